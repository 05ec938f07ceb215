"""From a phase's responses to what its updates need: for LCO a target, for distillation what the teacher says, for
policy gradients log-probabilities and advantages.

Legend: T response tokens of a micro-batch, N responses of the phase, d hidden width.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any, cast

import torch
from torch import Tensor

from lco_lite.feedback import advantages as adv
from lco_lite.feedback.advantages import dpo_shift, sampled_advantages
from lco_lite.models.language_model import Role
from lco_lite.objectives.authors_code import TopKTarget, loss_hook, target_hook
from lco_lite.objectives.distillation import Teacher, jsd_loss, minillm, mixture_weights
from lco_lite.objectives.head import Head
from lco_lite.objectives.lco import lco_loss
from lco_lite.objectives.logprobs import token_logprobs
from lco_lite.objectives.policy_gradient import POLICY_GRADIENTS, Clip, Loss, PolicyBatch, value_loss
from lco_lite.objectives.targets import DenseTarget, SparseTarget
from lco_lite.recipe import Rl
from lco_lite.sequences import Batch, collate
from lco_lite.train.rollouts import Actors, Phase
from lco_lite.user_code import load_function


@dataclass(frozen=True)
class Scored:
    """A micro-batch as π_old saw it, kept on the CPU until its turn. All per token, [T].

    ``old`` [T, d] is h_old; ``advantages`` those of the sampled tokens. LCO has a ``target``, the policy gradients
    ``old_logprobs``, and PPO the critic's ``values`` and their ``returns``. Distillation has a ``teacher``, and MiniLLM
    the ``importance`` of tokens that π_old alone did not draw.
    """

    batch: Batch
    old: Tensor
    advantages: Tensor
    target: DenseTarget | SparseTarget | TopKTarget | None = None
    old_logprobs: Tensor | None = None
    values: Tensor | None = None
    returns: Tensor | None = None
    teacher: Teacher | None = None
    importance: Tensor | None = None

    def to(self, device: torch.device | str) -> Scored:
        present = {f.name: value for f in fields(self) if (value := getattr(self, f.name)) is not None}
        return Scored(**{name: value.to(device) for name, value in present.items()})


@torch.no_grad()
def score(actors: Actors, phase: Phase, plan: list[list[list[int]]], rl: Rl) -> list[list[Scored]]:
    """Every micro-batch of the phase, scored by the policy as it is now: before the phase's first update."""
    flat = [group for minibatch in plan for group in minibatch]
    batches = [collate([phase.examples[i] for i in group], actors.policy.model.pad_id) for group in flat]
    frozen = actors.policy.model.head.frozen() if actors.policy.model.head.is_trained else None
    if rl.is_distillation:
        scored = [_taught(actors, batch, rl) for batch in batches]
    elif rl.is_dense:
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
    before = None if actors.reference is None else actors.reference.hidden(batch)
    if before is not None:
        shift = dpo_shift(shift, before)
    head, policy_head = actors.reward_model.model.head, actors.policy.model.head
    base = None  # a soft cap asks where the shift begins
    if head.softcap is not None:
        base = torch.zeros_like(shift) if before is None else before
    advantages = sampled_advantages(shift, head, batch.actions, base)
    target = DenseTarget(old, shift, rl.beta, shift_head=head, shift_base=base, **_base(actors, batch, rl, frozen))
    return Scored(batch, old, advantages, target_hook(rl)(target, policy_head, _sampled_part(batch, advantages)))


def _taught(actors: Actors, batch: Batch, rl: Rl) -> Scored:
    """The teacher's hidden states; the advantage of a sampled token is what MiniLLM's policy gradient makes of it."""
    assert actors.reward_model is not None, "distillation has a teacher"
    teacher = Teacher(actors.reward_model.hidden(batch), actors.reward_model.model.head)
    old = actors.policy.hidden(batch)
    old_logprobs = token_logprobs(old, actors.policy.model.head, _actions(batch, old))[0]
    says = token_logprobs(teacher.hidden, teacher.head, _actions(batch, teacher.hidden))[0].to(old.device)
    returns = adv.mean_reward_to_go((says - old_logprobs).cpu(), batch.rows)
    weights = mixture_weights(old_logprobs, says, rl.teacher_mix)
    return Scored(batch, old, returns, old_logprobs=old_logprobs, teacher=teacher, importance=weights)


def _sampled(actors: Actors, phase: Phase, batches: list[Batch], owners: list[Tensor], rl: Rl) -> list[Scored]:
    """Rewards of responses or of their tokens; baselines and whitening look at the whole phase. ``owners``: [T] each,
    the response of the phase that a token belongs to."""
    scored, rewards, kl = [], [], []
    for batch in batches:
        old = actors.policy.hidden(batch)
        old_logprobs = token_logprobs(old, actors.policy.model.head, _actions(batch, old))[0]
        values = None if actors.critic is None else actors.critic(old)
        scored.append(Scored(batch, old, old_logprobs, None, old_logprobs, values))
        rewards.append(_token_rewards(actors, batch) if rl.feedback == "dpo_sampled" else torch.zeros(len(batch.rows)))
        kl.append((old_logprobs - _logprobs(actors.start, batch)).cpu() if rl.kl_coef else torch.zeros(len(batch.rows)))
    owner = torch.cat(owners)
    per_token = torch.cat(rewards) - rl.kl_coef * torch.cat(kl) + adv.at_last_token(_whole_rewards(phase, rl), owner)
    lengths = [len(s.batch.rows) for s in scored]
    if actors.critic is not None:
        values = torch.cat([s.values.cpu() for s in scored if s.values is not None])
        advantages = adv.gae(per_token, values, owner, rl.gamma, rl.gae_lambda)
        parts = zip(scored, adv.whiten(advantages).split(lengths), (advantages + values).split(lengths), strict=True)
        return [replace(s, advantages=a, returns=r) for s, a, r in parts]
    pairs = zip(scored, _advantages(phase, per_token, owner, rl).split(lengths), strict=True)
    return [replace(s, advantages=a) for s, a in pairs]


def _advantages(phase: Phase, per_token: Tensor, owner: Tensor, rl: Rl) -> Tensor:
    """[T of the phase]: a token's own where the feedback has one a token and compares no group, else its response's."""
    if rl.feedback == "dpo_sampled" and rl.baseline in ("none", "batch"):
        return per_token - per_token.mean() if rl.baseline == "batch" else per_token
    rewards = torch.zeros(len(phase.responses)).index_add(0, owner, per_token)
    advantages = adv.subtract_baseline(rewards, rl.baseline, rl.responses_per_prompt)
    if rl.scale_rewards:
        advantages = adv.divide_by_group_std(advantages, rewards, rl.responses_per_prompt)
    return advantages[owner]


def _whole_rewards(phase: Phase, rl: Rl) -> Tensor:
    """[N]: what the feedback gives a whole response, less DAPO's penalty for coming near the limit."""
    rewards = torch.zeros(len(phase.responses)) if phase.rewards is None else phase.rewards
    if not rl.overlong_buffer:
        return rewards
    lengths = torch.tensor([float(len(r.example.response)) for r in phase.responses])
    return rewards + adv.overlong_penalty(lengths, phase.limit, rl.overlong_buffer * phase.limit)


def _with_sparse_target(actors: Actors, s: Scored, rl: Rl, frozen: Head | None) -> Scored:
    """LCO with the advantage of the sampled token alone (eq 11)."""
    actions, advantages = _actions(s.batch, s.old), s.advantages.to(s.old.device)
    target = SparseTarget(s.old, actions, advantages, rl.beta, **_base(actors, s.batch, rl, frozen))
    changed = target_hook(rl)(target, actors.policy.model.head, _sampled_part(s.batch, advantages))
    return replace(s, target=changed)


def _sampled_part(batch: Batch, advantages: Tensor) -> PolicyBatch:
    """What a hook is given of a micro-batch."""
    sequences = int(batch.rows.max()) + 1
    return PolicyBatch(None, advantages, advantages, batch.rows, len(advantages), sequences, actions=batch.actions)


def _token_rewards(actors: Actors, batch: Batch) -> Tensor:
    """log φ_DPO(a) - log φ_ref(a) at the sampled tokens, [T]."""
    assert actors.reward_model is not None and actors.reference is not None
    return (_logprobs(actors.reward_model, batch) - _logprobs(actors.reference, batch)).cpu()


def _logprobs(role: Role, batch: Batch) -> Tensor:
    hidden = role.hidden(batch)
    return token_logprobs(hidden, role.model.head, _actions(batch, hidden))[0]


def _actions(batch: Batch, beside: Tensor) -> Tensor:
    return batch.actions.to(beside.device)


def _base(actors: Actors, batch: Batch, rl: Rl, frozen: Head | None) -> dict[str, Any]:
    """What the target starts from besides h_old: the anchor, and ``frozen``, a copy of a head that is trained."""
    given: dict[str, Any] = {"old_head": frozen, "anchor": rl.anchor}
    if rl.anchor:
        given["reference"] = actors.start.hidden(batch)
        given["reference_head"] = None if frozen is None else actors.start.model.head
    return given


Found = tuple[Tensor, dict[str, Tensor]]  # a loss, and diagnostics per token


def loss_part(actors: Actors, s: Scored, hidden: Tensor, tokens: int, sequences: int, rl: Rl) -> Found:
    """``hidden`` [T, d]: the policy's final hidden states at the micro-batch's response tokens."""
    if rl.is_lco:
        loss, found = lco(actors, s, hidden, rl)
    elif rl.objective == "gkd":
        assert s.teacher is not None
        loss, found = jsd_loss(hidden, actors.policy.model.head, s.teacher, rl.jsd_beta)
    else:
        batch = policy_batch(actors, s, hidden, tokens, sequences)
        return (taught if rl.objective == "minillm" else gradient)(actors, s, hidden, batch, rl)
    return loss * (len(hidden) / tokens), {"logit_grad_norm": found["logit_grad_norm"]}


def lco(actors: Actors, s: Scored, hidden: Tensor, rl: Rl) -> Found:
    """eqs 8 to 10, a mean over the micro-batch's tokens."""
    head = actors.policy.model.head
    assert s.target is not None
    if rl.variant.is_on or isinstance(s.target, TopKTarget):
        return loss_hook(rl)(hidden, head, s.target, _sampled_part(s.batch, s.advantages))
    return lco_loss(rl.objective, hidden, head, s.target, rl.weighting, standardise=rl.standardise)


def policy_batch(actors: Actors, s: Scored, hidden: Tensor, tokens: int, sequences: int) -> PolicyBatch:
    assert s.old_logprobs is not None
    logprobs, _ = token_logprobs(hidden, actors.policy.model.head, s.batch.actions)
    return PolicyBatch(logprobs, s.old_logprobs, s.advantages, s.batch.rows, tokens, sequences)


def taught(actors: Actors, s: Scored, hidden: Tensor, batch: PolicyBatch, rl: Rl) -> Found:
    """MiniLLM."""
    assert s.teacher is not None and s.importance is not None
    clip = Clip(rl.clip_low, rl.clip_high)
    loss, found = minillm(hidden, actors.policy.model.head, s.teacher, batch, s.importance, clip)
    return loss, {name: found[name] for name in ("logit_grad_norm", "clipped")}


def gradient(actors: Actors, s: Scored, hidden: Tensor, batch: PolicyBatch, rl: Rl) -> Found:
    """A policy gradient, and the critic's loss where there is one."""
    loss, found = objective(rl.objective)(batch, Clip(rl.clip_low, rl.clip_high))
    if actors.critic is not None:
        assert s.values is not None and s.returns is not None
        values = actors.critic(hidden)
        loss = loss + rl.value_coef * value_loss(values, s.values, s.returns, rl.value_clip, batch.tokens)
    return loss, found


def objective(name: str) -> Loss:
    """A policy gradient of ours by its name, or the user's by FILE.py:NAME."""
    return POLICY_GRADIENTS[name] if name in POLICY_GRADIENTS else cast(Loss, load_function(name))
