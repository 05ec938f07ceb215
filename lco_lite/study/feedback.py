"""What a method is told, with the loss held still: dense, sampled, rule, mixed, right answers only. Table 5 and C6.

LCO is in the paper's form, without an anchor, but where the label says so.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean
from typing import TYPE_CHECKING

from lco_lite.study.base import Cell, Findings, Plot, Results, Study, Table, ahead
from lco_lite.study.methods import ANCHORED, METHODS, MIXED
from lco_lite.study.statistics import mean_std
from lco_lite.study.tuned import Contender, failures, gradient, of, rates_tried, tiered

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from lco_lite.recipe import Recipe

POSITIVE = {"rewards.rule.sign": "positive"}
SPARSE_RATES = (3e-4, 1e-3, 3e-3, 6e-3)


def sparse(objective: str, feedback: str, **more: object) -> Contender:
    return Contender({**of(objective, feedback=feedback), **{f"rl.{k}": v for k, v in more.items()}}, SPARSE_RATES)


# loss -> what it is told -> the method
TOLD: dict[str, dict[str, Contender]] = {
    "kld": {
        "dense": METHODS["kld"],
        "sampled": sparse("kld", "dpo_sampled"),
        "rule": sparse("kld", "rule"),
        "rule, right only": sparse("kld", "rule", **POSITIVE),
    },
    "kld, anchored": {
        "dense": METHODS[ANCHORED],
        "mixed": METHODS[MIXED],
        "mixed, both signs": Contender(
            of("kld", feedback="dpo + rule", anchor=0.5, **{"rewards.rule.sign": "both"}),
            tuned_as="kld, anchored, mixed",
        ),
    },
    "lch": {"dense": METHODS["lch"], "sampled": sparse("lch", "dpo_sampled")},
    "mse": {"dense": METHODS["mse"], "sampled": sparse("mse", "dpo_sampled")},
    "ppo": {"sampled": gradient("ppo", feedback="dpo_sampled"), "rule": METHODS["ppo"]},
    "grpo": {"sampled": gradient("grpo", feedback="dpo_sampled"), "rule": METHODS["grpo"]},
    "reinforce": {
        "sampled": gradient("reinforce", feedback="dpo_sampled"),
        "rule": METHODS["reinforce"],
        "rule, right only": Contender(of("reinforce", **POSITIVE), tuned_as="reinforce, rule"),
    },
    "raft": {"rule, right only": METHODS["raft"]},
}


ALL = {f"{loss}, {feedback}": method for loss, told in TOLD.items() for feedback, method in told.items()}


class Feedback(Study):
    name = "feedback"
    asks = "How much of it is feedback, and how much the loss? (Table 5)"
    labels = tuple(ALL)

    def cells(self, recipe: Recipe, seeds: Sequence[int], done: Results) -> list[Cell]:
        return tiered([ALL], recipe, seeds, done, self.only)

    def report(self, results: Results) -> Findings:
        claims = [
            ahead(results, f"C6, {loss} against {rival}, {feedback}", f"{loss}, {feedback}", f"{rival}, {feedback}")
            for feedback, losses in (("sampled", ("kld", "lch", "mse")), ("rule", ("kld",)))
            for loss in losses
            for rival in ("ppo", "grpo")
        ]
        claims += [
            ahead(results, "dense against sampled", "kld, dense", "kld, sampled"),
            ahead(results, "mixed against dense", "kld, anchored, mixed", "kld, anchored, dense"),
            ahead(results, "right answers only", "kld, anchored, mixed", "kld, anchored, mixed, both signs"),
            ahead(results, "positive REINFORCE", "reinforce, rule, right only", "reinforce, rule"),
        ]
        rows = []
        for name in ALL:
            if found := results.by_seed(name):
                before = [row["before"]["mean"] for row in results.of(name)]
                rate = f"{results.of(name)[0]['lr']:g}"
                rows.append([name, rate, len(found), mean_std(before), mean_std(list(found.values()))])
        table = Table("feedback", "Scores", ["loss, feedback", "lr", "n", "before", "pass@1"], rows)
        plots = [Plot("feedback", "pass@1 by feedback", lambda figure: _bars(figure, results))] if rows else []
        return Findings(claims, [table, rates_tried(results)], plots, failures(results))


def _bars(figure: Figure, results: Results) -> None:
    from lco_lite.study.figures import COLOURS

    axes = figure.subplots()
    kinds = list(dict.fromkeys(feedback for told in TOLD.values() for feedback in told))
    ticks = []
    for place, (loss, feedbacks) in enumerate(TOLD.items()):
        for i, feedback in enumerate(feedbacks):
            values = list(results.by_seed(f"{loss}, {feedback}").values())
            if values:
                colour, x = COLOURS[kinds.index(feedback)], place + 0.18 * (i - (len(feedbacks) - 1) / 2)
                axes.bar(x, fmean(values), 0.16, color=colour, label=feedback)
                axes.plot([x] * len(values), values, ".", color="black", markersize=3)
        ticks.append(loss)
    axes.set_xticks(range(len(ticks)), ticks)
    axes.set_ylabel("pass@1; points are seeds")
    handles = dict(zip(*axes.get_legend_handles_labels()[::-1], strict=True))
    figure.legend(handles.values(), handles.keys(), loc="outside upper center", ncols=len(handles))
