"""One rollout phase of RL: the responses of π_old, how they are split into updates, and the target of each.

π_old, A and the target stay fixed for all minibatches and epochs of the phase: refreshing them multiplies the advantage
into the policy once more, and doing so after every batch compounds noise. A minibatch is split into micro-batches once;
each is scored in the very shape in which it is trained on, so that h_θ = h_old, and with it r = A/β, holds to the last
bit at the first update.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lco_lite.data.prepare import Prompt
from lco_lite.feedback.dpo import dpo_shift, sampled_advantages
from lco_lite.feedback.rule import subtract_baseline
from lco_lite.models.roles import Role
from lco_lite.objectives.targets import DenseTarget, SparseTarget
from lco_lite.recipe import Rl
from lco_lite.rollout.engine import Response
from lco_lite.seeding import derive
from lco_lite.sequences import Batch, Example, collate, micro_batches


@dataclass(frozen=True)
class Actors:
    """Who takes part. ``reward_model`` and ``reference`` are None for rule feedback."""

    policy: Role
    start: Role
    reward_model: Role | None
    reference: Role | None


@dataclass
class Phase:
    """Responses in the order of their prompts, G in a row to each; ``rewards`` [N] of ±1 where a task grades them."""

    prompts: list[Prompt]
    responses: list[Response]
    rewards: Tensor | None

    @property
    def examples(self) -> list[Example]:
        return [r.example for r in self.responses]

    def to_json(self) -> dict[str, Any]:
        """For a checkpoint inside the phase; the prompts are found again by the step."""
        return {
            "responses": [[r.example.prompt, r.example.response, r.truncated] for r in self.responses],
            "rewards": None if self.rewards is None else self.rewards.tolist(),
        }

    @classmethod
    def from_json(cls, prompts: list[Prompt], data: dict[str, Any]) -> Phase:
        responses = [Response(Example(prompt, ids), cut) for prompt, ids, cut in data["responses"]]
        return cls(prompts, responses, None if data["rewards"] is None else torch.tensor(data["rewards"]))


@dataclass(frozen=True)
class Scored:
    """A micro-batch, its target, and the advantages [T] of its sampled tokens. Kept on the CPU until its turn."""

    batch: Batch
    target: DenseTarget | SparseTarget
    advantages: Tensor


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


@torch.no_grad()
def score(actors: Actors, phase: Phase, plan: list[list[list[int]]], rl: Rl) -> list[list[Scored]]:
    """h_old and the target of every micro-batch, from the policy as it is now: before the phase's first update."""
    head = actors.policy.model.head
    old_head = head.frozen() if head.is_trained else None
    spread = None
    if rl.feedback == "rule":
        assert phase.rewards is not None, "the recipe makes sure of a task"
        spread = subtract_baseline(phase.rewards, rl.baseline, rl.responses_per_prompt)

    def score_group(group: list[int]) -> Scored:
        batch = collate([phase.responses[i].example for i in group], actors.policy.model.pad_id)
        anchor: dict[str, Any] = {"old_head": old_head, "anchor": rl.anchor}
        if rl.anchor:
            anchor["reference"] = actors.start.hidden(batch)
            anchor["reference_head"] = actors.start.model.head if old_head is not None else None
        old = actors.policy.hidden(batch)
        target: DenseTarget | SparseTarget
        if spread is not None:
            advantages = spread[torch.tensor(group)][batch.rows]
            target = SparseTarget(old, batch.actions.to(old.device), advantages.to(old.device), rl.beta, **anchor)
        else:
            assert actors.reward_model is not None and actors.reference is not None
            shift = dpo_shift(actors.reward_model.hidden(batch), actors.reference.hidden(batch))
            reward_head = actors.reward_model.model.head
            advantages = sampled_advantages(shift, reward_head, batch.actions)
            target = DenseTarget(old, shift, rl.beta, shift_head=reward_head, **anchor)
        return Scored(batch, target.to("cpu"), advantages.cpu())

    return [[score_group(group) for group in minibatch] for minibatch in plan]
