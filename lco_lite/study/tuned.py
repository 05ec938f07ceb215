"""Methods whose learning rate is the best of several on a seed that is not scored, in half as many phases."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from lco_lite.study.base import TUNING_SEED, Cell, Results, Row, Table, score

if TYPE_CHECKING:
    from lco_lite.recipe import Recipe

REGRESSION_RATES, GRADIENT_RATES = (3e-3, 6e-3, 1.2e-2, 2.4e-2), (1e-4, 3e-4, 1e-3, 3e-3)


class Contender(NamedTuple):
    """``rates`` are those of the quickstart, whose own is 3e-3; another recipe's are in proportion to its own.
    ``tuned_as``: takes the rate of the method of that name. ``phases``: times as many."""

    sets: Mapping[str, Any]
    rates: Sequence[float] = ()
    tuned_as: str | None = None
    phases: int = 1


Contenders = Mapping[str, Contender]


def of(objective: str, **more: Any) -> dict[str, Any]:
    """The fields of ``rl`` by their names."""
    return {"rl.objective": objective, **{f"rl.{name}": value for name, value in more.items()}}


def regression(objective: str, **more: Any) -> Contender:
    return Contender(of(objective, **more), REGRESSION_RATES)


def gradient(objective: str, **more: Any) -> Contender:
    return Contender(of(objective, **more), GRADIENT_RATES)


def tiered(
    tiers: Sequence[Contenders],
    recipe: Recipe,
    seeds: Sequence[int],
    done: Results,
    only: Sequence[str] = (),
    halved_from: int | None = None,
) -> list[Cell]:
    """Tier by tier: the cells that find the rates, then, when those are known, all methods (or ``only`` these) of each
    seed; of the tiers from ``halved_from`` on the first half of the seeds."""
    planned, methods = list[Cell](), {name: method for tier in tiers for name, method in tier.items()}
    for number, whole in enumerate(tiers):
        few = halved_from is not None and number >= halved_from
        tier = [name for name in whole if not only or name in only]
        tuned = dict.fromkeys(methods[name].tuned_as or name for name in tier)
        planned += [cell for name in tuned for cell in tuning(name, methods[name], recipe) if cell not in planned]
        known = {name: sets_of(name, methods, recipe, done) for name in tier}
        if None in known.values():
            break
        used = seeds[: math.ceil(len(seeds) / 2)] if few else seeds
        planned += [Cell(name, seed, sets) for seed in used for name, sets in known.items() if sets is not None]
    return planned


def tuning(name: str, method: Contender, recipe: Recipe) -> list[Cell]:
    """A cell for each rate; none of a method that takes another's."""
    sets = {**equal(method.sets, recipe), "rl.steps": max(1, recipe.rl.steps // 2)}
    rates = [float(f"{rate * recipe.rl.lr / 3e-3:.6g}") for rate in method.rates]
    return [Cell(f"{name}, lr {rate:g}", TUNING_SEED, {**sets, "rl.lr": rate}) for rate in rates]


def sets_of(name: str, methods: Contenders, recipe: Recipe, done: Results) -> dict[str, Any] | None:
    """The fields of a method at the rate with the highest score, the lowest of several; None before that is known."""
    method, tuned_as = methods[name], methods[name].tuned_as or name
    cells = tuning(tuned_as, methods[tuned_as], recipe)
    rows = [done.of(cell.label, tuning=True) for cell in cells]
    if not all(rows):
        return None
    reached = [-math.inf if (value := score(row[0])) is None else value for row in rows]
    best = cells[reached.index(max(reached))].sets["rl.lr"]
    return {**equal(method.sets, recipe), "rl.lr": best, "rl.steps": method.phases * recipe.rl.steps}


def equal(sets: Mapping[str, Any], recipe: Recipe) -> dict[str, Any]:
    """The same number of responses a phase however many a prompt has, and the same passes over them."""
    from lco_lite.recipe import Rl

    each = Rl.model_validate({"objective": sets["rl.objective"]}).responses_per_prompt
    responses = recipe.rl.prompts_per_step * recipe.rl.responses_per_prompt
    usual = {
        "prompts_per_step": responses // each,
        "responses_per_prompt": each,
        "inner_epochs": recipe.rl.inner_epochs,
    }
    return {f"rl.{field}": value for field, value in usual.items()} | dict(sets)


def taught_by(results: Results) -> dict[int, float]:
    """Seed -> the score of φ_DPO itself, where a seed's start has one; not of the seed that rates are chosen on."""
    scored = dict[int, float]()
    for row in results.rows:
        of_task = row.get("start", {}).get("rm", {})
        own = [name for name in of_task if row["tasks"][name]["before"] == row["before"]]  # of several tasks
        if own and row["seed"] != TUNING_SEED:
            scored[row["seed"]] = of_task[own[0]]["mean"]
    return scored


def rates_tried(results: Results) -> Table:
    tried = [label for label in results.labels() if ", lr " in label]
    rows = [[*label.rsplit(", lr ", 1), score(results.of(label, tuning=True)[0])] for label in tried]
    return Table("rates", "Rates, on the seed that is not scored", ["method", "lr", "pass@1"], rows, shown=False)


def curve(row: Row) -> tuple[list[float], list[float]]:
    """Samples drawn and the held-out score after each phase that has one; at 0 the score before."""
    points = [(step["samples_seen"], step["eval"]) for step in row["steps"] if step.get("eval") is not None]
    return [0.0, *(x for x, _ in points)], [row["before"]["mean"], *(y for _, y in points)]


def failures(results: Results) -> list[str]:
    """Those that ended without weights that are numbers, for the page's notes."""
    lost = [f"{row['label']}, seed {row['seed']}: {row['failed']}" for row in results.rows if row.get("failed")]
    return [f"Diverged, and without a score: {'; '.join(lost)}."] if lost else []
