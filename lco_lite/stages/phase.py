"""One rollout phase of RL: the responses of π_old, and how they are split into updates.

π_old, A and the target stay fixed for all minibatches and epochs of the phase: refreshing them multiplies the advantage
into the policy once more, and doing so after every batch compounds noise. A minibatch is split into micro-batches once;
each is scored in the very shape in which it is trained on, so that h_θ = h_old, and with it r = A/β, holds to the last
bit at the first update.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lco_lite.feedback.advantages import live_groups
from lco_lite.models.roles import Role
from lco_lite.objectives.value import ValueHead
from lco_lite.recipe import Rl
from lco_lite.rollout.engine import Response
from lco_lite.seeding import derive
from lco_lite.sequences import Example, micro_batches


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
