"""Rows of a local file or a hub set as demonstrations, preference pairs and prompts (``shapes`` says which rows)."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from lco_lite.data import shapes
from lco_lite.data.shapes import CONVERSATIONS, RESPONSES, Demonstration, Preference
from lco_lite.errors import DataError
from lco_lite.files import read_jsonl
from lco_lite.models.chat import Message
from lco_lite.recipe.sections import Columns

FILE_KINDS = {".jsonl": "jsonl", ".json": "json", ".parquet": "parquet", ".csv": "csv"}
_PLACES = {"response": RESPONSES[0]}  # where the shapes look for a field

Made = TypeVar("Made")


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
            rows = datasets.load_dataset(kind, data_files=str(path), split="train")
        else:
            name, _, split = source.partition(":")
            rows = datasets.load_dataset(name, split=split or "train")
    except Exception as e:  # datasets raises many kinds, all of them meaning: not to be had
        raise DataError(
            f"{source}: cannot be loaded as {'a ' + kind + ' file' if kind else 'a hub set'}: {_first_line(e)}"
        ) from e
    if not len(rows):
        raise DataError(f"{source}: has no rows")
    return list(rows)


def demonstrations(source: str, system: str | None = None, columns: Columns | None = None) -> list[Demonstration]:
    return _each(source, columns, lambda row, at: shapes.demonstration(row, system, at))


def preferences(source: str, system: str | None = None, columns: Columns | None = None) -> list[Preference]:
    """The pairs of all rows. Raises DataError where there is none."""
    by_row = _each(source, columns, lambda row, at: shapes.preferences(row, system, at))
    pairs = [pair for found in by_row for pair in found]
    if not pairs:
        raise DataError(f"{source}: has no pairs: in no row is one answer better than another")
    return pairs


def prompts(
    source: str, system: str | None = None, columns: Columns | None = None
) -> list[tuple[list[Message], dict[str, Any]]]:
    """(conversation, the row it came from)."""
    return _each(source, columns, lambda row, at: (shapes.prompt(row, system, at), dict(row)))


def _each(source: str, columns: Columns | None, make: Callable[[Mapping[str, Any], str], Made]) -> list[Made]:
    named = {} if columns is None else columns.model_dump(exclude_none=True)
    place = "line" if source.endswith(".jsonl") else "row"
    made = []
    for i, row in enumerate(load_rows(source), 1):
        at = f"{source}, {place} {i}"
        made.append(make(_renamed(row, named, at), at))
    return made


def _renamed(row: Mapping[str, Any], named: Mapping[str, str], at: str) -> Mapping[str, Any]:
    """The row with the columns that the recipe names in the place of ours, which they hide."""
    if not named:
        return row
    for field, column in named.items():
        if column not in row:
            raise DataError(
                f"{at}: has no column {column!r}, which the recipe names as {field}; found {', '.join(row)}"
            )
    hidden: set[str] = set()
    if "response" in named:
        hidden |= set(RESPONSES)
    if "messages" in named or "prompt" in named:
        hidden |= set(CONVERSATIONS)
    kept = {key: value for key, value in row.items() if key not in hidden}
    return kept | {_PLACES.get(field, field): row[column] for field, column in named.items()}


def _read_json(path: Path) -> list[dict[str, Any]]:
    """A list of objects; a file of one object a line is JSON Lines, whatever its name."""
    try:
        content = path.read_text(encoding="utf-8-sig")
        found = json.loads(content) if content.lstrip().startswith("[") else read_jsonl(path)
    except UnicodeDecodeError as e:
        raise DataError(f"{path}: is not UTF-8 (byte {e.start + 1})") from e
    except (json.JSONDecodeError, RecursionError) as e:
        what = f"{e.msg} in line {e.lineno}" if isinstance(e, json.JSONDecodeError) else "nested too deeply"
        raise DataError(f"{path}: is not JSON: {what}") from e
    for i, row in enumerate(found, 1):
        if not isinstance(row, dict):
            raise DataError(f"{path}, row {i}: is not an object with named fields, found {row!r:.80}")
    if not found:
        raise DataError(f"{path}: has no rows")
    return found


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
