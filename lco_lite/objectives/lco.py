"""The element-wise part of the losses, between two products with the head. One function, one kernel on a GPU.

Legend: C tokens of a chunk, V vocabulary; every large tensor is [C, V], every value [C], ``actions`` [C].
``residual`` is r = z* − z_θ and is overwritten. Each returns values per token and ∂loss/∂logits in ``dtype``, short of
the factor over V. log cosh and the divergences are written so that neither large nor small residuals lose digits.
"""

import functools

import torch
from torch import Tensor

from lco_lite.objectives.chunks import Gradients, asks_gradient, fused, spans
from lco_lite.objectives.head import Head
from lco_lite.objectives.logprobs import Values, policy_values, with_logprob
from lco_lite.objectives.targets import DenseTarget, SparseTarget


def kld(logits: Tensor, residual: Tensor, actions: Tensor | None, dtype: torch.dtype) -> tuple[Values, Tensor]:
    """KL(π* ‖ π_θ) with π* ∝ π_θ e^r (eq 10)."""
    log_p = torch.log_softmax(logits, dim=-1)
    log_target = torch.log_softmax(residual.add_(log_p), dim=-1)
    return divergence(log_p, log_target, residual, actions, dtype)


def sparse_kld(
    logits: Tensor, gap: Tensor, sampled: Tensor, tilt: Tensor, actions: Tensor | None, dtype: torch.dtype
) -> tuple[Values, Tensor]:
    """KL(π* ‖ π_θ) where π* is π_base ∝ π_θ e^gap with the ``sampled`` action made e^tilt times as likely, tilt = A/β.

    log Z* = log Z_base + log(1 + π_base(a) (e^tilt − 1)), so one softmax gives both distributions.
    """
    log_p = torch.log_softmax(logits, dim=-1)
    log_base = torch.log_softmax(gap.add_(log_p), dim=-1)
    kl_to_base = torch.sub(log_p, log_base, out=gap).mul_(log_p.exp()).sum(-1)
    log_sampled = log_base.gather(-1, sampled.unsqueeze(-1))
    log_others = torch.log(-torch.expm1(log_sampled))
    log_target = log_base.sub_(torch.logaddexp(log_others, log_sampled + tilt))
    log_target = log_target.scatter_add_(-1, sampled.unsqueeze(-1), tilt)
    values, grad = divergence(log_p, log_target, gap, actions, dtype)
    return values | {"kl_to_old": kl_to_base}, grad


def summed(objective: str, residual: Tensor, mean: Tensor, factor: float, dtype: torch.dtype) -> tuple[Values, Tensor]:
    """factor · Σ f(r − mean) with f(x) = x² (mse, eq 8) or log cosh x (lch, eq 9); ``mean`` [C, 1] is that of A/β."""
    value, slope = _curve(objective, residual.sub_(mean))
    norm = torch.linalg.vector_norm(slope, dim=-1)
    return {"loss": factor * value.sum(-1), "logit_grad_norm": factor * norm}, slope.neg_().to(dtype)


def policy_weighted(objective: str, residual: Tensor, old_logits: Tensor, dtype: torch.dtype) -> tuple[Values, Tensor]:
    """Σ q f(r − r̄), q = π_old, r̄ = Σ q r; the gradient goes through r̄ too."""
    q = torch.softmax(old_logits, dim=-1)
    value, slope = _curve(objective, residual.sub_((q * residual).sum(-1, keepdim=True)))
    loss = (q * value).sum(-1)
    grad = slope.sub_((q * slope).sum(-1, keepdim=True)).mul_(q).neg_()
    return {"loss": loss, "logit_grad_norm": torch.linalg.vector_norm(grad, dim=-1)}, grad.to(dtype)


def divergence(
    log_p: Tensor, log_t: Tensor, scratch: Tensor, actions: Tensor | None, dtype: torch.dtype
) -> tuple[Values, Tensor]:
    """KL(t ‖ p) and its gradient p − t (eq 47). Overwrites ``log_t`` and ``scratch``."""
    p = log_p.exp()
    values = with_logprob({"entropy": -torch.mul(p, log_p, out=scratch).sum(-1)}, log_p, actions)
    t = torch.exp(log_t, out=scratch)
    grad = p.sub_(t)
    # the sum of the gradient is 0: adding it takes the rounding of both normalisers out of the loss, to first order
    values["loss"] = t.mul_(log_t.sub_(log_p)).sum(-1) + grad.sum(-1)
    values["logit_grad_norm"] = torch.linalg.vector_norm(grad, dim=-1)
    return values, grad.to(dtype)


def _curve(objective: str, x: Tensor) -> tuple[Tensor, Tensor]:
    """f(x), f′(x): x², 2x or log cosh x = |x| + log1p(e/2), tanh x, with e = expm1(−2|x|). May overwrite ``x``."""
    if objective == "mse":
        return x.square(), x.mul_(2)
    size = x.abs()
    e = (-2 * size).expm1_()
    slope = torch.copysign((e + 2).reciprocal_().mul_(e), x, out=x)  # tanh |x| = −e / (2 + e)
    return e.mul_(0.5).log1p_().add_(size), slope


OBJECTIVES = ("kld", "lch", "mse")
WEIGHTINGS = ("mean", "sum", "policy")
AnyTarget = DenseTarget | SparseTarget


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
    deviation over V at each token. ``actions`` [T]: token ids for ``logprob``; a sparse target knows its own.

    Gradients reach ``hidden``, and the weight and bias of a trained head. The diagnostics are detached, [T] each:
    ``loss`` and ``logit_grad_norm`` (norm of the gradient of a token's loss with respect to its logits) always;
    ``entropy`` of π_θ and ``logprob`` = log π_θ(action) where the policy's logits are formed anyway: kld, and every
    objective with a soft-capped or trained head; ``kl_to_old`` = KL(π_θ ‖ π_old) for kld with a sparse target and no
    anchor. None of them costs a product with the head.

    Raises ValueError for unknown names, for sizes that do not fit, and for a target that lacks what the head needs.
    """
    _check(objective, weighting, hidden, target, standardise)
    rows = target.common_rows(head)
    head, target = head.prefix(rows), target.restrict(rows)
    target.check_heads(head)
    if actions is None and isinstance(target, SparseTarget):
        actions = target.actions
    by_moments = objective == "mse" and weighting != "policy" and target.is_hidden(head)
    asks = (asks_gradient(hidden), asks_gradient(head.weight), asks_gradient(head.bias))
    grads = Gradients(hidden, head, asks, scale=1 / len(hidden))
    chunks = []
    with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False):
        for part in spans(len(hidden), chunk, head.weight.shape[1] if by_moments else rows, hidden.device):
            h, goal, taken = hidden[part], target[part], None if actions is None else actions[part]
            if by_moments:
                values, grad, factor = _moments(weighting, h, head, goal, standardise)
                grads.put(part, grad, factor * grads.scale)
            else:
                terms = _kld if objective == "kld" else functools.partial(_regression, objective, weighting)
                values, grad, factor, logits = terms(h, head, goal, taken, standardise)
                grads.add(head, part, h, grad, logits, factor)
                del logits
            del grad  # before the next chunk needs the room
            chunks.append(values)
        diagnostics = {name: torch.cat([values[name] for values in chunks]) for name in chunks[0]}
    return grads.attach(diagnostics["loss"].mean()), diagnostics


# values, ∂loss/∂logits short of a factor, that factor, z_θ where it was formed
Terms = tuple[Values, Tensor, float, Tensor | None]


def _kld(hidden: Tensor, head: Head, target: AnyTarget, actions: Tensor | None, standardise: bool) -> Terms:
    logits, dtype = head.logits(hidden), head.operand_dtype
    if isinstance(target, DenseTarget):
        residual, _ = target.residual(hidden, head, logits, standardise)
        return *fused(kld, logits, residual, actions, dtype), 1.0, logits
    gap, tilt = target.gap(hidden, head, logits), target.tilt(logits)
    values, grad = fused(sparse_kld, logits, gap, target.actions, tilt, actions, dtype)
    if target.anchor:
        del values["kl_to_old"]  # it is the divergence from the anchored base
    return values, grad, 1.0, logits


def _regression(
    objective: str,
    weighting: str,
    hidden: Tensor,
    head: Head,
    target: AnyTarget,
    actions: Tensor | None,
    standardise: bool,
) -> Terms:
    logits, dtype = None if target.is_hidden(head) else head.logits(hidden), head.operand_dtype
    residual, mean = target.residual(hidden, head, logits, standardise)
    if weighting == "policy":
        values, grad = fused(policy_weighted, objective, residual, target.old_logits(head), dtype)
        factor = 1.0
    else:
        factor = 1.0 if weighting == "sum" else 1 / head.rows  # kept out of half precision
        values, grad = fused(summed, objective, residual, mean, factor, dtype)
    if logits is not None:
        values |= fused(policy_values, logits, actions)
    return values, grad, factor, logits


def _moments(
    weighting: str, hidden: Tensor, head: Head, target: AnyTarget, standardise: bool
) -> tuple[Values, Tensor, float]:
    """LCO-MSE in closed form: values, ∂loss/∂hidden short of a factor, and the factor."""
    factor = float(head.rows) if weighting == "sum" else 1.0
    mean, grad = target.mean_square(hidden, head, standardise)
    norm = 2 * (mean.clamp_min(0) / head.rows).sqrt()
    return {"loss": factor * mean, "logit_grad_norm": factor * norm}, grad, factor


def _check(objective: str, weighting: str, hidden: Tensor, target: AnyTarget, standardise: bool) -> None:
    if objective not in OBJECTIVES:
        raise ValueError(f"objective must be one of {', '.join(OBJECTIVES)}; got {objective!r}")
    if weighting not in WEIGHTINGS:
        raise ValueError(f"weighting must be one of {', '.join(WEIGHTINGS)}; got {weighting!r}")
    if hidden.dim() != 2 or not len(hidden):
        raise ValueError(f"hidden must be [T, d] with at least one token, got {list(hidden.shape)}")
    if len(target) != len(hidden):
        raise ValueError(f"hidden has {len(hidden)} tokens, the target {len(target)}")
    if standardise and isinstance(target, SparseTarget):
        raise ValueError("standardise needs a dense target: at one action it would only erase the size of A")
