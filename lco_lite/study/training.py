"""A whole run from inside: gradient norm by the sign of A, entropy, probability of the samples, score: Figs 1, 2, 6.

Norms by sign are of the gradient in the logits, a token at a time; the norm of all trained weights is before clipping.
Whether a norm grows is told by a phase, within which the target stands still: its last third against its first.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from statistics import fmean
from typing import TYPE_CHECKING, Any

from lco_lite.study.base import FEWEST, Cell, Claim, Findings, Plot, Results, Row, Study, Table, Verdict, against, seen
from lco_lite.study.methods import METHODS
from lco_lite.study.statistics import mean_std
from lco_lite.study.tuned import curve, failures, tiered

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from lco_lite.recipe import Recipe

LCO, GRADIENTS = ("kld", "lch", "mse"), ("ppo", "grpo", "reinforce")
NORMS = {"grad_norm": "all weights", "logit_grad_norm_pos": "logits, A > 0", "logit_grad_norm_neg": "logits, A < 0"}
# set before the study ran
SANE = (0.25, 2.0)  # entropy at the end, as a share of that at the start
SMOOTH = 5  # updates


class WholeRun(Study):
    name = "training"
    asks = "What do gradient, entropy and probability do over a whole run? (Figs 1, 2, 6)"
    labels = (*LCO, *GRADIENTS)

    def cells(self, recipe: Recipe, seeds: Sequence[int], done: Results) -> list[Cell]:
        return tiered([{name: METHODS[name] for name in (*LCO, *GRADIENTS)}], recipe, seeds, done, self.only)

    def report(self, results: Results) -> Findings:
        known = [name for name in (*LCO, *GRADIENTS) if results.of(name)]
        claims = [
            _trend(results, "C1 in a run", "ppo", "logit_grad_norm_neg", rises=True),
            _trend(results, "C1 in a run", "ppo", "logit_grad_norm_pos", rises=False),
            *(_trend(results, "C2 in a run", name, norm, rises=False) for name in LCO for norm in NORMS),
            *(_entropy(results, name) for name in LCO),
        ]
        columns = ["method", "n", *(f"{what}: last third / first" for what in NORMS.values()), "entropy, end / start"]
        rows = [[name, len(results.of(name)), *_cells(results, name)] for name in known]
        tables = [Table("trends", "Within a phase, geometric mean over phases and seeds", columns, rows)]
        title = "Gradient norm, entropy and score over a run"
        plots = [Plot("training", title, lambda figure: _run(figure, results, known), (9.0, 9.0))]
        return Findings(claims, tables, plots if known else [], failures(results))


def rise(norm: str) -> Callable[[Row], float | None]:
    """The log of how much a norm grows within a phase, mean over the phases of a run."""

    def of(row: Row) -> float | None:
        logs = []
        for step in sorted(set(seen(row, "step"))):
            values = [value for value in seen(row, norm, int(step)) if value > 0]
            third = len(values) // 3
            if third:
                logs.append(math.log(fmean(values[-third:]) / fmean(values[:third])))
        return fmean(logs) if logs else None

    return of


def entropy_kept(row: Row) -> float | None:
    """Entropy of the last update as a share of the first's; what a policy learns lowers it too."""
    values = seen(row, "entropy")
    return values[-1] / values[0] if values and values[0] else None


def _trend(results: Results, claim: str, name: str, norm: str, rises: bool) -> Claim:
    verdict, ratio = against(results.by_seed(name, rise(norm)), 1.0, above=rises)
    does, above = ("grows", "above") if rises else ("falls", "below")
    says = f"The gradient norm of {name} ({NORMS[norm]}) {does} within a phase."
    threshold = f"the interval of the geometric mean over seeds lies {above} 1."
    why = f"Last third of a phase over first: {ratio}."
    return Claim(f"{claim}, {name}, {NORMS[norm]}", says, threshold, verdict, why)


def _entropy(results: Results, name: str) -> Claim:
    kept = results.by_seed(name, entropy_kept)
    low, high = SANE
    verdict: Verdict = "unclear"
    if len(kept) >= FEWEST:
        verdict = "reproduced" if all(low <= value <= high for value in kept.values()) else "not reproduced"
    return Claim(
        f"C2, entropy of {name}",
        f"The entropy of {name} neither collapses nor explodes.",
        f"of every seed it ends between {low:g} and {high:g} times where it began.",
        verdict,
        f"End / start: {mean_std(list(kept.values()), 2)}, n = {len(kept)}.",
    )


def _cells(results: Results, name: str) -> list[Any]:
    cells: list[Any] = []
    for norm in NORMS:
        logs = list(results.by_seed(name, rise(norm)).values())
        cells.append(f"{math.exp(fmean(logs)):.2f}" if logs else None)
    return [*cells, mean_std(list(results.by_seed(name, entropy_kept).values()), 2)]


def _run(figure: Figure, results: Results, names: Sequence[str]) -> None:
    from lco_lite.study.figures import band, smoothed

    panels = figure.subplots(3, 2)
    shown = {**NORMS, "entropy": "entropy, nats", "sampled_prob": "probability of sampled tokens"}
    for axes, (number, title) in zip(panels.flat, shown.items(), strict=False):
        if number in NORMS:
            axes.set_yscale("log")
        for name in names:
            rows = [smoothed(values, SMOOTH) for row in results.of(name) if (values := seen(row, number))]
            if rows:
                length = min(map(len, rows))
                band(axes, name, [i / length for i in range(length)], [values[:length] for values in rows])
        axes.set_title(title)
        axes.set_xlabel("share of the run's updates")
    for name in names:
        if curves := [curve(row) for row in results.ended(name)]:
            xs = [fmean(x) for x in zip(*(x for x, _ in curves), strict=True)]
            band(panels[2][1], name, xs, [y for _, y in curves])
    panels[2][1].set_title("pass@1, held-out")
    panels[2][1].set_xlabel("samples")
    figure.legend(*panels[2][1].get_legend_handles_labels(), loc="outside lower center", ncols=len(names))
