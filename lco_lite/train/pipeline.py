"""The order of the stages, and what each rests on: sft, then rm, then rl, then a score of each."""

import gc
from collections.abc import Callable, Collection, Sequence
from functools import partial

from lco_lite import ranks
from lco_lite.checkpoint import capture_rng, newest_good, restore_rng, seed_rng
from lco_lite.context import Context
from lco_lite.data.prompts import (
    held_out_lines,
    held_out_prompts,
    makes_split,
    open_task,
    recipe_task,
    rl_prompts,
    same_held_out,
    trained_on,
)
from lco_lite.errors import Diverged, UsageError, WeightsLost, naming
from lco_lite.evaluation.evaluate import score_all
from lco_lite.evaluation.held_out import HELD_OUT
from lco_lite.evaluation.prompts import score_name
from lco_lite.feedback.rewards import columns_of, try_functions
from lco_lite.files import write_text
from lco_lite.recipe import Recipe
from lco_lite.run import Input, Run, StageFolder, as_started, section, stage_settings, verb
from lco_lite.sequences import derive
from lco_lite.tasks.base import Task
from lco_lite.train.before import look_ahead, refuse_untrainable
from lco_lite.train.reward_model import train_rm
from lco_lite.train.rl import train_rl
from lco_lite.train.sft import train_sft
from lco_lite.weights import bases


def train(ctx: Context, stage: str, fresh: bool = False, whole: bool = False) -> None:
    """Trains a stage and, where they are missing, those it rests on. One that is done says so and is left alone.
    ``whole``: ``fresh`` begins with the first stage, and scores follow."""
    through = up_to(ctx.recipe, stage)
    first = through[0] if whole else stage
    refuse_untrainable(ctx.recipe)
    recipe, to_do = ranks.once(going_on)(ctx.recipe, ctx.run, through, ctx.said, first if fresh else None)
    if to_do:  # what may be refused is, before anything is deleted
        _look_ahead(ctx, recipe, to_do, whole)
        check_own_data(ctx, recipe, ctx.run.built_on(first) if fresh else ())
    if fresh:
        for name in ctx.run.discard_from(first):
            ctx.console.note(f"{name}: deleted, to start again")
    if to_do:
        keep_held_out(ctx, recipe)
    for i, name in enumerate(through):
        _train_one(ctx, name, {before: ctx.run.stage(before).id() for before in through[:i]})


@ranks.once
def _look_ahead(ctx: Context, recipe: Recipe, to_do: Sequence[str], scores: bool) -> None:
    with ctx.console.waiting("looking at data and models"):
        look_ahead(recipe, to_do, ctx.device, ctx.run.path.parent, ctx.console, scores)


def up_to(recipe: Recipe, stage: str) -> list[str]:
    """The stages that end with this one. Raises UsageError where the recipe has it not."""
    wanted = recipe.stages
    if stage not in wanted:
        reasons = {"sft": "sft.enabled: false", "rm": "rl.feedback is neither dpo nor dpo_sampled"}
        reason = reasons.get(stage, "rl.objective is another")
        raise UsageError(f"the recipe has no {stage} stage ({reason}); it has {', '.join(wanted)}")
    return wanted[: wanted.index(stage) + 1]


def going_on(
    recipe: Recipe, run: Run, stages: Sequence[str], said: Collection[str] | None, fresh_from: str | None
) -> tuple[Recipe, list[str]]:
    """(the recipe with which these stages go on, those of them that are to be trained). UsageError where one that has
    started does not go on with it."""
    made = dict[str, str]()
    for i, name in enumerate(stages):
        if name == fresh_from:
            return recipe, list(stages[i:])
        stage = run.stage(name)
        asked = recipe.task
        recipe, _ = as_started(recipe, stage, said)
        if recipe.task is not None and recipe.task != asked:
            with naming(str(stage.path / "stage.json")):
                open_task(recipe, recipe.task)
        longer = stage.check(stage_settings(recipe, name), made)
        if longer or not stage.is_done():
            return recipe, list(stages[i:])
        made[name] = stage.id()
    return recipe, []


@ranks.once
def check_own_data(ctx: Context, recipe: Recipe, doomed: Collection[str]) -> None:
    """Before anything is trained: which prompts are held out, where the recipe draws them, is said, and each reward
    function called once on a real prompt. ``doomed`` stages are to be deleted. Raises UsageError where a run would go
    on with others held out, and for what is wrong with a function; DataError where it is not known what the run holds
    out."""
    task = recipe_task(recipe)
    same_held_out(ctx.run, recipe, task, doomed)
    for line in [*told_of_split(recipe, task), *tried_rewards(recipe, task)]:
        ctx.console.note(line)


@ranks.once
def keep_held_out(ctx: Context, recipe: Recipe) -> None:
    """The prompts that the recipe holds out, in a run of which no stage has started."""
    task = recipe_task(recipe)
    if makes_split(recipe, task) and not any(stage.started() for stage in ctx.run.stages()):
        write_text(ctx.run.path / "held_out.jsonl", held_out_lines(recipe, task))


def told_of_split(recipe: Recipe, task: Task | None) -> list[str]:
    """How many prompts the recipe holds out, and how they were chosen."""
    if not makes_split(recipe, task):
        return []
    n, share = len(held_out_prompts(recipe, task)), recipe.data.held_out
    how = "a tenth, at most 200" if share is None else f"{share:g}"
    if n == 0:
        return ["nothing is held out: there are too few prompts for that share of them (data.held_out)"]
    return [f"held out: {n} prompts, drawn by seed {recipe.seed} (data.held_out: {how}); nothing is trained on them"]


def tried_rewards(recipe: Recipe, task: Task | None) -> list[str]:
    """What each reward function says of one response to the first prompt: its known answer, where there is one."""
    if not recipe.rl.reward_functions:
        return []
    prompts = rl_prompts(recipe, task)
    first, columns = prompts[0], columns_of([prompt.row for prompt in prompts])
    known = [first.item.demonstration, first.item.gold] if first.item else []
    known += [first.row.get(name) for name in ("completion", "response", "output", "answer", "solution")]
    text = next((value for value in known if isinstance(value, str) and value), "A response.")
    return try_functions(recipe.rl, first.messages, first.row, columns, text)


def _train_one(ctx: Context, name: str, upstream: dict[str, str]) -> None:
    stage, ctx.stage = ctx.run.stage(name), name
    ctx.recipe, kept = as_started(ctx.recipe, stage, ctx.said)
    if kept:
        ctx.console.note(f"{name} stays what it was started with where nothing else is said: {', '.join(kept)}")
    other_length = stage.check(stage_settings(ctx.recipe, name), upstream)
    if stage.is_done() and not other_length:
        _keep_recipe(ctx)
        ctx.console.note(f"{name}: done already ({stage.path})")
        return
    inputs = _inputs(ctx.recipe, name)
    stage.same_inputs(inputs)
    where = section(name)
    schedule, done = getattr(ctx.recipe, where).schedule, stage.steps_done()
    if other_length:
        course = f"; its {schedule} schedule is now that of the new length: another course than this at once"
        goes_on = f"{name}: {', '.join(other_length)}: goes on after step {done}"
        ctx.console.note(goes_on + (course if schedule != "constant" and done else ""))
    ctx.begins = partial(_begin, ctx, stage, upstream, inputs)
    trainer: Callable[[Context, StageFolder], None] = {"sft": train_sft, "rm": train_rm}.get(name, train_rl)
    seed_rng(derive(ctx.recipe.seed, name))  # dropout, and what a user's objective draws
    random_states = capture_rng()
    while True:
        try:
            trainer(ctx, stage)
            break
        except WeightsLost as e:
            lost = str(e)
        except Diverged as e:
            good = newest_good(stage.checkpoints)
            kept_is = f"the last good checkpoint is {good}" if good else "there is no checkpoint yet"
            with_fresh = f", with `{verb(name)} --fresh`" if good else ""
            helps = f"A lower {where}.lr or {where}.max_grad_norm helps{with_fresh}."
            raise Diverged(f"{name}: {e}; {kept_is}. {helps}") from e
        gc.collect()  # out here no traceback holds the models any more
        restore_rng(*random_states)
        good = newest_good(stage.checkpoints)
        ctx.console.warn(f"{name}: {lost}: back to {good or 'the start'}, and on from there without that batch")
    about = stage.adapter / "README.md"
    if about.exists():
        ctx.console.note(f"{name}: {about.read_text(encoding='utf-8').strip()}")


@ranks.once
def _inputs(recipe: Recipe, stage: str) -> dict[str, Input]:
    return bases(recipe, stage) | trained_on(recipe, stage)


@ranks.once
def _begin(ctx: Context, stage: StageFolder, upstream: dict[str, str], inputs: dict[str, Input]) -> None:
    """Everything that the stage works with is there: the run remembers it. Its recipe is the one that its stages were
    started with; another objective's stands beside it in that stage alone."""
    sampled = stage.path / ("responses.jsonl" if stage.name == "rm" else "rollouts")
    was_sampled, nothing = sampled.exists(), not any(one.started() for one in ctx.run.stages())
    best = stage.best_step()
    is_new = stage.begin(stage_settings(ctx.recipe, stage.name), upstream, inputs)
    if best is not None and stage.best_step() is None:
        gone = f"the best step, {best['step']}, lay after the last checkpoint and was of another length: it is deleted"
        ctx.console.warn(f"{stage.name}: {gone}")
    if was_sampled and not sampled.exists():
        ctx.console.warn(f"{stage.name}: what was sampled for other settings, before the first checkpoint, is deleted")
    _keep_recipe(ctx)
    kept = ctx.run.recipe()
    # a kill may have come after the stage remembered its settings and before the run did
    other = is_new or stage_settings(kept, stage.name) != stage_settings(ctx.recipe, stage.name)
    if nothing or (other and kept.rl.stage == ctx.recipe.rl.stage):
        ctx.run.write_recipe(ctx.recipe)


@ranks.once
def _keep_recipe(ctx: Context) -> None:
    """Where the run's recipe is missing or damaged, the one at hand takes its place."""
    try:
        ctx.run.recipe()
    except UsageError:
        ctx.run.write_recipe(ctx.recipe)


def announce(ctx: Context, stage: str) -> None:
    """The last line: what the stage made, and what comes next."""
    folder = ctx.run.stage(stage)
    scored = f"lco-lite eval {ctx.recipe.task or ''}".rstrip()
    following = {"sft": "lco-lite train-rm", "rm": "lco-lite rl"}.get(stage, scored)
    ctx.console.done(folder.adapter if folder.adapter.exists() else folder.model, following)


def run_all(ctx: Context, fresh: bool) -> None:
    """``lco-lite run``: every stage of the recipe, then the score after each."""
    train(ctx, ctx.recipe.stages[-1], fresh, whole=True)
    score_all(ctx)
    ctx.console.done(ctx.run.path, compare_first_and_last(ctx))


def compare_first_and_last(ctx: Context) -> str:
    """The command that tells whether the policy after the last stage is better than before RL, by what was scored."""
    before = "sft" if ctx.recipe.sft.enabled else "base"
    scored = ctx.recipe.eval.tasks or [ctx.recipe.task or HELD_OUT]
    name = score_name(open_task(ctx.recipe, scored[0]).name if scored[0] != HELD_OUT else HELD_OUT, "generation", None)
    both = [ctx.run.eval_path(name, stage) for stage in (before, ctx.recipe.stages[-1])]
    if ctx.recipe.eval.scoring != "generation" or ctx.recipe.eval.grader or not all(file.exists() for file in both):
        return "lco-lite eval" if scored == [HELD_OUT] else "lco-lite eval --help"
    task = "" if scored[0] == HELD_OUT else f" {scored[0]}"
    where = "" if str(ctx.run.path.parent) == "runs" else f" --runs {ctx.run.path.parent}"
    return f"lco-lite eval{task} --compare {before} {ctx.recipe.stages[-1]}{where}"
