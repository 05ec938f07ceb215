"""How a task is put to a model: the user's turn, the system text, worked examples; and all of it on record.

A score without its prompt cannot be repeated, so ``protocol`` goes into every result, and a score is used again only
while nothing in it has changed.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from lco_lite import __version__
from lco_lite.context import Context
from lco_lite.data.prompts import Prompt, system_text
from lco_lite.errors import DataError, UsageError
from lco_lite.evaluation.evaluate import scored_by
from lco_lite.grading.math import grade_math, grade_rounded
from lco_lite.models.chat import conversation
from lco_lite.recipe import Eval, Recipe
from lco_lite.tasks.base import Item, Task
from lco_lite.tasks.custom import UsersGrader


def score_name(task: str, scoring: str) -> str:
    """What the files of a score are called: one by likelihood does not replace one by generation."""
    return f"{task}-likelihood" if scoring == "likelihood" else task


def configured(task: Task, s: Eval) -> Task:
    """The task with the template of ``s``, where it has one to replace."""
    template = template_of(task, s)
    return task if task.template == template else replace(task, template=template)


def template_of(task: Task, s: Eval) -> str:
    """What stands around ``{problem}`` in the user's turn."""
    letter = task.likelihood_template if s.scoring == "likelihood" else None
    return s.template or letter or task.template


def eval_prompts(recipe: Recipe, task: Task, s: Eval) -> list[Prompt]:
    """The first ``s.items`` held-out items as conversations that end with the user's turn.

    Raises UsageError where worked examples are asked for and the task has too few of them.
    """
    task, system = configured(task, s), eval_system(recipe, task, s)
    shown = worked_examples(task, s.few_shot)

    def answer(example: Item) -> str:
        return example.gold if s.scoring == "likelihood" else example.demonstration or ""

    prompts = []
    for item in task.items("test")[: s.items]:
        first, *rest = [*shown(item), item]
        messages = conversation(first.prompt, system)
        for before, after in zip([first, *rest], rest, strict=False):
            messages += [{"role": "assistant", "content": answer(before)}, *conversation(after.prompt)]
        prompts.append(Prompt(messages, item))
    return prompts


def eval_system(recipe: Recipe, task: Task, s: Eval) -> str | None:
    return s.system if s.system is not None else system_text(recipe, task)


def worked_examples(task: Task, n: int) -> Callable[[Item], Sequence[Item]]:
    """item -> its ``n`` examples: of ``dev`` those of the item's own subject, where it has one; else the first n."""
    if n == 0:
        return lambda item: ()
    split, found = _examples_split(task)
    answered = [item for item in found if item.demonstration]
    by_subject = split == "dev" and all("subject" in item.row for item in answered)

    def shown(item: Item) -> Sequence[Item]:
        subject = item.row.get("subject")
        fitting = [e for e in answered if e.row["subject"] == subject] if by_subject else answered
        if len(fitting) < n:
            where = f" of subject {subject}" if by_subject else ""
            raise UsageError(f"eval.few_shot: {n}, and task {task.name} has {len(fitting)} worked examples{where}")
        return fitting[:n]

    return shown


def _examples_split(task: Task) -> tuple[str, Sequence[Item]]:
    for split in ("dev", "train"):
        try:
            return split, task.items(split)
        except DataError:
            raise
        except UsageError:  # the task has no split of that name
            continue
    raise UsageError(f"eval.few_shot: task {task.name} has neither a dev nor a train split to take examples from")


def protocol(recipe: Recipe, task: Task, s: Eval) -> dict[str, Any]:
    """Everything besides weights, sampling and items that a score depends on; JSON."""
    return {
        "scoring": s.scoring,
        "template": template_of(task, s),
        "system": eval_system(recipe, task, s),
        "template_args": json.loads(json.dumps(recipe.chat.template_args, default=str)),
        "few_shot": s.few_shot,
        "grader": grader_of(task),
        "lco_lite": __version__,
    }


def grader_of(task: Task) -> dict[str, str]:
    """The name of what grades; for mathematics math-verify's version; for a function of the user's a digest of its
    file, since an edited grader makes another score."""
    grader: Any = task.grader or task.aggregate
    if isinstance(grader, UsersGrader):
        file = Path(grader.spec.rpartition(":")[0])
        return {"name": grader.spec, "file": hashlib.sha256(file.read_bytes()).hexdigest()[:16]}
    found = {"name": f"{grader.__module__}.{grader.__qualname__}"}
    if grader in (grade_math, grade_rounded):
        found["math_verify"] = importlib.metadata.version("math-verify")
    return found


def digest(prompts: Sequence[Prompt]) -> str:
    """Of what is asked and what is right: another for other items, texts, examples or gold answers."""
    lines = [json.dumps([list(map(dict, p.messages)), p.item and p.item.gold]) for p in prompts]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


def asked_for(ctx: Context, task: Task, stage: str, s: Eval, prompts: Sequence[Prompt]) -> dict[str, Any]:
    """All that a score rests on; how many responses are made at once is no part of it."""
    kept = {"tasks", "batch", "batch_tokens", "template", "system", "few_shot", "scoring"}
    kept |= {name for name in Eval.model_fields if name.startswith(("judge_", "reward_"))}
    return scored_by(task, s) | {
        "made_by": made_by(ctx, stage),
        "seed": ctx.recipe.seed,
        "sampling": s.model_dump(exclude=kept),
        "protocol": protocol(ctx.recipe, task, s),
        "items": digest(prompts),
    }


def made_by(ctx: Context, stage: str) -> str:
    """What the score rests on: it is no longer known once that is trained again."""
    if stage == "base":
        return " ".join(["base", *map(str, base_of(ctx))])
    return (
        f"rm {ctx.run.stage('rm').id()}, beta {ctx.recipe.rl.beta}" if stage == "optimal" else ctx.run.stage(stage).id()
    )


def base_of(ctx: Context) -> list[object]:
    """Which weights, in what precision; of local files, when they were last written."""
    model = ctx.recipe.model
    if model.path is None:
        return []
    found: list[object] = [model.path, model.revision or "main", model.quantization, model.dtype]
    for folder in filter(None, (Path(model.path), ctx.adapter)):
        written = [file.stat().st_mtime_ns for file in folder.glob("*.safetensors")] if folder.is_dir() else []
        found += [folder, *sorted(written)[-1:]] if written else []
    return found
