"""Preference pairs made from the policy's own responses: the task grades them, right is paired with wrong.

A task that knows where a response first goes wrong lets the rejected one be cut after that token: whatever follows a
mistake may be sound in itself, and the policy will visit those states.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

from lco_lite.data.chat import ChatFormat
from lco_lite.data.jsonl import read_jsonl
from lco_lite.data.prepare import Pair, Prompt
from lco_lite.errors import DataError
from lco_lite.files import write_text
from lco_lite.recipe import TrainRm
from lco_lite.rollout.engine import Engine, Response, Sampling
from lco_lite.sequences import Example
from lco_lite.tasks.base import Item, Task


def sample_pairs(
    engine: Engine,
    chat: ChatFormat,
    task: Task,
    prompts: Sequence[Prompt],
    s: TrainRm,
    sampling: Sampling,
    on_batch: Callable[[int], None] = lambda done: None,
) -> list[Pair]:
    """Up to ``pairs_per_prompt`` pairs for each prompt that has both a right and a wrong response."""
    n = s.samples_per_prompt
    ids = [chat.prompt(p.messages) for p in prompts]
    responses = engine.generate([i for i in ids for _ in range(n)], sampling, on_batch)
    pairs = []
    for k, prompt in enumerate(prompts):
        item = prompt.item
        assert item is not None, "prompts for sampled pairs are a task's items"
        right, wrong = _grade(chat, task, item, responses[k * n : (k + 1) * n])
        if not right and s.demonstrations_as_chosen and item.demonstration:
            right = [chat.example(prompt.messages, item.demonstration)]
        if s.cut_rejected:
            wrong = [cut_after_error(chat, task, item, example) for example in wrong]
        pairs += [Pair(c, r) for c, r in zip(right, wrong, strict=False)][: s.pairs_per_prompt]
    return pairs


def cut_after_error(chat: ChatFormat, task: Task, item: Item, example: Example) -> Example:
    """The response up to and with the token that holds its first wrong character; whole where the task cannot tell."""
    error = task.first_error(chat.text(example.response), item)
    if error is None:
        return example
    for end in range(1, len(example.response)):
        if len(chat.text(example.response[:end])) > error:
            return Example(example.prompt, example.response[:end])
    return example


def save_pairs(file: Path, pairs: Sequence[Pair], chat: ChatFormat) -> None:
    """JSONL with the text for people and the token ids, which are what was sampled."""
    rows = [
        {
            "prompt": chat.tokenizer.decode(p.chosen.prompt),
            "chosen": chat.text(p.chosen.response),
            "rejected": chat.text(p.rejected.response),
            "prompt_ids": p.chosen.prompt,
            "chosen_ids": p.chosen.response,
            "rejected_ids": p.rejected.response,
        }
        for p in pairs
    ]
    write_text(file, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def load_pairs(file: Path) -> list[Pair]:
    """The pairs that ``save_pairs`` wrote. Raises DataError where the file has been changed into something else."""
    try:
        return [
            Pair(Example(row["prompt_ids"], row["chosen_ids"]), Example(row["prompt_ids"], row["rejected_ids"]))
            for row in read_jsonl(file)
        ]
    except KeyError as e:
        raise DataError(f"{file}: a row has no field {e}; delete the file to sample the pairs again") from e


def _grade(
    chat: ChatFormat, task: Task, item: Item, responses: Sequence[Response]
) -> tuple[list[Example], list[Example]]:
    right: list[Example] = []
    wrong: list[Example] = []
    for response in responses:
        good = task.grade(chat.text(response.example.response), item).right and not response.truncated
        (right if good else wrong).append(response.example)
    return right, wrong
