"""What a recipe's stages are fed: demonstrations for sft, prompts for pairs and rl, items held out for scores.

A task's training items are shuffled once by the seed; sft takes the first ``sft.examples`` of them, pairs and rl share
the rest (all of them where sft leaves none). Held-out items are the task's ``test`` split and never trained on.
"""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lco_lite.data import rows
from lco_lite.data.overlap import refuse_same
from lco_lite.data.shapes import Demonstration, Preference
from lco_lite.errors import DataError
from lco_lite.models.chat import ChatFormat, Message, conversation
from lco_lite.recipe import Recipe
from lco_lite.sequences import Example, derive
from lco_lite.tasks import load_task
from lco_lite.tasks.base import Item, Task


@dataclass(frozen=True)
class Prompt:
    """A conversation up to the response; ``item`` where a task can grade the response; the data row it came from."""

    messages: Sequence[Message]
    item: Item | None = None
    row: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Pair:
    chosen: Example
    rejected: Example

    def longest(self) -> int:
        return max(len(self.chosen), len(self.rejected))

    def __len__(self) -> int:
        """Padded tokens of the two side by side."""
        return 2 * self.longest()


def recipe_task(recipe: Recipe) -> Task | None:
    return load_task(recipe.task, recipe.data.task) if recipe.task else None


def system_text(recipe: Recipe, task: Task | None) -> str | None:
    if recipe.chat.system is not None or task is None:
        return recipe.chat.system
    return task.system


def item_prompt(item: Item, recipe: Recipe, task: Task) -> Prompt:
    return Prompt(conversation(item.prompt, system_text(recipe, task)), item, item.row)


def held_out(recipe: Recipe, task: Task, limit: int | None) -> list[Prompt]:
    """The first ``limit`` held-out items as prompts."""
    return [item_prompt(item, recipe, task) for item in task.items("test")[:limit]]


def sft_examples(recipe: Recipe, task: Task | None, chat: ChatFormat) -> list[Example]:
    """What sft trains on, as token ids. Raises DataError where there are no demonstrations."""
    return [chat.example(d.messages, d.response) for d in demonstrations(recipe, task)]


def demonstrations(recipe: Recipe, task: Task | None) -> list[Demonstration]:
    """``data.demonstrations``, else the task's. Raises DataError where there are none or they are held-out items."""
    source = recipe.data.demonstrations
    if source is not None:
        found = rows.demonstrations(source, system_text(recipe, task), recipe.data.columns.demonstrations)
        _refuse_held_out(recipe, task, source, [d.messages for d in found])
        return _shuffled(found, recipe.seed)[: recipe.sft.examples]
    assert task is not None, "the recipe makes sure of one or the other"
    first, _ = _split(recipe, task)
    shown = [(item, item.demonstration) for item in first if item.demonstration]
    if not shown:
        raise DataError(
            f"task {task.name} has no demonstrations: name a file in data.demonstrations, or set sft.enabled: false"
        )
    return [Demonstration(item_prompt(item, recipe, task).messages, text) for item, text in shown]


def rl_prompts(recipe: Recipe, task: Task | None) -> list[Prompt]:
    """Prompts for rollouts: ``data.prompts``, or the task's items that sft left."""
    source = recipe.data.prompts
    if source is not None:
        found = rows.prompts(source, system_text(recipe, task), recipe.data.columns.prompts)
        _refuse_held_out(recipe, task, source, [messages for messages, _ in found])
        return [Prompt(messages, row=row) for messages, row in _shuffled(found, recipe.seed)]
    assert task is not None, "the recipe makes sure of one or the other"
    return task_prompts(recipe, task)


def task_prompts(recipe: Recipe, task: Task) -> list[Prompt]:
    """The task's training items that sft left, which the task can grade: what pairs are sampled from."""
    first, rest = _split(recipe, task)
    return [item_prompt(item, recipe, task) for item in rest or first]


def file_pairs(recipe: Recipe, task: Task | None, chat: ChatFormat) -> list[Pair]:
    """Preference pairs of ``data.preferences`` as token ids."""
    pairs = []
    for p in preferences(recipe, task):
        prompt = chat.prompt(p.messages)
        pairs.append(Pair(Example(prompt, chat.response(p.chosen)), Example(prompt, chat.response(p.rejected))))
    return pairs


def preferences(recipe: Recipe, task: Task | None) -> list[Preference]:
    """Those of ``data.preferences``, a file or hub set. Raises DataError where they are held-out items."""
    source = recipe.data.preferences
    found = rows.preferences(source, system_text(recipe, task), recipe.data.columns.preferences)
    _refuse_held_out(recipe, task, source, [p.messages for p in found])
    return _shuffled(found, recipe.seed)


def _refuse_held_out(recipe: Recipe, task: Task | None, source: str, found: Sequence[Sequence[Message]]) -> None:
    if task is not None:
        refuse_same([messages[-1]["content"] for messages in found], task, recipe.data.allow_overlap, source)


def _split(recipe: Recipe, task: Task) -> tuple[list[Item], list[Item]]:
    items = _shuffled(task.items("train"), recipe.seed)
    taken = len(items) if recipe.sft.examples is None else recipe.sft.examples
    uses_items = recipe.sft.enabled and recipe.data.demonstrations is None
    return (items[:taken], items[taken:]) if uses_items else ([], list(items))


def _shuffled(found: Sequence, seed: int) -> list:
    found = list(found)
    random.Random(derive(seed, "split")).shuffle(found)
    return found
