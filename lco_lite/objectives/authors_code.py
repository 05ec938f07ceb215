"""The public code's way of LCO, for comparison: only a few tokens of the vocabulary take part.

Legend: T tokens, k tokens of the vocabulary for each, V vocabulary, d and d_r hidden widths of policy and reward model.

kld   π* ∝ exp(z_old + A/β) over the k tokens alone, nothing elsewhere; the loss is Σ π* (log π* − log π_θ)
mse   Σ over the k tokens of r², r = z + A/β − z_θ, with z = z_old or the current z_θ held fixed
lch   the same with log cosh r

A dense advantage is divided by its deviation over the k tokens (kld) or brought to mean 0 and deviation 1 (mse, lch).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lco_lite.objectives.chunks import Gradients, asks_gradient, spans
from lco_lite.objectives.head import Head, wide
from lco_lite.objectives.targets import inverse_root


@dataclass(frozen=True)
class TopKTarget:
    """``indices`` [T, k] token ids; π_old's ``logits`` there and A/β as ``step``, [T, k] each."""

    indices: Tensor
    logits: Tensor
    step: Tensor

    def to(self, device: torch.device | str) -> TopKTarget:
        return TopKTarget(self.indices.to(device), self.logits.to(device), self.step.to(device))


@torch.no_grad()
def dense_top_k(
    objective: str, old: Tensor, head: Head, shift: Tensor, shift_head: Head, beta: float, k: int
) -> TopKTarget:
    """The k likeliest tokens of π_old, and the advantages there: ``old`` [T, d], ``shift`` [T, d_r] = h_dpo − h_ref."""
    rows = min(head.rows, shift_head.rows)
    head = head.prefix(rows)
    found = [head.logits(old[part]).topk(k, dim=-1) for part in spans(len(old), None, rows, old.device)]
    indices, logits = torch.cat([f.indices for f in found]), torch.cat([f.values for f in found])
    advantages = at(indices, shift, Head(shift_head.weight, scale=shift_head.scale))
    centred = advantages - advantages.mean(-1, keepdim=True)
    spread = inverse_root(centred.square().sum(-1, keepdim=True) / max(k - 1, 1))
    return TopKTarget(indices, logits, (advantages if objective == "kld" else centred) * spread / beta)


def sampled_token(old: Tensor, head: Head, actions: Tensor, advantages: Tensor, beta: float) -> TopKTarget:
    """The sampled token alone, k = 1, with its advantage [T] as it is."""
    indices = actions.unsqueeze(-1)
    return TopKTarget(indices, at(indices, old, head), advantages.unsqueeze(-1) / beta)


def top_k_loss(
    objective: str, hidden: Tensor, head: Head, target: TopKTarget, current: bool = False
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss, [], a mean over T tokens, differentiable in ``hidden`` [T, d]. ``current``: z is the current z_θ."""
    if objective == "kld":
        return _kld(hidden, head, target)
    z = at(target.indices, hidden, head)
    r = (z.detach() if current else target.logits) + target.step - z
    each = (r.square() if objective == "mse" else torch.logaddexp(r, -r) - torch.log(r.new_tensor(2.0))).sum(-1)
    slope = 2 * r if objective == "mse" else r.tanh()
    return each.mean(), {"loss": each.detach(), "logit_grad_norm": slope.detach().norm(dim=-1)}


def at(indices: Tensor, hidden: Tensor, head: Head) -> Tensor:
    """Logits of the tokens ``indices`` [T, k] alone, [T, k] in fp32 at least: no product with the whole head."""
    dtype = wide(hidden, head.weight)
    z = head.scale * torch.einsum("tkd,td->tk", head.vocabulary[indices].to(dtype), hidden.to(dtype))
    if head.bias is not None:
        z = z + head.scale * head.bias[indices]
    return z if head.softcap is None else head.softcap * torch.tanh(z / head.softcap)


def _kld(hidden: Tensor, head: Head, target: TopKTarget) -> tuple[Tensor, dict[str, Tensor]]:
    """Gradient p − π* over the whole vocabulary, a chunk at a time."""
    log_target = (target.logits + target.step).log_softmax(-1)
    grads = Gradients(hidden, head, (asks_gradient(hidden), False, False), scale=1 / len(hidden))
    losses, norms = [], []
    with torch.no_grad():
        for part in spans(len(hidden), None, head.rows, hidden.device):
            logits = head.logits(hidden[part])
            log_p = logits.log_softmax(-1)
            t = log_target[part].exp()
            losses.append((t * (log_target[part] - log_p.gather(-1, target.indices[part]))).sum(-1))
            grad = log_p.exp_().scatter_add_(-1, target.indices[part], -t.to(log_p.dtype))
            norms.append(grad.norm(dim=-1))
            grads.add(head, part, hidden[part], grad.to(head.operand_dtype), logits)
    each = torch.cat(losses)
    return grads.attach(each.mean()), {"loss": each, "logit_grad_norm": torch.cat(norms)}
