"""What is done with a cell, in a process of its own: ``python -m lco_lite.study.work FOLDER`` reads ``cell.json`` there
and leaves ``row.json``.

FOLDER is the cell's run. Its warm-up and reward model were trained in the run of the seed's start, and lie here as
links.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import typer

from lco_lite import __version__
from lco_lite.command import boundary, command
from lco_lite.context import Context
from lco_lite.data.prompts import open_task
from lco_lite.errors import DataError, Diverged
from lco_lite.evaluation.evaluate import evaluate_stage, graded_by
from lco_lite.files import read_json, remove, sha256, write_bytes, write_folder, write_json
from lco_lite.metrics import read_log
from lco_lite.study.base import Row
from lco_lite.train.pipeline import train

# of an update, for curves within a phase
CURVES = "step grad_norm entropy sampled_prob logit_grad_norm_pos logit_grad_norm_neg"


def main(folder: Path) -> None:
    with boundary():
        cell = read_json(folder / "cell.json", dict[str, Any], "The study writes it again")
        if cell["start"] is not None:
            link_start(folder.parent / cell["start"], folder)
        if sha256(Path(cell["recipe"])) != cell["recipe_sha256"]:
            told = "has changed since the study began, whose cells are named by what it says"
            raise DataError(f"{cell['recipe']}: {told}. Start the study again, or put it back.")
        began = time.monotonic()
        work = WORK.get(cell["work"]) or _probe(cell["work"])
        with command(cell["recipe"], folder.parent, folder.name, cell["given"], cell["sets"], quiet=True) as ctx:
            made = work(ctx, cell["options"])
        row = {name: cell[name] for name in ("label", "seed", "sets", "id", "options")}
        row |= {"version": __version__, "seconds": round(time.monotonic() - began, 1)}
        write_json(folder / "row.json", row | made)
        for spare in (*folder.glob("*/checkpoints"), *folder.glob("*/best")):
            remove(spare)


def train_start(ctx: Context, options: dict[str, Any]) -> Row:
    """The stages before rl, and their scores: of a reward model, φ itself as a policy."""
    stages = [stage for stage in ctx.recipe.stages if not stage.startswith("rl-")]
    if stages:
        train(ctx, stages[-1])
    return {"scores": {stage: scores(ctx, stage) for stage in stages}}


def train_and_score(ctx: Context, options: dict[str, Any]) -> Row:
    """One training run: its scores before and after, its curve, what each update saw. One that diverged is a result,
    without a score after."""
    stage = ctx.recipe.rl.stage
    folder, failed = ctx.run.stage(stage), None
    try:
        train(ctx, stage)
    except Diverged as e:
        failed = str(e).splitlines()[0]
    steps = read_log(folder.metrics)
    updates = columns(read_log(folder.path / "updates.jsonl"))
    tasks = {
        name: {"before": one} for name, one in scores(ctx, "sft" if "sft" in ctx.recipe.stages else "base").items()
    }
    if failed is None:
        for name, one in scores(ctx, stage).items():
            tasks[name]["after"] = one
    own = tasks.get(ctx.recipe.task or "", next(iter(tasks.values())))
    rl = ctx.recipe.rl
    made = {"objective": rl.objective, "feedback": rl.feedback, "lr": rl.lr, "failed": failed, "tasks": tasks}
    made |= {"before": own["before"], "after": own.get("after"), "steps": steps, "updates": updates}
    return made | {"samples": steps[-1]["samples_seen"] if steps else 0}


def columns(updates: Sequence[Mapping[str, Any]]) -> dict[str, list[float | None]]:
    """Metric -> its value at each update, to five digits."""
    made = {name: [update.get(name) for update in updates] for name in CURVES.split()}
    return {
        name: [None if value is None else float(f"{value:.5g}") for value in values]
        for name, values in made.items()
        if any(value is not None for value in values)
    }


def scores(ctx: Context, stage: str) -> dict[str, Any]:
    """Task -> the result of ``stage``, without what it was made with."""
    names = ctx.recipe.eval.tasks or ([ctx.recipe.task] if ctx.recipe.task else [])
    results = {
        name: evaluate_stage(ctx, graded_by(ctx.recipe.eval, open_task(ctx.recipe, name)), stage) for name in names
    }
    return {name: {k: v for k, v in one.items() if k != "settings"} for name, one in results.items()}


WORK: dict[str, Callable[[Context, dict[str, Any]], Row]] = {"start": train_start, "train": train_and_score}


def _probe(name: str) -> Callable[[Context, dict[str, Any]], Row]:
    module, _, function = name.partition(":")
    return getattr(import_module(f"lco_lite.{module}"), function)  # type: ignore[no-any-return]


def link_start(start: Path, folder: Path) -> None:
    """The stages and scores of ``start`` in ``folder``, as links where the file system has them: files are replaced
    here, never written into."""
    if (held := start / "held_out.jsonl").exists():
        write_bytes(folder / held.name, held.read_bytes())
    for part in sorted(start.iterdir()):
        if part.is_dir() and not (folder / part.name).exists():
            with write_folder(folder / part.name) as made:
                shutil.copytree(
                    part, made, copy_function=_link, ignore=shutil.ignore_patterns("checkpoints"), dirs_exist_ok=True
                )


def _link(source: str, target: str) -> str:
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
    return target


if __name__ == "__main__":
    typer.run(main)
