"""When the target compounds and what holds it: phases, anchor, β, inner epochs and the learning rate's schedule, at
equal samples.

All are LCO-KLD under dense feedback at one learning rate, that which ``methods`` found for it with an anchor.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from lco_lite.study.base import Cell, Findings, Plot, Results, Study, Table, ahead, told
from lco_lite.study.methods import ANCHORED, METHODS
from lco_lite.study.statistics import mean_std
from lco_lite.study.tuned import curve, failures, sets_of, tuning

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from lco_lite.recipe import Recipe

BASE = ANCHORED
# what differs from the anchored run of 8 phases; ``phases``: how many share the same samples
VARIED: dict[str, dict[str, Any]] = {
    BASE: {},
    "anchor 0": {"anchor": 0.0},
    "anchor 1": {"anchor": 1.0},
    "anchor 0, 32 phases": {"anchor": 0.0, "phases": 4},
    "32 phases": {"phases": 4},
    "anchor 0, 2 phases": {"anchor": 0.0, "phases": 0.25},
    "2 phases": {"phases": 0.25},
    "β 0.5": {"beta": 0.5},
    "β 2": {"beta": 2.0},
    "anchor 1, β 0.5": {"anchor": 1.0, "beta": 0.5},
    "1 inner epoch": {"epochs": 1},
    "anchor 0, constant rate": {"anchor": 0.0, "schedule": "constant"},
    "constant rate": {"schedule": "constant"},
}


class Refresh(Study):
    name = "refresh"
    asks = "How often may the target be refreshed, and what holds it? (phases × anchor × β × inner epochs)"
    seeds = 4
    labels = tuple(VARIED)

    def cells(self, recipe: Recipe, seeds: Sequence[int], done: Results) -> list[Cell]:
        planned = tuning(ANCHORED, METHODS[ANCHORED], recipe)
        base = sets_of(ANCHORED, METHODS, recipe, done)
        if base is None:
            return planned
        varied = {label: _sets(base, recipe, **more) for label, more in VARIED.items()}
        return planned + [Cell(label, seed, sets) for seed in seeds for label, sets in varied.items()]

    def report(self, results: Results) -> Findings:
        claims = [
            ahead(results, "the anchor at 8 phases", BASE, "anchor 0"),
            ahead(results, "the anchor at 32 phases", "32 phases", "anchor 0, 32 phases"),
            ahead(results, "the anchor at a constant rate", "constant rate", "anchor 0, constant rate"),
            ahead(results, "refreshing without an anchor compounds", "anchor 0", "anchor 0, 32 phases"),
            ahead(results, "a rate that falls to 0", BASE, "constant rate"),
        ]
        rows = []
        for label in VARIED:
            if found := results.by_seed(label):
                best = [max(curve(row)[1]) for row in results.ended(label)]
                cells = [
                    label,
                    len(found),
                    mean_std(list(found.values())),
                    mean_std(best),
                    told(results.difference(label, BASE)),
                ]
                rows.append(cells)
        columns = ["run", "n", "pass@1 at the end", "best of its curve", f"less {BASE}"]
        table = Table("refresh", "Scores at equal samples", columns, rows)
        title = "Held-out score over a run"
        plots = [Plot("refresh", title, lambda figure: _curves(figure, results), (9.0, 5.0))] if rows else []
        return Findings(claims, [table], plots, failures(results))


def _sets(
    base: dict[str, Any], recipe: Recipe, phases: float = 1, epochs: int | None = None, **rl: Any
) -> dict[str, Any]:
    """The anchored run's fields with these in place of its own."""
    made = {**base, **{f"rl.{name}": value for name, value in rl.items()}}
    if phases != 1:
        steps = max(1, round(recipe.rl.steps * phases))
        made |= {
            "rl.steps": steps,
            "rl.prompts_per_step": max(1, base["rl.prompts_per_step"] * recipe.rl.steps // steps),
        }
        made["rl.eval_every"] = max(1, round(phases))
    return made | ({} if epochs is None else {"rl.inner_epochs": epochs})


def _curves(figure: Figure, results: Results) -> None:
    from lco_lite.study.figures import band

    axes = figure.subplots()
    for label in VARIED:
        curves = [curve(row) for row in results.ended(label)]
        if curves:
            style = {"linestyle": "--"} if "anchor 0" in label else {}
            band(axes, label, curves[0][0], [scores for _, scores in curves], **style)
    axes.set_xlabel("samples")
    axes.set_ylabel("pass@1, held-out")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside right upper")
