"""The rollouts of one step: prompts to responses of π_old, their grades and rewards."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lco_lite.data.chat import ChatFormat
from lco_lite.data.prepare import Prompt
from lco_lite.errors import DataError
from lco_lite.feedback.responses import Rater
from lco_lite.feedback.rule import rule_rewards
from lco_lite.rollout.engine import Engine, Response, Sampling
from lco_lite.rollout.local import LocalEngine
from lco_lite.rollout.lockstep import LockstepEngine, mixture
from lco_lite.seeding import derive, seeded
from lco_lite.sequences import endless
from lco_lite.stages.context import Context
from lco_lite.stages.phase import Actors, Phase, first_prompts, joined, with_signal
from lco_lite.tasks.base import Task, grades

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
            phase.rewards = None if self.rate is None else self.rate(prompts, texts, phase.grades)
        return phase

    def _generate(self, asked: list[list[int]], on_batch: Callable[[], None]) -> list[Response]:
        with self.ctx.clock("rollout"), self.ctx.console.progress(len(asked), "rollout") as line:

            def between_batches(done: int) -> None:
                line.update(done)
                on_batch()

            return self.engine.generate(asked, self.sampling, between_batches)

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
        if self.task is None or not grades(self.task) or len(items) < len(prompts):
            return None
        return rule_rewards([self.task.grade(t, item).right for t, item in zip(texts, items, strict=True)])


def open_engine(actors: Actors, teacher_mix: float, end: int) -> Engine:
    """The policy alone, or in step with its teacher (MiniLLM); over the tokens that whoever scores them has too."""
    if not teacher_mix:
        return LocalEngine(
            actors.policy, end, None if actors.reward_model is None else actors.reward_model.model.head.rows
        )
    assert actors.reward_model is not None, "distillation has a teacher"
    return LockstepEngine([actors.policy, actors.reward_model], mixture(teacher_mix), end)
