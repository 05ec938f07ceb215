"""What a recipe's stages are fed: demonstrations for sft, prompts for pairs and rl, items held out for scores.

A task's training items are shuffled once by the seed; sft takes the first ``sft.examples`` of them, pairs and rl share
the rest (all of them where sft leaves none). Held-out items are the task's ``test`` split and never trained on.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from lco_lite.data import rows
from lco_lite.data.chat import ChatFormat, Message, conversation
from lco_lite.errors import DataError
from lco_lite.recipe import Recipe
from lco_lite.seeding import derive
from lco_lite.sequences import Example
from lco_lite.tasks import load_task
from lco_lite.tasks.base import Item, Task


@dataclass(frozen=True)
class Prompt:
    """A conversation up to the response; ``item`` where a task can grade the response."""

    messages: Sequence[Message]
    item: Item | None = None


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
    return Prompt(conversation(item.prompt, system_text(recipe, task)), item)


def held_out(recipe: Recipe, task: Task, limit: int | None) -> list[Prompt]:
    """The first ``limit`` held-out items as prompts."""
    return [item_prompt(item, recipe, task) for item in task.items("test")[:limit]]


def sft_examples(recipe: Recipe, task: Task | None, chat: ChatFormat) -> list[Example]:
    """Demonstrations as token ids, from ``data.demonstrations`` or the task. Raises DataError where there are none."""
    system = system_text(recipe, task)
    if recipe.data.demonstrations is not None:
        shown = _shuffled(rows.demonstrations(recipe.data.demonstrations, system), recipe.seed)[: recipe.sft.examples]
        return [chat.example(d.messages, d.response) for d in shown]
    assert task is not None, "the recipe makes sure of one or the other"
    first, _ = _split(recipe, task)
    shown = [(item, item.demonstration) for item in first if item.demonstration]
    if not shown:
        raise DataError(
            f"task {task.name} has no demonstrations: name a file in data.demonstrations, or set sft.enabled: false"
        )
    return [chat.example(item_prompt(item, recipe, task).messages, text) for item, text in shown]


def rl_prompts(recipe: Recipe, task: Task | None) -> list[Prompt]:
    """Prompts for rollouts: ``data.prompts``, or the task's items that sft left."""
    if recipe.data.prompts is not None:
        found = rows.prompts(recipe.data.prompts, system_text(recipe, task))
        return [Prompt(messages) for messages in _shuffled(found, recipe.seed)]
    assert task is not None, "the recipe makes sure of one or the other"
    return task_prompts(recipe, task)


def task_prompts(recipe: Recipe, task: Task) -> list[Prompt]:
    """The task's training items that sft left, which the task can grade: what pairs are sampled from."""
    first, rest = _split(recipe, task)
    return [item_prompt(item, recipe, task) for item in rest or first]


def file_pairs(recipe: Recipe, task: Task | None, chat: ChatFormat) -> list[Pair]:
    """Preference pairs of ``data.preferences`` as token ids."""
    found = rows.preferences(recipe.data.preferences, system_text(recipe, task))
    pairs = []
    for p in _shuffled(found, recipe.seed):
        prompt = chat.prompt(p.messages)
        pairs.append(Pair(Example(prompt, chat.response(p.chosen)), Example(prompt, chat.response(p.rejected))))
    return pairs


def _split(recipe: Recipe, task: Task) -> tuple[list[Item], list[Item]]:
    items = _shuffled(task.items("train"), recipe.seed)
    taken = len(items) if recipe.sft.examples is None else recipe.sft.examples
    uses_items = recipe.sft.enabled and recipe.data.demonstrations is None
    return (items[:taken], items[taken:]) if uses_items else ([], list(items))


def _shuffled(found: Sequence, seed: int) -> list:
    found = list(found)
    random.Random(derive(seed, "split")).shuffle(found)
    return found
