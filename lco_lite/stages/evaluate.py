"""pass@1 by sampling: every held-out item once a seed, the mean over items, then mean and spread over seeds.

lco-lite eval math500 --seeds 4
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from lco_lite.data.chat import ChatFormat
from lco_lite.data.prepare import Prompt, held_out
from lco_lite.errors import DataError
from lco_lite.files import write_json, write_text
from lco_lite.models.language_model import LanguageModel
from lco_lite.recipe import Eval
from lco_lite.rollout.engine import Engine, Sampling
from lco_lite.rollout.local import LocalEngine
from lco_lite.rollout.lockstep import LockstepEngine, optimal_policy
from lco_lite.seeding import seeded
from lco_lite.stages import cast
from lco_lite.stages.context import Context
from lco_lite.tasks.base import Task


def sample_scores(
    engine: Engine,
    chat: ChatFormat,
    task: Task,
    prompts: Sequence[Prompt],
    sampling: Sampling,
    seed: int,
    on_batch: Callable[[int], None] = lambda done: None,
) -> list[dict[str, Any]]:
    """One graded response an item: rows of id, prompt, response, extracted, gold, right, why, truncated."""
    with seeded(seed, "eval", task.name):
        ids = [chat.prompt(p.messages) for p in prompts]
        made = engine.generate(ids, sampling, on_batch)
    rows = []
    for prompt, response in zip(prompts, made, strict=True):
        item = prompt.item
        assert item is not None, "held-out prompts come from a task"
        text = chat.text(response.example.response)
        grade = task.grade(text, item)
        rows.append(
            {
                "id": item.id,
                "prompt": item.prompt,
                "response": text,
                "extracted": grade.extracted,
                "gold": item.gold,
                "right": grade.right,
                "why": grade.why,
                "truncated": response.truncated,
            }
        )
    return rows


def own_metrics(
    task: Task,
    passes: Sequence[Sequence[dict[str, Any]]],
    prompts: Sequence[Prompt],
    settings: Eval,
    file: Path,
    ctx: Context,
) -> list[dict[str, float]] | None:
    """What a task that is not right or wrong makes of each pass; None where ``grade`` says it all."""
    aggregate = getattr(task, "aggregate", None)
    if aggregate is None:
        return None
    items = {p.item.id: p.item for p in prompts if p.item is not None}
    found = []
    for k, rows in enumerate(passes):
        folder = file.with_suffix(".files") / f"seed-{ctx.recipe.seed + k}"
        folder.mkdir(parents=True, exist_ok=True)
        found.append(
            aggregate([{**row, "row": dict(items[row["id"]].row)} for row in rows], settings, folder, ctx.console)
        )
    return found


def summarise_metrics(found: Sequence[dict[str, float]]) -> dict[str, Any]:
    """Mean and sample deviation over passes of every metric; the first one is the main one."""
    metrics = {
        name: {"mean": statistics.fmean(values), "std": statistics.stdev(values) if len(values) > 1 else None}
        for name in found[0]
        for values in [[one[name] for one in found]]
    }
    main = next(iter(metrics))
    return {"metric": main, **metrics[main], "stderr": None, "metrics": metrics}


def accuracy(rows: Sequence[dict[str, Any]]) -> float:
    return sum(row["right"] for row in rows) / len(rows)


def summarise(passes: Sequence[Sequence[dict[str, Any]]], n: int) -> dict[str, Any]:
    """Over ``n`` items, of which those without a row count as wrong. mean over seeds; std: the sample deviation over
    seeds (None for one); stderr: over items, of their mean over seeds."""
    scores = [sum(row["right"] for row in rows) / n for rows in passes]
    by_item = [statistics.fmean(float(rows[i]["right"]) for rows in passes) for i in range(len(passes[0]))]
    by_item += [0.0] * (n - len(by_item))
    return {
        "metric": "pass@1",
        "mean": statistics.fmean(scores),
        "std": statistics.stdev(scores) if len(scores) > 1 else None,
        "stderr": statistics.stdev(by_item) / math.sqrt(n) if n > 1 else None,
        "n": n,
        "seeds": len(scores),
        "truncated": statistics.fmean(float(row["truncated"]) for rows in passes for row in rows),
    }


def eval_sampling(s: Eval, task: Task) -> Sampling:
    return Sampling(s.temperature, s.top_p, s.max_new_tokens or task.max_new_tokens, s.batch)


def passes_of(s: Eval) -> int:
    """Greedy decoding gives the same answers every time: one pass."""
    return 1 if s.temperature == 0 else s.seeds


def evaluate_stage(ctx: Context, task: Task, stage: str, settings: Eval) -> dict[str, Any]:
    """Scores a stage on a task, once: the result is kept and used again while nothing it rests on changes."""
    file = ctx.run.eval_path(task.name, stage)
    asked = {
        "made_by": made_by(ctx, stage),
        "seed": ctx.recipe.seed,
        "sampling": settings.model_dump(exclude={"tasks", "batch"}),
    }
    if file.exists():
        known = json.loads(file.read_text(encoding="utf-8"))
        if known["settings"] == asked:
            ctx.console.note(f"{task.name}: {stage} has been scored already ({file})")
            return known
    with ctx.clock("loading"):
        model, engine = open_engine(ctx, stage)
    return evaluate_engine(ctx, model, engine, task, settings, file, stage, asked)


def made_by(ctx: Context, stage: str) -> str:
    """What the score rests on: it is no longer known once that is trained again."""
    if stage == "base":
        return "base"
    return (
        f"rm {ctx.run.stage('rm').id()}, beta {ctx.recipe.rl.beta}" if stage == "optimal" else ctx.run.stage(stage).id()
    )


def open_engine(ctx: Context, stage: str) -> tuple[LanguageModel, Engine]:
    """What a stage decodes from. ``optimal`` is π* of eq 6: start, φ_DPO and φ_ref in step, with the recipe's β."""
    if stage != "optimal":
        role = cast.open_stage(ctx, stage)
        return role.model, LocalEngine(role, chat_of(ctx, role.model).end)
    start = cast.open_start(ctx)
    reward_model, reference = cast.open_reward_model(ctx, start)
    combine = optimal_policy(ctx.recipe.rl.beta)
    return start.model, LockstepEngine([start, reward_model, reference], combine, chat_of(ctx, start.model).end)


def chat_of(ctx: Context, model: LanguageModel) -> ChatFormat:
    return ChatFormat(model.tokenizer, ctx.recipe.chat.template_args)


def evaluate_engine(
    ctx: Context,
    model: LanguageModel,
    engine: Engine,
    task: Task,
    settings: Eval,
    file: Path,
    stage: str,
    asked: dict[str, Any],
) -> dict[str, Any]:
    """All passes over the items; writes ``file`` and, beside it, one row an item and pass."""
    console, recipe, chat = ctx.console, ctx.recipe, chat_of(ctx, model)
    found = held_out(recipe, task, settings.items)
    sampling = eval_sampling(settings, task)
    prompts = [p for p in found if len(chat.prompt(p.messages)) + sampling.max_new_tokens <= model.max_length]
    if not prompts:
        raise DataError(f"no item of {task.name} fits the model's window of {model.max_length} tokens")
    if len(prompts) < len(found):
        console.warn(f"{len(found) - len(prompts)} of {len(found)} items do not fit the window and count as wrong")
    passes = []
    total = passes_of(settings) * len(prompts)
    with console.progress(total, f"{task.name} {stage}") as line:
        for k in range(passes_of(settings)):
            so_far = k * len(prompts)

            def advance(done: int, so_far: int = so_far) -> None:
                line.update(so_far + done)

            passes.append(sample_scores(engine, chat, task, prompts, sampling, recipe.seed + k, advance))
    result = {"task": task.name, "stage": stage} | summarise(passes, len(found)) | {"settings": asked}
    made = own_metrics(task, passes, prompts, settings, file, ctx)
    if made is not None:
        result |= summarise_metrics(made)
    rows = [{"seed": recipe.seed + k, **row} for k, done in enumerate(passes) for row in done]
    write_text(file.with_suffix(".rows.jsonl"), "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    write_json(file, result)
    return result
