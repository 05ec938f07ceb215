"""The table of docs/methods.md: every objective on the quickstart task, from the same warm-up, with the same samples.

    python benchmarks/methods.py                        # about an hour on two cores
    python benchmarks/methods.py --seeds 1 --objectives kld,grpo --json
    python benchmarks/methods.py --objectives kld,ppo --rates 3e-4,1e-3 --set rl.feedback=dpo_sampled

Each seed trains its own model and reward model; the objectives share them. LCO has the recipe's learning rate; for
every other objective seed 0 tries several, and all seeds use the one with the best score. Finished results are kept and
not trained again.
"""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Annotated, Any

import typer

from lco_lite.command import command
from lco_lite.evaluation.evaluate import evaluate_stage
from lco_lite.files import write_json
from lco_lite.metrics import read_log
from lco_lite.recipe import Rl
from lco_lite.recipe.file import find_recipe, load_recipe
from lco_lite.recipe.rl import LCO, METHOD_DEFAULTS
from lco_lite.tasks import load_task
from lco_lite.train.pipeline import train

RATES = {"opd": (1e-3, 3e-3), "gkd": (1e-3, 3e-3)}  # a divergence, as LCO-KLD
RATES_OF_POLICY_GRADIENTS = (3e-4, 1e-3)
RESPONSES = 640  # a phase, however they are spread over prompts


def main(
    recipe: Annotated[str, typer.Argument(help="A recipe file or a shipped recipe's name.")] = "quickstart",
    seeds: Annotated[int, typer.Option(help="Seeds 0 to this less one.")] = 3,
    objectives: Annotated[str, typer.Option(help="Names, with commas.")] = ",".join(METHOD_DEFAULTS),
    rates: Annotated[str, typer.Option(help="Learning rates to try, with commas; the method's unless given.")] = "",
    sets: Annotated[list[str] | None, typer.Option("--set", help="For all of them, e.g. rl.steps=12.")] = None,
    runs: Annotated[Path, typer.Option(help="Folder of the runs.")] = Path("runs/methods"),
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
) -> None:
    table = {}
    for objective in objectives.split(","):
        usual = (None,) if objective in LCO else RATES.get(objective, RATES_OF_POLICY_GRADIENTS)
        to_try = [float(rate) for rate in rates.split(",")] if rates else usual
        tried = {rate: result(recipe, runs, 0, objective, rate, sets or []) for rate in to_try}
        best = max(tried, key=lambda rate: tried[rate]["after"])
        found = [result(recipe, runs, seed, objective, best, sets or []) for seed in range(seeds)]
        scores = {str(rate): one["after"] for rate, one in tried.items()}
        table[objective] = {"lr": found[0]["lr"], "seeds": found, "tried": scores}
        if not as_json:
            typer.echo(line(objective, table[objective]))
    if as_json:
        typer.echo(json.dumps(table))


def result(recipe: str, runs: Path, seed: int, objective: str, lr: float | None, sets: list[str]) -> dict[str, Any]:
    """Scores before and after, samples drawn and seconds of one training run; kept under ``runs/results``."""
    file = runs / "results" / f"{'-'.join([objective, 'recipe' if lr is None else f'{lr:g}', *sets, str(seed)])}.json"
    if file.exists():
        known: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        return known
    each = Rl.model_validate({"objective": objective}).responses_per_prompt
    flags = {"seed": seed, "rl.objective": objective, "rl.prompts_per_step": RESPONSES // each, "rl.lr": lr}
    flags["rl.inner_epochs"] = load_recipe(find_recipe(recipe), sets).rl.inner_epochs  # the same for all
    with command(recipe, runs, f"seed-{seed}", sets, flags, quiet=True) as ctx:
        stage = ctx.recipe.rl.stage
        train(ctx, stage, fresh=(ctx.run.stage(stage).path / "done.json").exists())
        task = load_task(ctx.recipe.task or "arithmetic")
        before, after = (evaluate_stage(ctx, task, name)["mean"] for name in ("sft", stage))
        rows = read_log(ctx.run.stage(stage).metrics)
        seconds = sum(row["seconds"][phase] for row in rows for phase in ("rollout", "score", "update"))
        made = {"before": before, "after": after, "samples": rows[-1]["samples_seen"], "seconds": seconds}
        made |= {"lr": ctx.recipe.rl.lr, "grad_norm": max(row.get("grad_norm", 0.0) for row in rows)}
    file.parent.mkdir(parents=True, exist_ok=True)
    write_json(file, made)
    return made


def line(objective: str, row: dict[str, Any]) -> str:
    found = row["seeds"]

    def over(name: str) -> str:
        values = [one[name] for one in found]
        spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
        return f"{statistics.fmean(values):.3f}{spread}"

    samples, seconds = (statistics.fmean(one[name] for one in found) for name in ("samples", "seconds"))
    cells = [objective, f"{row['lr']:g}", over("before"), over("after"), f"{samples:,.0f}", f"{seconds:.0f}"]
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    typer.run(main)
