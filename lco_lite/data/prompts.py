"""What a recipe's stages are fed: demonstrations for sft, prompts for pairs and rl, items held out for scores.

A task's training items are shuffled once by the seed; sft takes the first ``sft.examples`` of them, pairs and rl share
the rest (all of them where sft leaves none). Of ``sft.more_tasks`` sft alone takes items, as many of each. Held-out
items are the task's ``test`` split and never trained on.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass

from lco_lite.data.overlap import refuse_same
from lco_lite.data.rows import Demonstration, Made, Prompt, read_demonstrations, read_preferences, read_prompts
from lco_lite.errors import DataError, UsageError
from lco_lite.models.chat import ChatFormat, conversation
from lco_lite.recipe import Recipe
from lco_lite.recipe.sections import Columns
from lco_lite.sequences import Example, derive
from lco_lite.tasks import graded_as, load_task
from lco_lite.tasks.base import Item, Task


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
    task = load_task(recipe.task, recipe.data.task) if recipe.task else None
    if task is not None and recipe.rl.places_rule and not task.places_errors:
        raise UsageError(
            f"rl.rewards.rule.credit: first_error needs a task that knows the first error of a response, and "
            f"{recipe.task} does not: set it to response, or take arithmetic or a task with a first_error of its own"
        )
    return task


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
    data, pairs = recipe.data, []
    for p in _shuffled_rows(recipe, task, read_preferences, data.preferences, data.columns.preferences):
        prompt = chat.prompt(p.messages)
        pairs.append(Pair(*(Example(prompt, chat.answer(p.messages, text)) for text in (p.chosen, p.rejected))))
    return pairs


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


def _shuffled_rows(
    recipe: Recipe, task: Task | None, read: Callable[..., list[Made]], source: str, columns: Columns
) -> list[Made]:
    """Raises DataError where they are held-out items of the task."""
    rows = read(source, system_text(recipe, task), columns)
    if task is not None:
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
    return Prompt(conversation(item.prompt, system_text(recipe, task)), item, item.row)
