"""The order of the stages, and what each rests on: sft, then rm, then rl, then a score of each."""

import contextlib
import gc
from collections.abc import Callable
from functools import partial

from lco_lite import ranks
from lco_lite.checkpoint import capture_rng, newest_good, restore_rng
from lco_lite.context import Context
from lco_lite.errors import Diverged, UsageError, WeightsLost
from lco_lite.evaluation.evaluate import check_all, score_all
from lco_lite.recipe import Recipe
from lco_lite.recipe.sections import RewardModel, Weights
from lco_lite.rollout.vllm import missing
from lco_lite.run import StageFolder, as_started, stage_settings, verb
from lco_lite.trackers import refuse_missing
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
    the user's does not fit the feedback, and where the engine that samples, or a tracker, is not installed."""
    refuse_missing(recipe.trackers)
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
    ctx.recipe, kept = as_started(ctx.recipe, stage, ctx.said)
    if kept:
        ctx.console.note(f"{name} stays what it was started with where nothing else is said: {', '.join(kept)}")
    other_length = stage.check(stage_settings(ctx.recipe, name), upstream)
    if stage.is_done() and not other_length:
        _own_objective(ctx)
        ctx.console.note(f"{name}: done already ({stage.path})")
        return
    section = {"sft": "sft", "rm": "train_rm"}.get(name, "rl")
    schedule, done = getattr(ctx.recipe, section).schedule, stage.steps_done()
    if other_length:
        course = f"; its {schedule} schedule is now that of the new length: another course than this at once"
        goes_on = f"{name}: {', '.join(other_length)}: goes on after step {done}"
        ctx.console.note(goes_on + (course if schedule != "constant" and done else ""))
    ctx.begins = partial(_begin, ctx, stage, upstream)
    trainer: Callable[[Context, StageFolder], None] = {"sft": train_sft, "rm": train_rm}.get(name, train_rl)
    random_states = capture_rng()
    while True:
        try:
            trainer(ctx, stage)
            break
        except WeightsLost as e:
            lost = str(e)
        except Diverged as e:
            good = newest_good(stage.checkpoints)
            where = f"the last good checkpoint is {good}" if good else "there is no checkpoint yet"
            with_fresh = f", with `{verb(name)} --fresh`" if good else ""
            helps = f"A lower {section}.lr or {section}.max_grad_norm helps{with_fresh}."
            raise Diverged(f"{name}: {e}; {where}. {helps}") from e
        gc.collect()  # out here no traceback holds the models any more
        restore_rng(*random_states)
        good = newest_good(stage.checkpoints)
        ctx.console.warn(f"{name}: {lost}: back to {good or 'the start'}, and on from there without that batch")
    about = stage.adapter / "README.md"
    if about.exists():
        ctx.console.note(f"{name}: {about.read_text(encoding='utf-8').strip()}")


@ranks.once
def _begin(ctx: Context, stage: StageFolder, upstream: dict[str, str]) -> None:
    """Everything that the stage works with is there: the run remembers it. Its recipe is the one that its stages were
    started with; another objective's stands beside it in that stage alone."""
    sampled = stage.path / ("responses.jsonl" if stage.name == "rm" else "rollouts")
    was_sampled, nothing = sampled.exists(), not any(one.started() for one in ctx.run.stages())
    is_new = stage.begin(stage_settings(ctx.recipe, stage.name), upstream)
    if was_sampled and not sampled.exists():
        ctx.console.warn(f"{stage.name}: what was sampled for other settings, before the first checkpoint, is deleted")
    if nothing or (_own_objective(ctx) == ctx.recipe.rl.stage and is_new):
        ctx.run.write_recipe(ctx.recipe)


@ranks.once
def _own_objective(ctx: Context) -> str:
    """The rl stage of the run's recipe. Where that is missing or damaged, the one at hand takes its place."""
    if ctx.run.has_recipe():
        with contextlib.suppress(UsageError):
            return ctx.run.recipe().rl.stage
    ctx.run.write_recipe(ctx.recipe)
    return ctx.recipe.rl.stage


def announce(ctx: Context, stage: str) -> None:
    """The last line: what the stage made, and what comes next."""
    folder = ctx.run.stage(stage)
    scored = f"lco-lite eval {ctx.recipe.task or 'TASK'}"
    following = {"sft": "lco-lite train-rm", "rm": "lco-lite rl"}.get(stage, scored)
    ctx.console.done(folder.adapter if folder.adapter.exists() else folder.model, following)


def run_all(ctx: Context, fresh: bool) -> None:
    """``lco-lite run``: every stage of the recipe, then the score after each."""
    last = ctx.recipe.stages[-1]
    refuse_untrainable(ctx.recipe)
    if fresh or not ctx.run.stage(last).is_done():
        check_all(ctx)
    train(ctx, ctx.recipe.stages[0] if fresh else last, fresh)
    train(ctx, last)
    score_all(ctx)
    ctx.console.done(ctx.run.path, "lco-lite eval --help")
