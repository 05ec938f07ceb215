"""JSON Lines: one object a line. What is wrong with a file is said with its name and the line."""

import json
from pathlib import Path
from typing import Any

from lco_lite.errors import DataError


def read_jsonl(path: str | Path) -> list[dict[str, Any]]:
    """All rows, in the order of the file, so that row i stands in line i + 1; empty lines are allowed at the end only.

    Raises DataError for a file that is missing, unreadable or empty, and for a line that is no JSON object in UTF-8.
    """
    try:
        content = Path(path).read_bytes()
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    except OSError as e:
        raise DataError(f"{path}: cannot be read: {e.strerror or e}") from e
    # Only \n ends a line here: str.splitlines would also split at characters that JSON strings may hold.
    lines = content.removeprefix(b"\xef\xbb\xbf").rstrip().split(b"\n")
    if lines == [b""]:
        raise DataError(f"{path}: is empty; one JSON object a line is expected")
    return [_row(line, f"{path}, line {i}") for i, line in enumerate(lines, 1)]


def _row(line: bytes, at: str) -> dict[str, Any]:
    if not line.strip():
        raise DataError(f"{at}: is empty; one JSON object a line is expected")
    try:
        row = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as e:
        raise DataError(f"{at}: is not UTF-8 (byte {e.start + 1})") from e
    except (json.JSONDecodeError, RecursionError) as e:
        what = f"{e.msg} at column {e.colno}" if isinstance(e, json.JSONDecodeError) else "nested too deeply"
        raise DataError(f"{at}: is not JSON: {what}") from e
    if not isinstance(row, dict):
        raise DataError(f"{at}: is {_kind(row)}, not an object with named fields")
    return row


def _kind(value: Any) -> str:
    if value is None:
        return "null"
    return {list: "a list", str: "a string", bool: "a boolean"}.get(type(value), "a number")
