"""The paper's equations on plain logits: what "correct" means here, and the oracle of the tests. Nothing else uses it.

Legend: V vocabulary; leading dimensions ``...`` are tokens. z_θ are the policy's logits, z* the target's.
Log-partition constants play no part: a constant added to advantages or logits changes no target distribution.
"""

import torch
from torch import Tensor


def optimal_logits(old_logits: Tensor, advantages: Tensor, beta: float) -> Tensor:
    """z* = z_old + A/β (eq 7), A centred per token over V (section 4.4; the best constant is −mean A). [..., V]."""
    return old_logits + (advantages - advantages.mean(-1, keepdim=True)) / beta


def kld(logits: Tensor, target_logits: Tensor) -> Tensor:
    """KL(π* ‖ π_θ) over the whole vocabulary (eq 10), in nats. [..., V] -> [...]."""
    log_policy = torch.log_softmax(logits, dim=-1)
    log_target = torch.log_softmax(target_logits, dim=-1)
    return (log_target.exp() * (log_target - log_policy)).sum(-1)


def mse(logits: Tensor, target_logits: Tensor, weighting: str = "mean", old_logits: Tensor | None = None) -> Tensor:
    """Squared distance between the logits (eq 8: ``weighting`` "mean" over V). [..., V] -> [...]."""
    return _weighted(torch.square, target_logits - logits, weighting, old_logits)


def lch(logits: Tensor, target_logits: Tensor, weighting: str = "mean", old_logits: Tensor | None = None) -> Tensor:
    """log cosh of the distance between the logits (eq 9: ``weighting`` "mean" over V). [..., V] -> [...]."""
    return _weighted(log_cosh, target_logits - logits, weighting, old_logits)


def jsd(logits: Tensor, teacher_logits: Tensor, beta: float) -> Tensor:
    """Generalised Jensen-Shannon divergence of GKD (Agarwal et al. 2024, eq 1), in nats. [..., V] -> [...].

    β KL(φ ‖ m) + (1−β) KL(p ‖ m) with m = βφ + (1−β)p; KL(φ ‖ p) at β = 0 and KL(p ‖ φ) at β = 1, as in TRL.
    """
    log_p, log_t = torch.log_softmax(logits, dim=-1), torch.log_softmax(teacher_logits, dim=-1)
    if beta in (0, 1):
        a, b = (log_t, log_p) if beta == 0 else (log_p, log_t)
        return (a.exp() * (a - b)).sum(-1)
    p, t = log_p.exp(), log_t.exp()
    log_m = (beta * t + (1 - beta) * p).log()
    return beta * (t * (log_t - log_m)).sum(-1) + (1 - beta) * (p * (log_p - log_m)).sum(-1)


def log_cosh(x: Tensor) -> Tensor:
    """log cosh x, element by element, without overflow."""
    return torch.logaddexp(x, -x) - torch.log(torch.full_like(x, 2.0))


def sparse_advantages(actions: Tensor, advantages: Tensor, vocabulary: int) -> Tensor:
    """A at the sampled action, 0 elsewhere (eq 11). [...] -> [..., V]."""
    dense = advantages.new_zeros(*advantages.shape, vocabulary)
    return dense.scatter(-1, actions.unsqueeze(-1), advantages.unsqueeze(-1))


def importance(old_logprobs: Tensor, sampler_logprobs: Tensor, kind: str, low: float, high: float) -> Tensor:
    """π_old/π_sampler of a sample: ``truncate``, at most ``high`` (Yao et al. 2025); ``mask``, 0 outside of ``low`` to
    ``high`` (IcePop, Ling team 2025). [...] -> [...]."""
    weight = torch.exp(old_logprobs - sampler_logprobs)
    if kind == "truncate":
        return torch.minimum(weight, torch.full_like(weight, high))
    return torch.where((low <= weight) & (weight <= high), weight, torch.zeros_like(weight))


def _weighted(f, residual: Tensor, weighting: str, old_logits: Tensor | None) -> Tensor:  # type: ignore[no-untyped-def]
    """Reduce f over V: "mean" and "sum" of f(r), or "policy": E_{π_old}[f(r − E_{π_old} r)], free of constants."""
    if weighting == "mean":
        return f(residual).mean(-1)
    if weighting == "sum":
        return f(residual).sum(-1)
    if weighting == "policy" and old_logits is not None:
        old = torch.softmax(old_logits, dim=-1)
        return (old * f(residual - (old * residual).sum(-1, keepdim=True))).sum(-1)
    raise ValueError(f"weighting must be mean, sum, or policy with old_logits; got {weighting!r}")
