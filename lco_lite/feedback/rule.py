"""Rule feedback: +1 for a right response, -1 for a wrong one, given to its sampled tokens (paper, eq 11).

The task grades; this file owns no grader. Legend: N responses, in groups of G to a prompt.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def rule_rewards(right: Sequence[bool]) -> Tensor:
    """[N] of +1 and -1."""
    return torch.tensor([1.0 if r else -1.0 for r in right])


def subtract_baseline(rewards: Tensor, baseline: str, group: int) -> Tensor:
    """[N] -> [N] advantages: ``none``; ``batch``: minus the mean; ``group``: minus the mean of each G in a row."""
    if baseline == "none":
        return rewards
    if baseline == "batch":
        return rewards - rewards.mean()
    if baseline == "group":
        grouped = rewards.view(-1, group)
        return (grouped - grouped.mean(1, keepdim=True)).flatten()
    raise ValueError(f"baseline is none, batch or group, got {baseline!r}")


def dead_groups(rewards: Tensor, group: int) -> float:
    """Share of groups whose responses all have the same reward: no signal where the baseline is the group's mean."""
    grouped = rewards.view(-1, group)
    return (grouped == grouped[:, :1]).all(1).float().mean().item()
