"""One rollout phase of RL: the responses of π_old, and how they are split into updates.

π_old, A and the target stay fixed for all minibatches and epochs of the phase: refreshing them multiplies the advantage
into the policy once more, and doing so after every batch compounds noise. A minibatch is split into micro-batches once;
each is scored in the very shape in which it is trained on, so that h_θ = h_old, and with it r = A/β, holds to the last
bit at the first update.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lco_lite.context import Context
from lco_lite.data.prompts import Prompt
from lco_lite.errors import DataError
from lco_lite.feedback.advantages import live_groups
from lco_lite.feedback.rewards import Rater, rule_rewards
from lco_lite.models.chat import ChatFormat
from lco_lite.models.language_model import Role
from lco_lite.objectives.policy_gradient import ValueHead
from lco_lite.recipe import Rl
from lco_lite.rollout.engine import Engine, Response, Sampling, in_order, open_engine
from lco_lite.rollout.lockstep import mixture
from lco_lite.sequences import Example, derive, endless, micro_batches, seeded
from lco_lite.tasks.base import Task


@dataclass(frozen=True)
class Actors:
    """Who takes part. ``reward_model`` is φ_DPO or another φ, ``reference`` φ_ref; None where the feedback needs none.
    ``critic`` is PPO's."""

    policy: Role
    start: Role
    reward_model: Role | None
    reference: Role | None
    critic: ValueHead | None = None


@dataclass
class Phase:
    """Responses in the order of their prompts, G in a row to each.

    ``chosen`` are the prompts' places among all, ``limit`` the longest response there could be, in tokens. ``grades``
    [N] of ±1 where a task can tell; ``rewards`` [N] where the feedback is one number a response. ``shown`` [N]: the
    response is a demonstration, not the policy's own. ``drawn`` counts the responses that were sampled for the phase,
    those of dropped groups too.
    """

    chosen: list[int]
    limit: int
    responses: list[Response]
    grades: Tensor | None = None
    rewards: Tensor | None = None
    shown: list[bool] = field(default_factory=list)
    drawn: int = 0

    def __post_init__(self) -> None:
        self.shown = self.shown or [False] * len(self.responses)
        self.drawn = self.drawn or self.shown.count(False)

    @property
    def examples(self) -> list[Example]:
        return [r.example for r in self.responses]

    def to_json(self) -> dict[str, Any]:
        """For a checkpoint inside the phase."""
        return {
            "chosen": self.chosen,
            "limit": self.limit,
            "responses": [[r.example.prompt, r.example.response, r.truncated] for r in self.responses],
            "grades": None if self.grades is None else self.grades.tolist(),
            "rewards": None if self.rewards is None else self.rewards.tolist(),
            "shown": self.shown,
            "drawn": self.drawn,
        }

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Phase:
        responses = [Response(Example(prompt, ids), cut) for prompt, ids, cut in data["responses"]]
        grades, rewards = (None if data[k] is None else torch.tensor(data[k]) for k in ("grades", "rewards"))
        return cls(data["chosen"], data["limit"], responses, grades, rewards, data["shown"], data["drawn"])


def plan_minibatches(examples: Sequence[Example], rl: Rl, seed: int, step: int) -> list[list[list[int]]]:
    """Response indices: minibatches of micro-batches. Every response is in exactly one."""
    generator = torch.Generator().manual_seed(derive(seed, "minibatches", step))
    order = torch.randperm(len(examples), generator=generator).tolist()
    minibatches = [order[i : i + rl.minibatch] for i in range(0, len(order), rl.minibatch)]
    return [
        [
            [chosen[k] for k in group]
            for group in micro_batches([len(examples[i]) for i in chosen], rl.micro_batch_tokens)
        ]
        for chosen in minibatches
    ]


def order_of_updates(n_minibatches: int, rl: Rl, seed: int, step: int) -> list[int]:
    """Which minibatch each update of the phase takes: every one once an inner epoch, in a new order."""
    generator = torch.Generator().manual_seed(derive(seed, "order", step))
    return [i for _ in range(rl.inner_epochs) for i in torch.randperm(n_minibatches, generator=generator).tolist()]


def with_signal(phase: Phase, group: int) -> Phase:
    """Only the groups whose rewards differ (DAPO's dynamic sampling); all of them where none does."""
    assert phase.rewards is not None, "the recipe makes sure"
    live = live_groups(phase.rewards, group).nonzero().flatten().tolist()
    return _groups(phase, live or list(range(len(phase.chosen))), group)


def first_prompts(phase: Phase, n: int, group: int) -> Phase:
    return _groups(phase, list(range(min(n, len(phase.chosen)))), group)


def joined(a: Phase, b: Phase) -> Phase:
    def both(x: Tensor | None, y: Tensor | None) -> Tensor | None:
        return None if x is None or y is None else torch.cat([x, y])

    return Phase(
        a.chosen + b.chosen,
        a.limit,
        a.responses + b.responses,
        both(a.grades, b.grades),
        both(a.rewards, b.rewards),
        a.shown + b.shown,
        a.drawn + b.drawn,
    )


def _groups(phase: Phase, places: list[int], group: int) -> Phase:
    members = [i * group + k for i in places for k in range(group)]
    return Phase(
        [phase.chosen[i] for i in places],
        phase.limit,
        [phase.responses[i] for i in members],
        None if phase.grades is None else phase.grades[members],
        None if phase.rewards is None else phase.rewards[members],
        [phase.shown[i] for i in members],
        phase.drawn,
    )


DYNAMIC_ROUNDS = 3  # how often a step samples again for groups without signal; the rest of the phase is smaller


@dataclass
class Rollouts:
    """Where a step's responses come from. ``rate`` gives rewards where the feedback is one number a response."""

    ctx: Context
    engine: Engine
    chat: ChatFormat
    task: Task | None
    prompts: Sequence[Prompt]
    sampling: Sampling
    rate: Rater | None

    def phase(self, step: int, on_batch: Callable[[], None]) -> Phase:
        """The step's responses, of the policy as it is now. With dynamic sampling groups without signal make room for
        those of other prompts. ``on_batch`` is called between batches, and may raise."""
        rl = self.ctx.recipe.rl
        phase = self._sample(step, 0, on_batch)
        for again in range(1, DYNAMIC_ROUNDS + 1) if rl.dynamic_sampling else ():
            phase = with_signal(phase, rl.responses_per_prompt)
            if len(phase.chosen) >= rl.prompts_per_step:
                break
            phase = joined(phase, self._sample(step, again, on_batch))
        return first_prompts(phase, rl.prompts_per_step, rl.responses_per_prompt)

    def _sample(self, step: int, again: int, on_batch: Callable[[], None]) -> Phase:
        """Responses to the step's prompts; ``again`` counts how often the step has sampled before."""
        recipe, n = self.ctx.recipe, self.ctx.recipe.rl.prompts_per_step
        order = derive(recipe.seed, "prompts", again) if again else recipe.seed
        chosen = endless(len(self.prompts), order, step * n, n)
        prompts = [self.prompts[i] for i in chosen for _ in range(recipe.rl.responses_per_prompt)]
        shown = self._shown(step, len(prompts))
        responses = [self._demonstration(p) if s else None for p, s in zip(prompts, shown, strict=True)]
        asked = [self.chat.prompt(p.messages) for p, r in zip(prompts, responses, strict=True) if r is None]
        with seeded(recipe.seed, "rollout", step, *([again] if again else [])):
            sampled = iter(self._generate(asked, on_batch) if asked else [])
        phase = Phase(chosen, self.sampling.max_new_tokens, [r or next(sampled) for r in responses], shown=shown)
        texts = [self.chat.text(r.example.response) for r in phase.responses]
        with self.ctx.clock("score"):
            phase.grades = self._grade(prompts, texts)
            phase.rewards = (
                None
                if self.rate is None
                else self.rate([p.messages for p in prompts], [p.row for p in prompts], texts, phase.grades)
            )
        return phase

    def _generate(self, asked: list[list[int]], on_batch: Callable[[], None]) -> list[Response]:
        with self.ctx.clock("rollout"), self.ctx.console.progress(len(asked), "rollout") as line:
            made = []
            for places, responses in self.engine.generate(asked, self.sampling):
                made.append((places, responses))
                line.update(sum(len(p) for p, _ in made))
                on_batch()
            return in_order(made)

    def _shown(self, step: int, n: int) -> list[bool]:
        """Which responses are demonstrations: GKD's off-policy share."""
        share = self.ctx.recipe.rl.on_policy
        generator = torch.Generator().manual_seed(derive(self.ctx.recipe.seed, "on_policy", step))
        return (torch.rand(n, generator=generator) >= share).tolist()

    def _demonstration(self, prompt: Prompt) -> Response:
        if prompt.item is None or not prompt.item.demonstration:
            raise DataError(
                f"rl.on_policy: {self.ctx.recipe.rl.on_policy:g} asks for demonstrations of the other prompts, and "
                f"{prompt.messages[-1]['content']!r:.80} has none; set rl.on_policy: 1"
            )
        return Response(self.chat.example(prompt.messages, prompt.item.demonstration), False)

    def _grade(self, prompts: Sequence[Prompt], texts: Sequence[str]) -> Tensor | None:
        """[N] of +1 right and -1 wrong; None where no task grades them."""
        items = [p.item for p in prompts if p.item is not None]
        if self.task is None or not self.task.graded or len(items) < len(prompts):
            return None
        return rule_rewards([self.task.grade(t, item).right for t, item in zip(texts, items, strict=True)])


def engine_of(actors: Actors, teacher_mix: float, end: int) -> Engine:
    """The policy alone, or in step with its teacher (MiniLLM); over the tokens that whoever scores them has too."""
    policy, teacher = actors.policy, actors.reward_model
    if not teacher_mix:
        return open_engine([policy], end, rows=None if teacher is None else teacher.model.head.rows)
    assert teacher is not None, "distillation has a teacher"
    return open_engine([policy, teacher], end, mixture(teacher_mix))
