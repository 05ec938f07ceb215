"""Rows of a local file or a hub set, as demonstrations, preference pairs or prompts (``shapes`` says which rows)."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from lco_lite.data.shapes import (
    CONVERSATIONS,
    RESPONSES,
    Demonstration,
    Preference,
    Prompt,
    Row,
    demonstration,
    preferences,
    prompt,
    with_system,
)
from lco_lite.errors import DataError
from lco_lite.files import read_jsonl
from lco_lite.recipe.sections import Columns

FILE_KINDS = {".jsonl": "jsonl", ".json": "json", ".parquet": "parquet", ".csv": "csv"}

Made = TypeVar("Made", Demonstration, Preference, Prompt)


def read_demonstrations(source: str, system: str | None = None, columns: Columns | None = None) -> list[Demonstration]:
    return _read(source, system, columns, lambda row, at: [demonstration(row, at)])


def read_preferences(source: str, system: str | None = None, columns: Columns | None = None) -> list[Preference]:
    """The pairs of all rows. Raises DataError where there is none."""
    pairs = _read(source, system, columns, preferences)
    if not pairs:
        raise DataError(f"{source}: has no pairs: in no row is one answer better than another")
    return pairs


def read_prompts(source: str, system: str | None = None, columns: Columns | None = None) -> list[Prompt]:
    return _read(source, system, columns, lambda row, at: [prompt(row, at)])


def _read(
    source: str, system: str | None, columns: Columns | None, make: Callable[[Row, str], list[Made]]
) -> list[Made]:
    renamed = {} if columns is None else columns.model_dump(exclude_none=True)
    place = "line" if source.endswith(".jsonl") else "row"
    made: list[Made] = []
    for i, row in enumerate(load_rows(source), 1):
        at = f"{source}, {place} {i}"
        row = _with_our_names(row, renamed, at)
        made += [replace(one, messages=with_system(one.messages, row, system, at)) for one in make(row, at)]
    return made


def _with_our_names(row: dict[str, Any], renamed: dict[str, str], at: str) -> dict[str, Any]:
    """The row with the columns that the recipe names (our name -> theirs) in place of those that would be used."""
    for ours, theirs in renamed.items():
        if theirs not in row:
            raise DataError(f"{at}: has no column {theirs!r}, which the recipe names as {ours}; found {', '.join(row)}")
    hidden: tuple[str, ...] = RESPONSES if "response" in renamed else ()
    if "messages" in renamed or "prompt" in renamed:
        hidden += CONVERSATIONS
    kept = {name: value for name, value in row.items() if name not in hidden}
    return kept | {ours: row[theirs] for ours, theirs in renamed.items()}


def load_rows(source: str) -> list[dict[str, Any]]:
    """All rows of a local file, or of a hub set ``id[:split]`` (split ``train`` unless named). Raises DataError."""
    path = Path(source)
    kind = FILE_KINDS.get(path.suffix.lower())
    if path.is_dir():
        raise DataError(f"{path}: is a folder; name a file ({', '.join(FILE_KINDS)}) or a hub set")
    if kind == "jsonl":
        return read_jsonl(path)
    if kind and not path.is_file():
        raise DataError(f"{path}: no such file")
    if kind == "json":
        return _read_json(path)
    import datasets

    try:
        if kind:
            table = datasets.load_dataset(kind, data_files=str(path), split="train")
        else:
            name, _, split = source.partition(":")
            table = datasets.load_dataset(name, split=split or "train")
    except Exception as e:  # datasets raises many kinds, and all of them mean that there are no rows
        what, why = f"a {kind} file" if kind else "a hub set", (str(e).splitlines() or [type(e).__name__])[0]
        raise DataError(f"{source}: cannot be loaded as {what}: {why}") from e
    if not len(table):
        raise DataError(f"{source}: has no rows")
    return list(table)


def _read_json(path: Path) -> list[dict[str, Any]]:
    """A list of objects; a file of one object a line is JSON Lines, whatever its name."""
    try:
        content = path.read_text(encoding="utf-8-sig")
        rows = json.loads(content) if content.lstrip().startswith("[") else read_jsonl(path)
    except UnicodeDecodeError as e:
        raise DataError(f"{path}: is not UTF-8 (byte {e.start + 1})") from e
    except (json.JSONDecodeError, RecursionError) as e:
        what = f"{e.msg} in line {e.lineno}" if isinstance(e, json.JSONDecodeError) else "nested too deeply"
        raise DataError(f"{path}: is not JSON: {what}") from e
    for i, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise DataError(f"{path}, row {i}: is not an object with named fields, found {row!r:.80}")
    if not rows:
        raise DataError(f"{path}: has no rows")
    return rows
