"""Trackers: who else is told the numbers of a stage, where the recipe's ``trackers`` or ``--tracker`` names them.

``trackio`` writes to its local store, ``tensorboard`` to ``STAGE/tensorboard``, ``wandb`` to its server or, offline, to
``RUN/wandb``. Each is an extra. A new one is a class with ``start``, ``log`` and ``finish``, and a line in TRACKERS.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
import math
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Protocol

from lco_lite import ranks
from lco_lite.errors import UsageError
from lco_lite.metrics import read_log
from lco_lite.recipe import Recipe
from lco_lite.recipe.file import flat
from lco_lite.run import Run, StageFolder

PROJECT = "lco-lite"  # where neither WANDB_PROJECT nor TRACKIO_PROJECT names another


class Tracker(Protocol):
    def start(self, run: Run, stage: StageFolder, config: Mapping[str, Any], done: int, told: int) -> None:
        """Begins; where ``done`` steps are made, and ``told`` of them once, goes on with what it began then."""

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        """The numbers of one step. Raises whatever the tracker's own library raises."""

    def finish(self) -> None:
        """All is told, or the stage stops."""


class Trackio:
    def start(self, run: Run, stage: StageFolder, config: Mapping[str, Any], done: int, told: int) -> None:
        import trackio

        project, name = os.environ.get("TRACKIO_PROJECT", PROJECT), f"{run.name}/{stage.name}"
        how = {"group": run.name, "config": dict(config), "resume": "allow" if told else "never", "embed": False}
        self.told = told
        with contextlib.redirect_stdout(sys.stderr):  # the command's own stdout stays as it is
            self.run = trackio.init(project, name=name, auto_log_gpu=False, auto_log_cpu=False, **how)

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        if step > self.told:
            self.run.log(dict(numbers), step=step)

    def finish(self) -> None:
        import trackio

        with contextlib.redirect_stdout(sys.stderr):
            trackio.finish()  # not the run's own, after which it would finish once more at exit


class Wandb:
    """Console output, code and git state stay here. The same id goes on after a stop, also offline."""

    def start(self, run: Run, stage: StageFolder, config: Mapping[str, Any], done: int, told: int) -> None:
        import wandb

        begun = (stage.path / "stage.json").read_bytes() if (stage.path / "stage.json").exists() else b"{}"
        what = [str(run.path.resolve()), stage.name, json.loads(begun).get("started", "")]
        settings = wandb.Settings(console="off", disable_git=True, disable_code=True, silent=True)
        self.told = told
        self.run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            id=hashlib.sha256(json.dumps(what).encode()).hexdigest()[:16],
            name=f"{run.name}/{stage.name}",
            group=run.name,
            job_type=stage.name,
            config=dict(config),
            dir=run.path,
            resume="allow",
            settings=settings,
        )

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        if step > self.told:
            self.run.log(dict(numbers), step=step)

    def finish(self) -> None:
        self.run.finish()


class TensorBoard:
    def start(self, run: Run, stage: StageFolder, config: Mapping[str, Any], done: int, told: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        folder = stage.path / "tensorboard"
        is_new = not folder.exists()
        # steps after the checkpoint are made again: what was told of them is hidden by their second telling
        self.writer = SummaryWriter(str(folder), purge_step=done + 1 if told else None)
        if is_new:
            settings = "".join(f"    {key}: {value}\n" for key, value in config.items())  # indented: as it is
            self.writer.add_text("recipe", settings, 0)

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        for name, value in numbers.items():
            self.writer.add_scalar(name, value, step)
        self.writer.flush()

    def finish(self) -> None:
        self.writer.close()


TRACKERS: dict[str, Callable[[], Tracker]] = {"trackio": Trackio, "wandb": Wandb, "tensorboard": TensorBoard}


def refuse_missing(names: Sequence[str]) -> None:
    """UsageError with the command that installs them, where some of these trackers are not."""
    absent = [name for name in names if importlib.util.find_spec(name) is None]
    if absent:
        how = f"pip install {' '.join(absent)}"
        raise UsageError(f"trackers: {' and '.join(absent)} {'is' if len(absent) == 1 else 'are'} not installed: {how}")


class Trackers:
    """Those of the recipe, on rank 0. One that fails while it starts is a UsageError; one that fails later is warned of
    and told no more: no training ends because a server is away."""

    @ranks.by_main
    def start(self, recipe: Recipe, run: Run, stage: StageFolder, done: int, warn: Callable[[str], object]) -> None:
        """``done``: steps in the checkpoint that the stage goes on from. Call it before its metrics are cut to that."""
        self.warn = warn
        self.open: dict[str, Tracker] = {}
        if not recipe.trackers:
            return
        refuse_missing(recipe.trackers)
        config = flat(recipe.model_dump(mode="json"))
        told = max((line["step"] for line in read_log(stage.metrics)), default=0)
        for name in dict.fromkeys(recipe.trackers):
            tracker = TRACKERS[name]()
            try:
                tracker.start(run, stage, config, done, told)
            except Exception as e:  # of many kinds: no key, no network, no room
                self.finish()
                raise UsageError(f"trackers: {name} does not start: {type(e).__name__}: {e}") from e
            self.open[name] = tracker

    @ranks.by_main
    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        """A line of ``metrics.jsonl``: what is in a group is named ``seconds/rollout``."""
        named = {name.replace(".", "/"): value for name, value in flat(dict(metrics)).items() if name != "step"}
        numbers = {n: v for n, v in named.items() if isinstance(v, (int, float)) and math.isfinite(v)}
        for name, tracker in list(self.open.items()):
            self._try(name, partial(tracker.log, step, numbers))

    @ranks.by_main
    def finish(self) -> None:
        for name, tracker in list(self.open.items()):
            self._try(name, tracker.finish)
        self.open = {}

    def _try(self, name: str, work: Callable[[], None]) -> None:
        try:
            work()
        except Exception as e:  # of many kinds
            self.warn(f"tracker {name} is told no more: {type(e).__name__}: {e}")
            del self.open[name]
