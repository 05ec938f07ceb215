"""How a task is put to a model (the user's turn, the system text, worked examples), and all of it on record.

A score without its prompt cannot be repeated, so what it rests on goes into every result, and a score is used again
only while nothing of that has changed.
"""

import hashlib
import importlib.metadata
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from lco_lite import __version__
from lco_lite.context import Context
from lco_lite.data.prompts import Prompt, plain, system_text
from lco_lite.errors import DataError, UsageError, naming
from lco_lite.grading.choice import LETTERS, answer_index
from lco_lite.grading.math import MathGrader
from lco_lite.models.chat import ChatFormat
from lco_lite.models.fingerprint import fingerprint, local_base
from lco_lite.recipe import Eval, Recipe
from lco_lite.rollout.engine import engine_for
from lco_lite.tasks.base import Item, Problem, Task, answer_text, asked, fill, read_rows, text
from lco_lite.tasks.custom import UsersGrader
from lco_lite.user_code import file_digest
from lco_lite.weights import policy_id, refuse_other_base


class Question(NamedTuple):
    """A held-out item as token ids: its prompt and, where choices are scored by log-likelihood, each one's letter."""

    item: Item
    prompt: list[int]
    letters: list[list[int]]


def question(chat: ChatFormat, prompt: Prompt, likelihood: bool = False) -> Question:
    assert prompt.item is not None, "held-out prompts come from a task"
    if not likelihood:
        return Question(prompt.item, chat.prompt(prompt.messages), [])
    return Question(prompt.item, *chat.choices(prompt.messages, LETTERS[: len(prompt.item.row["choices"])]))


def score_name(task: str, scoring: str, grader: str | None) -> str:
    """What the files of a score are called: one by likelihood, or by another grader, does not replace the task's."""
    own = "likelihood" if scoring == "likelihood" else (grader or "").rpartition(":")[2]
    return f"{task}-{own}" if own else task


def eval_prompts(recipe: Recipe, task: Task) -> list[Prompt]:
    """The first ``eval.items`` held-out items as conversations that end with the user's turn.

    Raises UsageError where the recipe wants worked examples and the task has too few of them, and DataError where an
    item or example does not have what template or system text name.
    """
    settings, protocol = recipe.eval, prompt_settings(recipe, task)
    if task.template != protocol["template"]:
        task = replace(task, template=protocol["template"])
    examples_of = worked_examples(task, settings)

    prompts = []
    for item in task.items("test")[: settings.items]:
        turns = [*examples_of(item), item]
        messages = list(asked(turns[0], _system(settings, item) or protocol["system"]))
        for example, following in pairwise(turns):
            answer = example.demonstration or ""
            if settings.scoring == "likelihood":
                index = answer_index(example)
                answer = example.gold if index is None else LETTERS[index]
            messages += [{"role": "assistant", "content": answer}, *asked(following)]
        prompts.append(Prompt(messages, item))
    return prompts


def _system(settings: Eval, item: Item) -> str | None:
    try:
        return settings.system and fill(settings.system, item.row)
    except (KeyError, ValueError) as e:
        why = f"has no field {e.args[0]!r}" if isinstance(e, KeyError) else e
        raise DataError(f"eval.system {settings.system!r:.60}: item {item.id} {why}") from e


def worked_examples(task: Task, settings: Eval) -> Callable[[Item], Sequence[Item]]:
    """item -> its ``few_shot`` examples: the first of ``eval.examples``; else of ``dev`` those of the item's own
    subject, where it has one; else the first of ``train``."""
    n = settings.few_shot
    if settings.examples is not None:
        file = Path(settings.examples)
        with naming("eval.examples"):
            shown = replace(task, sources={"dev": lambda _: read_rows(file)}, read=_example).items("dev")
        if len(shown) < n:
            raise UsageError(f"eval.few_shot: {n}, and {file} has {len(shown)} worked examples")
        return lambda item: shown[: n or None]
    if n == 0:
        return lambda item: ()
    split = next((name for name in ("dev", "train") if name in task.sources), None)
    if split is None:
        raise UsageError(f"eval.few_shot: task {task.name} has neither a dev nor a train split to take examples from")
    answered = [item for item in task.items(split) if item.demonstration]
    by_subject = split == "dev" and all("subject" in item.row for item in answered)

    def examples_of(item: Item) -> Sequence[Item]:
        subject = item.row.get("subject")
        fitting = [e for e in answered if e.row["subject"] == subject] if by_subject else answered
        if len(fitting) < n:
            where = f" of subject {subject}" if by_subject else ""
            raise UsageError(f"eval.few_shot: {n}, and task {task.name} has {len(fitting)} worked examples{where}")
        return fitting[:n]

    return examples_of


def _example(row: Mapping[str, Any]) -> Problem:
    """A row of ``eval.examples``: ``prompt``, ``answer`` (of ``choices`` the letter, index or text), and ``response``
    where the answer is worked out."""
    index = answer_index(Item("", "", "", None, row))
    if index is None and "choices" in row:
        raise ValueError(f"field answer is {row['answer']!r:.60}, not the letter, index or text of one of the choices")
    gold = answer_text(row) if index is None else LETTERS[index]
    return Problem(
        text(row, "prompt", "question", "problem"), gold, text(row, "response") if "response" in row else gold
    )


def score_settings(ctx: Context, task: Task, stage: str, prompts: Sequence[Prompt]) -> dict[str, Any]:
    """All that a score rests on, as JSON; ``scored_by`` decides how responses are scored, and not what they are."""
    settings = ctx.recipe.eval
    apart = {"tasks", "batch", "batch_tokens", "format", "template", "system", "few_shot", "examples", "scoring"}
    apart |= {"grader", "tolerance", "evaluated"}
    apart |= {name for name in Eval.model_fields if name.startswith(("judge_", "reward_"))}
    scored_by = task.scored_by(settings)
    # of what is asked and what is right: another for other items, texts, examples or gold answers
    lines = [json.dumps([list(map(dict, p.messages)), p.item and p.item.gold]) for p in prompts]
    engine = engine_for(ctx.recipe.rollout.engine, ctx.device)
    sampled = {} if engine == "hf" or stage == "optimal" or settings.scoring == "likelihood" else {"engine": engine}
    return (
        ({"scored_by": scored_by} if scored_by else {})
        | sampled
        | {
            "made_by": made_by(ctx, stage),
            "seed": ctx.recipe.seed,
            "sampling": settings.model_dump(exclude=apart)
            | {"max_new_tokens": settings.max_new_tokens or task.max_new_tokens},
            "protocol": prompt_settings(ctx.recipe, task),
            "items": hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16],
        }
    )


def prompt_settings(recipe: Recipe, task: Task) -> dict[str, Any]:
    """Everything besides weights, sampling and items that a score depends on."""
    settings = recipe.eval
    letter = task.likelihood_template if settings.scoring == "likelihood" else None
    return {
        "scoring": settings.scoring,
        "format": settings.format,
        "template": settings.template or letter or task.template,
        "system": system_text(recipe, task) if settings.system is None else settings.system,
        "template_args": json.loads(json.dumps(recipe.chat.template_args, default=str)),
        "few_shot": settings.few_shot,
        "examples": settings.examples,
        "grader": grader_of(task),
        "lco_lite": __version__,
    }


def grader_of(task: Task) -> dict[str, Any]:
    """The name of what grades; for mathematics its settings and math-verify's version; for a function of the user's
    digests of its file and of the items' columns, which it may read: another score where one is edited."""
    grader: Any = task.grader or task.aggregate
    if isinstance(grader, UsersGrader):
        return {"name": grader.spec, "file": file_digest(grader.spec), "rows": rows_digest(task.items("test"))}
    if isinstance(grader, MathGrader):
        return {"name": "math", **asdict(grader), "math_verify": importlib.metadata.version("math-verify")}
    return {"name": f"{grader.__module__}.{grader.__qualname__}"}


def rows_digest(items: Sequence[Item]) -> str:
    """Of all columns of the items."""
    lines = [json.dumps(item.row, sort_keys=True, default=plain) for item in items]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


def made_by(ctx: Context, stage: str) -> str:
    """Which weights: a stage by the id of its result, which is another once it is trained again; the base by name,
    precision and, of local files, what is in them. DataError where one cannot be read, or a stage's base has changed
    since it was trained."""
    if stage != "base":
        refuse_other_base(ctx.recipe, ctx.run.stage("rm" if stage == "optimal" else stage.partition("@")[0]))
    if stage == "optimal":
        return f"rm {ctx.run.stage('rm').id()}, beta {ctx.recipe.rl.beta}"
    if stage != "base":
        return policy_id(ctx.run, stage)
    model = ctx.recipe.model
    if model.path is None:
        return "base"
    parts: list[object] = ["base", model.path, model.revision or "main", model.quantization, model.dtype]
    parts += [fingerprint(place)[:16] for place in (local_base(model), ctx.adapter) if place is not None]
    return " ".join(map(str, parts))
