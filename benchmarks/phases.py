"""Seconds of each phase of RL (rollout, score, update) and peak memory, from one real run of a recipe.

    python benchmarks/phases.py recipes/quickstart.yaml
    python benchmarks/phases.py recipes/smollm2.yaml --set model.path=FOLDER --json

Trains any missing earlier stage, then RL, and reads its metrics.jsonl. Medians are over steps, without the first if
there are more (it allocates memory and compiles kernels). Compare runs on one machine, not seconds between machines.
"""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Annotated

import typer

from lco_lite.command import command
from lco_lite.environment import environment
from lco_lite.metrics import read_log
from lco_lite.train.pipeline import train

PHASES = ("rollout", "score", "update", "eval")


def main(
    recipe: str,
    sets: Annotated[list[str] | None, typer.Option("--set", "-s", help="Override a field of the recipe.")] = None,
    runs: Annotated[Path, typer.Option(help="Folder of the runs.")] = Path("runs"),
    name: Annotated[str, typer.Option(help="The run's name.")] = "phases",
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
    out: Annotated[Path | None, typer.Option(help="Also write the JSON object to this file.")] = None,
) -> None:
    with command(recipe, runs, name, sets, {}, quiet=True) as ctx:
        stage = f"rl-{ctx.recipe.rl.objective}"
        train(ctx, stage)
        rows = read_log(ctx.run.stage(stage).metrics)
        found = summary(rows) | {"recipe": recipe, "sets": sets or [], "environment": environment()}
        if out is not None:
            out.write_text(json.dumps(found) + "\n")
        if as_json:
            typer.echo(json.dumps(found))
        else:
            for phase, seconds, share in table(found):
                typer.echo(f"{phase:8} {seconds:>8} s a step  {share:>4}")
            typer.echo(f"{found['tokens_per_second']:.0f} response tokens/s, peak {found['peak_mib']:.0f} MiB")


def summary(rows: list[dict]) -> dict:
    """Medians of a metrics.jsonl: seconds by phase, tokens/s; the highest peak."""
    counted = rows[1:] or rows
    return {
        "steps": len(rows),
        "seconds": {p: statistics.median(row["seconds"].get(p, 0.0) for row in counted) for p in PHASES},
        "tokens_per_second": statistics.median(row["tokens_per_second"] for row in counted),
        "response_tokens": statistics.median(row["response_tokens"] for row in counted),
        "peak_mib": max(row["peak_mib"] for row in rows),
    }


def table(found: dict) -> list[list[str]]:
    total = sum(found["seconds"].values())
    return [[phase, f"{s:.2f}", f"{s / total:.0%}"] for phase, s in found["seconds"].items()]


if __name__ == "__main__":
    typer.run(main)
