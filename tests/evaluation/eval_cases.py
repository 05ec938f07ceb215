"""What the tests of scores share: a model from scratch, a task whose grader is neither always right nor wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from click.testing import Result
from typer.testing import CliRunner

from lco_lite.cli import app

GRADER = """
from lco_lite.tasks import Grade

def grade(response, item):
    extracted = str(sum(map(ord, response)) % 3)
    return Grade(extracted == item.gold, extracted, "by chance")
"""


def call(*args: object) -> Result:
    return CliRunner().invoke(app, [str(a) for a in args])


def chance_task(folder: Path, n: int = 12, name: str = "chance") -> tuple[str, Path]:
    """(task, its data): prompts of many lengths, each with a right answer that one response in three gives."""
    (folder / "grader.py").write_text(GRADER)
    data = folder / f"{name}.jsonl"
    data.write_text("".join(json.dumps({"prompt": "x" * (1 + 3 * i), "answer": str(i % 3)}) + "\n" for i in range(n)))
    return f"custom:{folder / 'grader.py'}:grade", data


def score(model: Path, runs: Path, task: str, data: Path, *more: object) -> Result:
    """``lco-lite eval TASK --model``: eight new tokens, four responses at once."""
    sets = ["-s", "eval.max_new_tokens=8", "-s", "eval.batch=4"]
    return call("eval", task, "--model", model, "--data", data, "--runs", runs, "--name", "run", *sets, *more)


def result_of(runs: Path, task: str = "custom", stage: str = "base", run: str = "run") -> dict[str, Any]:
    return json.loads((runs / run / "eval" / f"{task}--{stage}.json").read_text())


def rows_of(runs: Path, task: str = "custom", stage: str = "base", run: str = "run") -> list[dict[str, Any]]:
    lines = (runs / run / "eval" / f"{task}--{stage}.rows.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]
