"""How a grid of cells is worked off: each in a process and a run folder of its own, several at once, none twice.

    RUNS/studies/RECIPE/start-ID-seed-3/      warm-up and reward model of a seed, which cells share
    RUNS/studies/RECIPE/rl-kld-ID-seed-3/     a cell, a run like any other: cell.json says which, row.json what came out
    RUNS/studies/NAME/                        what the study says: README.md, study.json, tables, plots
    RUNS/studies/rows/                        what came out of each cell; enough to go on without its run

An ID is that of the settings that decide the outcome, and of the files of data and code that they name. So studies
share cells that are the same, and a study that is started again goes on: cells that are done are read, one that was
stopped goes on at its checkpoint.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from lco_lite.console import Console
from lco_lite.context import InterruptGuard
from lco_lite.errors import Interrupted, LcoError
from lco_lite.files import is_there, sha256, write_json
from lco_lite.progress import clock_time
from lco_lite.recipe.file import find_recipe, flat, load_recipe
from lco_lite.run import stage_settings
from lco_lite.study.base import TUNING_SEED, Cell, Results, Row, Study, read_row
from lco_lite.workers import Keeper, environment, python

_POLL = 0.2  # seconds


@dataclass(frozen=True)
class Job:
    """A cell with the folder it runs in; ``start``: that of its seed's start, None of a start itself."""

    cell: Cell = field(compare=False)
    folder: Path
    start: Job | None = field(compare=False)

    @property
    def row_file(self) -> Path:
        return self.folder / "row.json"


class Grid:
    """The cells of a study under a recipe and ``--set`` items. ``known``: rows of earlier studies, by id."""

    def __init__(
        self,
        study: Study,
        recipe: str | None,
        sets: Sequence[str],
        runs: Path,
        console: Console,
        known: Mapping[str, Row] | None = None,
    ) -> None:
        self.study, self.sets, self.console, self.known = study, list(sets), console, known or {}
        self.path = find_recipe(recipe or study.recipe)
        self.recipe_sum = sha256(self.path)
        self.recipe = load_recipe(self.path, self.sets)
        self.root = runs / "studies" / self.recipe.name
        self._names: dict[str, str] = {}

    def jobs(self, seeds: Sequence[int], done: Results) -> list[Job]:
        only = self.study.only
        cells = self.study.cells(self.recipe, seeds, done)
        return [self.job(cell) for cell in cells if not only or cell.label in only or cell.seed == TUNING_SEED]

    def job(self, cell: Cell) -> Job:
        sets = {key: value for key, value in cell.sets.items() if not key.startswith("rl.")}
        start = Cell("start", cell.seed, sets, "start")
        before = Job(start, self.root / self._folder_name(start), None)
        return Job(cell, self.root / self._folder_name(cell), before)

    def _folder_name(self, cell: Cell) -> str:
        key = json.dumps([cell.work, cell.sets, cell.options], sort_keys=True)
        if key not in self._names:
            self._names[key] = self._name(cell)
        return f"{self._names[key]}-seed-{cell.seed}"

    def _name(self, cell: Cell) -> str:
        """What is done, and a hash of all settings that decide what comes out, but for the seed."""
        recipe = load_recipe(self.path, self.sets, {"seed": cell.seed, **cell.sets})
        before = [stage for stage in recipe.stages if not stage.startswith("rl-")]
        stages = {"train": [recipe.rl.stage], "start": before}.get(cell.work, recipe.stages)
        settings: dict[str, Any] = {}
        for stage in stages:
            settings |= stage_settings(recipe, stage)
        settings |= {"eval": recipe.eval.model_dump(mode="json"), "options": dict(cell.options)}
        if cell.work == "train":
            settings |= {"eval_every": recipe.rl.eval_every, "eval_items": recipe.rl.eval_items}
        if files := _sums(flat(settings)):
            settings["files"] = files
        settings.pop("seed", None)  # a run without a stage before rl has none there
        what = {"start": "start", "train": recipe.rl.stage}.get(
            cell.work, cell.work.rpartition(".")[2].partition(":")[0]
        )
        return f"{what}-{hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]}"

    def row(self, job: Job) -> Row | None:
        """What came out, if it is done, under the label that this study has for it."""
        row = self.known.get(job.folder.name)
        if job.row_file.exists():
            row = read_row(job.row_file, job.folder.name)
            if job.start is not None and job.start.row_file.exists():
                row["start"] = read_row(job.start.row_file, job.start.folder.name).get("scores", {})
        return None if row is None else row | {"label": job.cell.label, "id": job.folder.name}

    def results(self, jobs: Iterable[Job]) -> Results:
        return Results(row for row in map(self.row, jobs) if row is not None)

    def settled(self, seeds: Sequence[int]) -> list[Job]:
        """All cells that can be named by what is done."""
        jobs, before = self.jobs(seeds, Results()), -1
        while len(jobs) != before:
            before, jobs = len(jobs), self.jobs(seeds, self.results(jobs))
        return jobs

    def work_off(self, seeds: Sequence[int], at_once: int) -> Results:
        """All cells of the study. Raises Interrupted after Ctrl-C, when all that ran have written a checkpoint, and
        LcoError at the end where cells failed."""
        failed: dict[Job, str] = {}
        while True:
            jobs = self.settled(seeds)
            missing = [job for job in jobs if self.row(job) is None and job not in failed]
            if not missing:
                break
            failed |= self._run(missing, len(jobs), at_once)
        if failed:
            lines = [f"  {job.cell.label}, seed {job.cell.seed}: {why}" for job, why in failed.items()]
            raise LcoError(
                "\n".join([f"{len(failed)} of {len(jobs)} cells failed; the same command tries them again:", *lines])
            )
        return self.results(jobs)

    def _run(self, missing: Sequence[Job], total: int, at_once: int) -> dict[Job, str]:
        """Works off these jobs and the starts they need; returns those that failed, with why."""
        starts = {
            job.start.folder: job.start for job in missing if job.start is not None and not job.start.row_file.exists()
        }
        waiting, running, failed = [*starts.values(), *missing], dict[Job, Worker](), dict[Job, str]()
        here = 0
        with (
            InterruptGuard(self.console) as guard,
            self.console.progress(total, self.study.name, total - len(missing)) as line,
        ):
            while waiting or running:
                if guard.requested:
                    self._stop(list(running.values()))
                free = at_once - len(running)
                broken = {job.folder: why for job, why in failed.items()}
                for job in list(waiting):
                    if job.start is not None and job.start.folder in broken:
                        waiting.remove(job)
                        failed[job] = f"its start failed with {broken[job.start.folder]}"
                ready = [j for j in waiting if j.start is None or j.start.row_file.exists()]
                for job in ready[:free]:
                    waiting.remove(job)
                    running[job] = Worker(job, self, threads=max(1, (os.cpu_count() or 1) // at_once))
                for job, worker in list(running.items()):
                    code = worker.process.poll()
                    if code is None:
                        continue
                    del running[job]
                    worker.close()
                    if job.row_file.exists() and code == 0:
                        if job.start is not None:
                            here += 1
                        self.console.note(self._told(job, time.monotonic() - worker.began))
                    else:
                        failed[job] = worker.why(code)
                        self.console.warn(f"{job.cell.label}, seed {job.cell.seed}: {failed[job]}")
                line.update(total - len(missing) + here)
                time.sleep(_POLL)
        return {job: why for job, why in failed.items() if job.start is not None}

    def _told(self, job: Job, seconds: float) -> str:
        row = self.row(job) or {}
        after = row.get("after")
        found = f"{after['mean']:.3f}" if after else row.get("failed") or "done"
        return f"{job.cell.label}, seed {job.cell.seed}: {found} ({clock_time(seconds)})"

    def _stop(self, workers: Sequence[Worker]) -> None:
        """Each finishes its batch and writes a checkpoint."""
        for worker in workers:
            worker.process.send_signal(signal.SIGTERM)
        for worker in workers:
            worker.process.wait()
            worker.close()
        raise Interrupted("stopped; cells that ran have their checkpoints, and the same command goes on from there")


def _sums(settings: Mapping[str, Any]) -> dict[str, str]:
    """The sha256 of each local file that a setting names, alone, with more or as ``FILE.py:NAME``; a stage looks to the
    weights it rests on itself."""
    values = [value if isinstance(value, list) else [value] for key, value in settings.items() if key[:6] != "model."]
    parts = (part for value in values for one in value if isinstance(one, str) for part in one.split(":"))
    named = (Path(part) for part in parts)  # custom:FILE.py:NAME too
    return {str(file): sha256(file) for file in named if file.suffix and is_there(file) and file.is_file()}


class Worker:
    """The process of a job, in a session of its own: Ctrl-C reaches it through us, once."""

    def __init__(self, job: Job, grid: Grid, threads: int) -> None:
        self.job, self.began = job, time.monotonic()
        job.folder.mkdir(parents=True, exist_ok=True)
        cell = job.cell
        given: dict[str, Any] = {
            "recipe": str(grid.path.resolve()),
            "recipe_sha256": grid.recipe_sum,
            "given": list(grid.sets),
            "sets": {"seed": cell.seed, **cell.sets},
        }
        given |= {"label": cell.label, "seed": cell.seed, "work": cell.work, "options": dict(cell.options)}
        given |= {"id": job.folder.name, "start": None if job.start is None else job.start.folder.name}
        write_json(job.folder / "cell.json", given)
        self.log: TextIO = (job.folder / "work.log").open("a", encoding="utf-8")
        self.said_before = self.log.tell()  # by those that tried this before
        own = {"TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": str(threads), **environment()}
        command = python("lco_lite.study.work", str(job.folder))
        self.process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=self.log, stderr=self.log, env=own, start_new_session=True
        )
        self.keeper = Keeper(self.process.pid, "TERM")  # a checkpoint, should this process be killed

    def close(self) -> None:
        """Its process has ended."""
        self.keeper.dismiss()
        self.log.close()

    def why(self, code: int) -> str:
        own = (self.job.folder / "work.log").read_bytes()[self.said_before :]
        lines = own.decode("utf-8", errors="replace").strip().splitlines()
        said = next((line for line in reversed(lines) if line.startswith("error:")), lines[-1] if lines else "")
        return f"exit status {code}: {said} (all of it: {self.job.folder / 'work.log'})"
