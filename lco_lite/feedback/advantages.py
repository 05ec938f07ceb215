"""Rewards of whole responses, or of their tokens, to advantages: baselines, scaling, generalised advantage estimation.

Legend: N responses, in groups of G to a prompt, one after the other; T tokens, ``rows`` [T] the response of each.
"""

from __future__ import annotations

import torch
from torch import Tensor

GROUP_STD_EPS = 1e-4  # TRL 1.16, GRPO


def subtract_baseline(rewards: Tensor, baseline: str, group: int) -> Tensor:
    """[N] -> [N]. ``none``; ``batch``: minus the mean of all; ``group``: minus the mean of its G;
    ``leave_one_out``: minus the mean of the other G - 1 (RLOO)."""
    if baseline == "none":
        return rewards
    if baseline == "batch":
        return rewards - rewards.mean()
    grouped = rewards.view(-1, group)
    if baseline == "group":
        return (grouped - grouped.mean(1, keepdim=True)).flatten()
    if baseline == "leave_one_out":
        others = (grouped.sum(1, keepdim=True) - grouped) / (group - 1)
        return (grouped - others).flatten()
    raise ValueError(f"baseline is none, batch, group or leave_one_out, got {baseline!r}")


def divide_by_group_std(advantages: Tensor, rewards: Tensor, group: int) -> Tensor:
    """[N] -> [N]: GRPO's scaling, by the sample deviation of the rewards of each G."""
    std = rewards.view(-1, group).std(1, keepdim=True)
    return (advantages.view(-1, group) / (std + GROUP_STD_EPS)).flatten()


def live_groups(rewards: Tensor, group: int) -> Tensor:
    """[N / G] of bool: groups whose rewards differ. The others have no signal where the baseline is the group's."""
    grouped = rewards.view(-1, group)
    return ~(grouped == grouped[:, :1]).all(1)


def whiten(values: Tensor) -> Tensor:
    """To mean 0 and standard deviation 1 over all tokens (PPO)."""
    return (values - values.mean()) / (values.std(correction=0) + 1e-8)


def gae(rewards: Tensor, values: Tensor, rows: Tensor, gamma: float, lam: float) -> Tensor:
    """Generalised advantage estimation (Schulman et al. 2016, eq 16) within each response, [T] -> [T].

    δ_t = r_t + γ V_{t+1} - V_t, A_t = δ_t + γλ A_{t+1}; past the last token of a response V and A are 0.
    """
    advantages = torch.zeros_like(rewards)
    following = torch.zeros((), dtype=rewards.dtype)
    next_value = torch.zeros((), dtype=rewards.dtype)
    for t in range(len(rewards) - 1, -1, -1):
        if t + 1 == len(rewards) or rows[t + 1] != rows[t]:
            following, next_value = torch.zeros_like(following), torch.zeros_like(next_value)
        following = rewards[t] + gamma * next_value - values[t] + gamma * lam * following
        next_value = values[t]
        advantages[t] = following
    return advantages


def mean_reward_to_go(rewards: Tensor, rows: Tensor) -> Tensor:
    """[T] -> [T]: the mean reward of the tokens that follow in the same response, 0 for its last (MiniLLM's
    length-normalised return)."""
    following = gae(rewards, torch.zeros_like(rewards), rows, 1.0, 1.0) - rewards
    left = gae(torch.ones_like(rewards), torch.zeros_like(rewards), rows, 1.0, 1.0) - 1
    return following / left.clamp_min(1)


def at_last_token(rewards: Tensor, rows: Tensor) -> Tensor:
    """Rewards [B] of whole responses -> [T]: each at the last of its tokens, 0 elsewhere."""
    last = torch.ones_like(rows, dtype=torch.bool)
    last[:-1] = rows[1:] != rows[:-1]
    return torch.where(last, rewards[rows], torch.zeros((), dtype=rewards.dtype))


def overlong_penalty(lengths: Tensor, limit: int, buffer: float) -> Tensor:
    """DAPO's soft overlong punishment (eq 13), [N] -> [N]: 0 up to ``limit - buffer`` tokens, -1 at ``limit``."""
    return -((lengths - (limit - buffer)) / buffer).clamp(0, 1)
