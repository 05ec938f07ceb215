"""Rewards of whole responses, or of their tokens, to advantages: baselines, scaling, generalised advantage estimation.

Legend: N responses, in groups of G to a prompt, one after the other; T tokens, ``response`` [T] of each its
response's number, in order; V tokens of the vocabulary, d_r hidden of the reward model.
"""

import math

import torch
from torch import Tensor

from lco_lite.objectives.chunks import spans
from lco_lite.objectives.head import BIAS_COLUMNS, Head, wide

GROUP_STD_EPS = 1e-4  # TRL 1.16, GRPO


def subtract_baseline(rewards: Tensor, baseline: str, group: int) -> Tensor:
    """[N] -> [N]. ``none``; ``batch``: minus the mean of all; ``group``: minus the mean of its G;
    ``leave_one_out``: minus the mean of the other G - 1 (RLOO). Equal rewards give exactly 0: a mean is rounded, and
    AdamW makes a whole step of what is left."""
    if baseline == "none":
        return rewards
    if baseline == "batch":
        return (rewards - rewards.mean()) * live_groups(rewards, len(rewards))
    grouped, live = rewards.view(-1, group), live_groups(rewards, group)[:, None]
    if baseline == "group":
        return ((grouped - grouped.mean(1, keepdim=True)) * live).flatten()
    if baseline == "leave_one_out":
        others = (grouped.sum(1, keepdim=True) - grouped) / (group - 1)
        return ((grouped - others) * live).flatten()
    raise ValueError(f"baseline is none, batch, group or leave_one_out, got {baseline!r}")


def fill_inapplicable(rewards: Tensor, baseline: str, group: int) -> Tensor:
    """[N] -> [N]: nan, where a reward does not apply, becomes what its baseline takes off: the mean of those of its G
    that have one, of a group without any and for ``batch`` that of all, 0 where nothing is taken off."""
    all_of_them = _mean_of_known(rewards.view(1, -1)).nan_to_num(0.0)
    means = (torch.zeros_like(all_of_them) if baseline == "none" else all_of_them).flatten().expand_as(rewards)
    if baseline in ("group", "leave_one_out"):
        of_group = _mean_of_known(rewards.view(-1, group)).expand(-1, group).flatten()
        means = torch.where(of_group.isnan(), means, of_group)
    return torch.where(rewards.isnan(), means, rewards)


def _mean_of_known(rows: Tensor) -> Tensor:
    """[n, G] -> [n, 1]: no further than the known ones, so that of equal ones it is exactly theirs; nan of none."""
    low, high = rows.nan_to_num(nan=math.inf).amin(1, True), rows.nan_to_num(nan=-math.inf).amax(1, True)
    return rows.nanmean(1, keepdim=True).clamp(low, high)


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


def gae(rewards: Tensor, values: Tensor, response: Tensor, gamma: float, lam: float) -> Tensor:
    """Generalised advantage estimation (Schulman et al. 2016, eq 16) within each response, [T] -> [T].

    δ_t = r_t + γ V_{t+1} - V_t, A_t = δ_t + γλ A_{t+1}; past the last token of a response V and A are 0.
    """
    r, v, of = rewards.tolist(), values.tolist(), response.tolist()  # floats: far quicker in a loop than tensors
    advantages = [0.0] * len(r)
    for t in reversed(range(len(r))):
        inside = t + 1 < len(r) and of[t + 1] == of[t]
        next_value, following = (v[t + 1], advantages[t + 1]) if inside else (0.0, 0.0)
        advantages[t] = r[t] + gamma * next_value - v[t] + gamma * lam * following
    return rewards.new_tensor(advantages)


def mean_reward_to_go(rewards: Tensor, response: Tensor) -> Tensor:
    """[T] -> [T]: the mean reward of the tokens that follow in the same response, 0 for its last (MiniLLM's
    length-normalised return)."""
    lengths = response.new_zeros(int(response.max()) + 1).index_add(0, response, torch.ones_like(response))
    total, last = rewards.double().cumsum(0), lengths.cumsum(0) - 1
    left = last[response] - torch.arange(len(response), device=response.device)
    return ((total[last][response] - total) / left.clamp_min(1)).to(rewards.dtype)


def at_last_token(rewards: Tensor, response: Tensor) -> Tensor:
    """Rewards [B] of whole responses -> [T]: each at the last of its tokens, 0 elsewhere."""
    last = torch.ones_like(response, dtype=torch.bool)
    last[:-1] = response[1:] != response[:-1]
    return torch.where(last, rewards[response], torch.zeros((), dtype=rewards.dtype))


def overlong_penalty(lengths: Tensor, limit: int, buffer: float) -> Tensor:
    """DAPO's soft overlong punishment (eq 13), [N] -> [N]: 0 up to ``limit - buffer`` tokens, -1 at ``limit``."""
    return -((lengths - (limit - buffer)) / buffer).clamp(0, 1)


def dpo_shift(h_dpo: Tensor, h_ref: Tensor) -> Tensor:
    """[T, d_r], [T, d_r] -> [T, d_r]: the difference, formed in at least fp32 and rounded once to the inputs' type."""
    precise = torch.promote_types(h_dpo.dtype, torch.float32)
    return (h_dpo.to(precise) - h_ref.to(precise)).to(h_dpo.dtype)


def log_phi_shift(hidden: Tensor, head: Head) -> tuple[Tensor, Head, Tensor | None]:
    """log φ itself (eq 12) as a difference of hidden states, from none: (shift [T, ≥ d_r], the head that it goes
    through, and where that is soft-capped the base of the shift). Nothing cancels a bias: it is a part of the shift."""
    if head.bias is not None:
        more = hidden.new_zeros(len(hidden), BIAS_COLUMNS)
        more[:, 0] = 1
        hidden, head = torch.cat([hidden, more], dim=-1), head.with_bias_as_column()
    return hidden, head, None if head.softcap is None else torch.zeros_like(hidden)


def sampled_advantages(shift: Tensor, head: Head, actions: Tensor, base: Tensor | None = None) -> Tensor:
    """A(a_t), centred over the vocabulary, of the sampled ``actions`` [T] -> [T]: (W_a - w̄)·shift. For the metrics.

    Through a soft-capped head it is a difference of logits, which needs the ``base`` of the shift [T, d_r], h_ref."""
    if head.softcap is None or base is None:
        sampled = head.vocabulary[actions.to(head.weight.device)].to(shift.dtype)  # [T, d_r]
        return head.scale * ((sampled - head.mean_row.to(shift.dtype)) * shift).sum(-1)
    actions, base = actions.to(shift.device), base.to(wide(shift, head.weight))
    parts = []
    for part in spans(len(shift), None, head.rows, shift.device):
        advantages = head.logits(base[part] + shift[part]) - head.logits(base[part])  # [part, V]
        parts.append(advantages.gather(-1, actions[part].unsqueeze(-1)).squeeze(-1) - advantages.mean(-1))
    return torch.cat(parts)
