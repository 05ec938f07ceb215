"""LCO from hidden states: ``lco_loss``, and below it the formulas on a chunk of tokens.

Large tensors are [C, V], values and ``actions`` [C]. A formula is one kernel on a GPU: it overwrites its residual and
returns values per token and ∂loss/∂logits in ``dtype``; neither large nor small residuals lose digits.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from lco_lite.objectives.chunks import Gradients, Values, fused, joined, spans
from lco_lite.objectives.head import Head, row_covariance
from lco_lite.objectives.logprobs import entropy_and_logprob, gradient_values, policy_values, token_logprobs
from lco_lite.objectives.targets import DenseTarget, SparseTarget

OBJECTIVES = ("kld", "lch", "mse")
WEIGHTINGS = ("mean", "sum", "policy")
AnyTarget = DenseTarget | SparseTarget  # a MixedTarget is both
Curve = Callable[[Tensor], tuple[Tensor, Tensor]]


def lco_loss(
    objective: str,
    hidden: Tensor,
    head: Head,
    target: AnyTarget,
    weighting: str = "mean",
    chunk: int | None = None,
    standardise: bool = False,
    actions: Tensor | None = None,
) -> tuple[Tensor, Values]:
    """The loss, [], a mean over T tokens, in nats (kld) or (squared) logits, and its diagnostics.

    ``hidden`` [T, d]: final hidden states of the policy at the tokens that are trained on, and at no others. ``head``:
    the policy's. ``weighting`` over V: "mean" (the paper's), "sum" or "policy"; kld has none and ignores it.
    ``chunk``: tokens at a time, None for what memory allows. ``standardise``: divide a dense advantage by its
    deviation over V at each token; a mixed target's sparse one stays as it is. ``actions`` [T]: the sampled token ids.
    Gradients reach ``hidden``, and the weight and bias of a trained head.

    The diagnostics are detached, [T] each: ``loss``; ``logit_grad_norm``, the norm over V of the gradient of a token's
    loss with respect to its logits, and ``logit_grad_sampled``, its size at the action; ``entropy`` of π_θ and
    ``logprob`` = log π_θ(action). Without ``actions`` only those that cost no product with the head. ``kl_to_old`` =
    KL(π_θ ‖ π_old) comes with kld of a SparseTarget without anchor.

    Raises ValueError for unknown names, for sizes that do not fit, and for a target that lacks what the head needs.
    """
    if objective not in OBJECTIVES:
        raise ValueError(f"objective must be one of {', '.join(OBJECTIVES)}; got {objective!r}")
    if weighting not in WEIGHTINGS:
        raise ValueError(f"weighting must be one of {', '.join(WEIGHTINGS)}; got {weighting!r}")
    if hidden.dim() != 2 or not len(hidden):
        raise ValueError(f"hidden must be [T, d] with at least one token, got {list(hidden.shape)}")
    if len(target) != len(hidden):
        raise ValueError(f"hidden has {len(hidden)} tokens, the target {len(target)}")
    if standardise and not isinstance(target, DenseTarget):
        raise ValueError("standardise needs a dense target: at one action it would only erase the size of A")
    head, target = target.fit(head)
    rows = head.rows
    asked, dtype = actions, head.operand_dtype
    if actions is None and isinstance(target, SparseTarget):
        actions = target.actions
    linear = target.is_hidden(head)
    by_moments = objective == "mse" and weighting != "policy" and linear
    curve = lch if objective == "lch" else mse
    factor = 1 / rows if objective != "kld" and weighting == "mean" else 1.0  # kept out of half precision
    size = float(rows) if weighting == "sum" else 1.0
    grads = Gradients(hidden, head, scale=1 / len(hidden))
    chunks = []
    with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False):
        for part in spans(len(hidden), chunk, head.weight.shape[1] if by_moments else rows, hidden.device):
            h, goal, taken = hidden[part], target[part], None if actions is None else actions[part]
            if by_moments:
                values, grad = mse_by_moments(h, head, goal, standardise, size, taken)
                grads.put(part, grad, size * grads.scale)
            else:
                logits = head.logits(h) if objective == "kld" or not linear else None
                if objective == "kld" and not isinstance(goal, DenseTarget):
                    r = goal.gap(h, head, logits)
                    values, grad = fused(sparse_kld, logits, r, goal.actions, goal.tilt(r), taken, dtype)
                else:
                    r, mean = goal.residual(h, head, logits, standardise)
                    if objective == "kld":
                        values, grad = fused(kld, logits, r, taken, dtype)
                    elif weighting == "policy":
                        values, grad = fused(policy_weighted, curve, r, goal.old_logits(head), taken, dtype)
                    else:
                        values, grad = fused(weighted, curve, r, mean, factor, taken, dtype)
                if logits is not None and objective != "kld":
                    values |= fused(policy_values, logits, taken)
                grads.add(part, grad, logits, factor)
                del r, logits
            del grad  # before the next chunk needs the room
            chunks.append(values)
        diagnostics = joined(chunks)
        if target.anchor:
            diagnostics.pop("kl_to_old", None)  # it is the divergence from the anchored base
        if asked is not None and "entropy" not in diagnostics:
            diagnostics["logprob"], seen = token_logprobs(hidden, head, asked, chunk)
            diagnostics["entropy"] = seen["entropy"]
    return grads.attach(diagnostics["loss"].mean()), diagnostics


def kld(logits: Tensor, residual: Tensor, actions: Tensor | None, dtype: torch.dtype) -> tuple[Values, Tensor]:
    """KL(π* ‖ π_θ) with π* ∝ π_θ e^r (eq 10)."""
    log_p = torch.log_softmax(logits, dim=-1)
    log_target = torch.log_softmax(residual.add_(log_p), dim=-1)
    return divergence(log_p, log_target, residual, actions, dtype)


def sparse_kld(
    logits: Tensor, gap: Tensor, sampled: Tensor, tilt: Tensor, actions: Tensor | None, dtype: torch.dtype
) -> tuple[Values, Tensor]:
    """KL(π* ‖ π_θ) where π* is π_base ∝ π_θ e^gap with the ``sampled`` action made e^tilt times as likely, tilt = A/β.

    Z*/Z_base = Σ_{b≠a} π_base(b) + π_base(a) e^tilt, so one softmax gives both distributions. The others are summed
    themselves: 1 − π_base(a) has no digits left near π_base(a) = 1, and with tilt ≪ 0 it is all that counts.
    """
    log_p = torch.log_softmax(logits, dim=-1)
    log_base = torch.log_softmax(gap.add_(log_p), dim=-1)
    p, index = log_p.exp(), sampled.unsqueeze(-1)
    kl_to_base = torch.sub(log_p, log_base, out=gap).mul_(p).sum(-1)
    tilted = log_base.gather(-1, index) + tilt
    top = log_base.scatter_(-1, index, -torch.inf).amax(-1, keepdim=True)
    log_others = torch.sub(log_base, top, out=gap).exp_().sum(-1, keepdim=True).log_().add_(top)
    log_z = torch.logaddexp(log_others, tilted)
    log_target = log_base.sub_(log_z).scatter_(-1, index, tilted - log_z)
    values, grad = divergence(log_p, log_target, gap, actions, dtype, p)
    return values | {"kl_to_old": kl_to_base}, grad


def divergence(
    log_p: Tensor,
    log_t: Tensor,
    scratch: Tensor,
    actions: Tensor | None,
    dtype: torch.dtype,
    p: Tensor | None = None,
) -> tuple[Values, Tensor]:
    """KL(t ‖ p) and its gradient p − t (eq 47). Overwrites ``log_t``, ``scratch`` and ``p``, if it is given."""
    p = log_p.exp() if p is None else p
    values = entropy_and_logprob(log_p, p, actions, scratch)
    t = torch.exp(log_t, out=scratch)
    grad = p.sub_(t)
    # the sum of the gradient is 0: adding it takes the rounding of both normalisers out of the loss, to first order
    loss = t.mul_(log_t.sub_(log_p)).sum(-1) + grad.sum(-1)
    return {"loss": loss} | values | gradient_values(grad, actions), grad.to(dtype)


def mse(x: Tensor) -> tuple[Tensor, Tensor]:
    """x² (eq 8) and its slope 2x. Overwrites ``x``."""
    return x.square(), x.mul_(2)


def lch(x: Tensor) -> tuple[Tensor, Tensor]:
    """log cosh x (eq 9) = |x| + log1p(e/2) and its slope tanh x, with e = expm1(−2|x|). Overwrites ``x``."""
    size = x.abs()
    e = (-2 * size).expm1_()
    slope = torch.copysign((e + 2).reciprocal_().mul_(e), x, out=x)  # tanh |x| = −e / (2 + e)
    return e.mul_(0.5).log1p_().add_(size), slope


def weighted(
    curve: Curve, residual: Tensor, mean: Tensor, factor: float, actions: Tensor | None, dtype: torch.dtype
) -> tuple[Values, Tensor]:
    """factor · Σ f(r − mean), ``mean`` [C, 1] that of A/β; the gradient is short of the factor."""
    value, slope = curve(residual.sub_(mean))
    values = {"loss": value.sum(-1), **gradient_values(slope, actions)}
    return {name: factor * x for name, x in values.items()}, slope.neg_().to(dtype)


def policy_weighted(
    curve: Curve, residual: Tensor, old_logits: Tensor, actions: Tensor | None, dtype: torch.dtype
) -> tuple[Values, Tensor]:
    """Σ q f(r − r̄), q = π_old, r̄ = Σ q r; the gradient goes through r̄ too."""
    q = torch.softmax(old_logits, dim=-1)
    value, slope = curve(residual.sub_((q * residual).sum(-1, keepdim=True)))
    loss = (q * value).sum(-1)
    grad = slope.sub_((q * slope).sum(-1, keepdim=True)).mul_(q).neg_()
    return {"loss": loss, **gradient_values(grad, actions)}, grad.to(dtype)


def mse_by_moments(
    hidden: Tensor, head: Head, target: AnyTarget, standardise: bool, factor: float, actions: Tensor | None
) -> tuple[Values, Tensor]:
    """factor · mean over V of r², and its gradient with respect to ``hidden`` [C, d], short of the factor.

    The mean of (W·w)² is (w̄·u)² + w·Σ·w, w = u + v (docs/hidden-space.md); a sparse x = A/β adds a rank-one term.
    """
    u = head.scale * target.drift(hidden, head)
    mean_row, n = head.mean_row.to(u.dtype), head.rows
    heads: tuple[Head, ...] = (head,)
    w, mean = u, u @ mean_row
    sparse = target if isinstance(target, SparseTarget) else None
    if isinstance(target, DenseTarget):
        through = target.through(head)
        v = through.scale * target.step(head, standardise).to(u.dtype)
        w, heads = (u + v, heads) if through is head else (torch.cat([u, v], dim=-1), (head, through))
    slope = w @ row_covariance(*heads).to(u.dtype)
    loss = mean.square() + (w * slope).sum(-1)
    if sparse is not None:
        x, rows = sparse.tilt(u), centred_rows(heads, sparse.actions, u.dtype)
        loss += (x * (2 * (w * rows).sum(-1, keepdim=True) + x * (1 - 1 / n)) / n).squeeze(-1)
        slope += rows * (x / n)
    grad = slope[:, : u.shape[1]] + torch.outer(mean, mean_row)
    values = {"loss": loss, "logit_grad_norm": 2 * (loss.clamp_min(0) / n).sqrt()}
    if actions is not None:  # r at the action, from one row of each head
        sampled = mean + (w * centred_rows(heads, actions, u.dtype)).sum(-1)
        if sparse is not None:
            sampled += x.squeeze(-1) * ((sparse.actions == actions).to(x.dtype) - 1 / n)
        values["logit_grad_sampled"] = 2 / n * sampled.abs()
    return {name: factor * value for name, value in values.items()}, grad.mul_(-2 * head.scale)


def centred_rows(heads: tuple[Head, ...], actions: Tensor, dtype: torch.dtype) -> Tensor:
    """w_a − w̄ of each token's action, [C, Σd], the heads side by side."""
    return torch.cat([h.vocabulary[actions].to(dtype) - h.mean_row.to(dtype) for h in heads], dim=-1)
