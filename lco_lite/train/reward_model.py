"""Preference pairs made from the policy's own responses: the task grades them, right is paired with wrong.

A task that knows where a response first goes wrong lets the rejected one be cut after that token: whatever follows a
mistake may be sound in itself, and the policy will visit those states.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from lco_lite import weights
from lco_lite.context import Context, InterruptGuard
from lco_lite.data.prompts import Pair, Prompt, file_pairs, held_out, recipe_task, task_prompts
from lco_lite.errors import DataError
from lco_lite.evaluation.evaluate import accuracy, eval_sampling, sample_scores
from lco_lite.files import read_jsonl, write_text
from lco_lite.metrics import MetricsLog, peak_mib
from lco_lite.models.chat import ChatFormat
from lco_lite.models.language_model import LanguageModel, Role
from lco_lite.objectives.logprobs import ChosenRejected, dpo_loss, token_logprobs
from lco_lite.recipe import TrainRm
from lco_lite.rollout.engine import Engine, Response, Sampling, in_order, open_engine
from lco_lite.run import StageFolder
from lco_lite.sequences import Example, collate, endless, micro_batches, seeded
from lco_lite.tasks.base import Item, Task
from lco_lite.train.training import Optimiser, Progress, fitting, preflight


def sample_pairs(
    engine: Engine,
    chat: ChatFormat,
    task: Task,
    prompts: Sequence[Prompt],
    s: TrainRm,
    sampling: Sampling,
    on_batch: Callable[[int], None] = lambda done: None,
) -> list[Pair]:
    """Up to ``pairs_per_prompt`` pairs for each prompt that has both a right and a wrong response."""
    n = s.samples_per_prompt
    ids = [chat.prompt(p.messages) for p in prompts]
    responses = in_order(engine.generate([i for i in ids for _ in range(n)], sampling))
    pairs = []
    for k, prompt in enumerate(prompts):
        item = prompt.item
        assert item is not None, "prompts for sampled pairs are a task's items"
        right, wrong = _grade(chat, task, item, responses[k * n : (k + 1) * n])
        if not right and s.demonstrations_as_chosen and item.demonstration:
            right = [chat.example(prompt.messages, item.demonstration)]
        if s.cut_rejected:
            wrong = [cut_after_error(chat, task, item, example) for example in wrong]
        pairs += [Pair(c, r) for c, r in zip(right, wrong, strict=False)][: s.pairs_per_prompt]
    return pairs


def cut_after_error(chat: ChatFormat, task: Task, item: Item, example: Example) -> Example:
    """The response up to and with the token that holds its first wrong character; whole where the task cannot tell."""
    error = task.first_error(chat.text(example.response), item)
    if error is None:
        return example
    for end in range(1, len(example.response)):
        if len(chat.text(example.response[:end])) > error:
            return Example(example.prompt, example.response[:end])
    return example


def save_pairs(file: Path, pairs: Sequence[Pair], chat: ChatFormat) -> None:
    """JSONL with the text for people and the token ids, which are what was sampled."""
    rows = [
        {
            "prompt": chat.tokenizer.decode(p.chosen.prompt),
            "chosen": chat.text(p.chosen.response),
            "rejected": chat.text(p.rejected.response),
            "prompt_ids": p.chosen.prompt,
            "chosen_ids": p.chosen.response,
            "rejected_ids": p.rejected.response,
        }
        for p in pairs
    ]
    write_text(file, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def load_pairs(file: Path) -> list[Pair]:
    """The pairs that ``save_pairs`` wrote. Raises DataError where the file has been changed into something else."""
    try:
        return [
            Pair(Example(row["prompt_ids"], row["chosen_ids"]), Example(row["prompt_ids"], row["rejected_ids"]))
            for row in read_jsonl(file)
        ]
    except KeyError as e:
        raise DataError(f"{file}: a row has no field {e}; delete the file to sample the pairs again") from e


def _grade(
    chat: ChatFormat, task: Task, item: Item, responses: Sequence[Response]
) -> tuple[list[Example], list[Example]]:
    right: list[Example] = []
    wrong: list[Example] = []
    for response in responses:
        good = task.grade(chat.text(response.example.response), item).right and not response.truncated
        (right if good else wrong).append(response.example)
    return right, wrong


def train_rm(ctx: Context, stage: StageFolder) -> None:
    """Trains the reward model's adapter (or its weights). Goes on at the last checkpoint."""
    recipe, s = ctx.recipe, ctx.recipe.train_rm
    with ctx.clock("loading"):
        start = weights.open_start(ctx)
        chat = ChatFormat(start.model.tokenizer, recipe.chat.template_args)
        reward_model, reference = weights.open_untrained_reward_model(ctx, start)
    engine = open_engine([start], chat.end, rows=reward_model.model.head.rows)
    pairs = fitting(
        ctx, make_pairs(ctx, stage, engine, start.model, chat), start.model, s.max_length, "pairs", Pair.longest
    )
    kept_out = min(round(len(pairs) * s.held_out), len(pairs) - 1)
    held, pairs = pairs[:kept_out], pairs[kept_out:]
    total = s.max_steps or math.ceil(s.epochs * len(pairs) / s.batch_size)
    optimiser = Optimiser(weights.trainable(ctx, reward_model, "rm"), s, total)

    with InterruptGuard() as interrupt, reward_model.model.training_mode():
        progress = Progress(stage, optimiser, interrupt, ctx.device)
        ctx.console.stage("train-rm", f"{len(pairs)} pairs, {total} updates of {s.batch_size}")
        preflight(
            ctx, pairs, s.micro_batch_tokens, lambda longest: accumulate(reward_model, reference, longest, s), optimiser
        )
        with (
            MetricsLog(stage.metrics, progress.done or None) as log,
            ctx.console.progress(total, "train-rm", progress.done) as line,
        ):
            for step in range(progress.done + 1, total + 1):
                chosen = endless(len(pairs), recipe.seed, (step - 1) * s.batch_size, s.batch_size)
                with ctx.clock("update"):
                    metrics = accumulate(reward_model, reference, [pairs[i] for i in chosen], s)
                    metrics["grad_norm"], metrics["lr"] = optimiser.step(step - 1)
                log.write({"step": step, **metrics, "seconds": ctx.clock.lap(), "peak_mib": peak_mib()})
                line.update(step, **metrics)
                progress.checkpoint(step, s.save_every)
    weights.save(reward_model, stage)
    result = {"updates": total, "pairs": len(pairs)} | pair_accuracy(ctx, reward_model, reference, held)
    result |= score_as_policy(ctx, start, reward_model, chat)
    stage.finish(result)


def make_pairs(ctx: Context, stage: StageFolder, engine: Engine, model: LanguageModel, chat: ChatFormat) -> list[Pair]:
    """From data, or sampled by ``engine`` and graded; sampled ones are kept in rm/pairs.jsonl."""
    recipe, s = ctx.recipe, ctx.recipe.train_rm
    task = recipe_task(recipe)
    if recipe.data.preferences != "sampled":
        return file_pairs(recipe, task, chat)
    assert task is not None, "the recipe makes sure"
    file = stage.path / "pairs.jsonl"
    if file.exists():
        return load_pairs(file)
    sampling = Sampling(
        s.temperature, s.top_p, recipe.rl.max_new_tokens or task.max_new_tokens, recipe.rl.rollout_batch
    )
    prompts = fitting(
        ctx,
        task_prompts(recipe, task)[: s.prompts],
        model,
        s.max_length,
        "prompts",
        lambda p: len(chat.prompt(p.messages)) + sampling.max_new_tokens,
    )
    total = len(prompts) * s.samples_per_prompt
    ctx.console.stage(
        "train-rm", f"sampling {s.samples_per_prompt} responses to each of {len(prompts)} prompts for pairs"
    )
    with ctx.clock("rollout"), ctx.console.progress(total, "pairs") as line, seeded(recipe.seed, "pairs"):
        pairs = sample_pairs(engine, chat, task, prompts, s, sampling, line.update)
    if len(pairs) < 2:
        raise DataError(
            f"{total} responses to {len(prompts)} prompts gave {len(pairs)} pairs of right and wrong: raise "
            "train_rm.samples_per_prompt or train_rm.prompts, let sft train longer, or set "
            "train_rm.demonstrations_as_chosen: true"
        )
    save_pairs(file, pairs, chat)
    return pairs


def accumulate(reward_model: Role, reference: Role, pairs: Sequence[Pair], s: TrainRm) -> dict[str, float]:
    """Adds the gradient of mean DPO loss + sft_weight · mean over the chosen responses' tokens of -log φ."""
    chosen_tokens = sum(len(p.chosen.response) for p in pairs)
    totals = {"loss": 0.0, "accuracy": 0.0, "margin": 0.0}
    for group in micro_batches([len(p) for p in pairs], s.micro_batch_tokens):
        logps, ref_logps = pair_logprobs(reward_model, reference, [pairs[i] for i in group])
        losses, margins = dpo_loss(logps, ref_logps, s.beta)
        part = losses.sum() / len(pairs) - s.sft_weight * logps[0].sum() / chosen_tokens
        part.backward()
        totals["loss"] += part.item()
        totals["accuracy"] += (margins > 0).sum().item() / len(pairs)
        totals["margin"] += margins.sum().item() / len(pairs)
    return totals


def pair_logprobs(reward_model: Role, reference: Role, pairs: Sequence[Pair]) -> tuple[ChosenRejected, ChosenRejected]:
    """((chosen, rejected) under the reward model, likewise under the reference): each [pairs], summed over tokens."""
    batch = collate([p.chosen for p in pairs] + [p.rejected for p in pairs], reward_model.model.pad_id)
    batch = batch.to(reward_model.model.device)

    def summed(role: Role) -> ChosenRejected:
        logprobs, _ = token_logprobs(role.hidden(batch), role.model.head, batch.actions)
        chosen, rejected = logprobs.new_zeros(2 * len(pairs)).index_add(0, batch.rows, logprobs).chunk(2)
        return chosen, rejected

    with torch.no_grad():
        ref = summed(reference)
    return summed(reward_model), ref


@torch.no_grad()
def pair_accuracy(ctx: Context, reward_model: Role, reference: Role, held: Sequence[Pair]) -> dict[str, float]:
    """Share of held-out pairs whose chosen response has the larger implicit reward β log φ_DPO/φ_ref."""
    if not held:
        return {}
    s, right = ctx.recipe.train_rm, 0
    for group in micro_batches([len(p) for p in held], s.micro_batch_tokens):
        logps, ref_logps = pair_logprobs(reward_model, reference, [held[i] for i in group])
        _, margins = dpo_loss(logps, ref_logps, s.beta)
        right += int((margins > 0).sum())
    ctx.console.note(f"implicit reward: {right / len(held):.3f} of {len(held)} held-out pairs are in the right order")
    return {"pair_accuracy": right / len(held), "held_out_pairs": len(held)}


def score_as_policy(ctx: Context, start: Role, reward_model: Role, chat: ChatFormat) -> dict[str, float]:
    """pass@1 of φ_DPO and of the policy it shall teach, on held-out items; warns where there is nothing to teach."""
    task, s = recipe_task(ctx.recipe), ctx.recipe.train_rm
    if task is None or not task.graded or not s.check_items:
        return {}
    prompts = held_out(ctx.recipe, task, s.check_items)
    sampling = eval_sampling(ctx.recipe.eval, task)
    with ctx.clock("eval"):
        before, after = (
            accuracy(sample_scores(open_engine([role], chat.end), chat, task, prompts, sampling, ctx.recipe.seed))
            for role in (start, reward_model)
        )
    ctx.console.note(
        f"as a policy on {len(prompts)} held-out items: φ_DPO {after:.3f}, the policy it shall teach {before:.3f}"
    )
    if after <= before:
        ctx.console.warn(
            "φ_DPO is no better than the policy it shall teach: its advantages may point the wrong way. More or "
            "cleaner pairs, train_rm.sft_weight, cut_rejected or more updates help; rl would not."
        )
    return {"rm_as_policy": after, "policy_before": before}
