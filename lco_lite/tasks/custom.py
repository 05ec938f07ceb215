"""Your own problems: a file with prompts and answers, graded by name or by a function of yours.

A row has ``prompt``, text or turns, and ``answer``; it may also have ``response``, a demonstration, and ``choices`` for
the grader ``choice``. Columns of other names are named in the recipe (``data.columns.task``). Where rows have
``split``, those of "train" are trained on and all others held out; where none has, the recipe draws which are
(``data.held_out``).
``custom:FILE.py:NAME`` grades by ``NAME(response, item)``, a bool or a ``Grade``.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import takewhile
from pathlib import Path
from typing import Any

from lco_lite.errors import DataError, UsageError
from lco_lite.grading import Grade, Grader, Item
from lco_lite.grading.choice import LETTERS, answer_index, grade_choice
from lco_lite.grading.math import MathGrader
from lco_lite.grading.string import grade_string
from lco_lite.messages import Message, turns_of
from lco_lite.tables import load_rows, named_columns, names_in
from lco_lite.tasks.base import Problem, Rows, Task, answer_text, drawn_to_hold_out, lettered, normalised, text
from lco_lite.user_code import load_function, names_function, shown, told

PROMPTS = ("prompt", "question", "problem", "instruction", "messages")


@dataclass(frozen=True)
class Own:
    """What a recipe says of the file: ``columns``, our names -> its; ``held_out``, the share of its prompts that is
    drawn by the ``seed`` where its rows have no split (None: a tenth; 0: all of them are held out)."""

    columns: Mapping[str, str] = field(default_factory=dict)
    held_out: float | None = 0.0
    seed: int = 0


def custom(data: Path | None = None, grader: str = "math", own: Own = Own()) -> Task:
    """The task. Raises UsageError for an unknown grader; its items raise DataError where ``data`` names no file."""
    sources = {split: partial(_rows, data, split, own) for split in ("train", "test")}
    read = partial(_read, by_letter=grader == "choice")
    return Task("custom", sources, read, grader=grader_named(grader), template="{problem}", max_new_tokens=1_024)


def is_custom(name: str | None) -> bool:
    """``custom``, or ``custom:GRADER``."""
    return name is not None and name.partition(":")[0] == "custom"


def grader_named(name: str) -> Grader:
    """Raises UsageError for an unknown one."""
    if name in GRADERS:
        return GRADERS[name]
    if not names_function(name):
        raise UsageError(f"unknown grader {name!r:.100}: one of {', '.join(GRADERS)}, or FILE.py:NAME")
    return UsersGrader(name, load_function(name))


def _rows(file: Path | None, split: str, own: Own, folder: Path | None) -> Rows:
    """One file holds both splits, so no folder is looked into."""
    if file is None:
        raise DataError("task custom needs a file with the columns prompt and answer, and none is named (data.task)")
    place = "line" if file.suffix == ".jsonl" else "row"
    numbered = [(f"{file}, {place} {i}", row) for i, row in enumerate(load_rows(str(file)), 1)]
    rows = [(at, row | named_columns(row, own.columns, at)) for at, row in numbered]
    if own.held_out != 0 and not any("split" in row for _, row in rows):
        prompts = [normalised(prompt_of(row, at)) for at, row in rows]
        held = drawn_to_hold_out(prompts, own.held_out, own.seed)
        rows = [one for one, prompt in zip(rows, prompts, strict=True) if (prompt in held) == (split == "test")]
        if not rows:
            raise DataError(f"{file}: of its {len(numbered)} rows none is held out: set data.held_out, e.g. to 0.2")
        return rows
    rows = [(at, row) for at, row in rows if (row.get("split") == "train") == (split == "train")]
    if not rows:
        sign = "with" if split == "train" else "without"
        raise DataError(f'{file}: has no {split} items, which are the rows {sign} "split": "train"')
    return rows


def prompt_of(row: Mapping[str, Any], at: str = "row") -> str:
    """What is asked, as the row has it: prompts are held out by that."""
    turns, _ = _asked(row, at)
    return turns[-1]["content"]


def _asked(row: Mapping[str, Any], at: str) -> tuple[list[Message], str | None]:
    """The turns up to the response, and the response where they end with one. Raises DataError."""
    name = next((n for n in PROMPTS if n in row), None)
    if name is None:
        raise DataError(f"{at}: has no field {' or '.join(PROMPTS)}; found {names_in(row)}")
    if isinstance(value := row[name], str) and value.strip():
        more = row.get("input") if name == "instruction" else None
        if more is not None and not isinstance(more, str):
            raise DataError(f"{at}, field input: a text is needed, found {more!r:.80}")
        return [{"role": "user", "content": (f"{value}\n\n{more}" if more else value).strip()}], None
    turns = turns_of(value, f"{at}, field {name}")
    said = turns.pop()["content"] if turns[-1]["role"] == "assistant" else None
    if not turns or turns[-1]["role"] != "user":
        raise DataError(f"{at}: the prompt does not end with a user's turn")
    return turns, said


def _read(row: Mapping[str, Any], by_letter: bool) -> Problem:
    try:
        turns, said = _asked(row, "row")
    except DataError as e:
        raise ValueError(str(e).removeprefix("row, ").removeprefix("row: ")) from e
    shown = text(row, "response") if "response" in row else said
    asked, gold = turns[-1]["content"], answer_text(row)
    if "####" in gold:  # GSM8K's: the working, and the answer after it
        shown, gold = shown or gold, gold.rpartition("####")[2].strip()
        if not gold:
            raise ValueError("field answer has nothing after its last ####")
        row = {**row, "answer": gold} if by_letter else row
    if by_letter and "choices" not in row and len(gold) == 1 and gold in LETTERS:  # the prompt has them
        row = {**row, "choices": list(_letters_in(asked, gold))}
    elif by_letter:
        listed = lettered(row["choices"])
        asked = asked if _lists(asked, row["choices"]) else f"{asked}\n{listed}"
    if by_letter:
        if (index := answer_index(Item("", "", "", None, row))) is None:
            raise ValueError(
                f"field answer is {row['answer']!r:.60}, not the letter, index or text of one of the choices"
            )
        gold = LETTERS[index]
    return Problem(asked, gold, shown, row=row, messages=[*turns[:-1], {"role": "user", "content": asked}])


def _letters_in(asked: str, gold: str) -> str:
    """The letters from A on that the prompt lists, as in ``A. red`` or ``(a) red``; all where ``gold`` is not among
    them: how many there are must not tell which is right."""
    found = "".join(takewhile(lambda one: re.search(rf"(?i)(?<!\w){one}[).:]", asked), LETTERS))
    return found if gold in found and len(found) > 1 else LETTERS


def _lists(asked: str, choices: Sequence[Any]) -> bool:
    """Whether each choice stands in the prompt after its letter, as in ``A. red`` or ``(a) red``; one that begins with
    its letter itself has that one. Choices that are the letters are listed there in words."""
    if all(str(one).strip(" ().:").upper() == letter for letter, one in zip(LETTERS, choices, strict=False)):
        return True
    bare = [re.sub(rf"^\(?{letter}[).:]", "", str(one)) for letter, one in zip(LETTERS, choices, strict=False)]
    words = [r"\s+".join(map(re.escape, text.split())) for text in bare]
    lines = [rf"(?<!\w){letter}\W{{1,9}}{text}(?!\w)" for letter, text in zip(LETTERS, words, strict=False)]
    return all(re.search(line, asked, re.IGNORECASE) for line in lines)


def grade_exact(response: str, item: Item) -> Grade:
    """The whole response is the answer, but for spaces around it."""
    answer = response.strip()
    right = answer == item.gold
    return Grade(right, answer or None, "equal" if right else "not equal")


GRADERS: dict[str, Grader] = {
    "math": MathGrader(),
    "rounded": MathGrader(tolerance=0.01),
    "string": grade_string,
    "choice": grade_choice,
    "exact": grade_exact,
}


@dataclass(frozen=True)
class UsersGrader:
    """A function of the user's as a grader. An error inside it is the user's to see: it is raised, not graded."""

    spec: str
    function: Callable[..., Any]

    def __call__(self, response: str, item: Item) -> Grade:
        try:
            verdict = self.function(response, item)
        except Exception as e:
            raise UsageError(f"{self.spec} failed on item {item.id}: {told(e)}") from e
        if isinstance(verdict, Grade):
            return verdict
        if isinstance(verdict, bool):
            return Grade(verdict, None, f"{self.spec.rpartition(':')[2]} says {'right' if verdict else 'wrong'}")
        raise UsageError(f"{self.spec} returned {shown(verdict)} on item {item.id}; a bool or a Grade is needed")


TASKS = {"custom": custom}
