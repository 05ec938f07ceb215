"""From a phase's responses to what its updates need: for LCO a target, for the rest log-probabilities and advantages.

Legend: T response tokens of a micro-batch, N responses of the phase, d hidden width.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from lco_lite.feedback import advantages as adv
from lco_lite.feedback.dpo import dpo_shift, sampled_advantages
from lco_lite.models.roles import Role
from lco_lite.objectives.head import Head
from lco_lite.objectives.logprobs import token_logprobs
from lco_lite.objectives.targets import DenseTarget, SparseTarget
from lco_lite.recipe import Rl
from lco_lite.sequences import Batch, collate
from lco_lite.stages.phase import Actors, Phase


@dataclass(frozen=True)
class Scored:
    """A micro-batch as π_old saw it, kept on the CPU until its turn. All per token, [T].

    ``old`` [T, d] is h_old; ``advantages`` those of the sampled tokens. LCO has a ``target``, the policy gradients
    ``old_logprobs``, and PPO the critic's ``values`` and their ``returns``.
    """

    batch: Batch
    old: Tensor
    advantages: Tensor
    target: DenseTarget | SparseTarget | None = None
    old_logprobs: Tensor | None = None
    values: Tensor | None = None
    returns: Tensor | None = None

    def to(self, device: torch.device | str) -> Scored:
        present = {f.name: value for f in fields(self) if (value := getattr(self, f.name)) is not None}
        return Scored(**{name: value.to(device) for name, value in present.items()})


@torch.no_grad()
def score(actors: Actors, phase: Phase, plan: list[list[list[int]]], rl: Rl) -> list[list[Scored]]:
    """Every micro-batch of the phase, scored by the policy as it is now: before the phase's first update."""
    flat = [group for minibatch in plan for group in minibatch]
    batches = [collate([phase.examples[i] for i in group], actors.policy.model.pad_id) for group in flat]
    frozen = actors.policy.model.head.frozen() if actors.policy.model.head.is_trained else None
    if rl.is_dense:
        scored = [_dense(actors, batch, rl, frozen) for batch in batches]
    else:
        owners = [torch.tensor(group)[batch.rows] for group, batch in zip(flat, batches, strict=True)]
        scored = _sampled(actors, phase, batches, owners, rl)
        if rl.is_lco:
            scored = [_with_sparse_target(actors, s, rl, frozen) for s in scored]
    rest = iter(s.to("cpu") for s in scored)
    return [[next(rest) for _ in minibatch] for minibatch in plan]


def _dense(actors: Actors, batch: Batch, rl: Rl, frozen: Head | None) -> Scored:
    """eq 13, or eq 12 where there is no reference: the shift of hidden states is the advantage over the vocabulary."""
    assert actors.reward_model is not None, "dense feedback comes from a model"
    old, shift = actors.policy.hidden(batch), actors.reward_model.hidden(batch)
    if actors.reference is not None:
        shift = dpo_shift(shift, actors.reference.hidden(batch))
    head = actors.reward_model.model.head
    target = DenseTarget(old, shift, rl.beta, shift_head=head, **_base(actors, batch, rl, frozen))
    return Scored(batch, old, sampled_advantages(shift, head, batch.actions), target)


def _sampled(actors: Actors, phase: Phase, batches: list[Batch], owners: list[Tensor], rl: Rl) -> list[Scored]:
    """Rewards of responses or of their tokens; baselines and whitening look at the whole phase. ``owners``: [T] each,
    the response of the phase that a token belongs to."""
    scored, rewards, kl = [], [], []
    for batch in batches:
        old = actors.policy.hidden(batch)
        old_logprobs = token_logprobs(old, actors.policy.model.head, batch.actions.to(old.device))[0]
        values = None if actors.critic is None else actors.critic(old)
        scored.append(Scored(batch, old, old_logprobs, None, old_logprobs, values))
        rewards.append(_token_rewards(actors, batch) if rl.feedback == "dpo_sampled" else torch.zeros(len(batch.rows)))
        kl.append((old_logprobs - _logprobs(actors.start, batch)).cpu() if rl.kl_coef else torch.zeros(len(batch.rows)))
    owner = torch.cat(owners)
    per_token = torch.cat(rewards) - rl.kl_coef * torch.cat(kl)
    lengths = [len(s.batch.rows) for s in scored]
    if actors.critic is not None:
        values = torch.cat([s.values.cpu() for s in scored if s.values is not None])
        advantages, returns = _critic_advantages(phase, per_token, values, owner, rl)
        parts = zip(scored, advantages.split(lengths), returns.split(lengths), strict=True)
        return [replace(s, advantages=a, returns=r) for s, a, r in parts]
    pairs = zip(scored, _advantages(phase, per_token, owner, rl).split(lengths), strict=True)
    return [replace(s, advantages=a) for s, a in pairs]


def _advantages(phase: Phase, per_token: Tensor, owner: Tensor, rl: Rl) -> Tensor:
    """[T of the phase]: a token's own where the feedback has one a token and compares no group, else its response's."""
    if rl.feedback == "dpo_sampled" and rl.baseline in ("none", "batch"):
        return per_token - per_token.mean() if rl.baseline == "batch" else per_token
    rewards = _response_rewards(phase, per_token, owner, rl)
    advantages = adv.subtract_baseline(rewards, rl.baseline, rl.responses_per_prompt)
    if rl.scale_rewards:
        advantages = adv.divide_by_group_std(advantages, rewards, rl.responses_per_prompt)
    return advantages[owner]


def _critic_advantages(phase: Phase, per_token: Tensor, values: Tensor, owner: Tensor, rl: Rl) -> tuple[Tensor, Tensor]:
    """(GAE, whitened over the phase; returns): a response's reward arrives with its last token."""
    if rl.feedback == "rule":
        per_token = per_token + adv.at_last_token(_phase_rewards(phase, rl), owner)
    advantages = adv.gae(per_token, values, owner, rl.gamma, rl.gae_lambda)
    return adv.whiten(advantages), advantages + values


def _response_rewards(phase: Phase, per_token: Tensor, owner: Tensor, rl: Rl) -> Tensor:
    """[N]: the sum over a response's tokens, and the rule's reward."""
    summed = torch.zeros(len(phase.responses)).index_add(0, owner, per_token)
    return summed + _phase_rewards(phase, rl) if rl.feedback == "rule" else summed


def _phase_rewards(phase: Phase, rl: Rl) -> Tensor:
    """[N] of the rule, less DAPO's penalty for responses that come near the limit."""
    assert phase.rewards is not None, "the recipe makes sure of a task"
    if not rl.overlong_buffer:
        return phase.rewards
    lengths = torch.tensor([float(len(r.example.response)) for r in phase.responses])
    return phase.rewards + adv.overlong_penalty(lengths, phase.limit, rl.overlong_buffer * phase.limit)


def _with_sparse_target(actors: Actors, s: Scored, rl: Rl, frozen: Head | None) -> Scored:
    """LCO with the advantage of the sampled token alone (eq 11)."""
    device, base = s.old.device, _base(actors, s.batch, rl, frozen)
    target = SparseTarget(s.old, s.batch.actions.to(device), s.advantages.to(device), rl.beta, **base)
    return replace(s, target=target)


def _token_rewards(actors: Actors, batch: Batch) -> Tensor:
    """log φ_DPO(a) - log φ_ref(a) at the sampled tokens, [T]."""
    assert actors.reward_model is not None and actors.reference is not None
    return (_logprobs(actors.reward_model, batch) - _logprobs(actors.reference, batch)).cpu()


def _logprobs(role: Role, batch: Batch) -> Tensor:
    return token_logprobs(role.hidden(batch), role.model.head, batch.actions.to(role.model.device))[0]


def _base(actors: Actors, batch: Batch, rl: Rl, frozen: Head | None) -> dict[str, Any]:
    """What the target starts from besides h_old: the anchor, and ``frozen``, a copy of a head that is trained."""
    given: dict[str, Any] = {"old_head": frozen, "anchor": rl.anchor}
    if rl.anchor:
        given["reference"] = actors.start.hidden(batch)
        given["reference_head"] = None if frozen is None else actors.start.model.head
    return given
