"""log π_θ(a) of sampled tokens from hidden states: what SFT, DPO and every policy gradient need of the policy.

A trained head needs Σ_t g_t (1_a − p_t) h_tᵀ, which waits for the upstream g: its logits are formed again in backward.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from lco_lite.objectives.chunks import Gradients, Values, asks_gradient, fused, joined, spans
from lco_lite.objectives.head import Head

ChosenRejected = tuple[Tensor, Tensor]  # log-probabilities of whole responses, each [N]


def token_logprobs(
    hidden: Tensor, head: Head, actions: Tensor, chunk: int | None = None, temperature: float = 1.0
) -> tuple[Tensor, Values]:
    """log π_θ(action), [T], of softmax(logits / ``temperature``), in nats, in fp32 or wider; and diagnostics, [T] each.

    ``hidden`` [T, d]: final hidden states at the positions that predict ``actions`` [T], token ids below
    ``head.rows``. Gradients reach ``hidden``, and the weight and bias of a trained head. ``chunk`` is as in
    ``lco_loss``. The diagnostics are detached: ``logit_grad_norm`` and ``logit_grad_sampled`` of log π_θ(action) in the
    logits, before they are divided: (1_a − π_θ) / temperature; ``entropy`` and ``logprob`` of the policy at temperature
    1, so that they compare with those of other losses. Raises ValueError where sizes do not fit.
    """
    if hidden.dim() != 2 or actions.shape != hidden.shape[:1]:
        raise ValueError(f"hidden must be [T, d] and actions [T], got {list(hidden.shape)} and {list(actions.shape)}")
    inputs = (hidden, head.weight, head.bias)
    wanted = any(asks_gradient(x) for x in inputs)
    grads = Gradients(hidden, head, asks=(wanted and not head.is_trained, False, False))
    chunks = []
    with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False):
        for part in spans(len(hidden), chunk, head.rows, hidden.device):
            logits = head.logits(hidden[part])
            values, grad = fused(logprob, logits, actions[part], temperature, head.operand_dtype)
            grads.add(part, grad, logits)
            del logits, grad  # before the next chunk needs the room
            chunks.append(values)
    values = joined(chunks)
    logprobs = values.pop("tempered")
    if wanted and head.is_trained:
        return _Recomputed.apply(logprobs, head, actions, chunk, temperature, *inputs), values
    return grads.attach(logprobs), values


@torch.no_grad()
def sampled_from(hidden: Tensor, head: Head, actions: Tensor, temperature: float, top_p: float) -> Tensor:
    """log-probabilities [T] with which a sampler of the policy draws ``actions``: at ``temperature``, within the
    nucleus of ``top_p``, whose mass is taken off. Without a gradient; otherwise as ``token_logprobs``."""
    parts = []
    with torch.autocast(hidden.device.type, enabled=False):
        for part in spans(len(hidden), None, 3 * head.rows, hidden.device):  # sorting takes values and places more
            log_p = torch.log_softmax(head.logits(hidden[part]) / temperature, dim=-1)
            drawn = log_p.gather(-1, actions[part].unsqueeze(-1)).squeeze(-1)
            if top_p < 1:
                p = log_p.exp_().sort(dim=-1, descending=True).values
                drawn = drawn - (p * (p.cumsum(-1) - p < top_p)).sum(-1).log()
            parts.append(drawn)
    return torch.cat(parts)


@torch.no_grad()
def kl_divergence(hidden: Tensor, old: Tensor, head: Head, old_head: Head | None = None) -> Tensor:
    """KL(π_θ ‖ π_old) of every token, [T], in nats, exact over the vocabulary and without a gradient, from final hidden
    states [T, d] of the two. ``old_head``: where π_old had another than ``head``."""
    old_head = old_head or head
    with torch.autocast(hidden.device.type, enabled=False):
        parts = spans(len(hidden), None, head.rows, hidden.device)
        return torch.cat([fused(_kl, head.logits(hidden[part]), old_head.logits(old[part])) for part in parts])


def _kl(logits: Tensor, old_logits: Tensor) -> Tensor:
    log_p, log_old = torch.log_softmax(logits, dim=-1), torch.log_softmax(old_logits, dim=-1)
    p = log_p.exp()
    # Σ (π_old − p) is 0: adding it takes the rounding of both normalisers out, to first order
    return log_old.exp().sub_(p).addcmul_(p, log_p.sub_(log_old)).sum(-1)


class _Recomputed(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logprobs: Tensor, head: Head, actions: Tensor, chunk: int | None, temperature: float, *inputs: Tensor
    ) -> Tensor:
        ctx.save_for_backward(actions, *inputs)
        ctx.head, ctx.chunk, ctx.temperature, ctx.asks = head, chunk, temperature, ctx.needs_input_grad[5:]
        return logprobs.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        actions, hidden, weight, bias = ctx.saved_tensors
        head = replace(ctx.head, weight=weight, bias=bias)
        grads = Gradients(hidden, head, asks=ctx.asks)
        with torch.autocast(hidden.device.type, enabled=False):
            for part in spans(len(hidden), ctx.chunk, head.rows, hidden.device):
                logits = head.logits(hidden[part])
                _, grad = fused(logprob, logits, actions[part], ctx.temperature, logits.dtype)
                grads.add(part, grad * upstream[part].unsqueeze(-1), logits)
        return None, None, None, None, None, *grads.all


def dpo_loss(logprobs: ChosenRejected, reference: ChosenRejected, beta: float) -> tuple[Tensor, Tensor]:
    """Of N pairs under φ and φ_ref -> (loss [N], margin [N]): -log σ(margin), margin = r(chosen) - r(rejected)."""
    chosen, rejected = (ours - ref for ours, ref in zip(logprobs, reference, strict=True))
    margin = beta * (chosen - rejected)
    return -F.logsigmoid(margin), margin.detach()


def logprob(logits: Tensor, actions: Tensor, temperature: float, dtype: torch.dtype) -> tuple[Values, Tensor]:
    """``tempered`` = log p(action), p = softmax(logits / T), its gradient (1_a − p) / T (eq 4); entropy at T = 1."""
    log_p = torch.log_softmax(logits, dim=-1)
    p = log_p.exp()
    values = entropy_and_logprob(log_p, p, actions)
    values["tempered"] = values["logprob"]
    if temperature != 1:
        log_p = torch.log_softmax(torch.div(logits, temperature, out=p), dim=-1)
        p = torch.exp(log_p, out=p)
        values["tempered"] = log_p.gather(-1, actions.unsqueeze(-1)).squeeze(-1)
    ones = torch.ones_like(actions, dtype=p.dtype).unsqueeze(-1)
    grad = p.neg_().scatter_add_(-1, actions.unsqueeze(-1), ones)
    if temperature != 1:
        grad.div_(temperature)
    return values | gradient_values(grad, actions), grad.to(dtype)


def policy_values(logits: Tensor, actions: Tensor | None) -> Values:
    log_p = torch.log_softmax(logits, dim=-1)
    return entropy_and_logprob(log_p, log_p.exp(), actions)


def entropy_and_logprob(log_p: Tensor, p: Tensor, actions: Tensor | None, scratch: Tensor | None = None) -> Values:
    """Entropy of π_θ in nats, and log π_θ(action). Overwrites ``scratch``."""
    values = {"entropy": -torch.mul(p, log_p, out=scratch).sum(-1)}
    return values if actions is None else values | {"logprob": log_p.gather(-1, actions.unsqueeze(-1)).squeeze(-1)}


def gradient_values(grad: Tensor, actions: Tensor | None) -> Values:
    """The norm of ∂loss/∂logits [C, V], and its size at the action."""
    values = {"logit_grad_norm": torch.linalg.vector_norm(grad, dim=-1)}
    if actions is not None:
        values["logit_grad_sampled"] = grad.gather(-1, actions.unsqueeze(-1)).squeeze(-1).abs()
    return values
