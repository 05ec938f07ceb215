"""From run folders to what a page shows, as plain JSON: methods, scores with intervals, tests, curves, samples.

Runs that differ in nothing but their seed are one method. Everything is read as it lies there: a run may be under way.
Nothing is shown in part without a word in ``left_out``.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from os.path import commonprefix
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch
from pydantic import BaseModel

from lco_lite.errors import DataError, RecipeError, UsageError
from lco_lite.evaluation.compare import Score, by_item, compare, paired_bootstrap, t_quantile
from lco_lite.evaluation.summary import read_rows, read_scores
from lco_lite.files import checked, damage, read_text
from lco_lite.metrics import METRICS, read_log
from lco_lite.recipe.file import flat, parse_yaml, unsealed
from lco_lite.report.about import chosen, headline
from lco_lite.run import Run, StageFolder
from lco_lite.study.statistics import paired

POINTS = 400  # of a curve
SAMPLES, GRADED = 6_000_000, 4_000_000  # bytes of samples from training, and of graded responses
LONGEST = 20_000  # characters of a prompt or response
PAIRS = 45  # of methods that are tested against each other, a task: ten methods
FIRST = (
    "reward",
    "accuracy",
    "eval",
    "grad_norm",
    "kl_to_old",
    "entropy",
    "loss",
    "mean_response_tokens",
    "sampled_prob",
)
NO_CURVE = ("step", "update", "samples_seen")
STAGES = ("base", "sft", "rm", "rl", "optimal")  # each is compared with those before it

Row = dict[str, Any]


class RecipeSeed(BaseModel):
    """Of a recipe, which may be another version's, what is counted with."""

    seed: int | None = None


@dataclass
class Compared:
    """A stage and the settings that decide it, without the seed; ``of``: run -> its seed."""

    stage: str
    settings: Mapping[str, Any]
    of: dict[str, int | None] = field(default_factory=dict)
    label: str = ""


def gather(runs: Sequence[Run], say: Callable[[str], object] = lambda text: None) -> dict[str, Any]:
    """Of one or several runs. UsageError for a folder that holds nothing to show, DataError for a damaged file."""
    methods, left_out, scores = list[Compared](), list[str](), list[Row]()
    about, curves, samples, graded = list[Row](), list[Row](), list[Row](), list[Row]()
    for run in runs:
        stages = [stage for stage in run.stages() if stage.metrics.exists()]
        scored = read_scores(run.path)
        if not run.has_recipe() and not stages and not scored:
            raise UsageError(f"{run.path}: no recipe, stage or score of a run is in it")
        recipe, tree = _recipe(run.path / "recipe.yaml") if run.has_recipe() else ("", {})
        settings = flat(tree)
        environment = run.made_on() if (run.path / "environment.json").exists() else {}
        about.append({"name": run.name, "seed": settings.get("seed"), "recipe": recipe, "environment": environment})
        about[-1] |= {"settings": settings, "chosen": chosen(tree, str(run.path / "recipe.yaml"))}
        about[-1]["stages"] = [_state(stage) for stage in run.stages()]
        for stage in stages:
            curves.append({"run": run.name, "stage": stage.name, "log": read_log(stage.metrics)})
            curves[-1]["method"] = _method_of(methods, run, stage.name, settings)
            for row in read_log(stage.samples):
                samples.append({"run": run.name, "stage": stage.name, **row})
        for file, result in scored.items():
            responses = read_rows(file, result) if file.with_suffix(".rows.jsonl").exists() else []
            name = file.stem.removesuffix(f"--{result['stage']}")
            scores.append({"run": run.name, "task": name, "result": result, "responses": responses})
            scores[-1]["method"] = _method_of(methods, run, result["stage"], settings | _beta(result))
            scores[-1]["data"] = {key: value for key, value in settings.items() if key.startswith("data.")}
            of = {"run": run.name, "stage": result["stage"], "task": name}
            graded += [of | (_ungraded(row) if result.get("own") else row) for row in responses]
    methods = _in_order(methods, [*curves, *scores])
    _name(methods)
    compared = _compared(scores, methods, left_out)
    tests = _tests(compared, methods, left_out, say)
    kept = within(samples, SAMPLES, ("run", "stage", "step"), "training steps with samples", left_out)
    kept += within(graded, GRADED, ("run", "stage", "task", "id"), "graded items", left_out)
    told = [{"label": m.label, "stage": m.stage, "runs": list(m.of), "seeds": list(m.of.values())} for m in methods]
    table = _scores(compared, methods)
    return {
        "kind": "runs",
        "title": runs[0].name if len(runs) == 1 else f"{len(runs)} runs",
        "headline": headline(about, table, tests),
        "methods": told,
        "runs": [{name: value for name, value in one.items() if name != "settings"} for one in about],
        "differences": _differences(about),
        "scores": table,
        "tests": tests,
        "figures": _figures(curves, methods, left_out),
        "samples": [_sample(row, left_out) for row in kept],
        "left_out": list(dict.fromkeys(left_out)),
    }


# which runs are one method


def _method_of(methods: list[Compared], run: Run, stage: str, recipe: Mapping[str, Any]) -> int:
    """Index of the method that ``stage`` of ``run`` is a training run of."""
    begun = run.stage(stage.partition("@")[0]).record("stage.json")  # rl-kld@best is of rl-kld
    settings = begun["settings"] if begun else {}
    if not settings:  # the base, π*: what is not trained here
        settings = {k: v for k, v in recipe.items() if k == "seed" or k.startswith(("model.", "reward_model", "chat."))}
    if stage == "optimal":  # of φ and β
        trained = run.stage("rm").record("stage.json")
        settings = (trained["settings"] if trained else settings) | {"rl.beta": recipe.get("rl.beta")}
    seed, rest = settings.get("seed", recipe.get("seed")), {k: v for k, v in settings.items() if k != "seed"}
    same = (i for i, m in enumerate(methods) if m.stage == stage and m.settings == rest)
    if (found := next(same, None)) is None:
        found = len(methods)
        methods.append(Compared(stage, rest))
    methods[found].of[run.name] = seed
    return found


def _beta(result: Mapping[str, Any]) -> Row:
    """That of π* as it was scored, which its recipe need not have any more."""
    found = re.fullmatch(r"rm .*, beta (\S+)", result["settings"]["made_by"])
    return {"rl.beta": found[1]} if result["stage"] == "optimal" and found else {}


def _in_order(methods: Sequence[Compared], rows: Sequence[Row]) -> list[Compared]:
    """The methods in the order of ``STAGES``, among which they keep their own; the rows' ``method`` goes with them."""
    kinds = [method.stage.partition("@")[0].partition("-")[0] for method in methods]
    order = sorted(range(len(methods)), key=lambda m: STAGES.index(kinds[m]) if kinds[m] in STAGES else len(STAGES))
    for row in rows:
        row["method"] = order.index(row["method"])
    return [methods[m] for m in order]


def _name(methods: Sequence[Compared]) -> None:
    """A stage's name; where several methods have it, what they differ in, or if that is much, what its runs' names have
    in common."""
    for method in methods:
        alike = [m for m in methods if m.stage == method.stage]
        keys = [
            k for k in dict.fromkeys(k for m in alike for k in m.settings) if _differ(m.settings.get(k) for m in alike)
        ]
        told = ", ".join(f"{key.rpartition('.')[2]} {method.settings.get(key)}" for key in keys)
        name = commonprefix(list(method.of))
        if len(method.of) > 1:
            name = re.sub(r"[-_. ]*(seed|s)?[-_. ]*$", "", name) or next(iter(method.of))
        told = told if len(keys) <= 3 and len(told) < 60 else name
        method.label = method.stage if len(alike) == 1 else told if method.stage in told else f"{method.stage}, {told}"


def _differ(values: Iterable[Any]) -> bool:
    return len({json.dumps(value, sort_keys=True, default=str) for value in values}) > 1


def _differences(about: Sequence[Row]) -> list[Row]:
    """Settings that are not the same in all runs."""
    keys = dict.fromkeys(key for one in about for key in one["settings"])
    table = [{"key": key, "values": [one["settings"].get(key) for one in about]} for key in keys]
    return [row for row in table if _differ(row["values"]) and row["key"] != "name"]


# scores, and whether they differ


@dataclass
class Scored:
    """The scores of a method on a task that were made in one way, one a seed; ``runs``: all that have one."""

    task: str
    method: int
    way: Mapping[str, Any]
    label: str
    scores: list[Row]
    runs: list[str]


def _compared(scores: Sequence[Row], methods: Sequence[Compared], left_out: list[str]) -> list[Scored]:
    """By task, then method. Scores of a method that were made in different ways are no seeds of one mean."""
    compared = []
    for task in dict.fromkeys(score["task"] for score in scores):
        for m, method in enumerate(methods):
            mine = [score for score in scores if score["task"] == task and score["method"] == m]
            apart: dict[str, list[Row]] = {}
            for score, asked in zip(mine, _asked(mine, method), strict=True):
                apart.setdefault(json.dumps([_way(score), asked], sort_keys=True, default=str), []).append(score)
            for of in apart.values():
                runs = [score["run"] for score in of]
                named = ", ".join(runs[:3]) + (f" and {len(runs) - 3} more" if len(runs) > 3 else "")
                label = method.label if len(apart) == 1 else f"{method.label} of {named}"
                compared.append(Scored(task, m, _way(of[0]), label, _one_a_seed(of, method, left_out), runs))
    return compared


def _way(score: Row) -> Row:
    """What a score rests on besides weights and items, but for what a draw of the items changes, the version and what
    a judge has left out."""
    settings = flat({key: score["result"]["settings"].get(key, {}) for key in ("sampling", "protocol", "scored_by")})
    other = ("scored_by.rows.", "scored_by.missing.", "protocol.grader.rows.", "protocol.lco_lite.")
    return {key: value for key, value in settings.items() if value != {} and not f"{key}.".startswith(other)}


def _asked(scores: Sequence[Row], method: Compared) -> list[Any]:
    """Of each score of a method what its items are known by: their digest, or where every seed draws its own (what is
    held out), the data that they are drawn from."""
    items = [_items(score) for score in scores]
    drawn = [(method.of[s["run"]], json.dumps(s["data"], sort_keys=True, default=str)) for s in scores]
    each_its_own = len(set(zip(drawn, items, strict=True))) == len(set(drawn))
    return [data for _, data in drawn] if each_its_own and len(set(items)) > 1 else list(items)


def _items(score: Row) -> tuple[int, str]:
    return score["result"]["n"], score["result"]["settings"]["items"]


def _one_a_seed(scores: Sequence[Row], method: Compared, left_out: list[str]) -> list[Row]:
    """Runs of one recipe and one seed are one training run, however often it was made."""
    kept: dict[Any, Row] = {}
    for score in scores:
        seed = method.of[score["run"]]
        first = kept.setdefault(score["run"] if seed is None else seed, score)
        if first is not score:
            of = f"{method.label} of {score['run']}"
            left_out.append(f"{of}: the same recipe and seed as in {first['run']}; scores and bands count it once")
    return list(kept.values())


def _scores(compared: Sequence[Scored], methods: Sequence[Compared]) -> list[Row]:
    """A row a task, metric and method, or way of scoring it. Of several training seeds: mean, std and the t-interval
    over them; of one: the interval over items, by bootstrap of the main metric, else of its standard error. ``place``:
    in ``compared``; ``way``: the same number where the way is the same."""
    table, ways = [], [of.way for of in compared]
    for place, of in enumerate(compared):
        for metric in dict.fromkeys(name for score in of.scores for name in score["result"]["metrics"]):
            have = [s for s in of.scores if metric in s["result"]["metrics"]]
            means = [float(s["result"]["metrics"][metric]["mean"]) for s in have]
            result = have[0]["result"]
            row = {"task": of.task, "metric": metric, "main": metric == result["metric"], "method": of.method}
            row |= {"label": of.label, "of": of.runs, "stage": methods[of.method].stage}
            row |= {"place": place, "way": ways.index(of.way)}
            row |= {"mean": fmean(means), "std": stdev(means) if len(means) > 1 else None, "n": result["n"]}
            row |= {"own": bool(result.get("own")), "passes": result.get("seeds")}
            row["runs"] = [{"run": s["run"], "value": value} for s, value in zip(have, means, strict=True)]
            interval = _over_seeds(means) if len(means) > 1 else _over_items(have[0], metric)
            if interval is not None and not row["own"]:  # a share
                interval = [max(0.0, interval[0]), min(1.0, interval[1])]
            table.append(row | {"interval": interval, "over": "seeds" if len(means) > 1 else "items"})
    return table


def _over_seeds(means: Sequence[float]) -> list[float]:
    half = t_quantile(len(means) - 1) * stdev(means) / math.sqrt(len(means))
    return [fmean(means) - half, fmean(means) + half]


def _over_items(score: Row, metric: str) -> list[float] | None:
    """None where it cannot be told: no responses, or none that differ."""
    result, told = score["result"], score["result"]["metrics"][metric]
    if metric == result["metric"] and score["responses"]:
        values = list(by_item(score["responses"]).values())
        if not result.get("own"):  # what does not fit a window is wrong
            values += [0.0] * (result["n"] - len(values))
        if len(set(values)) < 2:
            return None
        found = paired_bootstrap(torch.tensor(values))
        return [found.low, found.high] if abs(found.mean - told["mean"]) < 1e-6 else _normal(told)
    return _normal(told)


def _normal(told: Mapping[str, Any]) -> list[float] | None:
    error = told.get("stderr")
    return [told["mean"] - 1.96 * error, told["mean"] + 1.96 * error] if error else None


def _tests(
    compared: Sequence[Scored], methods: Sequence[Compared], left_out: list[str], say: Callable[[str], object]
) -> list[Row]:
    """Every method (``b``) less every earlier one (``a``) that has the task, as ``eval --compare A B`` does: paired
    over seeds that both have, and over items. Where what scores is another, or nothing tells that the way
    is, there is no difference."""
    tests = []
    for task in dict.fromkeys(of.task for of in compared):
        of_task = [of for of in compared if of.task == task]
        pairs = [(a, b) for a, b in combinations(of_task, 2) if a.method != b.method]
        if len(pairs) > PAIRS:
            left_out.append(f"{task}: {len(pairs) - PAIRS} of {len(pairs)} pairs of methods are not tested")
        for a, b in pairs[:PAIRS]:
            say(f"{task}: {b.label} against {a.label}")
            row: Row = {"items": None, "task": task, "a": a.method, "b": b.method, "labels": [a.label, b.label]}
            row |= {"places": [compared.index(of) for of in (a, b)], "own": bool(a.scores[0]["result"].get("own"))}
            over_seeds = paired(*(_by_seed(of.scores, methods[of.method]) for of in (b, a)))
            row["seeds"] = None if over_seeds is None else over_seeds._asdict()
            try:
                sides = [[_as_score(s) for s in of.scores] for of in (a, b)]
                if not all(score.responses for side in sides for score in side):
                    raise UsageError("no graded responses lie beside the score")
                found, warned = compare(*sides)
                row["items"] = {key: found[key] for key in ("difference", "interval", "p", "items")}
                row["warnings"] = warned
            except UsageError as e:
                row["warnings"] = [str(e).removeprefix("--compare: ")]
                if any(len(set(of_seed)) > 1 for of_seed in _items_by_seed((a, b), methods).values()):
                    row["seeds"] = None  # means over other items are no pairs
            if a.way != b.way and (row["items"] is None or _scorer(a) != _scorer(b)):
                row |= {"items": None, "seeds": None}
            tests.append(row)
    return tests


def _scorer(of: Scored) -> Row:
    return {key: value for key, value in of.way.items() if key.startswith("scored_by")}


def _as_score(score: Row) -> Score:
    return Score(f"{score['run']}/{score['result']['stage']}", score["result"], score["responses"])


def _items_by_seed(pair: Sequence[Scored], methods: Sequence[Compared]) -> dict[int, list[tuple[int, str]]]:
    """Seed -> how many items each side was scored on, and their digest."""
    found: dict[int, list[tuple[int, str]]] = {}
    for of in pair:
        for score in of.scores:
            if (seed := methods[of.method].of[score["run"]]) is not None:
                found.setdefault(seed, []).append(_items(score))
    return found


def _by_seed(scores: Sequence[Row], method: Compared) -> dict[int, float]:
    """Seed -> score, of runs that have a seed."""
    seeds = [method.of[score["run"]] for score in scores]
    return {seed: float(s["result"]["mean"]) for seed, s in zip(seeds, scores, strict=True) if seed is not None}


# curves


def _figures(curves: Sequence[Row], methods: Sequence[Compared], left_out: list[str]) -> list[Row]:
    """A figure a metric and kind of stage: of each method its runs' curves, and their mean and std over seeds."""
    figures = []
    for kind in ("rl", "rm", "sft"):
        mine = [curve for curve in curves if curve["stage"].partition("-")[0] == kind]
        logs = [[flat(line) for line in curve["log"]] for curve in mine]
        metrics = sorted({name for log in logs for line in log for name in line}, key=_place)
        for metric in (name for name in metrics if name not in NO_CURVE):
            series = []
            for m, method in enumerate(methods):
                runs = []
                for curve, log in zip(mine, logs, strict=True):
                    points = [line for line in log if isinstance(line.get(metric), (int, float))]
                    if curve["method"] == m and points:
                        runs.append(_thinned(curve["run"], metric, points, left_out))
                if runs:
                    series.append(
                        {
                            "method": m,
                            "label": method.label,
                            "stage": method.stage,
                            "runs": runs,
                            "band": _band(runs, method),
                        }
                    )
            if series:
                known = METRICS.get(metric) or METRICS.get("rewards.NAME" if metric.startswith("rewards.") else "", "")
                figure = {"id": f"{kind}-{metric.replace('.', '-')}", "kind": kind, "metric": metric, "says": known}
                shown = {"first": metric in FIRST, "share": known.endswith("0 to 1")}
                figures.append(figure | shown | {"series": series})
    return figures


def _place(metric: str) -> tuple[int, int, str]:
    names = list(METRICS)
    first = FIRST.index(metric) if metric in FIRST else len(FIRST)
    return first, names.index(metric) if metric in names else len(names), metric


def _thinned(run: str, metric: str, points: Sequence[Row], left_out: list[str]) -> Row:
    stride = -(-len(points) // POINTS)
    if stride > 1:
        left_out.append(f"curves show one of {stride} steps where a stage has more than {POINTS}")
    kept = [line for i, line in enumerate(points) if i % stride == 0 or i == len(points) - 1]
    samples = [line.get("samples_seen") for line in kept]
    return {"run": run, "x": [line["step"] for line in kept], "samples": samples, "y": [line[metric] for line in kept]}


def _band(runs: Sequence[Row], method: Compared) -> Row | None:
    """Mean and std over seeds at the steps that all of them have; None for one seed."""
    each = {run["run"] if (seed := method.of[run["run"]]) is None else seed: run for run in reversed(runs)}
    if len(each) < 2:
        return None
    at, seen = ([dict(zip(run["x"], run[key], strict=True)) for run in each.values()] for key in ("y", "samples"))
    steps = [step for step in at[0] if all(step in one for one in at)]
    values = [[one[step] for one in at] for step in steps]
    samples = [fmean(s[step] for s in seen) if all(s[step] is not None for s in seen) else None for step in steps]
    band = {"mean": [fmean(of) for of in values], "std": [stdev(of) for of in values]}
    return {"n": len(each), "x": steps, "samples": samples, **band}


# samples


def within(rows: Sequence[Row], budget: int, unit: Sequence[str], what: str, left_out: list[str]) -> list[Row]:
    """All rows, or units of them (rows that agree in these fields) spread evenly over what is there."""
    units: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        units.setdefault(tuple(row.get(name) for name in unit), []).append(row)
    sizes = [sum(_size(row) for row in of) for of in units.values()]
    if sum(sizes) <= budget:
        return list(rows)
    keep, last = len(sizes) * budget // sum(sizes), len(sizes) - 1
    places = sorted({round(i * last / max(1, keep - 1)) for i in range(max(1, keep))})
    left_out.append(
        f"{len(units) - len(places):,} of {len(units):,} {what}: those shown are spread evenly; the run has all"
    )
    chosen = list(units.values())
    return [row for place in places for row in chosen[place]]


def _size(row: Row) -> int:
    return len(json.dumps(row, ensure_ascii=False, default=str).encode("utf-8", "replace"))


def _ungraded(row: Row) -> Row:
    """Of a task that is not right or wrong: what a grade would have is no more than filled in."""
    return {name: value for name, value in row.items() if name not in ("right", "why", "gold", "extracted")}


def _sample(row: Row, left_out: list[str]) -> Row:
    """Long texts are cut; ``id``, a place in a data set, stands for the item."""
    shown = {name: value for name, value in row.items() if value is not None and value is not False}
    if row.get("right") is False:
        shown["right"] = False
    for name in ("prompt", "response"):
        text = str(row.get(name, ""))
        if len(text) > LONGEST:
            left_out.append(f"texts end after {LONGEST:,} characters")
            text = f"{text[:LONGEST]}… [{len(text) - LONGEST:,} more characters]"
        shown[name] = text
    return shown


# files


def _state(stage: StageFolder) -> Row:
    """Read as it lies there: a run is shown without its weights too."""
    done, begun = (stage.record(name) or {} for name in ("done.json", "stage.json"))
    state: Row = {"name": stage.name, "done": bool(done), "finished": done.get("finished")}
    state |= {"seconds": done.get("seconds"), "objective": None}
    state["steps"] = max((line["step"] for line in read_log(stage.metrics)), default=0)
    if (objective := stage.name.removeprefix("rl-")) != stage.name:
        feedback = begun.get("settings", {}).get("rl.feedback")
        state["objective"] = f"{objective}, feedback {feedback}" if feedback else objective
    return state


def _recipe(path: Path) -> tuple[str, dict[str, Any]]:
    """Its text, and the tree of its settings."""
    with damage(path, "Put it back as it was; what is trained in this run from now on writes it again"):
        try:
            text = unsealed(read_text(path), path)
            settings = parse_yaml(text)[0] or {}
        except RecipeError as e:
            raise DataError(str(e)) from e
        except ValueError as e:
            raise DataError(f"{path}: not valid YAML: {e}") from e
        return text, checked(settings, RecipeSeed)
