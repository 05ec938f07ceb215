"""All methods from the same warm-up with the same number of samples: the paper's Tables 1 and 4, and whether the mixed
target is ahead of what else there is.

All have the same phases, minibatches, inner epochs and schedule, and a learning rate that is tuned alike. GKD counts a
demonstration as a sample; ``gkd, twice`` has as many own samples as the others, and as many demonstrations beside them.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean
from typing import TYPE_CHECKING, Any

from lco_lite.study.base import (
    Cell,
    Claim,
    Findings,
    Plot,
    Results,
    Row,
    Study,
    Table,
    Verdict,
    judged,
    seen,
    told,
)
from lco_lite.study.statistics import mean_std
from lco_lite.study.tuned import Contender, failures, gradient, of, rates_tried, regression, taught_by, tiered

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from lco_lite.recipe import Recipe

MIXED, ANCHORED, GKD, GKD_TWICE = "kld mixed", "kld anchored", "gkd", "gkd, twice"
NO_CLIPPING = {"max_grad_norm": 1e9}
UNCLIPPED = {name: f"{name}, unclipped" for name in ("kld", "reinforce", "ppo", "grpo")}  # a method -> its label here

# the order in which they are worked off
TIERS: list[dict[str, Contender]] = [
    {
        MIXED: regression("kld", feedback="dpo + rule", anchor=0.5),
        GKD: regression("gkd"),
        GKD_TWICE: Contender(of("gkd"), tuned_as=GKD, phases=2),
        ANCHORED: regression("kld", anchor=0.5),
        "raft": gradient("raft"),
        "dapo": gradient("dapo"),
    },
    {
        "kld": regression("kld"),
        "grpo": gradient("grpo"),
        "ppo": gradient("ppo"),
    },
    {
        "lch": regression("lch"),
        "mse": regression("mse"),
        "reinforce": gradient("reinforce"),
        "gspo": gradient("gspo"),
        "minillm": regression("minillm"),
    },
    {"opd": regression("opd")}
    | {name: gradient(name) for name in ("rloo", "dr_grpo", "cispo", "dppo", "dro", "pmd", "rebel", "tpo")},
    {label: Contender(of(name, **NO_CLIPPING), tuned_as=name) for name, label in UNCLIPPED.items()},
]
HALVED_FROM = 3  # so that all studies fit a night on two cores, these tiers have half of the seeds
METHODS = {name: method for tier in TIERS for name, method in tier.items()}
PAPERS_BASELINES = ("reinforce", "ppo", "grpo", "dapo", "gspo", "gkd", "minillm")
POLICY_GRADIENTS = ("reinforce", "ppo", "rloo", "grpo", "dapo", "gspo", "dr_grpo", "cispo", "dppo")


class MethodsStudy(Study):
    name = "methods"
    asks = "Which method learns most from the same samples? (Tables 1 and 4)"
    labels = tuple(METHODS)

    def cells(self, recipe: Recipe, seeds: Sequence[int], done: Results) -> list[Cell]:
        return tiered(TIERS, recipe, seeds, done, self.only, HALVED_FROM)

    def report(self, results: Results) -> Findings:
        ranked = sorted((name for name in METHODS if results.by_seed(name)), key=lambda name: _mean(results, name))
        plots = [Plot("scores", "pass@1 after equal samples", lambda figure: _scores(figure, results, ranked))]
        notes = [
            "Every method's learning rate is the best of four on seed 0, which is not scored, in half as many phases. "
            "Intervals are those of the paired t-test over seeds, at 95 %, not corrected for how many there are.",
            "DAPO samples other prompts in place of groups without a signal, and so draws more: column samples.",
            *failures(results),
        ]
        tables = [_table(results, ranked[::-1]), *_clipping(results), rates_tried(results)]
        return Findings([*_ahead(results), _papers(results)], tables, plots if ranked else [], notes)


def _mean(results: Results, name: str) -> float:
    return fmean(results.by_seed(name).values())


def _ahead(results: Results) -> list[Claim]:
    """The mixed target against GKD, RAFT, the best policy gradient, and the anchor alone."""
    best = max((n for n in POLICY_GRADIENTS if results.by_seed(n)), key=lambda n: _mean(results, n), default="grpo")
    rivals = {
        GKD: "GKD at equal samples",
        GKD_TWICE: "GKD with as many own samples, and as many demonstrations beside them",
        "raft": "RAFT",
        best: f"the best policy gradient, {best}",
        ANCHORED: "the same without the rule's word",
    }
    claims = []
    for rival, what in rivals.items():
        found = results.difference(MIXED, rival)
        says = f"KLD with anchor and mixed feedback is ahead of {what}."
        threshold = "the interval of the paired difference in pass@1 lies above 0."
        claims.append(Claim(f"mixed against {rival}", says, threshold, judged(found), f"Difference {told(found)}."))
    return claims


def _papers(results: Results) -> Claim:
    """C4."""
    found = {name: results.difference("kld", name) for name in PAPERS_BASELINES}
    verdicts = [judged(interval) for interval in found.values()]
    verdict: Verdict = "not reproduced" if "not reproduced" in verdicts else "unclear"
    if set(verdicts) == {"reproduced"}:
        verdict = "reproduced"
    return Claim(
        "C4, the paper's form",
        f"LCO-KLD as in the paper is ahead of {', '.join(PAPERS_BASELINES)} at equal samples.",
        "the interval of every paired difference lies above 0; not reproduced where one lies below.",
        verdict,
        "KLD less each: " + "; ".join(f"{name} {told(interval)}" for name, interval in found.items()) + ".",
    )


def _table(results: Results, names: Sequence[str]) -> Table:
    rows: list[Sequence[Any]] = []
    for name in names:
        found = results.of(name)
        ended = [row for row in found if row["after"] is not None]
        eight = [row["after"]["metrics"]["pass@8"]["mean"] for row in ended if "pass@8" in row["after"]["metrics"]]
        scores = [mean_std([row[when]["mean"] for row in ended]) for when in ("before", "after")]
        samples = f"{fmean(row['samples'] for row in found):,.0f}"
        first = [name, found[0]["feedback"], f"{found[0]['lr']:g}", len(ended)]
        rows.append([*first, *scores, mean_std(eight), samples, f"{max(map(_largest_norm, found)):.3g}"])
    if scored := list(taught_by(results).values()):
        rows.append(["φ_DPO itself", None, None, len(scored), None, mean_std(scored), None, None, None])
    columns = ["method", "feedback", "lr", "n", "before", "pass@1", "pass@8", "samples", "largest gradient norm"]
    return Table("methods", "Scores", columns, rows)


def _clipping(results: Results) -> list[Table]:
    """What clipping of the gradient norm does, at the same rate: a method without it less the same with it."""
    found = {name: results.difference(label, name) for name, label in UNCLIPPED.items()}
    rows = [[name, told(interval)] for name, interval in found.items() if interval is not None]
    return [Table("clipping", "Without clipping the gradient norm", ["method", "difference"], rows)] if rows else []


def _largest_norm(row: Row) -> float:
    return max(seen(row, "grad_norm"), default=0.0)


def _scores(figure: Figure, results: Results, names: Sequence[str]) -> None:
    from lco_lite.study.figures import COLOURS

    axes = figure.subplots()
    for place, name in enumerate(names):
        values = list(results.by_seed(name).values())
        colour = COLOURS[0 if METHODS[name].sets["rl.objective"] in ("kld", "lch", "mse") else 8]
        axes.plot(values, [place] * len(values), "o", color=colour, alpha=0.4, markersize=4)
        axes.plot(fmean(values), place, "|", color=colour, markersize=14, markeredgewidth=2.5)
    axes.set_yticks(range(len(names)), names)
    axes.set_xlabel("pass@1 on held-out problems: a point a training seed, a line their mean")
