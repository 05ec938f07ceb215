"""Batches that are left out because a number of theirs is not finite: which, why, and how many there may be."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeAlias

from lco_lite.files import JsonLines

BatchRow: TypeAlias = dict[str, Any]
"""What a row of the data is for a reader: its number, its texts, and ``not_finite`` where its own numbers are not."""
SHOWN = 3  # rows of a batch on the screen; the file has all of them


class Skipped:
    """``skipped.jsonl`` of a stage, a line a batch:
    ``{"step": 3, "update": 7, "not_finite": ["loss"], "left_out": true, "rows": […]}``.
    The one that was one too many is in it too, and is not left out: it is tried again.

    What was left out stays so when updates are made again, from a checkpoint or after a kill: a stage ends in the same
    weights, however often it was stopped.
    """

    def __init__(self, path: Path, most: int) -> None:
        self.lines, self.most = JsonLines(path), most

    def __contains__(self, update: int) -> bool:
        """Whether it was left out before."""
        return update in self._left_out()

    def add(self, step: int, update: int, names: Sequence[str], rows: Sequence[BatchRow]) -> bool:
        """Whether the update may be left out: it is not one too many."""
        may = len(self._left_out() - {update}) < self.most
        before = self._lines(update)
        if not before or before[-1]["left_out"] != may:
            line = {"step": step, "update": update, "not_finite": list(names), "left_out": may, "rows": list(rows)}
            self.lines.append(line)
        return may

    def _left_out(self) -> set[int]:
        return {line["update"] for line in self.lines.rows if line.get("left_out")}

    def _lines(self, update: int) -> list[dict[str, Any]]:
        return [line for line in self.lines.rows if line.get("update") == update]

    def say(self, update: int) -> str:
        """Which numbers of the update are not finite, and whose."""
        line = self._lines(update)[-1]
        rows = [row for row in line["rows"] if row.get("not_finite")] or line["rows"]
        shown = "; ".join(", ".join(f"{name} {value!r:.60}" for name, value in row.items()) for row in rows[:SHOWN])
        more = f"; and {len(rows) - SHOWN} more" if len(rows) > SHOWN else ""
        return f"update {update}: not finite: {', '.join(line['not_finite'])}; its rows: {shown}{more}"
