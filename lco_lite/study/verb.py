"""``lco-lite study NAME``: works off the grid and writes what it says; started again, it goes on."""

from __future__ import annotations

import os
import shlex
from collections.abc import Sequence
from difflib import get_close_matches
from importlib import import_module
from pathlib import Path

from lco_lite.console import Console
from lco_lite.errors import LcoError, UsageError
from lco_lite.files import write_errors
from lco_lite.models.loading import resolve_device
from lco_lite.progress import clock_time
from lco_lite.study.base import TUNING_SEED, Findings, Study
from lco_lite.study.grid import Grid
from lco_lite.study.page import known_rows, ordered, write

# name, which is that of its file -> class
STUDIES = {
    "methods": "MethodsStudy",
    "dynamics": "Dynamics",
    "training": "WholeRun",
    "efficiency": "Efficiency",
    "convexity": "Convexity",
    "forgetting": "Forgetting",
    "feedback": "Feedback",
    "refresh": "Refresh",
    "variants": "Variants",
    "real": "RealModels",
}


def run_study(
    name: str,
    recipe: str | None,
    sets: Sequence[str],
    seeds: int | None,
    runs: Path,
    out: Path | None,
    jobs: int | None,
    only: Sequence[str],
    dry_run: bool,
    console: Console,
    as_json: bool,
) -> None:
    """All cells of the study, then its page; the page of what is done also where it is stopped or cells fail."""
    study = load_study(name)
    study.only = only
    if unknown := [label for label in only if label not in study.labels]:
        raise UsageError(f"study {name}: nothing is called {', '.join(unknown)}; there are: {'; '.join(study.labels)}")
    said = [word for item in sets for word in ("-s", item)]
    sets = [*(study.usual if recipe is None else ()), *sets]
    folder = out or runs / "studies" / name
    grid = Grid(study, recipe, sets, runs, console, known_rows(folder))
    if grid.recipe.task is None:
        raise UsageError(f"{grid.path}: names no task: what a study compares are scores on the held-out items of one")
    numbers = range(TUNING_SEED + 1, TUNING_SEED + 1 + (seeds or study.seeds))
    cores = (os.cpu_count() or 1) if resolve_device(grid.recipe.device).type == "cpu" else 1  # one run has the GPU
    at_once = jobs or max(1, min(2, cores // (grid.recipe.threads or 1)))
    if dry_run:
        return preview(grid, numbers, at_once, console)
    with write_errors(folder):  # before hours of work, not after
        folder.mkdir(parents=True, exist_ok=True)
    console.stage(name, f"{study.asks} Seeds {numbers[0]} to {numbers[-1]}, {at_once} at once")
    given = ["lco-lite", "study", name, *([recipe] if recipe else []), *said]

    def page() -> Findings:
        if only:
            study.only = [label for label in study.labels if label in only or _is_known(grid, label, numbers)]
        jobs_now = grid.settled(numbers)
        told = [word for label in study.only for word in ("--only", label)]
        command = shlex.join([*given, *told, "--seeds", str(len(numbers))])
        return write(study, grid.results(jobs_now), len(jobs_now), command, folder)

    try:
        grid.work_off(numbers, at_once)
    except LcoError:
        page()
        raise
    report = page()
    if as_json:
        console.emit({claim.name: {"verdict": claim.verdict, "why": claim.why} for claim in report.claims})
    else:
        show(report, console)
    console.done(folder / "README.md")


def _is_known(grid: Grid, label: str, seeds: Sequence[int]) -> bool:
    """Whether anything of it is done, whichever command ran it: the page of some runs tells of the others too."""
    grid.study.only = [label]
    return bool(grid.results(grid.settled(seeds)).of(label))


def show(report: Findings, console: Console) -> None:
    for claim in ordered(report.claims):
        console.result(f"{claim.verdict}: {claim.says} {claim.why}")
    for table in report.tables:
        if table.shown:
            console.table(table.title, table.columns, table.rows)


def preview(grid: Grid, seeds: Sequence[int], at_once: int, console: Console) -> None:
    """The cells, what of them is done, and how long the rest takes by those that are."""
    jobs = grid.settled(seeds)
    rows = {job: grid.row(job) for job in jobs}
    done = [row for row in rows.values() if row is not None]
    for label in dict.fromkeys(job.cell.label for job in jobs):
        mine = [job for job in jobs if job.cell.label == label]
        ended = sum(rows[job] is not None for job in mine)
        console.note(f"{label}: seeds {', '.join(str(job.cell.seed) for job in mine)}; {ended} of {len(mine)} done")
    left = len(jobs) - len(done)
    time = f", about {clock_time(sum(r['seconds'] for r in done) / len(done) * left / at_once)} left" if done else ""
    console.note(f"{len(jobs)} cells known so far, {len(done)} done, {at_once} at once{time}")


def list_studies(console: Console) -> None:
    for name in STUDIES:
        console.say(f"{name:12} {load_study(name).asks}")


def load_study(name: str) -> Study:
    """Raises UsageError with all names where there is none of this one."""
    if name not in STUDIES:
        near = get_close_matches(name, STUDIES, 1)
        hint = f"; did you mean {near[0]}?" if near else "."
        raise UsageError(f"no study {name!r}{hint} There are: {', '.join(STUDIES)}")
    study: Study = getattr(import_module(f"lco_lite.study.{name}"), STUDIES[name])()
    return study
