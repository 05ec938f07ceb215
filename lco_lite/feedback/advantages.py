"""Rewards of whole responses, or of their tokens, to advantages: baselines, scaling, generalised advantage estimation.

Legend: N responses, in groups of G to a prompt, one after the other; T tokens, ``rows`` [T] the response of each.
"""

import torch
from torch import Tensor

from lco_lite.objectives.chunks import spans
from lco_lite.objectives.head import Head, wide

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
    r, v, row = rewards.tolist(), values.tolist(), rows.tolist()  # a loop over floats is far quicker than over tensors
    advantages = [0.0] * len(r)
    for t in range(len(r) - 1, -1, -1):
        inside = t + 1 < len(r) and row[t + 1] == row[t]
        next_value, following = (v[t + 1], advantages[t + 1]) if inside else (0.0, 0.0)
        advantages[t] = r[t] + gamma * next_value - v[t] + gamma * lam * following
    return rewards.new_tensor(advantages)


def mean_reward_to_go(rewards: Tensor, rows: Tensor) -> Tensor:
    """[T] -> [T]: the mean reward of the tokens that follow in the same response, 0 for its last (MiniLLM's
    length-normalised return)."""
    total, last = rewards.double().cumsum(0), rows.bincount().cumsum(0) - 1
    left = last[rows] - torch.arange(len(rows), device=rows.device)
    return ((total[last][rows] - total) / left.clamp_min(1)).to(rewards.dtype)


def at_last_token(rewards: Tensor, rows: Tensor) -> Tensor:
    """Rewards [B] of whole responses -> [T]: each at the last of its tokens, 0 elsewhere."""
    last = torch.ones_like(rows, dtype=torch.bool)
    last[:-1] = rows[1:] != rows[:-1]
    return torch.where(last, rewards[rows], torch.zeros((), dtype=rewards.dtype))


def overlong_penalty(lengths: Tensor, limit: int, buffer: float) -> Tensor:
    """DAPO's soft overlong punishment (eq 13), [N] -> [N]: 0 up to ``limit - buffer`` tokens, -1 at ``limit``."""
    return -((lengths - (limit - buffer)) / buffer).clamp(0, 1)


def dpo_shift(h_dpo: Tensor, h_ref: Tensor) -> Tensor:
    """[T, d_r], [T, d_r] -> [T, d_r]: the difference, formed in at least fp32 and rounded once to the inputs' type."""
    return (h_dpo.to(wide(h_dpo)) - h_ref.to(wide(h_dpo))).to(h_dpo.dtype)


def sampled_advantages(shift: Tensor, head: Head, actions: Tensor, base: Tensor | None = None) -> Tensor:
    """A(a_t), centred over the vocabulary, of the sampled ``actions`` [T] -> [T]: (W_a - w̄)·shift. For the metrics.

    Through a soft-capped head it is a difference of logits, which ``base`` [T, d_r], h_ref, is needed for."""
    if head.softcap is not None and base is not None:
        actions, base, sampled = actions.to(shift.device), base.to(wide(shift, head.weight)), []
        for part in spans(len(shift), None, head.rows, shift.device):
            a = head.logits(base[part] + shift[part]) - head.logits(base[part])
            sampled.append(a.gather(-1, actions[part].unsqueeze(-1)).squeeze(-1) - a.mean(-1))
        return torch.cat(sampled)
    rows = head.vocabulary[actions.to(head.weight.device)].to(shift.dtype)
    return head.scale * ((rows - head.mean_row.to(shift.dtype)) * shift).sum(-1)
