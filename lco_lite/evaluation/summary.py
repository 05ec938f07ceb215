"""Rows to numbers: pass@1, pass@k, maj@k, with their spread over seeds and their error over items."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

Row = Mapping[str, Any]


def accuracy(rows: Sequence[Row]) -> float:
    return sum(row["right"] for row in rows) / len(rows)


def pass_at(k: int, n: int, right: int) -> float:
    """The chance that one of ``k`` responses, drawn without return from ``n`` of which ``right`` are right, is right:
    1 - C(n - right, k) / C(n, k), unbiased for pass@k (Chen et al. 2021)."""
    return 1.0 - math.comb(n - right, k) / math.comb(n, k)


def majority_right(rows: Sequence[Row]) -> bool:
    """Whether the answer most responses give is right; of several, that seen first; no answer is no vote."""
    votes = Counter(row["extracted"] for row in rows if row["extracted"] is not None)
    if not votes:
        return False
    winner = votes.most_common(1)[0][0]  # counts that are equal stay in the order they were met
    return any(row["right"] for row in rows if row["extracted"] == winner)


def item_scores(rows: Sequence[Row], samples: int) -> dict[str, list[float]]:
    """Metric -> one value an item, in the order of the items; ``rows`` are one pass, an item's samples together."""
    groups = [rows[i : i + samples] for i in range(0, len(rows), samples)]
    right = [sum(bool(row["right"]) for row in group) for group in groups]
    scores = {"pass@1": [c / samples for c in right]}
    if samples > 1:
        powers = (2**i for i in range(1, samples.bit_length()))
        for k in [*(k for k in powers if k < samples), samples]:
            scores[f"pass@{k}"] = [pass_at(k, samples, c) for c in right]
        if all(row["extracted"] is not None for row in rows if row["right"]):  # else its grader takes no answer out
            scores[f"maj@{samples}"] = [float(majority_right(group)) for group in groups]
    return scores


def summarise(passes: Sequence[Sequence[Row]], n: int, samples: int = 1) -> dict[str, Any]:
    """Over ``n`` items, of which those without a row count as wrong. For every metric, mean over seeds; std: the sample
    deviation over seeds (None for one); stderr: over items, of their mean over seeds (None for one item)."""
    scores = [item_scores(rows, samples) for rows in passes]
    metrics = {}
    for name in [name for name in scores[0] if all(name in one for one in scores)]:
        values = [one[name] for one in scores]
        by_item = [statistics.fmean(value) for value in zip(*values, strict=True)]
        by_item += [0.0] * (n - len(by_item))
        metrics[name] = spread([sum(one) / n for one in values])
        metrics[name]["stderr"] = statistics.stdev(by_item) / math.sqrt(n) if n > 1 else None
    return main_first(metrics) | {
        "n": n,
        "seeds": len(passes),
        "samples": samples,
        "truncated": statistics.fmean(float(row["truncated"]) for rows in passes for row in rows),
    }


def summarise_own(found: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    """Of a task's own metrics, one mapping a pass: mean and sample deviation over passes; the first is the main one."""
    return main_first({name: spread([one[name] for one in found]) | {"stderr": None} for name in found[0]})


def spread(values: Sequence[float]) -> dict[str, float | None]:
    return {"mean": statistics.fmean(values), "std": statistics.stdev(values) if len(values) > 1 else None}


def main_first(metrics: dict[str, dict[str, float | None]]) -> dict[str, Any]:
    main = next(iter(metrics))
    return {"metric": main, **metrics[main], "metrics": metrics}
