"""All methods from the same warm-up with the same number of samples: the paper's Tables 1 and 4, and whether the mixed
target is ahead of what else there is.

Every method's learning rate is the best of three on a seed that is not scored, in half as many phases; LCO's too. They
have the same phases, minibatches and inner epochs. GKD counts a demonstration as a sample; with twice the phases it has
as many own samples as the others, and as many demonstrations.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import TYPE_CHECKING, Any, NamedTuple

from lco_lite.study.base import (
    TUNING_SEED,
    Cell,
    Claim,
    Plot,
    Report,
    Results,
    Row,
    Study,
    Table,
    Verdict,
    judged,
    score,
)
from lco_lite.study.statistics import mean_std

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from lco_lite.recipe import Recipe

REGRESSION_RATES, GRADIENT_RATES = (1e-3, 3e-3, 6e-3), (1e-4, 3e-4, 1e-3)
MIXED, ANCHORED, GKD, GKD_TWICE = "kld mixed", "kld anchored", "gkd", "gkd, twice"
NO_CLIPPING = {"rl.max_grad_norm": 1e9}


class Method(NamedTuple):
    """``rates`` are of adapters on the quickstart's model; a study of another recipe scales them (``scaled``).
    ``tuned_as``: takes the rate of that method. ``phases``: times as many."""

    sets: Mapping[str, Any]
    rates: Sequence[float] = ()
    tuned_as: str | None = None
    phases: int = 1


def of(objective: str, **more: Any) -> dict[str, Any]:
    return {"rl.objective": objective, **{f"rl.{name}": value for name, value in more.items()}}


def gradient(objective: str, **more: Any) -> Method:
    return Method(of(objective, **more), GRADIENT_RATES)


# the order in which they are worked off: each line for all seeds before the next
TIERS: list[dict[str, Method]] = [
    {
        MIXED: Method(of("kld", feedback="dpo + rule", anchor=0.5), tuned_as="kld"),
        GKD: Method(of("gkd"), REGRESSION_RATES),
        GKD_TWICE: Method(of("gkd"), tuned_as=GKD, phases=2),
        "kld": Method(of("kld"), REGRESSION_RATES),
        ANCHORED: Method(of("kld", anchor=0.5), tuned_as="kld"),
        "raft": gradient("raft"),
        "grpo": gradient("grpo"),
        "dapo": gradient("dapo"),
        "ppo": gradient("ppo"),
    },
    {
        "lch": Method(of("lch"), REGRESSION_RATES),
        "mse": Method(of("mse"), REGRESSION_RATES),
        "reinforce": gradient("reinforce"),
        "gspo": gradient("gspo"),
        "minillm": Method(of("minillm"), REGRESSION_RATES),
    },
    {
        "opd": Method(of("opd"), REGRESSION_RATES),
        "rloo": gradient("rloo"),
        "dr_grpo": gradient("dr_grpo"),
        "cispo": gradient("cispo"),
        "dppo": gradient("dppo"),
        "dro": gradient("dro"),
        "pmd": gradient("pmd"),
        "rebel": gradient("rebel"),
        "tpo": gradient("tpo"),
    },
    {
        f"{name}, unclipped": Method({**of(name), **NO_CLIPPING}, tuned_as=name)
        for name in ("kld", "reinforce", "ppo", "grpo")
    },
]
METHODS = {name: method for tier in TIERS for name, method in tier.items()}
PAPERS_BASELINES = ("reinforce", "ppo", "grpo", "dapo", "gspo", "gkd", "minillm")
POLICY_GRADIENTS = ("reinforce", "ppo", "rloo", "grpo", "dapo", "gspo", "dr_grpo", "cispo", "dppo")


def sets_of(name: str, recipe: Recipe, done: Results) -> dict[str, Any] | None:
    """The fields of a method at its best rate; None before that is known."""
    method = METHODS[name]
    rate = best_rate(method.tuned_as or name, recipe, done)
    if rate is None:
        return None
    return {**_equal(method.sets, recipe), "rl.lr": rate, "rl.steps": method.phases * recipe.rl.steps}


def tuning(name: str, recipe: Recipe) -> list[Cell]:
    """A cell for each rate of a method that has rates of its own."""
    half = max(1, recipe.rl.steps // 2)
    return [
        Cell(
            f"{name}, lr {rate:g}", TUNING_SEED, {**_equal(METHODS[name].sets, recipe), "rl.lr": rate, "rl.steps": half}
        )
        for rate in scaled(METHODS[name].rates, recipe)
    ]


def best_rate(name: str, recipe: Recipe, done: Results) -> float | None:
    """That of the highest score; None until all have run. Of several the lowest."""
    cells = tuning(name, recipe)
    rows = [done.of(cell.label, tuning=True) for cell in cells]
    if not all(rows):
        return None
    reached = [score(row[0]) for row in rows]
    found = {cell.sets["rl.lr"]: -1.0 if s is None else s for cell, s in zip(cells, reached, strict=True)}
    return max(found, key=found.__getitem__)


def scaled(rates: Sequence[float], recipe: Recipe) -> list[float]:
    """In proportion to the recipe's own rate, for which 3e-3 stands on the quickstart."""
    return [float(f"{rate * recipe.rl.lr / 3e-3:.6g}") for rate in rates]


def _equal(sets: Mapping[str, Any], recipe: Recipe) -> dict[str, Any]:
    """The same number of responses a phase however many a prompt has, and the same passes over them."""
    from lco_lite.recipe import Rl

    each = Rl.model_validate({"objective": sets["rl.objective"]}).responses_per_prompt
    responses = recipe.rl.prompts_per_step * recipe.rl.responses_per_prompt
    return {**sets, "rl.prompts_per_step": responses // each, "rl.inner_epochs": recipe.rl.inner_epochs}


class Methods(Study):
    name = "methods"
    asks = "Which method learns most from the same samples? (Tables 1 and 4)"

    def cells(self, recipe: Recipe, seeds: Sequence[int], done: Results) -> list[Cell]:
        planned = []
        for tier in TIERS:
            planned += [cell for name in tier for cell in tuning(name, recipe)]
            known = {name: sets_of(name, recipe, done) for name in tier}
            if None in known.values():
                break
            planned += [Cell(name, seed, sets) for seed in seeds for name, sets in known.items() if sets is not None]
        return planned

    def report(self, results: Results) -> Report:
        plots = [Plot("scores", "pass@1 after equal samples, by seed", lambda figure: _scores(figure, results))]
        plots = plots if any(results.of(name) for name in METHODS) else []
        notes = [
            "Learning rates were chosen on seed 0 in half as many phases, and that seed is not scored. The interval of "
            "a difference is that of the paired t-test over seeds; it is not corrected for their number.",
            "DAPO samples other prompts in place of groups without a signal, and so draws more than the others: column "
            "samples.",
        ]
        return Report([*_ahead(results), _papers(results)], [_table(results), _tuned(results)], plots, notes)


def _ahead(results: Results) -> list[Claim]:
    """The mixed target against GKD, RAFT and the best policy gradient, at equal samples."""
    claims = []
    threshold = "the 95 % interval of the paired difference in pass@1 lies above 0."
    best = max(
        (n for n in POLICY_GRADIENTS if results.by_seed(n)),
        key=lambda n: fmean(results.by_seed(n).values()),
        default=None,
    )
    for rival, what in (
        (GKD, "GKD"),
        (GKD_TWICE, "GKD with as many own samples, and as many demonstrations"),
        ("raft", "RAFT"),
        (best, f"the best policy gradient ({best})"),
        (ANCHORED, "the anchor alone"),
    ):
        found = None if rival is None else results.difference(MIXED, rival)
        says = f"KLD with anchor and mixed feedback is ahead of {what}."
        claims.append(
            Claim(f"mixed against {rival or 'policy gradients'}", says, threshold, judged(found), _told(found))
        )
    return claims


def _papers(results: Results) -> Claim:
    """C4."""
    found = {name: results.difference("kld", name) for name in PAPERS_BASELINES}
    verdicts = {name: judged(interval) for name, interval in found.items()}
    behind = [name for name, verdict in verdicts.items() if verdict == "not reproduced"]
    verdict: Verdict = (
        "not reproduced" if behind else "reproduced" if set(verdicts.values()) == {"reproduced"} else "unclear"
    )
    why = "; ".join(f"{name} {_told(interval)}" for name, interval in found.items())
    return Claim(
        "C4, the paper's form",
        f"LCO-KLD as in the paper is ahead of {', '.join(PAPERS_BASELINES)} at equal samples.",
        "the interval of every paired difference lies above 0; not reproduced where one lies below.",
        verdict,
        f"KLD less each: {why}.",
    )


def _told(interval: Any) -> str:
    return "not measured yet" if interval is None else str(interval)


def _metric(name: str) -> Any:
    return lambda row: None if row.get("after") is None else row["after"]["metrics"].get(name, {}).get("mean")


def _table(results: Results) -> Table:
    rows = []
    for name in METHODS:
        found = results.of(name)
        if not found:
            continue
        ended = [row for row in found if row["after"] is not None]
        eights = list(results.by_seed(name, _metric("pass@8")).values())
        norms = [
            max((u["grad_norm"] for u in row["updates"] if u.get("grad_norm") is not None), default=0.0)
            for row in found
        ]
        cells: list[Any] = [name, found[0]["feedback"], f"{found[0]['lr']:g}", len(found)]
        cells += [mean_std([row["before"]["mean"] for row in found]), mean_std([row["after"]["mean"] for row in ended])]
        cells += [mean_std(eights), f"{fmean(row['samples'] for row in found):,.0f}", f"{max(norms):.3g}"]
        rows.append([*cells, len(found) - len(ended)])
    rows.sort(key=lambda row: row[5], reverse=True)
    columns = [
        "method",
        "feedback",
        "lr",
        "n",
        "before",
        "pass@1",
        "pass@8",
        "samples",
        "largest gradient norm",
        "diverged",
    ]
    return Table("methods", "Scores", columns, rows)


def _tuned(results: Results) -> Table:
    rows = [
        [label.rpartition(", lr ")[0], label.rpartition(", lr ")[2], score(results.of(label, tuning=True)[0])]
        for label in results.labels()
        if ", lr " in label
    ]
    return Table("rates", "Rates, on seed 0", ["method", "lr", "pass@1"], rows, shown=False)


def _scores(figure: Figure, results: Results) -> None:
    from lco_lite.study.figures import COLOURS

    names = sorted((n for n in METHODS if results.by_seed(n)), key=lambda n: fmean(results.by_seed(n).values()))
    axes = figure.subplots()
    for place, name in enumerate(names):
        values = list(results.by_seed(name).values())
        colour = COLOURS[0] if METHODS[name].sets["rl.objective"] in ("kld", "lch", "mse") else COLOURS[8]
        axes.plot(values, [place] * len(values), "o", color=colour, alpha=0.4, markersize=4)
        axes.plot(fmean(values), place, "|", color=colour, markersize=14, markeredgewidth=2.5)
    axes.set_yticks(range(len(names)), names)
    axes.set_xlabel("pass@1 on held-out problems; a point a training seed, a line their mean")


def curve(row: Row) -> tuple[list[int], list[float]]:
    """Samples seen and the held-out score after each phase that has one, with the score before the first."""
    points = [(step["samples_seen"], step["eval"]) for step in row["steps"] if step.get("eval") is not None]
    return [0, *(x for x, _ in points)], [row["before"]["mean"], *(y for _, y in points)]
