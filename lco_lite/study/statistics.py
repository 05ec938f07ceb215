"""Over seeds: mean ± std, paired intervals, and what a curve of scores says."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import fmean, stdev
from typing import NamedTuple

from lco_lite.evaluation.compare import t_quantile, two_sided


class Interval(NamedTuple):
    """A mean difference over ``n`` pairs, its 95 % interval and two-sided p by the paired t-test."""

    mean: float
    low: float
    high: float
    p: float
    n: int

    def __str__(self) -> str:
        return f"{self.mean:+.3f} [{self.low:+.3f}, {self.high:+.3f}], p = {self.p:.4f}, n = {self.n}"


def paired(a: Mapping[int, float], b: Mapping[int, float]) -> Interval | None:
    """``a`` less ``b`` by seed, over the seeds that both have. None for fewer than two."""
    differences = [a[seed] - b[seed] for seed in sorted(a.keys() & b.keys())]
    n = len(differences)
    if n < 2:
        return None
    mean, error = fmean(differences), stdev(differences) / math.sqrt(n)
    if error < 1e-12:
        return Interval(mean, mean, mean, 0.0 if abs(mean) > 1e-12 else 1.0, n)
    half = t_quantile(n - 1) * error
    return Interval(mean, mean - half, mean + half, float(two_sided(mean / error, n - 1)), n)


def mean_std(values: Sequence[float], digits: int = 3) -> str:
    """``0.912 ± 0.019``; without spread for one; a dash for none."""
    if not values:
        return "–"
    spread = f" ± {stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{fmean(values):.{digits}f}{spread}"


def samples_to(score: float, samples: Sequence[float], scores: Sequence[float]) -> float | None:
    """Samples at which a curve first reaches ``score``, by straight lines between its points; None if it never does."""
    points = list(zip(samples, scores, strict=True))
    for i, (x, y) in enumerate(points):
        if y >= score:
            if i == 0:
                return x
            before_x, before_y = points[i - 1]
            return before_x + (x - before_x) * (score - before_y) / (y - before_y)
    return None
