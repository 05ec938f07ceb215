"""Run folders as training leaves them, written by hand: what a report reads, in no time."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

HOSTILE = "</script><script>window.hacked = 1</script><img src=x onerror='window.hacked = 1'>"
HOSTILE += " & \u2028 \u202e\x1b[31m {{data}}"


def write_lines(file: Path, rows: list[dict[str, Any]]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def make_run(
    runs: Path, name: str, seed: int = 1, beta: float = 1.0, right: float = 0.5, steps: int = 4, tokens: bool = True
) -> Path:
    """A run with sft and rl-kld, scored on 40 items of arithmetic, of which a share ``right`` is right after rl."""
    folder, dice = runs / name, random.Random(f"{seed} {beta}")
    settings = {"seed": seed, "task": "arithmetic", "model.init.hidden_size": 32}
    (folder / "eval").mkdir(parents=True)
    (folder / "recipe.yaml").write_text(f"name: {name}\nseed: {seed}\ntask: arithmetic\nrl:\n  beta: {beta}\n")
    (folder / "environment.json").write_text(json.dumps({"packages": {}, "device": {"kind": "cpu"}}))
    for stage, more in (("sft", {}), ("rl-kld", {"rl.beta": beta})):
        (folder / stage).mkdir()
        begun = {"settings": settings | more, "upstream": {}, "started": "2026-01-01T00:00:00+00:00"}
        (folder / stage / "stage.json").write_text(json.dumps(begun))
        done = {"id": f"{name}-{stage}", "finished": "2026-01-01T00:00:00+00:00", "seconds": 1.0, "result": {}}
        (folder / stage / "done.json").write_text(json.dumps(done))
        numbers = [{"step": k, "loss": 2 / k + dice.random() / 9, "grad_norm": 1 / k} for k in range(1, steps + 1)]
        if stage != "sft":
            numbers = [
                row | {"reward": dice.random() - 1 / row["step"], "samples_seen": 16 * row["step"]} for row in numbers
            ]
            numbers = [row | {"accuracy": 0.0, "kl_to_old": 2.5e-5 / row["step"], "lr": 1e-3} for row in numbers]
        write_lines(folder / stage / "metrics.jsonl", numbers)
        share = right if stage != "sft" else 0.2
        rows = []
        for i in range(40):
            item = {"seed": 0, "sample": 0, "id": f"arithmetic/{i}", "prompt": f"{i}+1", "response": f"#{i + 1}"}
            good = i < 40 * share
            rows.append(item | {"extracted": str(i), "gold": str(i + 1), "right": good, "why": "", "truncated": False})
        write_lines(folder / "eval" / f"arithmetic--{stage}.rows.jsonl", rows)
        mean = sum(row["right"] for row in rows) / 40
        told = {"mean": mean, "std": None, "stderr": 0.05}
        result = {"task": "arithmetic", "stage": stage, "metric": "pass@1", **told, "metrics": {"pass@1": told}}
        how = {"made_by": f"{name}-{stage}", "sampling": {"temperature": 0.6}}
        how |= {"protocol": {}, "items": "i"}
        result |= {"n": 40, "seeds": 1, "samples": 1, "truncated": 0.0, "settings": how}
        (folder / "eval" / f"arithmetic--{stage}.json").write_text(json.dumps(result))
    samples = []
    for step in range(1, steps + 1):
        for k in range(3):
            row = {"step": step, "prompt": f"{step}+{k}", "response": f"so #{step + k}", "truncated": False}
            row |= {"reward": 1.0 if k else -1.0, "right": k > 0, "shown": False, "response_tokens": 3}
            if tokens and k < 2:
                row["tokens"] = [
                    [["so", 0.5, 0.4, 0.6, 0.5], ["to", -0.2, 0.3, 0.2, 0.3]],
                    [[" #", -0.25, 0.9, 0.8, 0.85]],
                    [[str(step + k), 0.0, 0.7, 0.7, 0.7]],
                ]
            samples.append(row)
    samples[-1] |= {"prompt": HOSTILE, "response": HOSTILE}
    write_lines(folder / "rl-kld" / "samples.jsonl", samples)
    return folder


def score_of_base(folder: Path, right: float) -> None:
    """The run has no sft, and its base has a score: a share ``right`` of the same items."""
    shutil.rmtree(folder / "sft")
    for old in sorted((folder / "eval").glob("arithmetic--sft*")):
        text = old.read_text(encoding="utf-8").replace('"sft"', '"base"').replace("-sft", "-base")
        old.unlink()
        rows = [json.loads(line) for line in text.splitlines()]
        for i, row in enumerate(rows):
            if "mean" in row:
                row["mean"] = row["metrics"]["pass@1"]["mean"] = right
            else:
                row["right"] = i < 40 * right
        old.with_name(old.name.replace("sft", "base")).write_text("".join(json.dumps(row) + "\n" for row in rows))


def make_study(folder: Path) -> Path:
    folder.mkdir(parents=True)
    claim = {"name": "ahead", "says": "a is ahead.", "threshold": "above 0.", "verdict": "unclear", "why": HOSTILE}
    about = {"study": "methods", "asks": "Which?", "command": "lco-lite study methods", "version": "0.4.0"}
    about |= {"cells": 4, "done": 2, "claims": [claim], "environment": {}, "rows": []}
    (folder / "study.json").write_text(json.dumps(about))
    (folder / "scores.csv").write_text('method,pass@1\n"a, b",0.5\nc,0.25\n')
    picture = '<svg xmlns="http://www.w3.org/2000/svg" width="90" height="60"><rect width="9" height="9"/></svg>'
    (folder / "learning.svg").write_text(picture)
    lines = [
        "# methods",
        "Which?",
        "    lco-lite study methods",
        "2 of 4 cells",
        "| claim |",
        "![Curves](learning.svg)",
    ]
    (folder / "README.md").write_text("\n\n".join([*lines, "## Scores", "Two seeds alone."]) + "\n")
    return folder
