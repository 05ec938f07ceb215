"""``lco-lite eval TASK --compare A B``: two scores that are there already, item by item.

A and B are stages of one run (``sft``, ``rl-lch``) or ``RUN/STAGE``, or several of these joined by commas: training
runs of one method. What is told is B less A.
"""

import math
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, NamedTuple

import mpmath
import torch
from torch import Tensor

from lco_lite.console import Console
from lco_lite.errors import UsageError
from lco_lite.evaluation.held_out import HELD_OUT
from lco_lite.evaluation.prompts import score_name
from lco_lite.evaluation.summary import Graded, read_rows, read_score
from lco_lite.recipe.file import flat
from lco_lite.run import Run, differences
from lco_lite.tasks import load_task
from lco_lite.weights import policy_id

RESAMPLES = 10_000
FEW = 30  # items; of fewer a bootstrap draws too narrow an interval: of 8 by about a quarter
_CELLS = 2**22  # numbers drawn at once
_SHOWN, _WIDTH = 20, 40  # answers that flipped, and characters of each
_SAME_SCORE = ("sampling", "protocol", "scored_by", "items")
LEVEL = 0.95


class Score(NamedTuple):
    """As it lies in a run: the result, and the graded responses that it is made of."""

    label: str
    result: Mapping[str, Any]
    responses: Sequence[Graded]


def compare_scores(
    runs: Path,
    name: str | None,
    tasks: Sequence[str] | None,
    pair: tuple[str, str],
    scoring: str,
    grader: str | None,
    console: Console,
    as_json: bool,
) -> None:
    """Both scores, their difference and the answers that flipped, a task after the other."""
    if not tasks:
        tasks = [(Run(runs / name) if name else Run.newest(runs)).recipe().task or HELD_OUT]
    results = {}
    for task in tasks:
        a, b = (
            [find(runs, name, task, one.strip(), scoring, grader, console) for one in which.split(",")]
            for which in pair
        )
        results[task], warnings = compare(a, b)
        for line in warnings:
            console.warn(f"{task}: {line}")
    if as_json:
        return console.emit(results)
    for task, result in results.items():
        show(console, task, result)


def find(
    runs: Path, name: str | None, task: str, which: str, scoring: str, grader: str | None, console: Console
) -> Score:
    """The score of STAGE or RUN/STAGE. UsageError with the command that makes it where it is not there; one of weights
    that are no more is told."""
    run_name, _, stage = which.rpartition("/")
    run_name = run_name or name or Run.newest(runs).name
    run = Run(runs / run_name)
    if stage.partition("@")[0] == "rl":
        stage = run.newest_stage("rl-") + stage.removeprefix("rl")
    if not stage or not run.path.is_dir():
        raise UsageError(f"--compare {which}: a stage of the run, or RUN/STAGE; no run {run_name!r} is in {runs}/")
    file = run.eval_path(score_name(HELD_OUT if task == HELD_OUT else load_task(task).name, scoring, grader), stage)
    responses = file.with_suffix(".rows.jsonl")
    flags = f"--policy {stage}" if run.has_recipe() else "--model MODEL"
    flags += " --scoring likelihood" if scoring == "likelihood" else f" --grader {grader}" if grader else ""
    flags += f" --name {run_name}" + ("" if str(runs) == "runs" else f" --runs {runs}")
    if not file.exists() or not responses.exists():
        raise UsageError(
            f"run {run_name} has no score of {stage} on {task} yet; this makes it:\n  lco-lite eval {task} {flags}"
        )
    result = read_score(file)
    if not _is_of(run, stage, result):
        console.warn(
            f"{which}: {file} is a score of other weights than {stage} has now, since it was trained on; this makes it "
            f"anew: lco-lite eval {task} {flags}"
        )
    return Score(which, result, read_rows(file, result))


def _is_of(run: Run, stage: str, result: Mapping[str, Any]) -> bool:
    """Whether a score is of what the stage has now; of the base, and where the stage is gone, nobody can tell."""
    made_by = result["settings"]["made_by"]
    name = "rm" if stage == "optimal" else stage
    if stage == "base" or not run.stage(name.partition("@")[0]).path.is_dir():
        return True
    try:
        now = policy_id(run, name)
    except UsageError:  # it is being trained on
        return False
    return bool(made_by.startswith(f"rm {now},") if stage == "optimal" else made_by == now)


def compare(a: Sequence[Score], b: Sequence[Score]) -> tuple[dict[str, Any], list[str]]:
    """(result for ``--json``, warnings). A side is a score, or one a training run of the same method.

    UsageError where they have not answered the same items.
    """
    warnings = _check(a, b)
    n, values = a[0].result["n"], [[by_item(one.responses) for one in side] for side in (a, b)]
    ids = sorted({i for side in values for one in side for i in one})
    if own := a[0].result.get("own", False):  # without right and wrong, an item that one has no score of is left out
        ids = [i for i in ids if all(i in one for side in values for one in side)]
        n = len(ids)
    labels = [",".join(one.label for one in side) for side in (a, b)]
    if not 0 < len(ids) <= n:
        raise UsageError(f"--compare: {' and '.join(labels)} have not answered the same items; score both again")
    # [R, N] of a side; what does not fit a window is wrong, as what fits none is for all
    grids = [torch.zeros(len(side), n, dtype=torch.float64) for side in values]
    for grid, side in zip(grids, values, strict=True):
        grid[:, : len(ids)] = torch.tensor([[one.get(i, 0.0) for i in ids] for one in side], dtype=torch.float64)
    difference = grids[1].mean(0) - grids[0].mean(0)  # [N]
    wins, losses = int((difference > 1e-12).sum()), int((difference < -1e-12).sum())
    mean, low, high, p = paired_bootstrap(difference)
    means = [grid.mean(1).tolist() for grid in grids]
    result = {"a": labels[0], "b": labels[1], "mean_a": fmean(means[0]), "mean_b": fmean(means[1])}
    result |= {"difference": mean, "interval": [low, high], "p": p, "resamples": RESAMPLES, "items": n}
    result |= {"wins": wins, "losses": losses, "ties": n - wins - losses}
    if own:
        result |= {"own": True, "metric": a[0].result["metric"]}
    if min(len(a), len(b)) > 1:
        result["runs"] = welch(*means)
    # whose answer flipped is a question about two sets of weights
    return result | {"flipped": flipped(a[0].responses, b[0].responses) if len(a) == len(b) == 1 else []}, warnings


def flipped(a: Sequence[Graded], b: Sequence[Graded]) -> list[dict[str, Any]]:
    """Responses of which one is right and the other is not: the same item, pass and sample, in A's order."""
    flips, by_place_b = [], _by_place(b)
    for place, of_a in _by_place(a).items():
        of_b = by_place_b.get(place)
        if of_b is not None and of_a["right"] != of_b["right"]:
            answers = {"a": of_a["extracted"], "b": of_b["extracted"], "right": "a" if of_a["right"] else "b"}
            flips.append({"id": of_a["id"], "seed": of_a["seed"], "gold": of_a["gold"], **answers})
    return flips


def show(console: Console, task: str, result: Mapping[str, Any]) -> None:
    """The numbers in percent, or in the unit of the task's own metric; then the first answers that flipped."""
    scale, digits = (1, 3) if result.get("own") else (100, 1)

    def told(value: float, sign: str = "") -> str:
        return f"{scale * value:{sign}.{digits}f}"

    def tested(found: Mapping[str, Any]) -> str:
        low, high = (told(bound, "+") for bound in found["interval"])
        return f"95 % interval {low} to {high}, p = {found['p']:.4f}"

    name = " ".join(filter(None, (task, result.get("metric"))))
    console.result(f"{name}: {result['a']} {told(result['mean_a'])} → {result['b']} {told(result['mean_b'])}")
    console.result(
        f"difference {told(result['difference'], '+')}, {tested(result)} "
        f"(paired bootstrap over {result['items']} items, {result['resamples']:,} resamples)"
    )
    if result["items"] < FEW:
        console.result(f"{result['items']} items are few: the interval is too narrow and p too small; score on more")
    if runs := result.get("runs"):
        a, b = (f"{told(runs[f'mean_{x}'])} ± {told(runs[f'std_{x}'])} ({runs[f'n_{x}']})" for x in "ab")
        found = "no spread to test with" if runs["p"] is None else f"Welch {tested(runs)}"
        console.result(f"over training runs: {b} against {a}, {found}")
    console.result(f"{result['b']}: {result['wins']} wins, {result['losses']} losses, {result['ties']} ties")
    if flips := result["flipped"]:
        cells = [[f["id"], f["seed"], *(_short(f[key]) for key in ("gold", "a", "b"))] for f in flips[:_SHOWN]]
        more = f", the first {_SHOWN} of {len(flips)}; all with --json" if len(flips) > _SHOWN else ""
        console.table(f"answers that flipped{more}", ["item", "seed", "gold", result["a"], result["b"]], cells)


def by_item(responses: Sequence[Graded]) -> dict[str, float]:
    """Item -> the share of its responses that are right, over samples and passes; or the mean of their scores."""
    values: dict[str, list[float]] = {}
    for r in responses:
        if (value := r.get("score", r["right"])) is not None:
            values.setdefault(r["id"], []).append(value)
    return {i: fmean(of_item) for i, of_item in values.items()}


def _check(a: Sequence[Score], b: Sequence[Score]) -> list[str]:
    """What to warn of. UsageError where the scores cannot be set against each other."""
    first, warnings = a[0], []
    for side in (a, b):
        weights: dict[str, str] = {}
        for one in side:
            if one.label in weights.values():
                raise UsageError(f"--compare: {one.label} is named twice on one side; a training run counts once")
            if (same := weights.setdefault(one.result["settings"]["made_by"], one.label)) != one.label:
                warnings.append(f"{same} and {one.label} are the same weights, not two training runs")
    for one in (*a, *b):
        if one.result.get("own") and not all("score" in r for r in one.responses):
            judge = "; alpaca_eval needs --judge-url" if one.result["task"] == "alpaca_eval" else ""
            raise UsageError(
                f"--compare {one.label}: {one.result['task']} is not right or wrong, and its {one.result['metric']} is "
                f"not there item by item; score it again{judge}"
            )
        if first.result["n"] != one.result["n"] or not _same_items(first, one):
            raise UsageError(
                f"--compare: {first.label} was scored on {first.result['n']} items and {one.label} on "
                f"{one.result['n']}, and they are not the same; score both with the same --limit and --data"
            )
        settings = [flat({key: score.result["settings"].get(key, {}) for key in _SAME_SCORE}) for score in (first, one)]
        if changed := [
            line for line in differences(*settings) if not line.startswith(("items:", "scored_by.missing:"))
        ]:
            warnings.append(f"{first.label} and {one.label} were scored in different ways: {'; '.join(changed)}")
    return warnings


def _same_items(a: Score, b: Score) -> bool:
    """Whether two scores are of the same items: by their digest, else by prompt and gold answer of each, and where the
    prompts are written by different templates by the gold answers alone."""
    settings = [one.result["settings"] for one in (a, b)]
    if settings[0]["items"] == settings[1]["items"]:
        return True
    in_same_words = settings[0]["protocol"].get("template") == settings[1]["protocol"].get("template")
    asked = [
        {r["id"]: (r.get("prompt") if in_same_words else None, r["gold"]) for r in one.responses} for one in (a, b)
    ]
    return asked[0] == asked[1]


def _by_place(responses: Sequence[Graded]) -> dict[tuple[str, int, int], Graded]:
    """By (item, number of the pass, sample): passes are counted, since their seeds may differ."""
    passes = {seed: k for k, seed in enumerate(dict.fromkeys(r["seed"] for r in responses))}
    return {(r["id"], passes[r["seed"]], r["sample"]): r for r in responses}


def _short(text: str | None) -> str:
    return "(none)" if text is None else text if len(text) <= _WIDTH else text[: _WIDTH - 1] + "…"


class Difference(NamedTuple):
    """The mean difference, its 95 % interval (2.5 % and 97.5 % of the resamples), and its two-sided p-value."""

    mean: float
    low: float
    high: float
    p: float


def paired_bootstrap(differences: Tensor, seed: int = 0, resamples: int = RESAMPLES) -> Difference:
    """``differences`` [N]: an item's score of B, averaged over its responses, less that of A. Items are drawn again;
    the luck of sampling is in their scores already. The same seed draws the same: B against A is the mirror image.

    p is the share of resamples at least as far from their own mean as that is from 0, the observed one counted in:
    1 where nothing differs, and never below 1 / (R + 1).
    """
    values, generator = differences.double(), torch.Generator().manual_seed(seed)
    n = len(values)
    means = []
    for start in range(0, resamples, at_once := max(1, _CELLS // n)):
        items = torch.randint(n, (min(at_once, resamples - start), n), generator=generator)
        means.append(values[items].mean(1))
    mean, drawn = values.mean(), torch.cat(means)  # [], [R]
    extreme = int(((drawn - mean).abs() >= mean.abs() - 1e-12).sum())  # less what rounding makes
    low, high = drawn.quantile(torch.tensor([(1 - LEVEL) / 2, (1 + LEVEL) / 2], dtype=torch.float64)).tolist()
    return Difference(mean.item(), low, high, (1 + extreme) / (resamples + 1))


def welch(a: Sequence[float], b: Sequence[float]) -> dict[str, Any]:
    """Welch's t-test of training runs, two or more a side: its interval of mean(b) - mean(a), and its two-sided p.
    Both are None where neither side varies."""
    result: dict[str, Any] = {}
    for side, scores in (("a", a), ("b", b)):
        result |= {f"mean_{side}": fmean(scores), f"std_{side}": stdev(scores), f"n_{side}": len(scores)}
    difference = result["mean_b"] - result["mean_a"]
    result |= {"difference": difference, "interval": None, "p": None, "degrees": None}
    variances = [stdev(scores) ** 2 / len(scores) for scores in (a, b)]
    if sum(variances) < 1e-24:
        return result
    error = math.sqrt(sum(variances))
    degrees = sum(variances) ** 2 / sum(v * v / (len(x) - 1) for v, x in zip(variances, (a, b), strict=True))

    half = t_quantile(degrees) * error
    interval = [difference - half, difference + half]
    return result | {"interval": interval, "p": float(two_sided(difference / error, degrees)), "degrees": degrees}


def two_sided(t: Any, degrees: float) -> Any:
    """Student's t-distribution: the chance of a |t| at least this large, as mpmath's number."""
    return mpmath.betainc(degrees / 2, 0.5, 0, degrees / (degrees + t * t), regularized=True)


@cache
def t_quantile(degrees: float) -> float:
    """The |t| within which ``LEVEL`` of Student's t-distribution lies."""
    # 1.9 and 13 lie around it: 1.96 at infinitely many degrees and 12.71 at 1
    return float(mpmath.findroot(lambda t: two_sided(t, degrees) - (1 - LEVEL), (1.9, 13.0), solver="anderson"))
