"""LCO-MSE (eq 8) without logits: an exact quadratic form in hidden states, O(d²) a token and no product with V.

Legend: C tokens, V vocabulary, d hidden width (of two heads side by side: d + d_r), w_b row b of the head(s), w̄ their
mean, Σ = 1/V Σ_b (w_b − w̄)(w_b − w̄)ᵀ their covariance, centred before it is squared so that nothing cancels.

With r_b = w_b·u + (w_b − w̄)·v, where u is the drift of the policy and v the centred advantage,

    mean over V of r²  =  (w̄·u)² + (u+v)ᵀ Σ (u+v),        ∂/∂u = 2 (w̄·u) w̄ + 2 Σ (u+v).

Two heads of different width are one head whose rows stand side by side, [W | W_r], and whose input is [u ; v].
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from lco_lite.objectives.head import Head, row_blocks, wide


@dataclass(frozen=True, eq=False)
class Gram:
    """Second moments over V of the rows of one head, or of several side by side."""

    covariance: Tensor  # Σ [d, d]
    heads: tuple[Head, ...]  # kept alive, so that their ids name them


def gram(head: Head, *others: Head) -> Gram:
    """The moments of ``head`` (and ``others`` beside it, over the same rows), computed once and kept on ``head``."""
    heads = (head, *others)
    key = ("gram", *((id(h), h.weight._version) for h in heads))
    return head.remember(key, lambda: Gram(_covariance(heads), heads))


def _covariance(heads: tuple[Head, ...]) -> Tensor:
    """Σ [Σd, Σd] in fp32 or fp64, in blocks of rows."""
    dtype = wide(*(h.weight for h in heads))
    mean = torch.cat([h.mean_row.to(dtype) for h in heads])
    total = mean.new_zeros(len(mean), len(mean))
    for blocks in zip(*(row_blocks(h.vocabulary, dtype) for h in heads), strict=True):
        rows = torch.cat([block for _, block in blocks], dim=-1) - mean
        total += rows.T @ rows
    return total / heads[0].rows
