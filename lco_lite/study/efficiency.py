"""Score against samples, and the gradient norm below it: Fig 7, and the picture of the README.

The runs are those of the study ``methods``; their curves are of ``rl.eval_items`` held-out problems after each phase.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean
from typing import TYPE_CHECKING, Any

from lco_lite.study.base import Cell, Claim, Findings, Plot, Results, Row, Study, Table, against, seen
from lco_lite.study.methods import ANCHORED, GKD, GKD_TWICE, METHODS, MIXED, TIERS
from lco_lite.study.statistics import mean_std, samples_to
from lco_lite.study.tuned import curve, failures, tiered

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from lco_lite.recipe import Recipe

COMPARED = (MIXED, ANCHORED, "kld", "lch", "mse", GKD, GKD_TWICE, "raft", "ppo", "grpo", "dapo")
PICTURE = (MIXED, ANCHORED, "kld", GKD_TWICE, "raft", "dapo", "grpo", "ppo")
# set before the study ran; the paper's are 1/2 of PPO's samples for KLD, and of KLD's 1/3 for LCH
HALF, THIRD = 0.5, 1 / 3
SMOOTH, POINTS = 5, 80  # updates, and of how many a norm is drawn


class Efficiency(Study):
    name = "efficiency"
    asks = "How many samples does a score take? (Fig 7)"
    labels = COMPARED

    def cells(self, recipe: Recipe, seeds: Sequence[int], done: Results) -> list[Cell]:
        chosen = [{name: tier[name] for name in tier if name in COMPARED} for tier in TIERS]
        return tiered(chosen, recipe, seeds, done, self.only)

    def report(self, results: Results) -> Findings:
        needed = {name: _samples_to_best_of("ppo", name, results) for name in COMPARED}
        of_kld = _samples_to_best_of("kld", "lch", results)
        own = _samples_to_best_of("kld", "kld", results)
        ran = {name: {row["seed"] for row in results.of(name)} for name in ("kld", "lch")}
        says = "reaches {}'s best score with about {} of its samples."
        claims = [
            _ratio("C3, KLD", f"LCO-KLD {says.format('PPO', 'half')}", needed["kld"], needed["ppo"], HALF, ran["kld"]),
            _ratio("C3, LCH", f"LCO-LCH {says.format('KLD', 'a third')}", of_kld, own, THIRD, ran["lch"]),
        ]
        ppos = {row["seed"] for row in results.of("ppo")}
        n = {name: len({row["seed"] for row in results.of(name)} & ppos) for name in COMPARED if results.of(name)}
        told = {name: mean_std(list(needed[name].values()), 0) for name in n}
        rows = [[name, n[name], told[name], n[name] - len(needed[name])] for name in n] if "ppo" in n else []
        columns = ["method", "n", "samples", "never"]
        table = Table("samples", "Samples to PPO's best score of the same seed", columns, rows)
        title = "Held-out score and gradient norm against samples"
        plots = [Plot("learning", title, lambda figure: _learning(figure, results), (9.0, 6.5))]
        notes = ["Samples are responses drawn. GKD has as many demonstrations beside them.", *failures(results)]
        return Findings(claims, [table, _curves(results)], plots if n else [], notes)


def _samples_to_best_of(other: str, name: str, results: Results) -> dict[int, float]:
    """Seed -> samples after which ``name`` first reaches the best score on ``other``'s curve; seeds where it never does
    are left out."""
    best = {row["seed"]: max(curve(row)[1]) for row in results.of(other)}
    reached = {
        row["seed"]: samples_to(best[row["seed"]], *curve(row)) for row in results.of(name) if row["seed"] in best
    }
    return {seed: max(samples, 1.0) for seed, samples in reached.items() if samples is not None}


def _ratio(name: str, says: str, a: dict[int, float], b: dict[int, float], at_most: float, ran: set[int]) -> Claim:
    """``ran``: the seeds of the method that ``a`` is of."""
    verdict, ratio = against({seed: math.log(a[seed] / b[seed]) for seed in a.keys() & b.keys()}, at_most, above=False)
    threshold = f"the interval of the ratio of samples, a geometric mean over seeds, lies below {at_most:.2g}"
    never = len((b.keys() & ran) - a.keys())  # which no mean has: such a ratio is of the seeds that did well
    if never and verdict == "reproduced":
        verdict = "unclear"
    why = f"Ratio {ratio}" + (f", and {never} that never reach it." if never else ".")
    return Claim(name, says, f"{threshold}, and all reach it.", verdict, why)


def _curves(results: Results) -> Table:
    of_all = [row for name in COMPARED for row in results.of(name)]
    rows = [[row["label"], row["seed"], int(x), y] for row in of_all for x, y in zip(*curve(row), strict=True)]
    return Table("curves", "Curves", ["method", "seed", "samples", "pass@1"], rows, shown=False)


def _learning(figure: Figure, results: Results) -> None:
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=[3, 2])
    below.set_yscale("log")
    for name in PICTURE:
        rows = results.ended(name)
        if rows:
            _draw(above, below, name, rows)
    lengths = [row["samples"] for name in PICTURE if name != "dapo" for row in results.of(name)]
    above.set_xlim(0, 1.02 * max(lengths, default=1))  # DAPO's go on beyond
    above.set_ylabel("pass@1, held-out")
    below.set_ylabel("gradient norm")
    below.set_xlabel("samples")
    above.set_title("mean over training seeds ± one standard deviation", loc="left")
    figure.legend(*above.get_legend_handles_labels(), loc="outside right upper")


def _draw(above: Axes, below: Axes, name: str, rows: Sequence[Row]) -> None:
    from lco_lite.study.figures import band, smoothed

    style: dict[str, Any] = {} if METHODS[name].sets["rl.objective"] == "kld" else {"linestyle": "--", "linewidth": 1.3}
    curves = [curve(row) for row in rows]
    band(above, name, [fmean(xs) for xs in zip(*(x for x, _ in curves), strict=True)], [y for _, y in curves], **style)
    norms = [smoothed(seen(row, "grad_norm"), SMOOTH) for row in rows]
    shortest = min(map(len, norms))
    if shortest:
        drawn, every = fmean(row["samples"] for row in rows), range(0, shortest, max(1, shortest // POINTS))
        band(below, name, [drawn * (i + 1) / shortest for i in every], [[n[i] for i in every] for n in norms], **style)
