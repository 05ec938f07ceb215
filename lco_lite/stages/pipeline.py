"""The order of the stages, and what each rests on: sft, then rm, then rl, then a score of each."""

from __future__ import annotations

from collections.abc import Callable

from lco_lite.checkpoint import checkpoints
from lco_lite.errors import Diverged, UsageError
from lco_lite.recipe import Recipe
from lco_lite.recipe.stage_settings import stage_settings
from lco_lite.run import StageFolder
from lco_lite.stages.context import Context
from lco_lite.stages.rl import train_rl
from lco_lite.stages.sft import train_sft
from lco_lite.stages.train_rm import train_rm


def stages_of(recipe: Recipe) -> list[str]:
    """The stages that a recipe asks for, in order."""
    return [
        *(["sft"] if recipe.sft.enabled else []),
        *(["rm"] if recipe.rl.needs_reward_model else []),
        recipe.rl.stage,
    ]


def train(ctx: Context, stage: str, fresh: bool = False) -> None:
    """Trains a stage and, where they are missing, those it rests on. One that is done says so and is left alone."""
    wanted = stages_of(ctx.recipe)
    if stage not in wanted:
        raise UsageError(f"the recipe has no {stage} stage ({why_absent(stage)}); it has {', '.join(wanted)}")
    if fresh:
        for name in ctx.run.discard_from(stage):
            ctx.console.note(f"{name}: deleted, to start again")
    for i, name in enumerate(wanted[: wanted.index(stage) + 1]):
        _train_one(ctx, name, {before: ctx.run.stage(before).id() for before in wanted[:i]})


def _train_one(ctx: Context, name: str, upstream: dict[str, str]) -> None:
    stage = ctx.run.stage(name)
    stage.begin(stage_settings(ctx.recipe, name), upstream)
    if not ctx.run.has_recipe():
        ctx.run.write_recipe(ctx.recipe)
        ctx.run.write_environment()
    if stage.is_done():
        ctx.console.note(f"{name}: done already ({stage.path})")
        return
    trainer: Callable[[Context, StageFolder], None] = {"sft": train_sft, "rm": train_rm}.get(name, train_rl)
    try:
        trainer(ctx, stage)
    except Diverged as e:
        good = checkpoints(stage.checkpoints)
        where = f"the last good checkpoint is {good[-1]}" if good else "there is no checkpoint yet"
        raise Diverged(
            f"{name}: {e}; {where}. A lower learning rate or max_grad_norm helps; --fresh starts again."
        ) from e


def announce(ctx: Context, stage: str) -> None:
    """The last line: what the stage made, and what comes next."""
    folder = ctx.run.stage(stage)
    following = {"sft": "lco-lite train-rm", "rm": "lco-lite rl"}.get(
        stage, f"lco-lite eval {ctx.recipe.task or 'TASK'}"
    )
    ctx.console.done(folder.adapter if folder.adapter.exists() else folder.model, following)


def why_absent(stage: str) -> str:
    reasons = {"sft": "sft.enabled: false", "rm": "rl.feedback is neither dpo nor dpo_sampled"}
    return reasons.get(stage, "rl.objective is another")


def newest_stage(ctx: Context) -> str:
    """The stage whose result is the newest; ``base`` where nothing has been trained."""
    done = [s for s in ctx.run.stages() if s.is_done()]
    policies = [s for s in done if s.name != "rm"]
    return max(policies, key=lambda s: (s.path / "done.json").stat().st_mtime).name if policies else "base"
