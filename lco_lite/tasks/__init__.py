"""Benchmarks by name. A new one is a module of this package with ``TASKS``: name -> function of ``data`` that opens it.

Importing them loads nothing heavy.
"""

from collections.abc import Callable
from dataclasses import replace
from difflib import get_close_matches
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules

from lco_lite.errors import DataError, UsageError
from lco_lite.files import is_there
from lco_lite.grading import Grade, Item
from lco_lite.grading.math import MathGrader
from lco_lite.tasks.base import Task
from lco_lite.tasks.custom import Own, custom, grader_named, is_custom

__all__ = ["Grade", "Item", "Own", "Task", "graded_as", "load_task", "task_names"]


def task_names() -> list[str]:
    """The names ``load_task`` knows, in alphabetical order."""
    return sorted(_openers())


def load_task(name: str, data: str | Path | None = None, own: Own | None = None) -> Task:
    """The task of that name; ``data`` is a JSONL with its held-out items, or a folder with the files of its splits;
    ``own`` what a recipe says of the file of ``custom``.

    ``custom:GRADER`` is the custom task with another grader. Raises UsageError for an unknown name and DataError for a
    path that is not there; the items are not opened before they are asked for.
    """
    path = None if data is None else Path(data)
    if path is not None and not is_there(path):
        raise DataError(f"{path!s:.200}: no such file or folder")
    if is_custom(name):
        return custom(path, name.partition(":")[2] or "math", own or Own())
    openers = _openers()
    if name not in openers:
        close = get_close_matches(name, openers, n=1)
        hint = f"; did you mean {close[0]}?" if close else "."
        raise UsageError(f"unknown task {name!r:.100}{hint} Known: {', '.join(task_names())}")
    return openers[name](path)


def graded_as(task: Task, grader: str | None = None, tolerance: float | None = None, evaluated: bool = False) -> Task:
    """The task with another grader (a name, or FILE.py:NAME), or with other settings of ``MathGrader`` where that is
    its grader. Raises UsageError for an unknown grader, and for a tolerance where there is nothing to set."""
    if grader is not None:
        task = replace(task, grader=grader_named(grader))
    if isinstance(task.grader, MathGrader):
        own = task.grader.tolerance if tolerance is None else tolerance
        return replace(task, grader=MathGrader(own, evaluated))
    if tolerance is not None:
        raise UsageError(f"eval.tolerance: task {task.name} is not graded as mathematics")
    return task


def _openers() -> dict[str, Callable[[Path | None], Task]]:
    names = [module.name for module in iter_modules(__path__) if module.name != "base"]
    return {task: opener for name in names for task, opener in import_module(f"{__name__}.{name}").TASKS.items()}
