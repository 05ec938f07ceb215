"""``lco-lite eval``: which policy on which tasks, and how the scores are shown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lco_lite.errors import UsageError
from lco_lite.recipe import Recipe
from lco_lite.stages.context import Context
from lco_lite.stages.evaluate import evaluate_stage, passes_of
from lco_lite.stages.own_metrics import check_own
from lco_lite.stages.pipeline import newest_stage, stages_of, train
from lco_lite.tasks import Task, load_task
from lco_lite.telemetry.console import Console


def score(
    ctx: Context,
    tasks: Sequence[str] | None,
    stage: str | None,
    model: str | None,
    json: bool,
    data: Path | None = None,
) -> None:
    """Scores, then a table or, for machines, one JSON object by task. ``data``: where the items are."""
    names = list(tasks or ([ctx.recipe.task] if ctx.recipe.task else []))
    if not names:
        raise UsageError("eval: name a task (`lco-lite eval --list`): the run's recipe has none")
    if data is not None and data.is_file() and len(names) > 1:
        raise UsageError(
            f"--data {data}: one file holds the items of one task, and {len(names)} are named; give a folder"
        )
    stage = "base" if model else stage or newest_stage(ctx)
    needed = "rm" if stage == "optimal" else stage
    if needed != "base" and not ctx.run.stage(needed).is_done():
        done = ", ".join(["base", *(s.name for s in ctx.run.stages() if s.is_done())])
        raise UsageError(f"eval --policy {stage}: that is not trained in run {ctx.run.name}; there are: {done}")
    loaded = [load_task(n, data or task_file(ctx.recipe, n)) for n in names]
    results = [evaluate_stage(ctx, task, stage, ctx.recipe.eval) for task in loaded]
    if json:
        ctx.console.emit({r["task"]: r for r in results})
    else:
        show(ctx.console, results)
    ctx.console.done(ctx.run.path / "eval")


def score_all(ctx: Context) -> list[dict[str, Any]]:
    """Every stage of the recipe, and the base where it is no model from scratch, on the recipe's evaluation tasks."""
    recipe = ctx.recipe
    stages = [*([] if recipe.model.init else ["base"]), *stages_of(recipe)]
    return [evaluate_stage(ctx, task, s, recipe.eval) for task in eval_tasks(recipe) for s in stages]


def eval_tasks(recipe: Recipe) -> list[Task]:
    names = recipe.eval.tasks if recipe.eval.tasks is not None else [recipe.task] if recipe.task else []
    return [load_task(name, task_file(recipe, name)) for name in names]


def show(console: Console, results: Sequence[dict[str, Any]]) -> None:
    """The paper's table, mean ± std over seeds in percent: a row a stage, a column a task (and metric, if not pass@1).

    A task's own metrics are shown in the task's own unit.
    """
    cells = {
        (r["stage"], _column(r["task"], name)): _cell(value, percent=not r.get("own"))
        for r in results
        for name, value in r["metrics"].items()
    }
    stages, columns = (list(dict.fromkeys(key[i] for key in cells)) for i in (0, 1))
    rows = [[stage, *(cells.get((stage, column), "") for column in columns)] for stage in stages]
    console.table("mean ± std over seeds, %", ["stage", *columns], rows)
    for r in results:
        error = "" if r["stderr"] is None else f", standard error over items {100 * r['stderr']:.1f}"
        cut = f", {100 * r['truncated']:.1f} % cut at the length limit" if r["truncated"] else ""
        console.note(f"{r['task']} {r['stage']}: {r['n']} items, {r['seeds']} seed{'s' * (r['seeds'] > 1)}{error}{cut}")


def _column(task: str, metric: str) -> str:
    return task if metric == "pass@1" else f"{task} {metric}"


def _cell(metric: Mapping[str, float | None], percent: bool) -> str:
    scale, digits = (100, 1) if percent else (1, 3)
    texts = [f"{scale * value:.{digits}f}" for value in (metric["mean"], metric["std"]) if value is not None]
    return " ± ".join(texts)


def task_file(recipe: Recipe, name: str) -> str | None:
    """``data.task`` holds the items of the recipe's own task, not of others."""
    return recipe.data.task if name == recipe.task else None


def run_all(ctx: Context, fresh: bool) -> None:
    """``lco-lite run``: every stage of the recipe, then the score after each."""
    last, s = stages_of(ctx.recipe)[-1], ctx.recipe.eval
    if fresh or not ctx.run.stage(last).is_done():
        for task in eval_tasks(ctx.recipe):  # what a score will lack is said before hours of training
            check_own(task, s, len(task.items("test")[: s.items]), passes_of(s), ctx.console)
    train(ctx, stages_of(ctx.recipe)[0] if fresh else last, fresh)
    train(ctx, last)
    results = score_all(ctx)
    show(ctx.console, results)
    ctx.console.done(ctx.run.path, "lco-lite eval --help")
