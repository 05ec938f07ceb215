"""A run folder: which stages are done, what may go on from where, and which process has it.

    runs/NAME/recipe.yaml  environment.json  sft/  rm/  rl-kld/  eval/TASK--STAGE.json

A stage counts as started once there is a checkpoint or a result of it. It remembers what it was started with
(``stage.json``); what it made is complete once ``done.json`` is there. What is said goes on only where it is the same;
what is not said stays as it was. Everything is written whole, so a run can be killed at any instant and goes on.
"""

from __future__ import annotations

import contextlib
import difflib
import errno
import json
import os
import re
import time
import uuid
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from filelock import FileLock, SoftFileLock, Timeout
from pydantic import BaseModel, Field, FiniteFloat, ValidationError

from lco_lite import ranks
from lco_lite.environment import environment
from lco_lite.errors import DataError, RecipeError, UsageError
from lco_lite.files import (
    Count,
    JsonLines,
    Sums,
    checksums,
    held,
    is_there,
    read_json,
    recover,
    remove,
    verify,
    write_errors,
    write_json,
    write_sealed_lines,
    write_text,
)
from lco_lite.metrics import read_log
from lco_lite.recipe import RUN_NAME, Recipe
from lco_lite.recipe.file import dump, flat, load_recipe, seal
from lco_lite.recipe.rl import REWARDS, RewardPart
from lco_lite.recipe.sections import OF_RUN, TaskColumns

# the files of a run, field by field: what is believed of them


class StartedWith(BaseModel):
    """Of the settings, by dotted key, those that are counted with."""

    seed: int | None = None
    sft_steps: Count | None = Field(None, alias="sft.max_steps")
    sft_epochs: FiniteFloat | None = Field(None, alias="sft.epochs")
    rm_steps: Count | None = Field(None, alias="train_rm.max_steps")
    rm_epochs: FiniteFloat | None = Field(None, alias="train_rm.epochs")
    rl_steps: Count | None = Field(None, alias="rl.steps")


class StageBegun(BaseModel):
    settings: StartedWith
    upstream: dict[str, str]
    started: str
    id: str = ""
    steps: Count | None = None
    inputs: Sums = {}


class StageResult(BaseModel):
    steps: Count = 0
    updates: Count = 0


class StageDone(BaseModel):
    id: str
    finished: str
    result: StageResult
    seconds: FiniteFloat | None = None
    order: Count = 0
    files: Sums = {}


class BestStep(BaseModel):
    step: Count
    score: FiniteFloat
    items: Count
    scored_by: dict[str, Any] = {}
    files: Sums = {}


class MadeOnDevice(BaseModel):
    kind: str


class MadeOn(BaseModel):
    packages: dict[str, str | None]
    device: MadeOnDevice


_RECORDS = {"stage.json": StageBegun, "done.json": StageDone, "best.json": BestStep}


@dataclass(frozen=True)
class Input:
    """What a stage is trained on and the run does not hold: what messages call it, and a sha256 of its content."""

    name: str
    sha256: str


class StageFolder:
    """One stage of a run: ``path`` and what lies in it."""

    def __init__(self, path: Path) -> None:
        self.name, self.path = path.name, path
        self.adapter, self.model = path / "adapter", path / "model"
        self.checkpoints, self.best = path / "checkpoints", path / "best"
        self.metrics, self.samples = path / "metrics.jsonl", path / "samples.jsonl"
        self._begun = time.monotonic()

    @ranks.once
    def is_done(self) -> bool:
        """UsageError where the stage says so and what it made is gone."""
        if self.record("done.json") is None:
            return False
        if not (self.adapter.exists() or self.model.exists()):
            gone = f"{self.path / 'done.json'} says that this stage is done, and neither adapter/ nor model/ is there."
            raise UsageError(gone + self._anew())
        return True

    @ranks.once
    def started(self) -> bool:
        """Whether there is a checkpoint or a result; pairs that were sampled for a reward model are one."""
        results = ("done.json", "adapter", "model", "best", "pairs.jsonl")
        return bool(self.kept_steps()) or any((self.path / made).exists() for made in results)

    def kept_steps(self) -> list[int]:
        """Those of which there is a checkpoint, in order."""
        return sorted(int(one.name.removeprefix("step-")) for one in self.checkpoints.glob("step-" + "[0-9]" * 8))

    @ranks.once
    def steps_done(self) -> int:
        """How many steps are in the result or, while there is none, in the newest checkpoint."""
        result = (self.record("done.json") or {"result": {}})["result"]
        return max([int(result.get("steps", result.get("updates", 0))), *self.kept_steps()])

    @ranks.once
    def best_step(self) -> dict[str, Any] | None:
        """``step``, held-out ``score`` and ``items`` of the best step that was kept, if one was, and the settings that
        it was ``scored_by``, where they are known."""
        kept = self.record("best/best.json")
        return kept and {"scored_by": {}} | {n: kept[n] for n in BestStep.model_fields if n in kept and n != "files"}

    @ranks.once
    def better_step(self) -> dict[str, Any] | None:
        """``best_step`` where the last step scored lower, or was not scored."""
        best, log = self.best_step(), read_log(self.metrics)
        last = log[-1].get("eval") if log else None
        is_better = best is not None and best["step"] != self.steps_done() and (last is None or last < best["score"])
        return best if is_better else None

    @ranks.once
    def owner(self) -> str | None:
        """What the stage's checkpoints carry; None of a stage that version 0.3 began."""
        begun = self.record("stage.json") or {}
        return str(begun["id"]) if "id" in begun else None

    @ranks.once
    def settings(self) -> dict[str, Any]:
        """What the stage was started with; nothing while it does not count as started."""
        return dict((self.record("stage.json") or {"settings": {}})["settings"]) if self.started() else {}

    @ranks.once
    def check(self, settings: dict[str, Any], upstream: dict[str, str]) -> list[str]:
        """Whether the stage may start or go on with this; ``upstream`` maps the stages it builds on to the ids of their
        results. Returns a line a setting that makes it longer, or shorter than it was planned. UsageError with every
        difference where it was started with something else, or has done more than is asked for."""
        before = self.record("stage.json")
        if not self.started():
            return []
        if before is None:
            unknown = f"{self.path} holds what a stage made and no stage.json: what it was started with is not known."
            raise UsageError(unknown + self._anew())
        old, new, ids = before["settings"], json.loads(json.dumps(settings)), before["upstream"]
        lengths = [key for key in _lengths(self.name) if old.get(key) != new.get(key)]
        after = [s.name for s in Run(self.path.parent).stages() if s.started() and self.name in s.upstream()]
        lines, done = list[str](), self.steps_done()
        if lengths and (after or not _reaches(self.name, old, new, done)):
            why = f"{', '.join(after)} rests on it as it is" if after else f"{done} steps are done"
            lines, lengths = [f"{line} ({why})" for line in _only(lengths, old, new)], []
        others = [key for key in {**old, **new} if key not in _lengths(self.name)]
        lines += _only(others, old, new)
        lines += [f"{name} was trained again since" for name in upstream if ids.get(name) != upstream[name]]
        lines += [f"{name} is no longer used" for name in ids if name not in upstream]
        if lines:
            lines = [f"{self.path} was started with something else (then → now):", *lines]
            raise UsageError("\n  ".join(lines) + "\n" + self._anew("Go back to that, start"))
        if lengths and self.is_done() and not self.kept_steps():
            longer = f"{self.path}: {', '.join(_only(lengths, old, new))}"
            raise UsageError(f"{longer} goes on from the last checkpoint, and none is left.{self._anew()}")
        return _only(lengths, old, new)

    @ranks.once
    def same_inputs(self, inputs: Mapping[str, Input]) -> None:
        """DataError where one of these, by setting, is not what the stage noted as it began. What is gone or was never
        noted, as in runs of earlier versions, passes."""
        noted = (self.record("stage.json") or {}).get("inputs", {}) if self.started() else {}
        for key, now in inputs.items():
            if (was := noted.get(key, now.sha256)) != now.sha256:
                sums = f"sha256 {now.sha256[:12]}…, in {self.path / 'stage.json'} {was[:12]}…"
                changed = f"{now.name}: has changed since {self.name} was trained on it ({key}: {sums})"
                raise DataError(f"{changed}. Put it back as it was.{self._anew()}")

    @ranks.once
    def begin(
        self, settings: dict[str, Any], upstream: dict[str, str], inputs: Mapping[str, Input] | None = None
    ) -> bool:
        """What ``check`` lets pass is remembered; returns whether anything is new. What was sampled for other settings
        or ``inputs`` is deleted, of a stage of another length what lies after its last checkpoint, and a stage that
        goes on after its end is open again. DataError where the best step is not as it was kept."""
        longer, before = self.check(settings, upstream), self.record("stage.json")
        self.verify_best()  # ``finish`` would tell hours later
        started, new = self.started(), json.loads(json.dumps(settings))
        noted = {"inputs": {key: one.sha256 for key, one in inputs.items()}} if inputs else {}
        same = started or (before or {}).get("inputs") == noted.get("inputs")
        if before is not None and same and (before["settings"], before["upstream"]) == (new, upstream):
            return False
        if started and not longer:
            return False  # the order of keys, or what an older version left out
        if not started:
            remove(self.path)
            run = self.path.parent.name
            before = {"upstream": upstream, "started": _now(), "id": f"{run}/{self.name} {uuid.uuid4().hex[:12]}"}
            before |= noted
        self._cut_back(new)
        remove(self.path / "done.json")
        assert before is not None
        write_json(self.path / "stage.json", {**before, "settings": new})
        return True

    def _cut_back(self, settings: dict[str, Any]) -> None:
        """Of what was made after the checkpoint that the stage goes on from nothing that the same steps of another
        course would take over. Of a constant rate another length is the same course, up to its end. Where each
        checkpoint is damaged, none of it is used: the stage is refused as it loads them."""
        from lco_lite.checkpoint import newest_good  # torch, which looking at a run does without

        if settings.get(f"{section(self.name)}.schedule") == "constant":
            if section(self.name) != "rl":
                return
            done = settings["rl.steps"]
        else:
            good = newest_good(self.checkpoints)
            kept = [int(good.name.removeprefix("step-"))] if good else self.kept_steps()
            done = max(kept, default=0)
        for file in (self.path / "rollouts").glob("step-" + "[0-9]" * 6 + ".jsonl"):
            if int(file.stem.removeprefix("step-")) > done + 1:  # the next are of the policy that was kept
                remove(file)
        if (best := self.best_step()) is not None and best["step"] > done:
            remove(self.best)
        if is_there(skipped := self.path / "skipped.jsonl"):
            write_sealed_lines(skipped, [row for row in JsonLines(skipped).rows if row.get("step", 0) <= done])

    @ranks.once
    def plan(self, steps: int) -> None:
        """How many steps the stage takes, in ``stage.json``, for who looks at it from outside."""
        begun = self.record("stage.json")
        if begun is not None and begun.get("steps") != steps:
            write_json(self.path / "stage.json", {**begun, "steps": steps})

    @ranks.once
    def finish(self, result: dict[str, Any]) -> None:
        """Marks the stage done. ``result`` is JSON; later stages refer to a fresh id; seconds are this process's.
        ``order`` counts what the run has made, ``files`` has the sha256 of all that the stage made. DataError where the
        best step is not as it was kept."""
        self.verify_best()
        made = {"id": uuid.uuid4().hex[:12], "finished": _now(), "seconds": round(time.monotonic() - self._begun, 3)}
        order = 1 + max((one.order() for one in Run(self.path.parent).stages()), default=0)
        files = checksums(self.path, "checkpoints", "rollouts")
        write_json(self.path / "done.json", {**made, "order": order, "result": result, "files": files})

    @ranks.once
    def verify(self, *parts: str) -> None:
        """That these files and folders of a stage that is done (``adapter``, ``model``, ``stage.json``) are as it
        left them. Whoever opens them asks first. DataError with the file and what to do where one is not; runs of
        earlier versions noted no checksums, and pass."""
        made = (self.record("done.json") or {}).get("files", {})
        loaded = {name for name in made if name.partition("/")[0] in parts and not name.endswith(".md")}
        remedy = f"Put it back as it was.{self._anew()}"
        verify(self.path, {name: made[name] for name in made if name in loaded}, remedy)

    @ranks.once
    def verify_best(self) -> None:
        """``verify`` of the best step, which is kept while the stage is not done, by what was noted as it was kept."""
        if best := self.record("best/best.json"):
            verify(self.best, best.get("files", {}), f"Put it back as it was, or delete {self.best}.")

    @ranks.once
    def id(self) -> str:
        """Changes whenever the stage is trained again. UsageError while it is not done."""
        done = self.record("done.json")
        if done is None:
            raise UsageError(f"{self.path}: this stage is not done yet")
        return str(done["id"])

    def upstream(self) -> dict[str, str]:
        """The stages that it was started on, and the ids of their results."""
        return dict((self.record("stage.json") or {"upstream": {}})["upstream"])

    def order(self) -> int:
        """The how-manieth result of the run it was; 0 where it has none, or where nobody counted yet."""
        try:
            return int((self.record("done.json") or {}).get("order", 0))
        except UsageError:
            return 0  # another stage's damage is told where that stage is asked for

    def record(self, name: str) -> dict[str, Any] | None:
        """What the stage wrote there, if it did. DataError for a file that holds anything else, and for a
        ``stage.json`` that is not as it was when the stage was done."""
        file = self.path / name
        if not is_there(file):
            return None
        spare = f"Delete {file.parent}: other steps may be kept there again."
        remedy = spare if name != file.name else self._anew().lstrip()
        told = dict(read_json(file, _RECORDS[file.name], remedy))
        if name == "stage.json":
            self.verify(name)
        return told

    def _anew(self, start: str = " Start") -> str:
        remedy = f"{start} this stage again with `{verb(self.name)} --fresh` and the recipe and flags that you want (it"
        return f"{remedy} deletes the stage and what was built on it), or start a new run by RECIPE --name NAME."


@dataclass(frozen=True)
class Run:
    path: Path

    @classmethod
    @ranks.once
    def open(cls, root: Path, name: str) -> Run:
        """``root/name``, made if it is not there. UsageError for a name that is no plain folder name."""
        path = cls.named(root, name).path
        with write_errors(path):
            if path.exists() and not path.is_dir():
                raise UsageError(f"{path} is a file: choose another --name or --runs")
            path.mkdir(parents=True, exist_ok=True)
        return cls(path)

    @classmethod
    def named(cls, root: Path, name: str) -> Run:
        """``root/name``, which need not be there. UsageError for a name that is no plain folder name."""
        if not re.fullmatch(RUN_NAME, name):
            shown = name if len(name) <= 140 else f"{name[:60]}… ({len(name)} characters)"
            raise UsageError(
                f"{shown!r} is no name for a run: letters and digits, after the first also '.', '_', '-', at most 128"
            )
        return cls(root / name)

    @classmethod
    def newest(cls, root: Path) -> Run:
        """The run under ``root`` that was used last. UsageError that says what to type where there is none."""
        runs = {recipe.parent: recipe.stat().st_mtime for recipe in root.glob("*/recipe.yaml")}
        runs |= {lock.parent: lock.stat().st_mtime for lock in root.glob("*/.lock") if lock.parent in runs}
        if not runs:
            start = "`lco-lite run recipes/quickstart.yaml` or `lco-lite sft RECIPE`"
            raise UsageError(f"no run under {root}/ yet: start with {start}")
        return cls(max(runs, key=runs.__getitem__))

    @classmethod
    def known(cls, which: str | None, root: Path) -> Run | None:
        """The run of that name under ``root``, or in that folder; None: the newest. None where there is no such run."""
        if which is None:
            return cls.newest(root)
        return next((run for run in (cls(root / which), cls(Path(which))) if run.has_recipe()), None)

    @property
    def name(self) -> str:
        return self.path.name

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Keeps other processes out and cleans up after killed ones. UsageError names the process that has the run, as
        ``.lock`` does, whose time is that of the run's last use; a lock of its own lies beside it."""
        holder, witness = self.path / ".lock", self.path / ".lock.held"
        for file in (holder, witness):
            if file.is_dir():
                raise UsageError(f"{file} is a folder, and the file that keeps other processes out lies there: move it")
        lock = FileLock(witness, timeout=0)
        no_locks = f"{self.path}: this file system has no locks (%s): choose a local --runs DIR"
        try:
            with write_errors(holder):
                try:
                    acquired = lock.acquire()
                except OSError as e:
                    if e.errno == errno.ENOLCK:
                        raise UsageError(no_locks % e) from e
                    raise
        except Timeout as e:
            process = holder.read_text(encoding="utf-8", errors="replace") if holder.exists() else "unknown"
            used = f"in use by process {process:.30}"
            raise UsageError(f"{self.path} is {used}: wait for it, stop it, or start another run with --name") from e
        except (OSError, NotImplementedError) as e:
            raise UsageError(no_locks % e) from e
        with acquired, held(self.path, witness):
            if isinstance(lock, SoftFileLock):
                raise UsageError(no_locks % "a lock file would outlive its process")
            write_text(holder, str(os.getpid()))
            recover(self.path)
            try:
                yield
            except BaseException:
                with contextlib.suppress(OSError):
                    os.utime(holder)
                raise
            with write_errors(holder):
                os.utime(holder)  # a run that ends after another began is the newer one

    @ranks.once
    def has_recipe(self) -> bool:
        return is_there(self.path / "recipe.yaml")

    def recipe(self) -> Recipe:
        """The resolved recipe that the run goes by. UsageError where it is missing or damaged."""
        if not self.has_recipe():
            start = f"{self.path} has no recipe.yaml: `lco-lite run RECIPE --name {self.name}` starts it"
            raise no_run(self.name, self.path.parent, start)
        try:
            recipe = load_recipe(self.path / "recipe.yaml", of_run=True)
            if "held_out" not in recipe.data.model_fields_set:  # a version without it began the run: it holds none out
                recipe.data.held_out = _held_out_before(recipe)
            return recipe
        except RecipeError as e:
            raise UsageError(f"the run's recipe is damaged or of another version; give one to go on.\n{e}") from e

    @ranks.once
    def write_recipe(self, recipe: Recipe) -> None:
        """Beside it the environment it is to be run in."""
        write_text(self.path / "recipe.yaml", seal(dump(recipe)))
        write_json(self.path / "environment.json", environment())

    def made_on(self) -> dict[str, Any]:
        """The environment that it was last run in. DataError where that is damaged or missing."""
        remedy = "Put it back as it was; what is trained in this run from now on writes it again"
        return dict(read_json(self.path / "environment.json", MadeOn, remedy))

    def stage(self, name: str) -> StageFolder:
        """``sft``, ``rm`` or ``rl-OBJECTIVE``; the folder need not be there yet."""
        return StageFolder(self.path / name)

    @ranks.once
    def stages(self) -> list[StageFolder]:
        """Those that were begun, in the order they build on each other."""
        begun = {p.parent.name for name in ("stage.json", "done.json") for p in self.path.glob(f"*/{name}")}
        return [self.stage(name) for name in sorted(begun, key=_order)]

    @ranks.once
    def newest_stage(self, kind: str = "") -> str:
        """The policy that was made last, by the run's own count, of those whose name starts with ``kind``: what stands
        later in the order of stages before what stands earlier; ``base`` where there is none."""
        made = [
            (_order(s.name)[0], s.order(), done["finished"], s.name)
            for s in self.stages()
            if s.name != "rm" and s.name.startswith(kind) and (done := s.record("done.json")) is not None
        ]
        return str(max(made)[-1]) if made else "base"

    def eval_path(self, task: str, stage: str) -> Path:
        """Where the score of ``stage`` on ``task`` is; its items lie beside it as .jsonl."""
        return self.path / "eval" / f"{task}--{stage}.json"

    @ranks.once
    def built_on(self, stage: str) -> list[str]:
        """``stage`` and the stages built on it. One that does not tell what it was built on goes with all that come
        before it."""
        present, found = sorted({begun.name for begun in self.stages()} | {stage}, key=_order), list[str]()
        for name in present:
            if name == stage or (_order(stage)[0] < _order(name)[0] and self._rests_on(name, found)):
                found.append(name)
        return found

    @ranks.once
    def discard_from(self, stage: str) -> list[str]:
        """Deletes ``stage``, the stages built on it, their scores and the bases made for them in the run, but one that
        another stage's adapter is on; returns the names of the stages deleted."""
        doomed = self.built_on(stage)
        of_phi = ["optimal"] if "rm" in doomed else []  # decoded from the start and φ
        for name in [*of_phi, *reversed(doomed)]:  # killed half-way, what is left still stands on what it was built on
            for score in sorted(f for end in (".", "@") for f in (self.path / "eval").glob(f"*--{name}{end}*")):
                remove(score)
            remove(self.path / name)
        if stage in ("sft", "rm"):
            remove(self.path / "base-rm")
        if stage == "sft" and not self.stages():
            remove(self.path / "base")
        return doomed

    def _rests_on(self, name: str, stages: Collection[str]) -> bool:
        stage = self.stage(name)
        try:
            return not is_there(stage.path / "stage.json") or any(one in stage.upstream() for one in stages)
        except UsageError:  # damaged
            return True


def no_run(name: str, root: Path, remedy: str = "") -> UsageError:
    """For a name that is no run's: which there are, the nearest first."""
    there = sorted(recipe.parent.name for recipe in root.glob("*/recipe.yaml"))
    near = difflib.get_close_matches(name, there, MOST_NAMED)
    shown = [*near, *(other for other in there if other not in near)][:MOST_NAMED]
    more = f" and {len(there) - len(shown)} more" if len(there) > len(shown) else ""
    told = f"no run {name!r} under {root}/; there are: {', '.join(shown) or 'none'}{more}"
    return UsageError(told + (f". {remedy}" if remedy else ""))


def base_name(base: str, folder: Path, run: Path | None) -> str:
    """How an adapter in ``folder`` names its base: a hub id as it is, a folder by its absolute path or, where both are
    inside of ``run``, by its path from ``folder``."""
    if not Path(base).is_dir():
        return base
    there, here = Path(base).resolve(), folder.resolve()
    if run is not None and there.is_relative_to(run.resolve()) and here.is_relative_to(run.resolve()):
        return Path(os.path.relpath(there, here)).as_posix()
    return str(there)


def named_base(name: str, folder: Path) -> str:
    """Where that base is, for an adapter that now lies in ``folder``."""
    near = folder / name
    return str(near.resolve()) if name.startswith(".") and near.is_dir() else name


def _order(stage: str) -> tuple[int, str]:
    return ({"sft": 0, "rm": 1}.get(stage, 2), stage)


def verb(stage: str) -> str:
    """The command that trains it."""
    return {"sft": "lco-lite sft", "rm": "lco-lite train-rm"}.get(stage, "lco-lite rl")


def section(stage: str) -> str:
    """Where the recipe has its settings."""
    return {"sft": "sft", "rm": "train_rm"}.get(stage, "rl")


def _lengths(stage: str) -> list[str]:
    """The settings that say how far a stage goes, and nothing of the way."""
    where = section(stage)
    return ["rl.steps"] if where == "rl" else [f"{where}.max_steps", f"{where}.epochs"]


def _reaches(stage: str, old: dict[str, Any], new: dict[str, Any], done: int) -> bool:
    """Whether a stage that has ``done`` so many steps gets as far with ``new`` settings, or farther."""
    steps, *epochs = _lengths(stage)
    if new.get(steps) is None:
        return old.get(steps) is None and all(new[key] >= old[key] for key in epochs)
    return bool(new[steps] >= done)


def _only(keys: Collection[str], old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    return differences(*({key: value for key, value in one.items() if key in keys} for one in (old, new)))


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


MOST_NAMED = 20  # runs in a message

_SFT = ["seed", "task", "model", "chat", "data.demonstrations", "data.columns.demonstrations", "data.task", "sft"]
_SFT += ["data.columns.task", "data.held_out"]
_RM = [*_SFT, "reward_model", "data.preferences", "data.columns.preferences", "train_rm"]

# last part of the key, wherever it stands
_NO_MATTER = {"gradient_checkpointing", "attention", "trust_remote_code", "micro_batch_tokens", "rollout_batch"}
_NO_MATTER |= {"device", "gpu_share", "streaming"}
_NO_MATTER |= {"save_every", "eval_every", "eval_items", "check_items", "samples", "guard", "keep_best"}
_NO_MATTER |= {"reward_timeout", "skip_batches"}
# left out while unset, so that runs of version 0.1, whose recipes did not have them, go on
_NEWER: dict[str, Any] = {"sft.more_tasks": [], "rl.settings": {}, "rl.target": None, "rl.whole_groups": False}
_NEWER |= {"rl.evaluated": True, "rollout.engine": "auto"}
_NEWER |= {"rl.mismatch": "none", "rl.mismatch_cap": 3.0, "rl.mismatch_low": 0.5, "rl.mismatch_high": 5.0}
_NEWER |= {f"rl.rewards.{name}.{key}": v for name in REWARDS for key, v in RewardPart().model_dump().items()}
_NEWER |= dict.fromkeys(f"data.columns.task.{name}" for name in TaskColumns.model_fields)
_NEWER |= dict.fromkeys(("sft.optimizer", "train_rm.optimizer", "rl.optimizer"), "adamw")
_NEWER |= dict.fromkeys(("sft.adam_eps", "train_rm.adam_eps", "rl.adam_eps"))


def _held_out_before(recipe: Recipe) -> float | None:
    """``data.held_out`` of versions that had no choice: without a task all prompts were trained on."""
    return None if recipe.task else 0.0


def decides(recipe: Recipe, stage: str, key: str) -> bool:
    """Whether the setting, by dotted key, is one that decides the outcome of ``stage``: see ``stage_settings``."""
    if stage not in ("sft", "rm") and not stage.startswith("rl-"):
        raise UsageError(f"no stage {stage!r}: sft, rm or rl-OBJECTIVE")
    roots = _RM if stage == "rm" or (stage != "sft" and recipe.rl.needs_reward_model) else _SFT
    if stage == "rm" and recipe.data.preferences == "sampled":
        roots = [*roots, "rollout"]
    if stage.startswith("rl-"):
        judge = ["reward_model"] if recipe.rl.dense == "logprob" else []  # its base is φ
        roots = [*roots, *judge, "data.prompts", "data.columns.prompts", "rollout", "rl"]
    counts = key.startswith(("rl.settings.", "rl.reward_function.")) or key.rpartition(".")[2] not in _NO_MATTER
    return counts and any(f"{key}.".startswith(f"{root}.") for root in roots)


def stage_settings(recipe: Recipe, stage: str) -> dict[str, Any]:
    """The settings, by dotted key, that decide the outcome of ``stage`` (``sft``, ``rm`` or ``rl-OBJECTIVE``)."""

    def counts(key: str, value: Any) -> bool:
        if key in _NEWER and value == _NEWER[key]:
            return False
        if key == "data.held_out" and value == _held_out_before(recipe):
            return False
        if key == "rl.logprob_temperature" and recipe.rl.compared_at == 1:
            return False  # as version 0.1 had it always: at another temperature its policy gradients do not go on
        return decides(recipe, stage, key)

    return {key: value for key, value in flat(recipe.model_dump(mode="json")).items() if counts(key, value)}


def as_started(recipe: Recipe, stage: StageFolder, said: Collection[str] | None) -> tuple[Recipe, list[str]]:
    """The recipe in which what nobody ``said``, by dotted key, is as the stage was started with, whatever a newer
    version fills in, and a line a setting that this changes. None: everything was said."""
    before = stage.settings()
    if not before or said is None:
        return recipe, []
    now = json.loads(json.dumps(stage_settings(recipe, stage.name)))
    other = [key for key in {**now, **before} if now.get(key, ...) != before.get(key, ...)]
    unsaid = [key for key in other if not _said(key, said)]
    tree = recipe.model_dump(mode="json")
    for key in unsaid:
        _drop(tree, key.split("."))
    older = {**_NEWER, "data.held_out": _held_out_before(recipe)}
    for key in unsaid:
        if key in before or key in older:
            _put(tree, key.split("."), before.get(key, older.get(key)))
    try:
        kept = Recipe.model_validate(tree, context=OF_RUN)
    except ValidationError:  # it does not go with what is said, which is then another setting too
        return recipe, []
    return kept, differences(now, stage_settings(kept, stage.name))


def _said(key: str, said: Collection[str]) -> bool:
    return any(f"{key}.".startswith(f"{one}.") or one.startswith(f"{key}.") for one in said)


def _drop(tree: dict[str, Any], path: Sequence[str]) -> None:
    for name in path[:-1]:
        if not isinstance(tree := tree.get(name), dict):  # type: ignore[assignment]
            return
    tree.pop(path[-1], None)


def _put(tree: dict[str, Any], path: Sequence[str], value: Any) -> None:
    for name in path[:-1]:
        if not isinstance(tree.get(name), dict):
            tree[name] = {}
        tree = tree[name]
    tree[path[-1]] = value


def differences(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """One line a setting that differs: ``rl.beta: 1.0 → 0.5``."""
    pairs = {key: (before.get(key, "unset"), after.get(key, "unset")) for key in [*before, *after]}
    return [f"{key}: {old} → {new}" for key, (old, new) in pairs.items() if old != new]
