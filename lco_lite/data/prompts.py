"""What a recipe's stages are fed: demonstrations for sft, prompts for pairs and rl, items held out for scores.

A task's training items are shuffled once by the seed; sft takes the first ``sft.examples`` of them, pairs and rl share
the rest (all of them where sft leaves none). Of ``sft.more_tasks`` sft alone takes items, as many of each. Held-out
items are the task's ``test`` split and never trained on. Where neither a task nor the user's file says which are held
out, the seed draws them by prompt, so that no prompt is on both sides.
"""

import hashlib
import json
import random
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, is_dataclass
from datetime import date
from decimal import Decimal
from pathlib import Path
from typing import Any, Protocol, TypeVar

from lco_lite.data.overlap import refuse_same
from lco_lite.data.rows import (
    Demonstration,
    Made,
    Preference,
    Prompt,
    read_demonstrations,
    read_preferences,
    read_prompts,
)
from lco_lite.errors import DataError, UsageError
from lco_lite.files import is_there, json_text, read_text
from lco_lite.messages import Message
from lco_lite.models.chat import ChatFormat
from lco_lite.recipe import Recipe
from lco_lite.recipe.sections import Columns
from lco_lite.run import Input, Run, verb
from lco_lite.sequences import Example, derive
from lco_lite.tasks import Own, graded_as, load_task
from lco_lite.tasks.base import Item, Task, asked, drawn_to_hold_out, normalised
from lco_lite.tasks.custom import is_custom, prompt_of


@dataclass(frozen=True)
class Pair:
    """A preference pair as token ids."""

    chosen: Example
    rejected: Example

    def longest(self) -> int:
        return max(len(self.chosen), len(self.rejected))

    def __len__(self) -> int:
        """Padded tokens of the two side by side."""
        return 2 * self.longest()


def recipe_task(recipe: Recipe) -> Task | None:
    """Raises UsageError where the rule's word is to be placed, and the task does not know where a response is wrong."""
    task = open_task(recipe, recipe.task) if recipe.task else None
    if task is not None and recipe.rl.places_rule and not task.places_errors:
        raise UsageError(
            f"rl.rewards.rule.credit: first_error needs a task that knows the first error of a response, and "
            f"{recipe.task} does not: set it to response, or take arithmetic or a task with a first_error of its own"
        )
    return task


def open_task(recipe: Recipe, name: str, data: Path | None = None) -> Task:
    """A task by name. The recipe's own has the items, columns and split that the recipe says; another file, ``data``,
    is scored whole."""
    own, columns = name == recipe.task, recipe.data.columns.task.model_dump(exclude_none=True)
    held_out = recipe.data.held_out if data is None else 0.0
    file = data or (recipe.data.task if own else None)
    return load_task(name, file, Own(columns, held_out, recipe.seed) if own else None)


def makes_split(recipe: Recipe, task: Task | None) -> bool:
    """Whether the recipe draws what is held out: without a task, or where the rows of task custom do not say."""
    if task is None:
        return recipe.data.held_out != 0
    is_own = is_custom(recipe.task) and recipe.data.held_out != 0 and recipe.data.task is not None
    return is_own and not any("split" in item.row for item in task.items("test"))


def held_out_prompts(recipe: Recipe, task: Task | None) -> frozenset[str]:
    """The prompts, normalised, that nothing is trained on where the recipe draws them; else none. Each of the recipe's
    files has its share, and what is held out of one is held out of all."""
    if not makes_split(recipe, task):
        return frozenset()
    if task is not None:
        return frozenset(normalised(prompt_of(item.row)) for item in task.items("test"))
    return _drawn(recipe, _own_rows(recipe))


def _drawn(recipe: Recipe, rows: Mapping[str, Sequence[Any]]) -> frozenset[str]:
    asked = ([_last_turn(row) for row in of_file] for of_file in rows.values())
    held = recipe.data.held_out
    return frozenset().union(*(drawn_to_hold_out(prompts, held, recipe.seed) for prompts in asked))


def held_out_lines(recipe: Recipe, task: Task | None) -> str:
    """What a run's ``held_out.jsonl`` says of them."""
    return "".join(json_text({"prompt": prompt}) + "\n" for prompt in sorted(held_out_prompts(recipe, task)))


def same_held_out(run: Run, recipe: Recipe, task: Task | None, doomed: Collection[str] = ()) -> None:
    """Once a stage of ``run`` that is not ``doomed`` has started: UsageError where the recipe and its data hold out
    other prompts than then, some of which were trained on; DataError where it is not known which those were."""
    if not makes_split(recipe, task) or not any(s.started() for s in run.stages() if s.name not in doomed):
        return
    file, first = run.path / "held_out.jsonl", verb(recipe.stages[0])
    if not is_there(file):
        raise DataError(
            f"{file}: is missing, which has the prompts that this run holds out. Put it back, start again with "
            f"`{first} --fresh`, or start a new run with --name NAME"
        )
    if read_text(file) != held_out_lines(recipe, task):
        raise UsageError(
            f"{file}: other prompts are held out than when the run began: seed, data.held_out, rows or which of the "
            "files the stages use are others. Go back to them, or start a new run with --name NAME"
        )


def _own_rows(recipe: Recipe) -> dict[str, list[Any]]:
    """Without a task: the rows of the files that the recipe's stages use."""
    data, system = recipe.data, recipe.chat.system
    rows: dict[str, list[Any]] = {"prompts": [], "demonstrations": [], "preferences": []}
    if data.prompts is not None:
        rows["prompts"] = read_prompts(data.prompts, system, data.columns.prompts)
    if recipe.sft.enabled and data.demonstrations is not None:
        rows["demonstrations"] = read_demonstrations(data.demonstrations, system, data.columns.demonstrations)
    if recipe.rl.needs_reward_model:
        rows["preferences"] = read_preferences(data.preferences, system, data.columns.preferences)
    return rows


def held_out_rows(recipe: Recipe) -> dict[str, list[Any]]:
    """Without a task: the rows of ``prompts``, ``demonstrations`` and ``preferences`` that nothing is trained on,
    in the order of the file."""
    rows = _own_rows(recipe)
    held = _drawn(recipe, rows) if makes_split(recipe, None) else frozenset()
    return {name: [row for row in found if normalised(_last_turn(row)) in held] for name, found in rows.items()}


class Asks(Protocol):
    """What has a conversation up to the response, whatever else it has."""

    @property
    def messages(self) -> Sequence[Message]: ...


Asking = TypeVar("Asking", bound=Asks)


def without_held_out(rows: Sequence[Asking], held: frozenset[str], source: str) -> list[Asking]:
    """The rows of ``source`` whose prompts are none of ``held``. Raises DataError where that leaves none."""
    left = [row for row in rows if normalised(_last_turn(row)) not in held]
    if not left:
        raise DataError(f"{source}: all of its prompts are held out: set data.held_out to a smaller share")
    return left


def _last_turn(row: Asks) -> str:
    return row.messages[-1]["content"]


def rewarding_task(recipe: Recipe) -> Task | None:
    """The task as its grades are rewards and make pairs: stricter than for scores, with ``rl.evaluated``."""
    task = recipe_task(recipe)
    return None if task is None else graded_as(task, evaluated=recipe.rl.evaluated)


def longest_response(recipe: Recipe) -> int:
    """Tokens that a rollout, or a response for a pair, may take."""
    task = recipe_task(recipe)
    return recipe.rl.max_new_tokens or (task.max_new_tokens if task else recipe.rl.max_length // 2)


def system_text(recipe: Recipe, task: Task | None) -> str | None:
    """The recipe's system message, else the task's."""
    return task.system if recipe.chat.system is None and task else recipe.chat.system


def sft_examples(recipe: Recipe, task: Task | None, chat: ChatFormat) -> list[Example]:
    """What sft trains on, as token ids. Raises DataError where there are no demonstrations."""
    return [chat.example(d.messages, d.response) for d in demonstrations(recipe, task)]


def demonstrations(recipe: Recipe, task: Task | None) -> list[Demonstration]:
    """``data.demonstrations``, else the task's; then those of ``sft.more_tasks``. Raises DataError where there are none
    or they are held-out items, UsageError for an unknown task."""
    return _own_demonstrations(recipe, task) + more_demonstrations(recipe)


def more_demonstrations(recipe: Recipe) -> list[Demonstration]:
    """Those of ``sft.more_tasks``, one task after the other. Raises UsageError for an unknown task, and DataError."""
    return [shown for name in recipe.sft.more_tasks for shown in _of_items(recipe, load_task(name))]


def _own_demonstrations(recipe: Recipe, task: Task | None) -> list[Demonstration]:
    data = recipe.data
    if data.demonstrations is not None:
        rows = _shuffled_rows(recipe, task, read_demonstrations, data.demonstrations, data.columns.demonstrations)
        return rows[: recipe.sft.examples]
    assert task is not None, "the recipe makes sure of one or the other"
    return _of_items(recipe, task)


def _of_items(recipe: Recipe, task: Task) -> list[Demonstration]:
    items, _ = _split(recipe, task, for_sft=True)
    shown = [(item, item.demonstration) for item in items if item.demonstration]
    if not shown and task.name in recipe.sft.more_tasks:
        raise DataError(f"sft.more_tasks: task {task.name} has no demonstrations, so there is nothing to mix in")
    if not shown:
        raise DataError(
            f"task {task.name} has no demonstrations: name a file in data.demonstrations, or set sft.enabled: false"
        )
    return [Demonstration(_item_prompt(item, recipe, task).messages, text) for item, text in shown]


def file_pairs(recipe: Recipe, task: Task | None, chat: ChatFormat) -> list[Pair]:
    """The pairs of ``data.preferences``, a file or hub set. Raises DataError where they are held-out items."""
    return [pair_of(row, chat) for row in preference_rows(recipe, task)]


def preference_rows(recipe: Recipe, task: Task | None) -> list[Preference]:
    data = recipe.data
    return _shuffled_rows(recipe, task, read_preferences, data.preferences, data.columns.preferences)


def pair_of(p: Preference, chat: ChatFormat) -> Pair:
    prompt = chat.prompt(p.messages)
    return Pair(*(Example(prompt, chat.answer(p.messages, text)) for text in (p.chosen, p.rejected)))


def held_out_pairs(recipe: Recipe, chat: ChatFormat) -> list[Pair]:
    """Those of ``data.preferences`` whose prompts the recipe holds out, which it does without a task."""
    if recipe.task is not None or not makes_split(recipe, None):
        return []
    return [pair_of(p, chat) for p in held_out_rows(recipe)["preferences"]]


def task_prompts(recipe: Recipe, task: Task) -> list[Prompt]:
    """The task's training items that sft left, which the task can grade: what pairs are sampled from."""
    first, rest = _split(recipe, task)
    return [_item_prompt(item, recipe, task) for item in rest or first]


def rl_prompts(recipe: Recipe, task: Task | None) -> list[Prompt]:
    """Prompts for rollouts: ``data.prompts``, or the task's items that sft left."""
    data = recipe.data
    if data.prompts is not None:
        return _shuffled_rows(recipe, task, read_prompts, data.prompts, data.columns.prompts)
    assert task is not None, "the recipe makes sure of one or the other"
    return task_prompts(recipe, task)


def held_out(recipe: Recipe, task: Task, limit: int | None) -> list[Prompt]:
    """The first ``limit`` held-out items."""
    return [_item_prompt(item, recipe, task) for item in task.items("test")[:limit]]


def trained_on(recipe: Recipe, stage: str) -> dict[str, Input]:
    """By setting, the rows that a stage is trained on, or samples responses to: as read, and in their order. Raises
    DataError and UsageError as reading them does."""
    data, task = recipe.data, recipe_task(recipe)
    rows: Sequence[Any]
    if stage == "sft":
        key, source, rows = "data.demonstrations", data.demonstrations, demonstrations(recipe, task)
    elif stage == "rm" and data.preferences != "sampled":
        key, source, rows = "data.preferences", data.preferences, preference_rows(recipe, task)
    elif stage == "rm":
        assert task is not None, "the recipe makes sure"
        key, source, rows = "task", None, task_prompts(recipe, task)[: recipe.train_rm.prompts]
    else:
        key, source, rows = "data.prompts", data.prompts, rl_prompts(recipe, task)
    if source is None:
        key, source = "task", f"task {recipe.task}" + (f" ({data.task})" if data.task else "")
    more = recipe.sft.more_tasks if stage == "sft" else []
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps(row, default=plain, sort_keys=True).encode() + b"\n")
    return {key: Input(", ".join([source, *more]), digest.hexdigest())}


def plain(value: Any) -> Any:
    """What JSON has no form for: a row's fields, and of a picture or the like that it is one."""
    if is_dataclass(value):
        return vars(value)
    if isinstance(value, Mapping):
        return dict(value)
    return str(value) if isinstance(value, (bytes, date, Decimal)) else type(value).__name__


def _shuffled_rows(
    recipe: Recipe, task: Task | None, read: Callable[..., list[Made]], source: str, columns: Columns
) -> list[Made]:
    """Without those that the recipe holds out. Raises DataError where they are held-out items of the task."""
    rows, held = read(source, system_text(recipe, task), columns), held_out_prompts(recipe, task)
    if held:
        rows = without_held_out(rows, held, source)
    elif task is not None:
        refuse_same([row.messages[-1]["content"] for row in rows], task, recipe.data.allow_overlap, source)
    random.Random(derive(recipe.seed, "split")).shuffle(rows)
    return rows


def _split(recipe: Recipe, task: Task, for_sft: bool = False) -> tuple[list[Item], list[Item]]:
    """(items for sft, the rest) of the task's training items; ``for_sft``: whatever else sft takes."""
    items = list(task.items("train"))
    random.Random(derive(recipe.seed, "split")).shuffle(items)
    taken = len(items) if recipe.sft.examples is None else recipe.sft.examples
    uses_items = for_sft or (recipe.sft.enabled and recipe.data.demonstrations is None)
    return (items[:taken], items[taken:]) if uses_items else ([], items)


def _item_prompt(item: Item, recipe: Recipe, task: Task) -> Prompt:
    return Prompt(asked(item, system_text(recipe, task)), item, item.row)
