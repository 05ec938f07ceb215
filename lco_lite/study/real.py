"""Whether it holds on a real small model: the mixed target beside GKD, RAFT and GRPO after equal samples.

    ln -s PKG smollm2       # the weights by a name that is the same everywhere: a run is known by its settings
    lco-lite study real --set model.path=smollm2 --set model.gguf_file=SmolLM2-135M-Instruct.Q4_1.gguf
    lco-lite study real gemma3 --set model.path=FOLDER --set rl.steps=2 --set rl.schedule=cosine

The methods are those of the study ``methods``. Each has the best of the middle two rates of the four there; RAFT and
GRPO, whose best was the higher of these, of the highest too.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from lco_lite.study.base import Cell, Findings, Plot, Results, Study, Table, ahead
from lco_lite.study.methods import GKD, METHODS, MIXED
from lco_lite.study.statistics import mean_std
from lco_lite.study.tuned import failures, rates_tried, taught_by, tiered

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from lco_lite.recipe import Recipe

COMPARED = {name: METHODS[name]._replace(rates=METHODS[name].rates[1:3]) for name in (MIXED, GKD)}
COMPARED |= {name: METHODS[name]._replace(rates=METHODS[name].rates[1:4]) for name in ("raft", "grpo")}


class RealModels(Study):
    name = "real"
    asks = "Does the mixed target hold on a real small model?"
    labels = tuple(COMPARED)
    recipe, usual = "smollm2_arithmetic", ("rl.eval_every=0",)
    seeds = 3

    def cells(self, recipe: Recipe, seeds: Sequence[int], done: Results) -> list[Cell]:
        return tiered([COMPARED], recipe, seeds, done, self.only)

    def report(self, results: Results) -> Findings:
        claims = [ahead(results, f"mixed against {rival}", MIXED, rival) for rival in COMPARED if rival != MIXED]
        rows = []
        for name in COMPARED:
            ended = [row for row in results.of(name) if row["after"] is not None]
            if ended:
                scores = [mean_std([row[when]["mean"] for row in ended]) for when in ("before", "after")]
                one = ended[0]
                rows.append([name, one["feedback"], f"{one['lr']:g}", len(ended), *scores, one["samples"]])
        if scored := list(taught_by(results).values()):
            rows.append(["φ_DPO itself", None, None, len(scored), None, mean_std(scored), None])
        table = Table("real", "Scores", ["method", "feedback", "lr", "n", "before", "pass@1", "samples"], rows)
        title = "pass@1 before, and after equal samples"
        plots = [Plot("real", title, lambda figure: _draw(figure, results))] if rows else []
        return Findings(claims, [table, rates_tried(results)], plots, failures(results))


def _draw(figure: Figure, results: Results) -> None:
    from lco_lite.study.figures import COLOURS

    axes = figure.subplots()
    for place, name in enumerate(COMPARED):
        for row in results.of(name):
            if row["after"] is not None:
                values = [row["before"]["mean"], row["after"]["mean"]]
                axes.plot([place - 0.2, place + 0.2], values, "o-", color=COLOURS[place], markersize=4)
    axes.set_xticks(range(len(COMPARED)), list(COMPARED))
    axes.set_ylabel("pass@1, a line a training seed")
