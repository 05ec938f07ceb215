"""Tasks that are not right or wrong make their own metrics of each pass; another judge needs no new responses.

Such a task has ``aggregate``, and may have ``check``, asked before the first response is made, and ``scored_by``, the
settings that its metrics rest on beside the responses.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lco_lite.files import write_json
from lco_lite.recipe import Eval
from lco_lite.stages.summary import summarise_own
from lco_lite.tasks.base import Item, Task
from lco_lite.telemetry.console import Console

_SCORED_BY = "scored_by"
Row = Mapping[str, Any]


def check_own(task: Task, s: Eval, n: int, passes: int, console: Console) -> None:
    """Whether all is there that scoring ``n`` responses, ``passes`` times, will need. Raises what the task raises."""
    if hasattr(task, "check"):
        task.check(s, n, passes, console)


def scored_by(task: Task, s: Eval) -> dict[str, Any]:
    """The part of a score's settings that its responses do not rest on."""
    return {_SCORED_BY: task.scored_by(s)} if hasattr(task, "scored_by") else {}


def responses_of(asked: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a score's settings that its responses rest on."""
    return {name: value for name, value in asked.items() if name != _SCORED_BY}


def own_metrics(
    task: Any,
    s: Eval,
    file: Path,
    passes: Mapping[int, Sequence[Row]],
    items: Mapping[str, Item],
    console: Console,
) -> dict[str, Any]:
    """The part of a result that the task makes; ``passes`` are the rows by seed. Its files lie beside ``file``."""
    found = []
    for seed, rows in passes.items():
        folder = file.with_suffix(".files") / f"seed-{seed}"
        folder.mkdir(parents=True, exist_ok=True)
        whole = [{**row, "row": dict(items[row["id"]].row)} for row in rows]
        found.append(task.aggregate(whole, s, folder, console))
    return summarise_own(found) | {"own": True}


def scored_anew(
    task: Task, s: Eval, file: Path, known: Mapping[str, Any], asked: Mapping[str, Any], console: Console
) -> dict[str, Any]:
    """The score of the responses that are there, by another judge or reward model; replaces that in ``file``."""
    console.note(f"{task.name}: {known['stage']} has answered already; only the scores are made anew")
    passes: dict[int, list[Row]] = {}
    for line in file.with_suffix(".rows.jsonl").read_text(encoding="utf-8").split("\n")[:-1]:
        row = json.loads(line)
        passes.setdefault(row["seed"], []).append(row)
    items = {item.id: item for item in task.items("test")}
    result = {**known, **own_metrics(task, s, file, passes, items, console), "settings": dict(asked)}
    write_json(file, result)
    return result
