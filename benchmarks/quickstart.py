"""The README's table: the quickstart recipe with every objective and seed, scored on held-out problems.

    python benchmarks/quickstart.py                     # about ten minutes on two cores
    python benchmarks/quickstart.py --seeds 1 --json

Each seed trains its own model and reward model; the objectives share them. Started again, it continues where it was.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from lco_lite.command import command
from lco_lite.evaluation.evaluate import evaluate_stage
from lco_lite.recipe.rl import LCO
from lco_lite.tasks import load_task
from lco_lite.train.pipeline import train


def main(
    recipe: Annotated[str, typer.Argument(help="A recipe file or a shipped recipe's name.")] = "quickstart",
    seeds: Annotated[int, typer.Option(help="Seeds 0 to this less one.")] = 3,
    runs: Annotated[Path, typer.Option(help="Folder of the runs.")] = Path("runs/quickstart-table"),
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
) -> None:
    results = {seed: scores(recipe, runs, seed) for seed in range(seeds)}
    typer.echo(json.dumps(results) if as_json else markdown(results))


def scores(recipe: str, runs: Path, seed: int) -> dict[str, dict[str, Any]]:
    """The score of every stage of one seed, by stage."""
    found = {}
    for objective in LCO:
        flags = {"seed": seed, "rl.objective": objective}
        with command(recipe, runs, f"seed-{seed}", [], flags, quiet=True) as ctx:
            stage = f"rl-{objective}"
            train(ctx, stage)
            task = load_task(ctx.recipe.task or "arithmetic")
            for name in ("sft", stage, "rm"):
                found[name] = evaluate_stage(ctx, task, name)
    return found


def markdown(results: dict[int, dict[str, dict[str, Any]]]) -> str:
    names = ["sft", *(f"rl-{objective}" for objective in LCO), "rm"]
    lines = ["| seed | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    for seed, found in results.items():
        cells = [f"{found[name]['mean']:.3f} ± {found[name]['std']:.3f}" for name in names]
        lines.append(f"| {seed} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    typer.run(main)
