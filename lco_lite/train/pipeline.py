"""The order of the stages, and what each rests on: sft, then rm, then rl, then a score of each."""

from collections.abc import Callable

from lco_lite.checkpoint import checkpoints
from lco_lite.context import Context
from lco_lite.errors import Diverged, UsageError
from lco_lite.evaluation.evaluate import check_all, score_all
from lco_lite.recipe import Recipe
from lco_lite.recipe.sections import RewardModel, Weights
from lco_lite.rollout.vllm import missing
from lco_lite.run import StageFolder, stage_settings
from lco_lite.train.methods import method_of
from lco_lite.train.reward_model import train_rm
from lco_lite.train.rl import train_rl
from lco_lite.train.sft import train_sft


def train(ctx: Context, stage: str, fresh: bool = False) -> None:
    """Trains a stage and, where they are missing, those it rests on. One that is done says so and is left alone."""
    wanted = ctx.recipe.stages
    if stage not in wanted:
        reasons = {"sft": "sft.enabled: false", "rm": "rl.feedback is neither dpo nor dpo_sampled"}
        reason = reasons.get(stage, "rl.objective is another")
        raise UsageError(f"the recipe has no {stage} stage ({reason}); it has {', '.join(wanted)}")
    refuse_untrainable(ctx.recipe)
    if fresh:
        for name in ctx.run.discard_from(stage):
            ctx.console.note(f"{name}: deleted, to start again")
    for i, name in enumerate(wanted[: wanted.index(stage) + 1]):
        _train_one(ctx, name, {before: ctx.run.stage(before).id() for before in wanted[:i]})


def refuse_untrainable(recipe: Recipe) -> None:
    """Raises UsageError where gradients would pass through float16, in which scores may be made, where a function of
    the user's does not fit the feedback, and where the engine that samples is not installed."""
    method_of(recipe.rl)
    if recipe.rollout.engine == "vllm" and (reason := missing(recipe.model.quantization)) is not None:
        raise UsageError(reason)
    rm = recipe.reward_model
    trained: dict[str, Weights] = {"model": recipe.model}
    if isinstance(rm, RewardModel) and recipe.rl.needs_reward_model:
        trained["reward_model"] = rm
    for section, weights in trained.items():
        if weights.dtype == "float16":
            raise UsageError(
                f"{section}.dtype: float16 is too narrow for gradients: those under 6e-8 become 0, and the loss is not "
                f"scaled to keep them. Set {section}.dtype to bfloat16 or float32; eval takes float16."
            )


def _train_one(ctx: Context, name: str, upstream: dict[str, str]) -> None:
    stage, ctx.stage = ctx.run.stage(name), name
    stage.begin(stage_settings(ctx.recipe, name), upstream)
    if not ctx.run.has_recipe():
        ctx.run.write_recipe(ctx.recipe)
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
    about = stage.adapter / "README.md"
    if about.exists():
        ctx.console.note(f"{name}: {about.read_text(encoding='utf-8').strip()}")


def announce(ctx: Context, stage: str) -> None:
    """The last line: what the stage made, and what comes next."""
    folder = ctx.run.stage(stage)
    scored = f"lco-lite eval {ctx.recipe.task or 'TASK'}"
    following = {"sft": "lco-lite train-rm", "rm": "lco-lite rl"}.get(stage, scored)
    ctx.console.done(folder.adapter if folder.adapter.exists() else folder.model, following)


def run_all(ctx: Context, fresh: bool) -> None:
    """``lco-lite run``: every stage of the recipe, then the score after each."""
    last = ctx.recipe.stages[-1]
    if fresh or not ctx.run.stage(last).is_done():
        check_all(ctx)
    train(ctx, ctx.recipe.stages[0] if fresh else last, fresh)
    train(ctx, last)
    score_all(ctx)
    ctx.console.done(ctx.run.path, "lco-lite eval --help")
