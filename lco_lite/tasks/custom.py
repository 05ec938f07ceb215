"""Your own problems: a JSONL with ``prompt`` and ``answer``, graded by name or by a function of yours.

A row may also have ``response``, a demonstration, ``choices`` for the grader ``choice``, and ``"split": "train"``: all
other rows are held out. ``custom:FILE.py:NAME`` grades by ``NAME(response, item)``, a bool or a ``Grade``.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from lco_lite.errors import DataError, UsageError
from lco_lite.grading import Grade, Grader, Item
from lco_lite.grading.choice import grade_choice
from lco_lite.grading.math import MathGrader
from lco_lite.grading.string import grade_string
from lco_lite.tasks.base import Problem, Rows, Task, answer_text, read_rows, text
from lco_lite.user_code import load_function, names_function


def custom(data: Path | None = None, grader: str = "math") -> Task:
    """The task. Raises UsageError for an unknown grader; its items raise DataError where ``data`` names no file."""
    sources = {split: partial(_rows, data, split) for split in ("train", "test")}
    return Task("custom", sources, _read, grader=grader_named(grader), template="{problem}", max_new_tokens=1_024)


def grader_named(name: str) -> Grader:
    """Raises UsageError for an unknown one."""
    if name in GRADERS:
        return GRADERS[name]
    if not names_function(name):
        raise UsageError(f"unknown grader {name!r}: one of {', '.join(GRADERS)}, or FILE.py:NAME")
    return UsersGrader(name, load_function(name))


def _rows(file: Path | None, split: str, folder: Path | None) -> Rows:
    """One file holds both splits, so no folder is looked into."""
    if file is None:
        raise DataError("task custom needs a JSONL file with the fields prompt and answer, and none is named")
    rows = [(place, row) for place, row in read_rows(file) if (row.get("split") == "train") == (split == "train")]
    if not rows:
        sign = "with" if split == "train" else "without"
        raise DataError(f'{file}: has no {split} items, which are the rows {sign} "split": "train"')
    return rows


def _read(row: Mapping[str, Any]) -> Problem:
    return Problem(text(row, "prompt"), answer_text(row), text(row, "response") if "response" in row else None)


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
            raise UsageError(f"{self.spec} failed on item {item.id}: {type(e).__name__}: {e}") from e
        if isinstance(verdict, Grade):
            return verdict
        if isinstance(verdict, bool):
            return Grade(verdict, None, f"{self.spec.rpartition(':')[2]} says {'right' if verdict else 'wrong'}")
        raise UsageError(f"{self.spec} returned {verdict!r:.60} on item {item.id}; a bool or a Grade is needed")


TASKS = {"custom": custom}
