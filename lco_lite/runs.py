"""``lco-lite runs``: which runs there are, how far they got, what they take on the disk, and what of it can go.

Can go: of a stage that is done its checkpoints and the responses and pairs it was trained on; of one under way what no
checkpoint that is kept would go back to. Weights, logs, samples and scores stay.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import psutil
import typer
from filelock import FileLock, Timeout

from lco_lite.console import Console
from lco_lite.errors import UsageError
from lco_lite.evaluation.summary import read_score, score_files
from lco_lite.files import remove, shown_bytes
from lco_lite.metrics import read_log
from lco_lite.run import Run, StageFolder, no_run
from lco_lite.visible import visible


@dataclass(frozen=True)
class Spare:
    """What nothing needs any more, and why."""

    path: Path
    why: str

    @property
    def size(self) -> int:
        return size_of(self.path)


def spare(run: Run) -> list[Spare]:
    """In the order of the stages; of one that is a link, and so another run's, nothing."""
    found = list[Spare]()
    for stage in run.stages():
        if stage.path.is_symlink():
            continue
        try:
            is_done = stage.is_done()
        except UsageError:
            continue  # of one that is damaged nothing goes
        rollouts, pairs, responses = (stage.path / name for name in ("rollouts", "pairs.jsonl", "responses.jsonl"))
        if is_done:
            found += [
                Spare(stage.checkpoints, "the stage is done: only more steps, and policies STAGE@N, are made of them"),
                Spare(rollouts, "their updates are made"),
                Spare(pairs, "sampled for this stage, which is done"),
                Spare(responses, "the pairs are made of them"),
            ]
            continue
        kept = stage.kept_steps()
        for file in sorted(rollouts.glob("step-*.jsonl")):
            if kept and file.stem[5:].isdecimal() and int(file.stem[5:]) <= min(kept):
                found.append(Spare(file, "its updates are in every checkpoint"))
        if pairs.exists():
            found.append(Spare(responses, "the pairs are made of them"))
    return [one for one in found if one.path.exists() and (one.path.is_file() or any(one.path.iterdir()))]


def show_runs(root: Path, name: str | None, console: Console, json: bool) -> None:
    """All runs under ``root``, the newest first, or one in detail. Raises UsageError where there is none."""
    told = [describe(run) for run in ([one_run(root, name)] if name else all_runs(root))]
    if json:
        return console.emit(told[0] if name else told)
    if not told:
        return console.note(f"no run under {root}/ yet: start with `lco-lite run recipes/quickstart.yaml`")
    console.table("", ["run", "stage", "state", "score", "size", "changed"], [r for one in told for r in _rows(one)])
    if name:
        console.table("", ["folder or file", "size", "can go"], _part_rows(told[0]["parts"]))
    if can_go := sum(one["can_go_bytes"] for one in told):
        console.note(f"{shown_bytes(can_go)} can go: lco-lite runs {f'{_line(name)} ' if name else ''}--clean")


def clean_runs(root: Path, name: str | None, console: Console, yes: bool, json: bool) -> None:
    """Deletes what can go, of one run or of all, after it was shown and agreed to. A run that is in use is left alone.
    Raises UsageError where nobody can be asked, and for a named run that is in use."""
    chosen = [one_run(root, name)] if name else all_runs(root)
    planned = {run: found for run in chosen if (found := spare(run))}
    total = sum(one.size for found in planned.values() for one in found)
    if not planned:
        console.note("nothing can go")
    else:
        lines = [[_line(str(one.path)), shown_bytes(one.size), one.why] for found in planned.values() for one in found]
        console.table("", ["to delete", "size", "why it can go"], lines)
    if planned and not yes:
        if not sys.stdin.isatty():
            raise UsageError(f"runs --clean would delete {shown_bytes(total)}: --yes does it without asking")
        if not typer.confirm(f"Delete {shown_bytes(total)}?", err=json):
            return console.note("nothing is deleted")
    deleted = list[dict[str, Any]]()
    for run, found in planned.items():
        try:
            with _held(run):
                for one in spare(run):  # as it is now that nobody else works there
                    if one in found:
                        deleted.append({"run": run.name, "path": str(one.path), "bytes": one.size})
                        remove(one.path)
        except UsageError as e:
            if name:
                raise
            console.warn(str(e))
    freed = sum(one["bytes"] for one in deleted)
    if json:
        console.emit({"deleted": deleted, "bytes": freed})
    elif planned:
        console.note(f"{shown_bytes(freed)} deleted")


def all_runs(root: Path) -> list[Run]:
    """Those used last come first."""
    made = {file.parent for name in ("recipe.yaml", "eval/*.json", "*/stage.json") for file in root.glob(f"*/{name}")}
    folders = {path if path.parent == root else path.parent for path in made}
    return [Run(path) for path in sorted(folders, key=lambda path: (-_changed(path), path.name))]


def one_run(root: Path, name: str) -> Run:
    found = {run.name: run for run in all_runs(root)}
    if name not in found and (run := Run.known(name, root)) is not None:
        return run
    if name not in found:
        raise no_run(name, root)
    return found[name]


def describe(run: Run) -> dict[str, Any]:
    """A run as JSON; ``parts``: what lies in it, stage folders by what is in them."""
    can_go, running = spare(run), is_running(run)
    stages = [_stage(run, stage) for stage in run.stages()]
    under_way = [one for one in stages if one["state"] in ("stopped", "failed")]
    if running and under_way:
        max(under_way, key=lambda one: _changed(run.path / one["name"]))["state"] = "running"
    scores = _scores(run)
    named = {one["name"] for one in stages}
    bare = [{"name": name, "state": None, "step": None, "steps": None} for name in scores if name not in named]
    stages = [*bare, *stages]  # base, and what else is only scored
    places = sorted(p for top in run.path.iterdir() for p in (top.iterdir() if top.name in named else [top]))
    whys = {one.path: one.why for one in can_go} | {one.path.parent: f"in part: {one.why}" for one in can_go[::-1]}
    parts = [
        {"path": str(path.relative_to(run.path)), "bytes": size_of(path), "can_go": whys.get(path)}
        for path in places
        if not path.name.startswith(".lock")
    ]
    return {
        "name": run.name,
        "path": str(run.path),
        "running": running,
        "stages": [one | {"scores": scores.get(one["name"], {})} for one in stages],
        "bytes": size_of(run.path),
        "can_go_bytes": sum(one.size for one in can_go),
        "changed": datetime.fromtimestamp(_changed(run.path)).astimezone().isoformat(timespec="seconds"),
        "parts": parts,
    }


def is_running(run: Run) -> bool:
    """Whether a process of this machine has it."""
    try:
        if not psutil.pid_exists(int((run.path / ".lock").read_text(encoding="utf-8"))):
            return False
        with FileLock(run.path / ".lock.held", timeout=0):
            return False
    except Timeout:
        return True
    except (OSError, ValueError, OverflowError, NotImplementedError):
        return False


def size_of(path: Path) -> int:
    """Bytes of a file, or of all files below a folder; links count nothing."""
    if path.is_symlink():
        return 0
    if path.is_file():
        return path.stat().st_size
    files = (Path(folder, name) for folder, _, names in os.walk(path) for name in names)
    return sum(file.stat().st_size for file in files if not file.is_symlink() and file.exists())


def _stage(run: Run, stage: StageFolder) -> dict[str, Any]:
    """``state``: done, stopped, failed, or damaged. ``step`` of ``steps``: as far as its metrics go."""
    step, steps, state = 0, None, "damaged"
    with contextlib.suppress(UsageError, OSError):
        step = max((line["step"] for line in read_log(stage.metrics)), default=0)
        if (begun := stage.record("stage.json")) is not None:
            steps = begun.get("steps") or _planned(stage.name, begun["settings"])
            state = "done" if stage.is_done() else "failed" if _failed(run, stage) else "stopped"
    return {"name": stage.name, "state": state, "step": step, "steps": steps}


def _planned(stage: str, settings: dict[str, Any]) -> int | None:
    """Of a stage that older versions began: the steps that its settings name, where they do."""
    return settings.get({"sft": "sft.max_steps", "rm": "train_rm.max_steps"}.get(stage, "rl.steps"))


def _failed(run: Run, stage: StageFolder) -> bool:
    """Whether the run has said why it failed since the stage last wrote anything."""
    log = run.path / "error.log"
    return log.exists() and log.stat().st_mtime >= _changed(stage.path)


def _scores(run: Run) -> dict[str, dict[str, Any]]:
    """By stage and task: metric, mean, std, n, seeds; or what is ``damaged``."""
    scores = dict[str, dict[str, Any]]()
    for file in score_files(run.path):
        task, _, stage = file.stem.rpartition("--")
        try:
            score = read_score(file)
            kept = {name: score[name] for name in ("metric", "mean", "std", "n", "seeds")}
        except UsageError as e:
            kept = {"damaged": str(e)}
        scores.setdefault(stage, {})[task] = kept
    return scores


def _part_rows(parts: list[dict[str, Any]]) -> Iterator[list[str]]:
    """What can go, then the rest, the largest first; what is under a hundredth of all of it stands in one row."""
    small = sum(part["bytes"] for part in parts) / 100
    rest = [part for part in parts if part["bytes"] < small and not part["can_go"]]
    for part in sorted(parts, key=lambda part: (not part["can_go"], -part["bytes"])):
        if len(rest) < 2 or part not in rest:
            yield [_line(part["path"]), shown_bytes(part["bytes"]), part["can_go"] or ""]
    if len(rest) > 1:
        yield [f"{len(rest)} smaller ones", shown_bytes(sum(part["bytes"] for part in rest)), ""]


def _rows(told: dict[str, Any]) -> Iterator[list[str]]:
    day, _, clock = told["changed"].partition("T")
    of_run = [shown_bytes(told["bytes"]), clock[:5] if day == datetime.now().date().isoformat() else day]
    for i, one in enumerate(told["stages"] or [{"name": "", "state": None, "scores": {}}]):
        done = one["state"] in ("done", None)
        where = "" if done else f" at {one['step']}" + (f"/{one['steps']}" if one["steps"] else "")
        scores = [f"{task} {_score(score)}" for task, score in one["scores"].items()]
        first = i == 0
        row = [_line(told["name"]) if first else "", one["name"], f"{one['state'] or ''}{where}", "\n".join(scores)]
        yield row + (of_run if first else ["", ""])


def _line(name: str) -> str:
    """A name on one line; line ends are for what a cell of more lines means by them."""
    return visible(name, lines=False)


def _score(score: dict[str, Any]) -> str:
    if "damaged" in score:
        return "damaged"
    numbers = [f"{score[key]:.3f}" for key in ("mean", "std") if score[key] is not None]
    own = "" if score["metric"] in ("pass@1", "accuracy") else f"{score['metric']} "
    return own + "±".join(numbers)


def _changed(path: Path) -> float:
    """When any file in there was last written; the locks are not."""
    times = [
        file.stat().st_mtime
        for folder, _, names in os.walk(path)
        for name in names
        if not name.startswith(".lock") and (file := Path(folder, name)).exists()
    ]
    return max(times, default=path.stat().st_mtime)


@contextlib.contextmanager
def _held(run: Run) -> Iterator[None]:
    """The run's lock; which run was used last stays as it was."""
    holder, recipe, acquired = run.path / ".lock", run.path / "recipe.yaml", False
    before = next((file.stat() for file in (holder, recipe) if file.exists()), None)
    try:
        with run.lock():
            acquired = True
            yield
    finally:
        if acquired and before is not None:
            os.utime(holder, ns=(before.st_atime_ns, before.st_mtime_ns))
