"""log π_θ(a) of sampled tokens from hidden states: what SFT, DPO and every policy gradient need of the policy.

Legend: T tokens, C tokens of a chunk, V vocabulary, d hidden width.

∂ log π(a)/∂h = W_a − Σ p W is found in the forward pass and kept, [T, d]; backward scales it by the upstream gradient.
A trained head needs Σ_t g_t (1_a − p_t) h_tᵀ as well, which waits for g: its logits are formed again in backward.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from lco_lite.objectives.chunks import Gradients, asks_gradient, fused, spans
from lco_lite.objectives.head import Head

Values = dict[str, Tensor]  # per token, [C] or [T]


def token_logprobs(hidden: Tensor, head: Head, actions: Tensor, chunk: int | None = None) -> tuple[Tensor, Tensor]:
    """log π_θ(action) and the entropy of π_θ, [T] each, in nats at temperature 1, in fp32 or wider.

    ``hidden`` [T, d]: final hidden states at the positions that predict ``actions`` [T], token ids below
    ``head.rows``. ``chunk``: tokens at a time, None for what memory allows. Log-probabilities are differentiable with
    respect to ``hidden`` and to the weight and bias of a trained head; the entropy is a diagnostic and detached.
    Without a gradient to compute (``torch.no_grad``) it costs one product with the head, otherwise two.

    Raises ValueError where sizes do not fit.
    """
    if hidden.dim() != 2 or actions.shape != hidden.shape[:1]:
        raise ValueError(f"hidden must be [T, d] and actions [T], got {list(hidden.shape)} and {list(actions.shape)}")
    inputs = (hidden, head.weight, head.bias)
    wanted = any(asks_gradient(x) for x in inputs)
    grads = Gradients(hidden, head, (wanted and not head.is_trained, False, False))
    chunks = []
    with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False):
        for part in spans(len(hidden), chunk, head.rows, hidden.device):
            logits = head.logits(hidden[part])
            if grads.wanted:
                values, grad = fused(logprob, logits, actions[part], head.operand_dtype)
                grads.add(head, part, hidden[part], grad, logits)
                del grad  # before the next chunk needs the room
            else:
                values = fused(policy_values, logits, actions[part])
            del logits
            chunks.append(values)
    logprobs, entropy = (torch.cat([values[name] for values in chunks]) for name in ("logprob", "entropy"))
    if wanted and head.is_trained:
        return _Recomputed.apply(logprobs, head, actions, chunk, *inputs), entropy
    return grads.attach(logprobs), entropy


class _Recomputed(torch.autograd.Function):
    """Log-probabilities whose logits are formed again in backward, a chunk at a time."""

    @staticmethod
    def forward(ctx: Any, logprobs: Tensor, head: Head, actions: Tensor, chunk: int | None, *inputs: Tensor) -> Tensor:
        ctx.save_for_backward(actions, *inputs)
        ctx.head, ctx.chunk, ctx.asks = head, chunk, ctx.needs_input_grad[4:]
        return logprobs.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        actions, hidden, weight, bias = ctx.saved_tensors
        head = replace(ctx.head, weight=weight, bias=bias)
        grads = Gradients(hidden, head, ctx.asks)
        with torch.autocast(hidden.device.type, enabled=False):
            for part in spans(len(hidden), ctx.chunk, head.rows, hidden.device):
                logits = head.logits(hidden[part])
                _, grad = fused(logprob, logits, actions[part], logits.dtype)
                grads.add(head, part, hidden[part], grad * upstream[part].unsqueeze(-1), logits)
        return None, None, None, None, *grads.cast()


ChosenRejected = tuple[Tensor, Tensor]  # log-probabilities of whole responses, each [N]


def dpo_loss(logprobs: ChosenRejected, reference: ChosenRejected, beta: float) -> tuple[Tensor, Tensor]:
    """Of N pairs under φ and φ_ref -> (loss [N], margin [N]): -log σ(margin), margin = r(chosen) - r(rejected)."""
    chosen, rejected = (ours - ref for ours, ref in zip(logprobs, reference, strict=True))
    margin = beta * (chosen - rejected)
    return -F.logsigmoid(margin), margin.detach()


def policy_values(logits: Tensor, actions: Tensor | None) -> Values:
    """Entropy of π_θ in nats, and log π_θ(action)."""
    log_p = torch.log_softmax(logits, dim=-1)
    return with_logprob({"entropy": -(log_p.exp() * log_p).sum(-1)}, log_p, actions)


def logprob(logits: Tensor, actions: Tensor, dtype: torch.dtype) -> tuple[Values, Tensor]:
    """log π_θ(action), its gradient 1_a − p (eq 4), and the entropy."""
    log_p = torch.log_softmax(logits, dim=-1)
    p = log_p.exp()
    values = with_logprob({"entropy": -(p * log_p).sum(-1)}, log_p, actions)
    grad = p.neg_()
    ones = torch.ones_like(actions, dtype=grad.dtype).unsqueeze(-1)
    return values, grad.scatter_add_(-1, actions.unsqueeze(-1), ones).to(dtype)


def with_logprob(values: Values, log_p: Tensor, actions: Tensor | None) -> Values:
    if actions is not None:
        values["logprob"] = log_p.gather(-1, actions.unsqueeze(-1)).squeeze(-1)
    return values
