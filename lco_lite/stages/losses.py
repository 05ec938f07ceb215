"""One micro-batch's part of a minibatch's loss, for each of the three kinds of objective.

A minibatch of ``tokens`` tokens in ``sequences`` responses may be trained in several micro-batches: their parts add up.
"""

from __future__ import annotations

from dataclasses import replace
from typing import cast

from torch import Tensor

from lco_lite.objectives.distillation import jsd_loss, minillm
from lco_lite.objectives.lco import lco_loss
from lco_lite.objectives.logprobs import token_logprobs
from lco_lite.objectives.policy_gradient import POLICY_GRADIENTS, Clip, Loss, PolicyBatch
from lco_lite.objectives.top_k import TopKTarget, top_k_loss
from lco_lite.objectives.value import value_loss
from lco_lite.recipe import Rl
from lco_lite.stages.phase import Actors
from lco_lite.stages.score import Scored
from lco_lite.user_code import load_function

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
    head, current = actors.policy.model.head, rl.variant.target == "current"
    assert s.target is not None
    if isinstance(s.target, TopKTarget):
        return top_k_loss(rl.objective, hidden, head, s.target, current)
    target = replace(s.target, old=hidden.detach()) if current else s.target
    return lco_loss(rl.objective, hidden, head, target, rl.weighting, standardise=rl.standardise)


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
