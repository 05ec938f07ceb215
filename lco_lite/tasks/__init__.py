"""Benchmarks by name. A task is one small file and one line of ``_TASKS``; importing them loads nothing heavy."""

from collections.abc import Callable
from difflib import get_close_matches
from pathlib import Path

from lco_lite.errors import UsageError
from lco_lite.tasks.arithmetic import Arithmetic
from lco_lite.tasks.base import Grade, Item, Task

__all__ = ["Grade", "Item", "Task", "load_task", "task_names"]


def _generated(make: Callable[[], Task]) -> Callable[[Path | None], Task]:
    def load(data: Path | None) -> Task:
        task = make()
        if data is not None:
            raise UsageError(f"task {task.name} makes its own problems and reads no data; {data} is not used")
        return task

    return load


_TASKS: dict[str, Callable[[Path | None], Task]] = {
    "arithmetic": _generated(Arithmetic),
}


def task_names() -> list[str]:
    """The names ``load_task`` knows, in alphabetical order."""
    return sorted(_TASKS)


def load_task(name: str, data: str | Path | None = None) -> Task:
    """The task of that name, reading the local JSONL ``data`` if given. Raises UsageError for an unknown name."""
    if name not in _TASKS:
        close = get_close_matches(name, _TASKS, n=1)
        hint = f"; did you mean {close[0]}?" if close else "."
        raise UsageError(f"unknown task {name!r}{hint} Known: {', '.join(task_names())}")
    return _TASKS[name](None if data is None else Path(data))
