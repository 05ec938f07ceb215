"""``lco-lite eval TASK --compare A B``: two scores that are there already, item by item.

A and B are stages of one run (``sft``, ``rl-lch``) or ``RUN/STAGE``. What is told is B less A.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lco_lite.console import Console
from lco_lite.errors import UsageError
from lco_lite.evaluation.prompts import score_name
from lco_lite.evaluation.summary import Graded
from lco_lite.files import read_jsonl
from lco_lite.run import Run, differences, flat
from lco_lite.tasks import load_task

RESAMPLES = 10_000
_CELLS = 2**22  # numbers drawn at once
_SHOWN, _WIDTH = 20, 40  # answers that flipped, and characters of each
_SAME_SCORE = ("sampling", "protocol", "items")


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
    console: Console,
    as_json: bool,
) -> None:
    """Both scores, their difference and the answers that flipped, a task after the other."""
    if not tasks:
        own = (Run(runs / name) if name else Run.newest(runs)).recipe().task
        if own is None:
            raise UsageError("eval --compare: name a task: the run's recipe has none")
        tasks = [own]
    results = {}
    for task in tasks:
        a, b = (find(runs, name, task, which, scoring) for which in pair)
        results[task], warnings = compare(a, b)
        for line in warnings:
            console.warn(f"{task}: {line}")
    if as_json:
        return console.emit(results)
    for task, result in results.items():
        show(console, task, result)


def find(runs: Path, name: str | None, task: str, which: str, scoring: str) -> Score:
    """The score of STAGE or RUN/STAGE. UsageError with the command that makes it where it is not there."""
    run_name, _, stage = which.rpartition("/")
    run_name = run_name or name or Run.newest(runs).name
    run = Run(runs / run_name)
    if not stage or not run.path.is_dir():
        raise UsageError(f"--compare {which}: a stage of the run, or RUN/STAGE; no run {run_name!r} is in {runs}/")
    file = run.eval_path(score_name(load_task(task).name, scoring), stage)
    responses = file.with_suffix(".rows.jsonl")
    if not file.exists() or not responses.exists():
        flags = f"--policy {stage}" if run.has_recipe() else "--model MODEL"
        flags += " --scoring likelihood" if scoring == "likelihood" else ""
        flags += f" --name {run_name}" + ("" if str(runs) == "runs" else f" --runs {runs}")
        raise UsageError(
            f"run {run_name} has no score of {stage} on {task} yet; this makes it:\n  lco-lite eval {task} {flags}"
        )
    return Score(which, json.loads(file.read_text(encoding="utf-8")), read_jsonl(responses))


def compare(a: Score, b: Score) -> tuple[dict[str, Any], list[str]]:
    """(result for ``--json``, warnings). UsageError where the two have not answered the same items."""
    warnings = _check(a, b)
    n, shares = a.result["n"], [_shares(one.responses) for one in (a, b)]
    seeds_a, seeds_b = (list(dict.fromkeys(r["seed"] for r in one.responses)) for one in (a, b))
    paired = seeds_a == seeds_b
    if not paired:
        warnings.append(f"{a.label} has other seeds than {b.label}: items are drawn again, seeds are averaged over")
        shares = [{i: [fmean(by_pass)] for i, by_pass in one.items()} for one in shares]
    columns = len(seeds_a) if paired else 1
    # what fits neither window is wrong for both
    ids, wrong = sorted(shares[0] | shares[1]), [0.0] * columns
    of_a, of_b = (torch.tensor([one.get(i, wrong) for i in ids], dtype=torch.float64) for one in shares)
    grid = torch.zeros(n, columns, dtype=torch.float64)  # [N, S]
    grid[: len(ids)] = of_b - of_a
    by_item = grid.mean(1)  # [N]
    wins, losses = int((by_item > 1e-12).sum()), int((by_item < -1e-12).sum())
    mean, low, high, p = paired_bootstrap(grid)
    result = {"a": a.label, "b": b.label, "mean_a": a.result["mean"], "mean_b": b.result["mean"]}
    result |= {"difference": mean, "interval": [low, high], "p": p, "resamples": RESAMPLES, "items": n}
    result |= {"seeds": columns if paired else None, "wins": wins, "losses": losses, "ties": n - wins - losses}
    return result | {"flipped": flipped(a.responses, b.responses)}, warnings


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
    """The numbers in percent, then the first answers that flipped."""
    mean_a, mean_b = 100 * result["mean_a"], 100 * result["mean_b"]
    console.note(f"{task}: {result['a']} {mean_a:.1f} → {result['b']} {mean_b:.1f}")
    low, high = result["interval"]
    over = f"{result['items']} items" + (f" and {result['seeds']} seeds" if result["seeds"] else "")
    console.note(
        f"difference {100 * result['difference']:+.1f}, 95 % interval {100 * low:+.1f} to {100 * high:+.1f}, "
        f"p = {result['p']:.4f} (paired bootstrap over {over}, {result['resamples']:,} resamples)"
    )
    console.note(f"{result['b']}: {result['wins']} wins, {result['losses']} losses, {result['ties']} ties")
    if flips := result["flipped"]:
        cells = [[f["id"], f["seed"], *(_short(f[key]) for key in ("gold", "a", "b"))] for f in flips[:_SHOWN]]
        more = f", the first {_SHOWN} of {len(flips)}; all with --json" if len(flips) > _SHOWN else ""
        console.table(f"answers that flipped{more}", ["item", "seed", "gold", result["a"], result["b"]], cells)


def _check(a: Score, b: Score) -> list[str]:
    """What to warn of. UsageError where the scores cannot be set against each other."""
    for one in (a, b):
        if one.result.get("own"):
            raise UsageError(f"--compare: task {one.result['task']} is not right or wrong item by item")
    golds = [{r["id"]: r["gold"] for r in one.responses} for one in (a, b)]
    same = a.result["settings"]["items"] == b.result["settings"]["items"]
    if a.result["n"] != b.result["n"] or not (same or golds[0] == golds[1]):
        raise UsageError(
            f"--compare: {a.label} was scored on {a.result['n']} items and {b.label} on {b.result['n']}, and they are "
            "not the same; score both with the same --limit and --data"
        )
    settings = [flat({key: one.result["settings"][key] for key in _SAME_SCORE}) for one in (a, b)]
    changed = [line for line in differences(*settings) if not line.startswith("items:")]
    return [f"{a.label} and {b.label} were scored in different ways: {'; '.join(changed)}"] if changed else []


def _shares(responses: Sequence[Graded]) -> dict[str, list[float]]:
    """Item -> pass by pass, the share of its samples that are right."""
    verdicts: dict[str, dict[int, list[bool]]] = {}
    for r in responses:
        verdicts.setdefault(r["id"], {}).setdefault(r["seed"], []).append(r["right"])
    return {i: [fmean(right) for right in by_seed.values()] for i, by_seed in verdicts.items()}


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
    """``differences`` [N, S]: B's score less A's. The same seed draws the same: B against A is the mirror image.

    p is the share of resamples at least as far from their own mean as that is from 0, the observed one counted in:
    1 where nothing differs, and never below 1 / (R + 1).
    """
    values, generator = differences.double(), torch.Generator().manual_seed(seed)
    n, s = values.shape
    at_once = max(1, _CELLS // (n * s))
    means = []
    for start in range(0, resamples, at_once):
        r = min(at_once, resamples - start)
        items = torch.randint(n, (r, n), generator=generator)
        seeds = torch.randint(s, (r, s), generator=generator)
        means.append(values[items].mean(1).gather(1, seeds).mean(1))
    mean, drawn = values.mean(), torch.cat(means)  # [], [R]
    extreme = int(((drawn - mean).abs() >= mean.abs() - 1e-12).sum())  # less what rounding makes
    low, high = drawn.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return Difference(mean.item(), low, high, (1 + extreme) / (resamples + 1))
