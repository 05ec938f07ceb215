"""A run small enough to be made hundreds of times: its stages, the same undisturbed, and what counts as the same."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import signal
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from tests.conftest import TINY
from tests.faults import children
from tests.faults.children import Ended, Fault

SMALL = {
    **TINY,
    "model": {
        "init": {"hidden_size": 16, "layers": 1, "heads": 2, "intermediate_size": 16, "max_length": 128},
        "lora": {"r": 2, "alpha": 4},
    },
    "sft": {**TINY["sft"], "examples": 16, "max_steps": 3, "batch_size": 4},
    "train_rm": {**TINY["train_rm"], "prompts": 6, "check_items": 2},
    "rl": {**TINY["rl"], "prompts_per_step": 4, "minibatch": 2, "eval_items": 2, "max_new_tokens": 6, "save_every": 1},
    "eval": {"seeds": 1, "items": 4, "max_new_tokens": 6},
}
SMALL["rl"] |= {"inner_epochs": 1, "rollout_batch": 2}
STAGES = ("sft", "rm", "rl", "eval")
STATUSES = (0, 1, 2, 3, 4, 130)  # of errors.py
_TEMPORARY = re.compile(r"\.[0-9a-f]{12}\.(new|old|gone)$")
_OF_THE_MOMENT = {
    "id",
    "finished",
    "started",
    "seconds",
    "peak_mib",
    "tokens_per_second",
    "upstream",
    "made_by",
    "order",
}
_OF_THE_MOMENT |= {"owner", "metrics.jsonl", "updates.jsonl", "stage.json"}  # sums of the latter
_MAY_STAY = (".partial.jsonl",)  # what was made, where only its removal failed; it is used no more
_NOT_COMPARED = (".lock", "environment.json", "error.log")


class Failed(AssertionError):
    """A promise that was not kept."""


@dataclass(frozen=True)
class Workshop:
    """``folder/after/STAGE`` is the runs' folder after an undisturbed STAGE, ``folder/before/STAGE`` the one before."""

    folder: Path
    recipe: Path
    undisturbed: Mapping[str, Ended]

    @classmethod
    def make(cls, folder: Path, stages: tuple[str, ...] = STAGES) -> Workshop:
        recipe = folder / "small.yaml"
        recipe.write_text(yaml.safe_dump(SMALL))
        undisturbed: dict[str, Ended] = {}
        shop, before = cls(folder, recipe, undisturbed), folder / "nothing"
        before.mkdir()
        for stage in stages:
            shutil.copytree(before, folder / "before" / stage)
            with shop.bench(stage) as runs:
                ended = undisturbed[stage] = children.run(shop.command(stage, runs), runs)
                if ended.status != 0:
                    raise Failed(f"{stage} fails undisturbed: {ended.err}")
                before = shutil.copytree(runs, folder / "after" / stage)
        return shop

    def half(self, stage: str) -> None:
        """Makes ``folder/half/STAGE``: killed after its second step of several, of eval after its responses."""
        with self.bench(stage) as runs:
            children.run(self.command(stage, runs), runs, prepare=_killed_half_way)
            shutil.copytree(runs, self.folder / "half" / stage)

    def command(self, stage: str, runs: Path) -> list[str]:
        verb = {"rm": "train-rm", "eval": "eval"}.get(stage, stage)
        which = ["arithmetic", "--name", "tiny"] if stage == "eval" else [str(self.recipe)]
        return [verb, *which, "--runs", str(runs), "--quiet"]

    @contextlib.contextmanager
    def bench(self, stage: str, when: str = "before") -> Iterator[Path]:
        """A runs folder of its own as it is before, or after, ``stage``."""
        place = self.folder / "bench"
        shutil.rmtree(place, ignore_errors=True)
        shutil.copytree(self.folder / when / stage, place)
        try:
            yield place
        finally:
            shutil.rmtree(place, ignore_errors=True)

    def disturbed(
        self, stage: str, runs: Path, fault: Fault | None = None, signals: Any = (), prepare: Any = None
    ) -> Ended:
        """The command of ``stage``, disturbed. Whatever came of it, it ended, and left nothing half-written."""
        ended = children.run(self.command(stage, runs), runs, fault, signals, prepare)
        told_well(ended)
        whole(runs)
        return ended

    def goes_on(self, stage: str, runs: Path) -> None:
        """The same command ends in the same bytes as an undisturbed one."""
        ended = children.run(self.command(stage, runs), runs)
        told_well(ended)
        if ended.status != 0:
            raise Failed(f"the same command does not go on, status {ended.status}: {ended.err.strip()[-600:]}")
        same(self.folder / "after" / stage, runs)
        if left := [str(p) for p in runs.rglob(".*") if _TEMPORARY.search(p.name)]:
            raise Failed(f"left under temporary names: {left}")


def _killed_half_way() -> None:
    from lco_lite.evaluation import evaluate
    from lco_lite.train.training import StageTraining

    keep = StageTraining.keep

    def then_die(self: Any, step: int, *args: Any, **kwargs: Any) -> None:
        keep(self, step, *args, **kwargs)
        if step + 1 == self.steps_planned - 1:
            os.kill(os.getpid(), signal.SIGKILL)

    StageTraining.keep = then_die  # type: ignore[method-assign]
    evaluate._conclude = lambda *_: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore[assignment]


def told_well(ended: Ended, own_code: bool = False) -> None:
    """It did not hang; it was killed or has a status of the contract, and where that is not 0 it said why, once. That a
    traceback is in the log is well only where ``own_code``, the user's, raised it."""
    if ended.hung:
        raise Failed(f"hangs: no end after {ended.seconds:.0f} s")
    if ended.status < 0 and -ended.status in (signal.SIGKILL, signal.SIGTERM, signal.SIGHUP):
        return
    if "Traceback" in ended.err or "Traceback" in ended.out:
        raise Failed(f"a traceback, status {ended.status}: …{ended.err.strip()[-900:]}")
    if "raceback is" in ended.err and not own_code:
        raise Failed(f"an exception that nobody expected: {ended.err.strip()[-600:]}")
    if ended.status not in STATUSES:
        raise Failed(f"exit status {ended.status}: {ended.err.strip()[-600:]}")
    said = sum(line.startswith("error: ") for line in ended.err.splitlines())
    if ended.status not in (0, 130) and said != 1:
        raise Failed(f"{said} messages with status {ended.status}: {ended.err.strip()[-600:]}")


def whole(runs: Path, but: tuple[Path, ...] = ()) -> None:
    """No file under its own name is half of one; of a log only the last line may lack its end."""
    for file in (p for p in runs.rglob("*") if p.is_file()):
        if file in but or any(_TEMPORARY.search(part) for part in file.relative_to(runs).parts):
            continue
        try:
            if file.suffix == ".json":
                json.loads(file.read_bytes())
            elif file.suffix == ".jsonl":
                content = file.read_bytes()
                for line in content[: content.rfind(b"\n") + 1].splitlines():
                    json.loads(line)
            elif file.suffix == ".safetensors":
                from safetensors.torch import load_file

                load_file(file)
        except Exception as e:
            raise Failed(f"{file.relative_to(runs)} is half-written: {type(e).__name__}: {e}") from e


def same(expected: Path, found: Path, but: tuple[str, ...] = ()) -> None:
    """Both runs hold the same, modulo times, ids and memory; ``but`` for the files of these names."""
    a, b = products(expected), products(found)
    differ = sorted(name for name in {*a, *b} if a.get(name) != b.get(name) and Path(name).name not in but)
    if differ := [name for name in differ if name in a or not name.endswith(_MAY_STAY)]:
        lacking = [n for n in differ if n not in b]
        raise Failed(f"not as the undisturbed run: {', '.join(differ[:6])}" + f"; lacking {lacking}" * bool(lacking))


def products(runs: Path) -> dict[str, str]:
    """What each file holds, by its path: a digest."""
    files = [p for p in runs.rglob("*") if p.is_file() and not p.name.startswith(_NOT_COMPARED)]
    return {str(p.relative_to(runs)): hashlib.sha256(_content(p)).hexdigest()[:16] for p in files}


def _content(file: Path) -> bytes:
    if file.suffix == ".json":
        return json.dumps(_timeless(json.loads(file.read_bytes())), sort_keys=True).encode()
    if file.suffix == ".jsonl":
        return "\n".join(json.dumps(_timeless(json.loads(line))) for line in file.read_bytes().splitlines()).encode()
    return file.read_bytes()


def _timeless(value: Any) -> Any:
    if isinstance(value, dict):
        if set(value) == {"sha256", "content"}:  # of a checkpoint: the sum is also of what is left out below
            return _timeless(value["content"])
        return {k: _timeless(v) for k, v in value.items() if k not in _OF_THE_MOMENT and not k.startswith("seconds")}
    return [_timeless(v) for v in value] if isinstance(value, list) else value


def temporary_folder() -> str | None:
    """Memory, where there is some: hundreds of runs are written."""
    return "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
