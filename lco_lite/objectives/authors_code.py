"""What the authors' public code does otherwise than the paper, as a plug-in like a user's: two functions, made by
``target_hook`` and ``loss_hook`` from the recipe's rl.variant.

    target hook   f(target, head, batch) -> target         once a micro-batch, when a phase is scored
    loss hook     f(hidden, head, target, batch) -> loss   and diagnostics; for every micro-batch

docs/methods.md has the options. With ``top_k`` only π_old's likeliest tokens take part, or with a sparse advantage the
sampled one. A dense A is divided by its deviation over them (kld), or brought to mean 0 as well (mse, lch).
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from torch import Tensor

from lco_lite.objectives.chunks import Gradients, Values, joined, spans
from lco_lite.objectives.head import Head, wide
from lco_lite.objectives.lco import AnyTarget, lco_loss
from lco_lite.objectives.logprobs import entropy_and_logprob, gradient_values, token_logprobs
from lco_lite.objectives.policy_gradient import PolicyBatch
from lco_lite.objectives.targets import DenseTarget, SparseTarget, inverse_root

AGREED_BETA = 100.0


@dataclass(frozen=True)
class TopKTarget:
    """``indices`` [T, k] token ids; π_old's ``logits`` there and A/β as ``step``, [T, k] each."""

    indices: Tensor
    logits: Tensor
    step: Tensor

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: Tensor | slice) -> Self:
        return replace(self, **{name: tensor[index] for name, tensor in vars(self).items()})

    def to(self, device: torch.device | str) -> Self:
        return replace(self, **{name: tensor.to(device) for name, tensor in vars(self).items()})


def target_hook(rl: Any) -> Callable[[AnyTarget, Head, PolicyBatch], AnyTarget | TopKTarget]:
    variant = rl.variant

    @torch.no_grad()
    def change(target: AnyTarget, head: Head, batch: PolicyBatch) -> AnyTarget | TopKTarget:
        if isinstance(target, SparseTarget):
            if variant.negative_beta is not None:
                a = target.advantages
                target = replace(target, advantages=torch.where(a > 0, a, a / variant.negative_beta))
            if not variant.top_k:
                return target
            indices = target.actions.unsqueeze(-1)
            step = target.advantages.unsqueeze(-1) / target.beta
            return TopKTarget(indices, logits_at(indices, target.old, head), step)
        if variant.agreement is not None:
            assert batch.actions is not None, "agreement is about the sampled tokens"
            pairs = (target.old, head), (target.shift, target.through(head))
            logprobs = (token_logprobs(hidden, own, batch.actions.to(hidden.device))[0] for hidden, own in pairs)
            agreed = (torch.minimum(*logprobs) > variant.agreement).unsqueeze(-1)
            target = replace(target, shift=torch.where(agreed, target.shift / AGREED_BETA, target.shift))
        return likeliest(rl.objective, target, head, variant.top_k) if variant.top_k else target

    return change


def likeliest(objective: str, target: DenseTarget, head: Head, k: int) -> TopKTarget:
    """The k likeliest tokens of π_old, and the advantages there."""
    old, reward = target.old, target.through(head)
    head = head.prefix(min(head.rows, reward.rows))
    tops = [head.logits(old[part]).topk(k, dim=-1) for part in spans(len(old), None, head.rows, old.device)]
    indices, logits = torch.cat([top.indices for top in tops]), torch.cat([top.values for top in tops])
    if reward.softcap is None or target.shift_base is None:
        advantages = logits_at(indices, target.shift, Head(reward.weight, scale=reward.scale))
    else:
        base = target.shift_base.to(wide(target.shift, reward.weight))
        advantages = logits_at(indices, base + target.shift, reward) - logits_at(indices, base, reward)
    centred = advantages - advantages.mean(-1, keepdim=True)
    spread = inverse_root(centred.square().sum(-1, keepdim=True) / max(k - 1, 1))
    return TopKTarget(indices, logits, (advantages if objective == "kld" else centred) * spread / target.beta)


def loss_hook(rl: Any) -> Callable[[Tensor, Head, AnyTarget | TopKTarget, PolicyBatch], tuple[Tensor, Values]]:
    """The loss is a mean over T tokens, its diagnostics are those of ``lco_loss``."""
    current = rl.variant.target == "current"

    def loss(hidden: Tensor, head: Head, target: AnyTarget | TopKTarget, batch: PolicyBatch) -> tuple[Tensor, Values]:
        actions = batch.actions
        if isinstance(target, TopKTarget):
            if rl.objective == "kld":
                return top_k_kld(hidden, head, target, actions)
            return top_k_regression(rl.objective, hidden, head, target, current, actions)
        if current:
            target = replace(target, old=hidden.detach())
        return lco_loss(rl.objective, hidden, head, target, rl.weighting, standardise=rl.standardise, actions=actions)

    return loss


def top_k_regression(
    objective: str, hidden: Tensor, head: Head, target: TopKTarget, current: bool, actions: Tensor | None
) -> tuple[Tensor, Values]:
    """Σ over the k tokens of r² or log cosh r, r = z* − z_θ; with ``current`` z* starts from z_θ, held fixed."""
    z = logits_at(target.indices, hidden, head)
    r = (z.detach() if current else target.logits) + target.step - z
    each = (r.square() if objective == "mse" else torch.logaddexp(r, -r) - torch.log(r.new_tensor(2.0))).sum(-1)
    slope = (2 * r if objective == "mse" else r.tanh()).detach()
    values = {"loss": each.detach(), "logit_grad_norm": slope.norm(dim=-1)}
    if actions is not None:
        with torch.no_grad():
            values["logprob"], seen = token_logprobs(hidden, head, actions)
        values["entropy"] = seen["entropy"]
        values["logit_grad_sampled"] = torch.where(target.indices == actions.unsqueeze(-1), slope, 0).sum(-1).abs()
    return each.mean(), values


def top_k_kld(hidden: Tensor, head: Head, target: TopKTarget, actions: Tensor | None) -> tuple[Tensor, Values]:
    """Σ π* (log π* − log π_θ), π* ∝ exp(z_old + A/β) over the k tokens alone; its gradient p − π* is over all of V."""
    log_target = (target.logits + target.step).log_softmax(-1)
    grads = Gradients(hidden, head, scale=1 / len(hidden))
    chunks = []
    with torch.no_grad():
        for part in spans(len(hidden), None, head.rows, hidden.device):
            logits, indices, log_t = head.logits(hidden[part]), target.indices[part], log_target[part]
            taken = None if actions is None else actions[part]
            log_p = logits.log_softmax(-1)
            p, t = log_p.exp(), log_t.exp()
            seen = {} if taken is None else entropy_and_logprob(log_p, p, taken)
            seen["loss"] = (t * (log_t - log_p.gather(-1, indices))).sum(-1)
            grad = p.scatter_add_(-1, indices, -t.to(p.dtype))
            chunks.append(seen | gradient_values(grad, taken))
            grads.add(part, grad.to(head.operand_dtype), logits)
    values = joined(chunks)
    return grads.attach(values["loss"].mean()), values


def logits_at(indices: Tensor, hidden: Tensor, head: Head) -> Tensor:
    """Logits of the tokens ``indices`` [T, k] alone, [T, k] in fp32 at least: no product with the whole head."""
    dtype = wide(hidden, head.weight)
    z = head.scale * torch.einsum("tkd,td->tk", head.vocabulary[indices].to(dtype), hidden.to(dtype))
    if head.bias is not None:
        z = z + head.scale * head.bias[indices]
    return z if head.softcap is None else head.softcap * torch.tanh(z / head.softcap)
