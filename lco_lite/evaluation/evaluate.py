"""``lco-lite eval``: policies on the held-out items of tasks, several passes each, and the table of their scores.

    eval/TASK--STAGE.json             mean, std, stderr, and under ``settings`` all that they rest on
    eval/TASK--STAGE.rows.jsonl       one line an item, sample and pass
    eval/TASK--STAGE.partial.jsonl    while it is made: the settings, then {"pass": 0, "batch": 3, "rows": [...]}

A batch is on disk as soon as it is graded. The batches and their random numbers depend on the settings alone, so a
score that was stopped anywhere goes on with the next batch and ends in the same lines as one that was not.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from operator import eq
from pathlib import Path
from typing import Any

import torch

from lco_lite import ranks, weights
from lco_lite.console import Console
from lco_lite.context import Context, InterruptGuard
from lco_lite.data.prompts import Prompt, open_task, recipe_task, same_held_out
from lco_lite.errors import DataError, Interrupted, UsageError, naming
from lco_lite.evaluation.held_out import HELD_OUT, held_out_task, likelihoods, show_held_out
from lco_lite.evaluation.likelihood import likeliest_letters
from lco_lite.evaluation.prompts import Question, eval_prompts, question, score_name, score_settings
from lco_lite.evaluation.summary import Graded, graded, main_first, over_items, read_rows, read_score, spread, summarise
from lco_lite.files import JsonLines, is_there, json_line, remove, sha256, write_bytes, write_json
from lco_lite.grading.choice import answer_index
from lco_lite.grading.math import MathGrader
from lco_lite.models.chat import ChatFormat, PlainText
from lco_lite.models.language_model import Role
from lco_lite.recipe import Eval, Recipe
from lco_lite.rollout.engine import OTHER_NUMBERS, Engine, Made, Response, Sampling, before_stop, in_order, open_engine
from lco_lite.rollout.lockstep import optimal_policy
from lco_lite.sequences import seeded
from lco_lite.tasks import graded_as
from lco_lite.tasks.base import Task

# which policy on which tasks, and how the scores are shown


def score(
    ctx: Context, tasks: Sequence[str] | None, stage: str | None, model: str | None, as_json: bool, data: Path | None
) -> None:
    """Scores, then a table or, for machines, one JSON object by task. ``data``: where the items are."""
    names = list(tasks or [ctx.recipe.task or HELD_OUT])
    if data is not None and is_there(data) and data.is_file() and len(names) > 1:
        raise UsageError(
            f"--data {data}: one file holds the items of one task, and {len(names)} are named; give a folder"
        )
    if data is None and (HELD_OUT in names or ctx.recipe.task in names):
        same_held_out(ctx.run, ctx.recipe, recipe_task(ctx.recipe))
    stage = "base" if model else weights.named_policy(ctx.run, stage)
    loaded = [graded_by(ctx.recipe.eval, open_task(ctx.recipe, n, data)) for n in names if n != HELD_OUT]
    results = [evaluate_stage(ctx, task, stage) for task in loaded]
    own = [score_held_out(ctx, stage)] if HELD_OUT in names else []
    if as_json:
        ctx.console.emit({result["task"]: result for result in results + own})
    else:
        _show_both(ctx.console, results, own)
    ctx.console.done(ctx.run.path / "eval")


def score_all(ctx: Context) -> None:
    """Every stage of the recipe, and the base where it is no model from scratch, on the recipe's evaluation tasks."""
    stages = [*([] if ctx.recipe.model.init else ["base"]), *ctx.recipe.stages]
    rl = ctx.run.stage(ctx.recipe.rl.stage)
    better = rl.better_step()
    labels = {rl.name: f"{rl.name} (best: step {better['step']})"} if better else {}
    results = [evaluate_stage(ctx, task, stage) for task in _eval_tasks(ctx.recipe) for stage in stages]
    own = [score_held_out(ctx, stage) for stage in stages] if ctx.recipe.task is None else []
    _show_both(ctx.console, results, own, labels)


def score_held_out(ctx: Context, stage: str) -> dict[str, Any]:
    """A stage's rewards on the prompts held out, and its likelihoods of the data held out: what there is without a
    task. Raises UsageError where there is one."""
    task, result = held_out_task(ctx.recipe, ctx.device), {"task": HELD_OUT, "stage": stage}
    likely = likelihoods(ctx, stage) if stage != "optimal" else {}
    result |= {name: value for name, value in likely.items() if name != "settings"}
    if ctx.recipe.rl.reward_parts and task.items("test"):
        result |= evaluate_stage(ctx, task, stage)
    return result


def _show_both(
    console: Console,
    of_tasks: Sequence[Mapping[str, Any]],
    own: Sequence[dict[str, Any]],
    labels: Mapping[str, str] | None = None,
) -> None:
    if of_tasks:
        show(console, of_tasks, labels)
    if any(len(one) > 2 for one in own):
        show_held_out(console, own, labels)
    elif own:
        console.warn("there is no task, and nothing is held out (data.held_out): no stage has a score")


def check_all(recipe: Recipe, device: torch.device, console: Console) -> dict[str, int]:
    """What ``score_all`` will lack is said before hours of training; how many items each task has, by its name. Raises
    what the tasks raise."""
    with naming("eval.tasks"):
        tasks, settings = _eval_tasks(recipe), recipe.eval
        if recipe.task is None and recipe.rl.reward_parts:
            tasks.append(held_out_task(recipe, device))
        counts = {}
        for task in tasks:
            _refuse_meaningless(task, "base", settings)
            counts[task.name] = len(eval_prompts(recipe, task))
            task.check(settings, counts[task.name], _passes(settings), console)
        return counts


def show(console: Console, results: Sequence[Mapping[str, Any]], labels: Mapping[str, str] | None = None) -> None:
    """The paper's table, mean ± std over seeds in percent: a row a stage, a column a task (and metric, if not pass@1).
    ``labels``: what stages are called that have more to say than their name.

    A task's own metrics are shown in the task's own unit.
    """
    cells: dict[tuple[str, str], str] = {}
    for result in results:
        scale, digits = (1, 3) if result.get("own") else (100, 1)
        for name, metric in result["metrics"].items():
            column = result["task"] if name == "pass@1" else f"{result['task']} {name}"
            values = [metric[key] for key in ("mean", "std") if metric[key] is not None]
            cells[result["stage"], column] = " ± ".join(f"{scale * value:.{digits}f}" for value in values)
    stages, columns = (list(dict.fromkeys(key[i] for key in cells)) for i in (0, 1))
    lines = [
        [(labels or {}).get(stage, stage), *(cells.get((stage, column), "") for column in columns)] for stage in stages
    ]
    title = "mean ± std over seeds, %" if any(r["seeds"] > 1 for r in results) else "score, %"
    console.table(title, ["stage", *columns], lines, result=True)
    for r in results:
        errors = [f"{100 * r['stderr']:.1f}"] if r["stderr"] is not None else []
        if r.get("own"):
            errors = [f"{m['stderr']:.3f} ({name})" for name, m in r["metrics"].items() if m["stderr"] is not None]
        error = f", standard error over items {', '.join(errors)}" if errors else ""
        cut = f", {100 * r['truncated']:.1f} % cut at the length limit" if r["truncated"] else ""
        console.result(
            f"{r['task']} {r['stage']}: {r['n']} items, {r['seeds']} seed{'s' * (r['seeds'] > 1)}{error}{cut}"
        )


def _eval_tasks(recipe: Recipe) -> list[Task]:
    names = recipe.eval.tasks if recipe.eval.tasks is not None else [recipe.task] if recipe.task else []
    return [graded_by(recipe.eval, open_task(recipe, name)) for name in names]


def graded_by(settings: Eval, task: Task) -> Task:
    """By its own grader, or by the user's, within the tolerance that is asked for."""
    return graded_as(task, settings.grader, settings.tolerance, settings.evaluated)


def _passes(settings: Eval) -> int:
    """Greedy decoding and likelihoods are the same every time: one pass."""
    return 1 if settings.temperature == 0 or settings.scoring == "likelihood" else settings.seeds


# one stage on one task


def evaluate_stage(ctx: Context, task: Task, stage: str) -> dict[str, Any]:
    """Scores a stage on a task, once: the result is kept and used again while nothing it rests on changes.

    Where only the grader, the judge or the reward models are others than before, the responses are kept and scored
    anew.
    """
    settings, console = ctx.recipe.eval, ctx.console
    file, usual = (
        ctx.run.eval_path(score_name(task.name, settings.scoring, grader), stage) for grader in (settings.grader, None)
    )
    started = file.with_suffix(".partial.jsonl")
    _refuse_meaningless(task, stage, settings)
    prompts = eval_prompts(ctx.recipe, task)
    asked = score_settings(ctx, task, stage, prompts)
    known = ranks.once(_read)(file, usual)
    if file in known and known[file]["settings"] == asked:
        console.note(f"{task.name}: {stage} has been scored already ({file})")
        return known[file]
    task.check(settings, len(prompts), _passes(settings), console)
    passes: dict[int, list[Graded]] = {}  # by seed
    if answered := next((one for one in known if _same_responses(known[one]["settings"], asked)), None):
        console.note(f"{task.name}: {stage} has answered already; only the scores are made anew")
        for row in ranks.once(graded_again)(answered, known[answered], task, settings):
            passes.setdefault(row["seed"], []).append(row)
    else:
        passes = respond_to_all(ctx, task, stage, prompts, asked, started)
    return _conclude(ctx, task, stage, len(prompts), asked, passes, file)


@ranks.once
def _conclude(
    ctx: Context,
    task: Task,
    stage: str,
    n: int,
    asked: dict[str, Any],
    passes: dict[int, list[Graded]],
    file: Path,
) -> dict[str, Any]:
    """The score of these responses, on disk. A task that judges does it here."""
    settings, rows_file = ctx.recipe.eval, file.with_suffix(".rows.jsonl")
    _write_rows(rows_file, passes)
    same = task.grader.same if isinstance(task.grader, MathGrader) else eq
    scores = summarise(list(passes.values()), n, settings.samples, same)
    result = {"task": task.name, "stage": stage} | scores
    if settings.scoring == "likelihood":
        result |= main_first({"accuracy": result["metrics"]["pass@1"]})
    elif not task.graded:
        result |= _tasks_own(ctx, task, file.with_suffix(".files"), passes)
        _write_rows(rows_file, passes)
    result["settings"] = asked
    if missing := result.get("missing"):  # another setting than is asked for: scored anew the next time
        result["settings"] = asked | {"scored_by": {**asked.get("scored_by", {}), "missing": missing}}
    result["rows_sha256"] = sha256(rows_file)
    write_json(file, result)
    remove(file.with_suffix(".partial.jsonl"))
    return result


def _read(*scores: Path) -> dict[Path, dict[str, Any]]:
    """Those that are there."""
    return {file: read_score(file) for file in scores if file.exists()}


def _same_responses(settings: Mapping[str, Any], asked: Mapping[str, Any]) -> bool:
    """Whether two scores rest on the same responses."""
    own, other = (
        {**one, "scored_by": None, "protocol": {**one["protocol"], "grader": None}} for one in (settings, asked)
    )
    return own == other


def graded_again(file: Path, result: Mapping[str, Any], task: Task, settings: Eval) -> list[Graded]:
    """The rows of a score with the task's grades of their responses."""
    rows = read_rows(file, result)
    if not task.graded or settings.scoring == "likelihood":
        return rows
    items = {item.id: item for item in task.items("test")}
    for row in rows:
        row.pop("score", None)  # of a task's own metric, which a grader takes the place of
    return [row | asdict(task.grade(row["response"], items[row["id"]])) for row in rows]


def _write_rows(file: Path, passes: Mapping[int, Sequence[Graded]]) -> None:
    write_bytes(file, b"".join(json_line(row) for rows in passes.values() for row in rows))


def respond_to_all(
    ctx: Context, task: Task, stage: str, prompts: Sequence[Prompt], asked: dict[str, Any], file: Path
) -> dict[int, list[Graded]]:
    """Seed -> the graded responses of that pass in the order of the prompts, made batch by batch; ``file`` has those
    that are made already. Raises Interrupted after the batch in which Ctrl-C was pressed."""
    settings, seed, label = ctx.recipe.eval, ctx.recipe.seed, f"{task.name} {stage}"
    sampling, n = _sampling(settings, task), _passes(settings)
    sampling = replace(sampling, stop=tuple(settings.stop))
    by_likelihood = settings.scoring == "likelihood"
    new_tokens = 1 if by_likelihood else sampling.max_new_tokens
    with ctx.clock("loading"):
        role, chat, engine = open_policy(ctx, stage)
    with ctx.clock("eval"), InterruptGuard(ctx.console) as guard:
        window = role.model.max_length
        questions = [question(chat, p, by_likelihood) for p in prompts]
        questions = fitting_questions(questions, new_tokens, window, task)
        if left_out := len(prompts) - len(questions):
            verdict = "count as wrong" if task.graded else "are left out"
            ctx.console.warn(f"{left_out} of {len(prompts)} items do not fit the window and {verdict}")
        planned = plan_batches([q.prompt for q in questions], settings, new_tokens)
        # what fits at once is known of the first, which are the longest; an engine may be given several in one
        batches = [sum(planned[i : i + engine.ahead], []) for i in range(0, len(planned), engine.ahead)]
        total = n * len(questions) * settings.samples
        # batches of another size hold other responses
        header = asked | {"batch": settings.batch, "batch_tokens": settings.batch_tokens}
        lines = _started(file, header, ctx.console, label)
        made = {(line["pass"], line["batch"]): line["rows"] for line in lines.rows[1:]}
        done = sum(map(len, made.values()))
        if done:
            ctx.console.note(f"{label}: goes on after {done} of {total} responses")
        with ctx.console.progress(total, label, done) as line:

            def tell(made: int, part: float) -> None:
                line.update(done, part=made + part)  # they count when they are on disk

            left = [(k, b) for k in range(n) for b in range(len(batches)) if (k, b) not in made]
            for turn in (left[i : i + ranks.world()] for i in range(0, len(left), ranks.world())):
                answered = {}
                for k, b in ranks.share(turn):
                    batch = [questions[i] for i, _ in batches[b]]
                    if by_likelihood:
                        responses = likeliest(ctx, role, batch)
                    else:
                        at_once = replace(sampling, batch=len(planned[b * engine.ahead]))
                        responses = respond(ctx, engine, chat, task, batch, at_once, seed + k, b, tell=tell)
                    answered[k, b] = [{"sample": j} | r for (_, j), r in zip(batches[b], responses, strict=True)]
                for (k, b), rows in ((key, rows) for one in ranks.gather(answered) for key, rows in one.items()):
                    made[k, b] = rows
                    lines.append({"pass": k, "batch": b, "rows": rows})
                    done += len(rows)
                line.update(done)
                if answered:
                    last: dict[str, Any] = list(answered.values())[-1][-1]
                    ctx.console.sample(last["prompt"], last["response"], last["right"] if task.graded else None)
                if ranks.any_of(guard.requested):
                    made_so_far = f"stopped after {done} of {total} responses; they are in {file}"
                    raise Interrupted(f"{made_so_far}, and the same command goes on from there")
    passes = {}
    for k in range(n):
        by_slot = {slot: r for b, slots in enumerate(batches) for slot, r in zip(slots, made[k, b], strict=True)}
        passes[seed + k] = [{"seed": seed + k, **by_slot[slot]} for slot in sorted(by_slot)]
    return passes


def open_policy(ctx: Context, stage: str) -> tuple[Role, ChatFormat, Engine]:
    """What a stage decodes from. ``optimal`` is π* of eq 6: start, φ_DPO and φ_ref in step, with the recipe's β."""
    role = weights.open_start(ctx) if stage == "optimal" else weights.open_stage(ctx, stage)
    form = PlainText if ctx.recipe.eval.format == "text" else ChatFormat
    chat = form(role.model.tokenizer, ctx.recipe.chat.template_args, ctx.console.warn)
    if stage != "optimal":
        return role, chat, open_engine([role], chat.end, settings=ctx.recipe.rollout, say=ctx.console.note)
    roles = [role, *weights.open_reward_model(ctx, role)]
    return role, chat, open_engine(roles, chat.end, optimal_policy(ctx.recipe.rl.beta), say=ctx.console.note)


def plan_batches(ids: Sequence[list[int]], settings: Eval, new_tokens: int) -> list[list[tuple[int, int]]]:
    """Batches of (a prompt's index, the number of its sample), the longest prompts first, so that what does not fit the
    memory shows at once: at most ``eval.batch`` of them, and ``eval.batch_tokens`` tokens if every response takes
    ``new_tokens`` (a single long one may pass it)."""
    slots = [(i, j) for i in range(len(ids)) for j in range(settings.samples)]
    batches: list[list[tuple[int, int]]] = []
    for slot in sorted(slots, key=lambda slot: (-len(ids[slot[0]]), ids[slot[0]], slot)):
        width = len(ids[batches[-1][0][0]]) + new_tokens if batches else 0
        if batches and len(batches[-1]) < settings.batch and width * (len(batches[-1]) + 1) <= settings.batch_tokens:
            batches[-1].append(slot)
        else:
            batches.append([slot])
    return batches


def held_out_accuracy(
    ctx: Context, engine: Engine, window: int, chat: ChatFormat, task: Task, prompts: Sequence[Prompt]
) -> float:
    """pass@1 of one pass over the prompts as they are trained on, for a look at the model; nothing is kept. What does
    not fit the model's ``window`` in tokens counts as wrong, as in a score. DataError where nothing does."""
    settings = ctx.recipe.eval
    task, questions = graded_by(settings, task), [question(chat, p) for p in prompts]
    own = ranks.share(fitting_questions(questions, _sampling(settings, task).max_new_tokens, window, task))
    rank = [f"rank {ranks.rank()} of {ranks.world()}"] if ranks.world() > 1 else []
    with ctx.console.progress(len(own), "held-out") as line:
        sampling, seed = _sampling(settings, task), ctx.recipe.seed

        def tell(made: int, part: float) -> None:
            line.update(made, part=part)

        responses = respond(ctx, engine, chat, task, own, sampling, seed, *rank, tell=tell) if own else []
    return ranks.total(sum(r["right"] for r in responses)) / len(questions)


def fitting_questions(questions: Sequence[Question], new_tokens: int, window: int, task: Task) -> list[Question]:
    """Those that leave room in ``window`` for ``new_tokens`` or their letters. DataError where none does."""
    fit = [q for q in questions if len(q.prompt) + max(map(len, q.letters), default=new_tokens) <= window]
    if not fit:
        raise DataError(f"no item of {task.name} fits the model's window of {window} tokens")
    return fit


def looked_by(settings: Eval) -> dict[str, Any]:
    """The settings that decide ``held_out_accuracy`` of a model."""
    return settings.model_dump(
        mode="json", include={"temperature", "top_p", "max_new_tokens", "grader", "tolerance", "evaluated"}
    )


def respond(
    ctx: Context,
    engine: Engine,
    chat: ChatFormat,
    task: Task,
    questions: list[Question],
    sampling: Sampling,
    seed: int,
    *batch: int | str,
    tell: Callable[[int, float], object] = lambda made, part: None,
) -> list[Graded]:
    """One graded response a question, as many at once as ``eval.batch_tokens`` lets in and the memory holds. The random
    numbers are those of the seed, the task and the batch's number. ``tell`` hears how many there are, and how many the
    batch under way is worth so far."""

    def generate(at_once: int) -> list[Response]:
        made, done = list[Made](), 0

        def of_batch(share: float) -> None:
            tell(done, share * min(engine.ahead * at_once, len(questions) - done))

        with seeded(seed, "eval", task.name, *batch):
            told = replace(sampling, batch=at_once, tell=of_batch)
            for some in engine.generate([q.prompt for q in questions], told):
                made.append(some)
                done += len(some[0])
                tell(done, 0.0)
        return in_order(made)

    width = max(len(q.prompt) for q in questions) + sampling.max_new_tokens
    responses = _within_memory(ctx, width, sampling.batch, len(questions), generate, OTHER_NUMBERS)
    texts = [before_stop(chat.text(response.example.response), sampling.stop) for response in responses]
    return [
        graded(q.item, text, task.grade(text, q.item), response.truncated)
        for q, text, response in zip(questions, texts, responses, strict=True)
    ]


def likeliest(ctx: Context, role: Role, questions: list[Question]) -> list[Graded]:
    """``likeliest_letters``, of as many questions at once as the memory holds."""

    def choose(n: int) -> list[Graded]:
        parts = (likeliest_letters(role, questions[i : i + n]) for i in range(0, len(questions), n))
        return [graded for part in parts for graded in part]

    width = max(len(q.prompt) + max(map(len, q.letters)) for q in questions)
    return _within_memory(ctx, width, len(questions), len(questions), choose)


def _within_memory(
    ctx: Context, width: int, batch: int, n: int, work: Callable[[int], list[Any]], then: str = ""
) -> list[Any]:
    """``work(at once)``: all ``n`` sequences, at most ``batch`` of ``width`` padded tokens at once."""

    def half(tokens: int) -> tuple[int, int] | None:
        at_once = max(1, min(batch, n, tokens // width))
        return (at_once * width, at_once * width // 2) if at_once > 1 else None

    room = ctx.room("eval.batch_tokens", ctx.recipe.eval.batch_tokens)
    return room.do(lambda tokens: work(max(1, min(batch, tokens // width))), half, then)


def _refuse_meaningless(task: Task, stage: str, settings: Eval) -> None:
    if settings.samples > 1 and not task.graded:
        raise UsageError(f"eval.samples: task {task.name} is not right or wrong: pass@k and maj@k do not exist for it")
    if settings.samples > 1 and settings.temperature == 0:
        raise UsageError("eval.samples: greedy decoding makes the same response every time; set a temperature")
    if settings.scoring == "likelihood":
        for item in task.items("test")[: settings.items]:
            if answer_index(item) is None:
                raise UsageError(
                    f"--scoring likelihood: item {item.id} of {task.name} has no `choices` with an `answer` among "
                    "them; score this task with --scoring generation"
                )
        if stage == "optimal":
            raise UsageError("--scoring likelihood: π* is only decoded from; score a stage or base")


def _started(file: Path, header: dict[str, Any], console: Console, label: str) -> JsonLines:
    """What is made of a score so far, below its settings; nothing of one with other settings."""
    lines = JsonLines(file)
    if lines.rows and lines.rows[0] != header:
        console.note(f"{label}: starts anew, since the settings have changed")
        remove(file)
        lines = JsonLines(file)
    if not lines.rows:
        lines.append(header)
    return lines


def _sampling(settings: Eval, task: Task) -> Sampling:
    new_tokens = settings.max_new_tokens or task.max_new_tokens
    return Sampling(settings.temperature, settings.top_p, new_tokens, settings.batch)


# tasks that are not right or wrong


def _tasks_own(ctx: Context, task: Task, files: Path, passes: Mapping[int, Sequence[Graded]]) -> dict[str, Any]:
    """The metrics that the task makes of each pass; what it writes besides is in a folder of ``files`` a seed.

    Where the main one is a number a row, that becomes the row's ``score``. ``missing``: what could not be had.
    """
    items = {item.id: item for item in task.items("test")}
    by_pass = []
    for seed, responses in passes.items():
        folder = files / f"seed-{seed}"
        folder.mkdir(parents=True, exist_ok=True)
        with_row = [{**response, "row": dict(items[response["id"]].row)} for response in responses]
        by_pass.append(task.aggregate(with_row, ctx.recipe.eval, folder, ctx.console))
    metrics, missing = {}, []
    for name in by_pass[0]:
        values = [one[name] for one in by_pass]
        if any(value is None for value in values):
            missing.append(name)
        else:
            metrics[name] = spread(values) if isinstance(values[0], (int, float)) else over_items(values)
    result = main_first(metrics) | {"own": True} | ({"missing": missing} if missing else {})
    for responses, one in zip(passes.values(), by_pass, strict=True):
        main = one[result["metric"]]
        for i, response in enumerate(responses):
            response.pop("score", None)
            response |= {} if isinstance(main, (int, float)) else {"score": main[i]}
    return result
