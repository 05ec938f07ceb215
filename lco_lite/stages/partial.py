"""The rows of a score that is not complete yet: one JSON line a batch, written as soon as the batch is graded.

    eval/TASK--STAGE.partial.jsonl    the settings, then {"pass": 0, "batch": 3, "rows": [...]}

The batches and their random numbers depend on the settings alone, so a score that was stopped anywhere goes on with the
next batch and ends in the same rows as one that was not.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lco_lite.files import write_bytes, write_errors

Row = dict[str, Any]


class PartialRows:
    """``rows`` by (pass, batch), as far as they are made. With other settings than the file's it starts anew."""

    def __init__(self, path: Path, settings: dict[str, Any]) -> None:
        self.path = path
        known = _read(path)
        same = bool(known) and known[0] == settings
        self.rows: dict[tuple[int, int], list[Row]] = {
            (line["pass"], line["batch"]): line["rows"] for line in (known[1:] if same else [])
        }
        self.dropped = bool(known) and not same
        write_bytes(path, b"".join(map(_line, known if same else [settings])))
        with write_errors(path):
            self._file = path.open("ab", buffering=0)  # a batch is on its way at once

    def append(self, k: int, batch: int, rows: list[Row]) -> None:
        """Keeps the rows of one batch of pass ``k``. Raises LcoError on a full disk."""
        line = memoryview(_line({"pass": k, "batch": batch, "rows": rows}))
        with write_errors(self.path):
            while line:
                line = line[self._file.write(line) :]
        self.rows[k, batch] = rows

    def __enter__(self) -> PartialRows:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


def _read(path: Path) -> list[dict[str, Any]]:
    """The whole lines; a last one that was cut short is left out."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_bytes().split(b"\n")[:-1]]


def _line(value: dict[str, Any]) -> bytes:
    return json.dumps(value, ensure_ascii=False).encode() + b"\n"
