"""A run folder: which stages are done, what may go on from where, and which process has it.

    runs/NAME/recipe.yaml  environment.json  sft/  rm/  rl-kld/  eval/TASK--STAGE.json

A stage remembers what it was started with (``stage.json``); what it made is complete once ``done.json`` is there.
Everything is written whole, so a run can be killed at any instant and goes on.
"""

from __future__ import annotations

import json
import os
import re
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from filelock import FileLock, SoftFileLock, Timeout

from lco_lite import ranks
from lco_lite.environment import environment
from lco_lite.errors import RecipeError, UsageError
from lco_lite.files import recover, remove, write_errors, write_json, write_text
from lco_lite.recipe import Recipe
from lco_lite.recipe.file import dump, flat, load_recipe
from lco_lite.recipe.rl import REWARDS, RewardPart


class StageFolder:
    """One stage of a run: ``path`` and what lies in it."""

    def __init__(self, path: Path) -> None:
        self.name, self.path = path.name, path
        self.adapter, self.model = path / "adapter", path / "model"
        self.checkpoints = path / "checkpoints"
        self.metrics, self.samples = path / "metrics.jsonl", path / "samples.jsonl"
        self._begun = time.monotonic()

    @ranks.once
    def is_done(self) -> bool:
        return (self.path / "done.json").exists()

    @ranks.once
    def begin(self, settings: dict[str, Any], upstream: dict[str, str]) -> None:
        """Starts the stage or lets it go on; ``upstream`` maps the stages it builds on to the ids of their results.
        UsageError with every difference where it was started with other settings or upstream results."""
        file = self.path / "stage.json"
        if not file.exists():
            write_json(file, {"settings": settings, "upstream": upstream, "started": _now()})
        before = _read_json(file)
        lines, ids = differences(before["settings"], json.loads(json.dumps(settings))), before["upstream"]
        lines += [f"{name} was trained again since" for name in upstream if ids.get(name) != upstream[name]]
        lines += [f"{name} is no longer used" for name in ids if name not in upstream]
        if lines:
            lines = [f"{self.path} was started with something else (then → now):", *lines]
            remedy = "Go back to that, start this stage again with --fresh (deletes it and what was built on it)"
            raise UsageError("\n  ".join(lines) + f"\n{remedy}, or start a new run with --name NAME.")

    @ranks.once
    def finish(self, result: dict[str, Any]) -> None:
        """Marks the stage done. ``result`` is JSON; later stages refer to a fresh id; seconds are this process's."""
        made = {"id": uuid.uuid4().hex[:12], "finished": _now(), "seconds": round(time.monotonic() - self._begun, 3)}
        write_json(self.path / "done.json", {**made, "result": result})

    @ranks.once
    def id(self) -> str:
        """Changes whenever the stage is trained again. UsageError while it is not done."""
        if not self.is_done():
            raise UsageError(f"{self.path}: this stage is not done yet")
        return str(_read_json(self.path / "done.json")["id"])


@dataclass(frozen=True)
class Run:
    path: Path

    @classmethod
    @ranks.once
    def open(cls, root: Path, name: str) -> Run:
        """``root/name``, made if it is not there. UsageError for a name that is no plain folder name."""
        if not re.fullmatch("[A-Za-z0-9][A-Za-z0-9._-]{,127}", name):
            shown = name if len(name) <= 140 else f"{name[:60]}… ({len(name)} characters)"
            raise UsageError(
                f"{shown!r} is no name for a run: letters and digits, after the first also '.', '_', '-', at most 128"
            )
        path = root / name
        with write_errors(path):
            if path.exists() and not path.is_dir():
                raise UsageError(f"{path} is a file: choose another --name or --runs")
            path.mkdir(parents=True, exist_ok=True)
        return cls(path)

    @classmethod
    def newest(cls, root: Path) -> Run:
        """The run under ``root`` that was used last. UsageError that says what to type where there is none."""
        runs = {recipe.parent: recipe.stat().st_mtime for recipe in root.glob("*/recipe.yaml")}
        runs |= {lock.parent: lock.stat().st_mtime for lock in root.glob("*/.lock") if lock.parent in runs}
        if not runs:
            start = "`lco-lite run recipes/quickstart.yaml` or `lco-lite sft RECIPE`"
            raise UsageError(f"no run under {root}/ yet: start with {start}")
        return cls(max(runs, key=runs.__getitem__))

    @property
    def name(self) -> str:
        return self.path.name

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Keeps other processes out and cleans up after killed ones. UsageError names the process that has the run, as
        ``.lock`` does, whose time is that of the run's last use; a lock of its own lies beside it."""
        holder = self.path / ".lock"
        lock = FileLock(self.path / ".lock.held", timeout=0)
        no_locks = f"{self.path}: this file system has no locks (%s): choose a local --runs DIR"
        try:
            with write_errors(holder):
                held = lock.acquire()
        except Timeout as e:
            used = f"in use by process {holder.read_text(encoding='utf-8') if holder.exists() else 'unknown'}"
            raise UsageError(f"{self.path} is {used}: wait for it, stop it, or start another run with --name") from e
        except (OSError, NotImplementedError) as e:
            raise UsageError(no_locks % e) from e
        with held:
            if isinstance(lock, SoftFileLock):
                raise UsageError(no_locks % "a lock file would outlive its process")
            write_text(holder, str(os.getpid()))
            recover(self.path)
            try:
                yield
            finally:
                os.utime(holder)  # a run that ends after another began is the newer one

    @ranks.once
    def has_recipe(self) -> bool:
        return (self.path / "recipe.yaml").exists()

    def recipe(self) -> Recipe:
        """The resolved recipe that the run goes by. UsageError where it is missing or damaged."""
        if not self.has_recipe():
            start = f"start it with `lco-lite run RECIPE --name {self.name}`"
            raise UsageError(f"no run {self.name!r} under {self.path.parent}/: it has no recipe.yaml; {start}")
        try:
            return load_recipe(self.path / "recipe.yaml")
        except RecipeError as e:
            raise UsageError(f"the run's recipe is damaged or of another version; give one to go on.\n{e}") from e

    @ranks.once
    def write_recipe(self, recipe: Recipe) -> None:
        """Beside it the environment it is to be run in."""
        write_text(self.path / "recipe.yaml", dump(recipe))
        write_json(self.path / "environment.json", environment())

    def stage(self, name: str) -> StageFolder:
        """``sft``, ``rm`` or ``rl-OBJECTIVE``; the folder need not be there yet."""
        return StageFolder(self.path / name)

    @ranks.once
    def stages(self) -> list[StageFolder]:
        """Those that were begun, in the order they build on each other."""
        begun = [p.parent.name for p in self.path.glob("*/stage.json")]
        return [self.stage(name) for name in sorted(begun, key=_order)]

    @ranks.once
    def newest_stage(self) -> str:
        """The policy that was trained last; ``base`` where none has been."""
        policies = [s for s in self.stages() if s.is_done() and s.name != "rm"]
        return max(policies, key=lambda s: (s.path / "done.json").stat().st_mtime).name if policies else "base"

    def eval_path(self, task: str, stage: str) -> Path:
        """Where the score of ``stage`` on ``task`` is; its items lie beside it as .jsonl."""
        return self.path / "eval" / f"{task}--{stage}.json"

    @ranks.once
    def discard_from(self, stage: str) -> list[str]:
        """Deletes ``stage``, the stages built on it, their scores and the bases made for them in the run; returns the
        names of the stages deleted: sft takes everything with it, rm every rl-*, an rl-* only itself."""
        present = {begun.name for begun in self.stages()} | {stage}
        doomed = [name for name in sorted(present, key=_order) if name == stage or _order(stage)[0] < _order(name)[0]]
        for name in reversed(doomed):  # killed half-way, what is left still stands on what it was built on
            for score in sorted((self.path / "eval").glob(f"*--{name}.*")):
                remove(score)
            remove(self.path / name)
        for name in {"sft": ("base", "base-rm"), "rm": ("base-rm",)}.get(stage, ()):
            remove(self.path / name)
        return doomed


def _order(stage: str) -> tuple[int, str]:
    return ({"sft": 0, "rm": 1}.get(stage, 2), stage)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(value, dict):
            raise ValueError("no JSON object")
        return value
    except (OSError, ValueError) as e:
        raise UsageError(f"{path} is damaged ({e}): start the stage again with --fresh") from e


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


_SFT = ["seed", "task", "model", "chat", "data.demonstrations", "data.columns.demonstrations", "data.task", "sft"]
_RM = [*_SFT, "reward_model", "data.preferences", "data.columns.preferences", "train_rm"]

# last part of the key, wherever it stands
_NO_MATTER = {"gradient_checkpointing", "attention", "trust_remote_code", "micro_batch_tokens", "rollout_batch"}
_NO_MATTER |= {"device", "gpu_share", "streaming"}
_NO_MATTER |= {"save_every", "eval_every", "eval_items", "check_items", "guard", "reward_timeout"}
# left out while unset, so that runs of version 0.1, whose recipes did not have them, go on
_NEWER: dict[str, Any] = {"sft.more_tasks": [], "rl.settings": {}, "rl.target": None, "rl.whole_groups": False}
_NEWER |= {"rl.evaluated": True, "rollout.engine": "auto"}
_NEWER |= {"rl.mismatch": "none", "rl.mismatch_cap": 3.0, "rl.mismatch_low": 0.5, "rl.mismatch_high": 5.0}
_NEWER |= {f"rl.rewards.{name}.{key}": v for name in REWARDS for key, v in RewardPart().model_dump().items()}
_NEWER |= dict.fromkeys(("sft.optimizer", "train_rm.optimizer", "rl.optimizer"), "adamw")
_NEWER |= dict.fromkeys(("sft.adam_eps", "train_rm.adam_eps", "rl.adam_eps"))


def stage_settings(recipe: Recipe, stage: str) -> dict[str, Any]:
    """The settings, by dotted key, that decide the outcome of ``stage`` (``sft``, ``rm`` or ``rl-OBJECTIVE``)."""
    if stage not in ("sft", "rm") and not stage.startswith("rl-"):
        raise UsageError(f"no stage {stage!r}: sft, rm or rl-OBJECTIVE")
    roots = _RM if stage == "rm" or (stage != "sft" and recipe.rl.needs_reward_model) else _SFT
    if stage == "rm" and recipe.data.preferences == "sampled":
        roots = [*roots, "rollout"]
    if stage.startswith("rl-"):
        judge = ["reward_model"] if recipe.rl.dense == "logprob" else []  # its base is φ
        roots = [*roots, *judge, "data.prompts", "data.columns.prompts", "rollout", "rl"]

    def decides(key: str, value: Any) -> bool:
        if key in _NEWER and value == _NEWER[key]:
            return False
        if key == "rl.logprob_temperature" and recipe.rl.compared_at == 1:
            return False  # as version 0.1 had it always: at another temperature its policy gradients do not go on
        counts = key.startswith(("rl.settings.", "rl.reward_function.")) or key.rpartition(".")[2] not in _NO_MATTER
        return counts and any(f"{key}.".startswith(f"{root}.") for root in roots)

    return {key: value for key, value in flat(recipe.model_dump(mode="json")).items() if decides(key, value)}


def differences(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """One line a setting that differs: ``rl.beta: 1.0 → 0.5``."""
    pairs = {key: (before.get(key, "unset"), after.get(key, "unset")) for key in [*before, *after]}
    return [f"{key}: {old} → {new}" for key, (old, new) in pairs.items() if old != new]
