"""Benchmarks by name. A task is one small file and one line of ``_TASKS``; importing them loads nothing heavy."""

from collections.abc import Callable
from difflib import get_close_matches
from pathlib import Path

from lco_lite.errors import DataError, UsageError
from lco_lite.tasks.alpaca_eval import alpaca_eval
from lco_lite.tasks.arithmetic import Arithmetic
from lco_lite.tasks.base import Grade, Item, Task
from lco_lite.tasks.custom import custom
from lco_lite.tasks.mathematics import aime24, aime25, amc23, gsm8k, math500, minervamath
from lco_lite.tasks.mmlu import mmlu, mmlu_redux, mmlu_redux_all
from lco_lite.tasks.qa_feedback import qa_feedback

__all__ = ["Grade", "Item", "Task", "load_task", "task_names"]


def _arithmetic(data: Path | None) -> Task:
    if data is not None:
        raise UsageError(f"task arithmetic makes its own problems and reads no data; {data} is not used")
    return Arithmetic()


_TASKS: dict[str, Callable[[Path | None], Task]] = {
    "arithmetic": _arithmetic,
    "gsm8k": gsm8k,
    "math500": math500,
    "amc23": amc23,
    "aime24": aime24,
    "aime25": aime25,
    "minervamath": minervamath,
    "mmlu": mmlu,
    "mmlu_redux": mmlu_redux,
    "mmlu_redux_all": mmlu_redux_all,
    "alpaca_eval": alpaca_eval,
    "qa_feedback": qa_feedback,
    "custom": custom,
}


def task_names() -> list[str]:
    """The names ``load_task`` knows, in alphabetical order."""
    return sorted(_TASKS)


def load_task(name: str, data: str | Path | None = None) -> Task:
    """The task of that name; ``data`` is a JSONL with its held-out items, or a folder with the files of its splits.

    ``custom:GRADER`` is the custom task with another grader (see ``custom``). Raises UsageError for an unknown name and
    DataError for a path that is not there; the items are not opened before they are asked for.
    """
    path = None if data is None else Path(data)
    if path is not None and not path.exists():
        raise DataError(f"{path}: no such file or folder")
    if name.startswith("custom:"):
        return custom(path, name.removeprefix("custom:"))
    if name not in _TASKS:
        close = get_close_matches(name, _TASKS, n=1)
        hint = f"; did you mean {close[0]}?" if close else "."
        raise UsageError(f"unknown task {name!r}{hint} Known: {', '.join(task_names())}")
    return _TASKS[name](path)
