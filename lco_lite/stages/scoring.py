"""``lco-lite eval``: which policy on which tasks, and how the scores are shown."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lco_lite.errors import UsageError
from lco_lite.recipe import Recipe
from lco_lite.stages.context import Context
from lco_lite.stages.evaluate import evaluate_stage
from lco_lite.stages.pipeline import newest_stage, stages_of, train
from lco_lite.tasks import load_task
from lco_lite.telemetry.console import Console


def score(ctx: Context, tasks: Sequence[str] | None, stage: str | None, model: str | None, json: bool) -> None:
    """Scores, then a table or, for machines, one JSON object by task."""
    names = list(tasks or ([ctx.recipe.task] if ctx.recipe.task else []))
    if not names:
        raise UsageError("eval: name a task (`lco-lite eval --list`): the run's recipe has none")
    stage = "base" if model else stage or newest_stage(ctx)
    needed = "rm" if stage == "optimal" else stage
    if needed != "base" and not ctx.run.stage(needed).is_done():
        done = ", ".join(["base", *(s.name for s in ctx.run.stages() if s.is_done())])
        raise UsageError(f"eval --policy {stage}: that is not trained in run {ctx.run.name}; there are: {done}")
    results = [evaluate_stage(ctx, load_task(n, task_file(ctx.recipe, n)), stage, ctx.recipe.eval) for n in names]
    if json:
        ctx.console.emit({r["task"]: r for r in results})
    else:
        show(ctx.console, results)
    ctx.console.done(ctx.run.path / "eval")


def score_all(ctx: Context) -> list[dict[str, Any]]:
    """Every stage of the recipe, and the base where it is no model from scratch, on the recipe's evaluation tasks."""
    recipe = ctx.recipe
    names = recipe.eval.tasks if recipe.eval.tasks is not None else [recipe.task] if recipe.task else []
    stages = [*([] if recipe.model.init else ["base"]), *stages_of(recipe)]
    return [evaluate_stage(ctx, load_task(n, task_file(recipe, n)), s, recipe.eval) for n in names for s in stages]


def show(console: Console, results: Sequence[dict[str, Any]]) -> None:
    """score ± std over seeds, a row a task and stage."""
    rows = [
        [
            r["task"],
            r["stage"],
            f"{r['mean']:.3f}" + ("" if r["std"] is None else f" ± {r['std']:.3f}"),
            r["n"],
            r["seeds"],
        ]
        for r in results
    ]
    console.table("pass@1", ["task", "stage", "score", "items", "seeds"], rows)


def task_file(recipe: Recipe, name: str) -> str | None:
    """``data.task`` holds the items of the recipe's own task, not of others."""
    return recipe.data.task if name == recipe.task else None


def run_all(ctx: Context, fresh: bool) -> None:
    """``lco-lite run``: every stage of the recipe, then the score after each."""
    last = stages_of(ctx.recipe)[-1]
    train(ctx, stages_of(ctx.recipe)[0] if fresh else last, fresh)
    train(ctx, last)
    results = score_all(ctx)
    show(ctx.console, results)
    ctx.console.done(ctx.run.path, "lco-lite eval --help")
