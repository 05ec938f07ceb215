"""Files of a run in which one field is of another type, or which are nested without end."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

WRONG: dict[str, Any] = {
    "text": "x",
    "long": "x" * 5000,
    "null": None,
    "list": [],
    "object": {},
    "yes": True,
    "less": -1,
    "half": 1.5,
    "huge": 10**30,
    "vast": 10**400,
    "inf": float("inf"),
    "nan": float("nan"),
}
DEEP = b"[" * 100_000 + b"]" * 100_000


def fields(file: Path, depth: int = 3) -> list[str]:
    """The fields of a JSON file, or of the last line of a log, as ``result.steps``; of names with dots none."""
    return sorted(_fields(_last(file)[1], depth))


def mistype(file: Path, field: str, wrong: str) -> None:
    """Puts ``WRONG[wrong]`` in place of what is there; the name ``gone`` takes the field away."""
    lines, value = _last(file)
    *path, name = field.split(".")
    inner = value
    for part in path:
        inner = inner[part]
    if wrong == "gone":
        del inner[name]
    else:
        inner[name] = WRONG[wrong]
    file.write_text("".join(f"{line}\n" for line in [*lines, json.dumps(value)]), encoding="utf-8")


def _last(file: Path) -> tuple[list[str], Any]:
    """(the lines before, the value of the last) of a log; of another file nothing and its value."""
    text = file.read_text(encoding="utf-8")
    lines = text.splitlines() if file.suffix == ".jsonl" else [text]
    return lines[:-1], json.loads(lines[-1])


def _fields(value: Any, depth: int) -> Iterator[str]:
    if depth and isinstance(value, dict):
        for name, inner in value.items():
            if "." not in name:
                yield name
                yield from (f"{name}.{rest}" for rest in _fields(inner, depth - 1))
