"""Is B better than A, or was it luck? The paired bootstrap over items and seeds (Efron and Tibshirani 1993, ch. 16).

Both have answered the same items with the same seeds, so only their differences are drawn again: the items and, apart
from them, the seeds, with return, as often as there are. Legend: N items, S seeds, R resamples.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

RESAMPLES = 10_000
_CELLS = 2**22  # numbers drawn at once


@dataclass(frozen=True)
class Difference:
    """The mean difference, its 95 % interval (2.5 % and 97.5 % of the resamples), and its two-sided p-value."""

    mean: float
    low: float
    high: float
    p: float


def paired_bootstrap(differences: Tensor, seed: int = 0, resamples: int = RESAMPLES) -> Difference:
    """``differences`` [N, S]: B's score less A's. The same seed draws the same: B against A is the mirror image.

    p is the share of resamples at least as far from their own mean as that is from 0, the observed one counted in:
    1 where nothing differs, and never below 1 / (R + 1).
    """
    values = differences.double()
    mean = values.mean()
    drawn = _means(values, torch.Generator().manual_seed(seed), resamples)
    rounding = 1e-12
    extreme = int(((drawn - mean).abs() >= mean.abs() - rounding).sum())
    low, high = drawn.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return Difference(mean.item(), low, high, (1 + extreme) / (resamples + 1))


def _means(values: Tensor, generator: torch.Generator, resamples: int) -> Tensor:
    """[R]"""
    n, s = values.shape
    at_once = max(1, _CELLS // (n * s))
    parts = []
    for start in range(0, resamples, at_once):
        r = min(at_once, resamples - start)
        items = torch.randint(n, (r, n), generator=generator)
        seeds = torch.randint(s, (r, s), generator=generator)
        parts.append(values[items].mean(1).gather(1, seeds).mean(1))
    return torch.cat(parts)
