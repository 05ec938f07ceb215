"""The element-wise part of the losses, between two products with the head. One function, one kernel on a GPU.

Legend: C tokens of a chunk, V vocabulary; every large tensor is [C, V], every value [C], ``actions`` [C].
``residual`` is r = z* − z_θ and is overwritten. Each returns values per token and ∂loss/∂logits in ``dtype``, short of
the factor over V. log cosh and the divergences are written so that neither large nor small residuals lose digits.
"""

import math

import torch
from torch import Tensor

Values = dict[str, Tensor]


def kld(logits: Tensor, residual: Tensor, actions: Tensor | None, dtype: torch.dtype) -> tuple[Values, Tensor]:
    """KL(π* ‖ π_θ) with π* ∝ π_θ e^r (eq 10)."""
    log_p = torch.log_softmax(logits, dim=-1)
    log_target = torch.log_softmax(residual.add_(log_p), dim=-1)
    return _divergence(log_p, log_target, residual, actions, dtype)


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
    values, grad = _divergence(log_p, log_target, gap, actions, dtype)
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


def policy_values(logits: Tensor, actions: Tensor | None) -> Values:
    """Entropy of π_θ in nats, and log π_θ(action)."""
    log_p = torch.log_softmax(logits, dim=-1)
    return _with_logprob({"entropy": -(log_p.exp() * log_p).sum(-1)}, log_p, actions)


def logprob(logits: Tensor, actions: Tensor, dtype: torch.dtype) -> tuple[Values, Tensor]:
    """log π_θ(action), its gradient 1_a − p (eq 4), and the entropy."""
    log_p = torch.log_softmax(logits, dim=-1)
    p = log_p.exp()
    values = _with_logprob({"entropy": -(p * log_p).sum(-1)}, log_p, actions)
    grad = p.neg_()
    ones = torch.ones_like(actions, dtype=grad.dtype).unsqueeze(-1)
    return values, grad.scatter_add_(-1, actions.unsqueeze(-1), ones).to(dtype)


def jsd(logits: Tensor, teacher: Tensor, beta: float, weights: Tensor, dtype: torch.dtype) -> tuple[Values, Tensor]:
    """w (β KL(φ ‖ m) + (1−β) KL(p ‖ m)), m = βφ + (1−β)p, and its gradient w (1−β) p (g − Σ p g), g = log p − log m;
    at the ends KL(φ ‖ p) with p − φ, and KL(p ‖ φ) with p (g − Σ p g), g = log p − log φ. Overwrites ``teacher``."""
    log_p, log_t = torch.log_softmax(logits, dim=-1), torch.log_softmax(teacher, dim=-1)
    if beta == 0:
        values, grad = _divergence(log_p, log_t, teacher, None, log_p.dtype)
        loss = values["loss"]
    else:
        p = log_p.exp()
        if beta == 1:
            g, scale, loss = log_p - log_t, 1.0, torch.zeros_like(log_p[:, 0])
        else:
            log_m = torch.logaddexp(log_p + math.log1p(-beta), log_t + math.log(beta))
            g, scale, loss = log_p - log_m, 1 - beta, beta * (log_t.exp() * (log_t - log_m)).sum(-1)
        inner = (p * g).sum(-1, keepdim=True)
        loss = loss + scale * inner.squeeze(-1)
        grad = g.sub_(inner).mul_(p).mul_(scale)
    grad = grad.mul_(weights.unsqueeze(-1))
    return {"loss": weights * loss, "logit_grad_norm": torch.linalg.vector_norm(grad, dim=-1)}, grad.to(dtype)


def _divergence(
    log_p: Tensor, log_t: Tensor, scratch: Tensor, actions: Tensor | None, dtype: torch.dtype
) -> tuple[Values, Tensor]:
    """KL(t ‖ p) and its gradient p − t (eq 47). Overwrites ``log_t`` and ``scratch``."""
    p = log_p.exp()
    values = _with_logprob({"entropy": -torch.mul(p, log_p, out=scratch).sum(-1)}, log_p, actions)
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


def _with_logprob(values: Values, log_p: Tensor, actions: Tensor | None) -> Values:
    if actions is not None:
        values["logprob"] = log_p.gather(-1, actions.unsqueeze(-1)).squeeze(-1)
    return values
