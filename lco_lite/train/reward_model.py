"""The reward model φ_DPO: DPO on preference pairs (paper, section 4; loss of Rafailov et al. 2023, eq 7).

The pairs come from data, or are made here from the responses of the policy before RL: the task grades them, right is
paired with wrong, and the wrong one is cut after its first wrong token where the task knows it, since what follows a
mistake may be sound in itself. φ_DPO is then scored as a policy on held-out items: if it is no better than the policy
that it will teach, its advantage points the wrong way.
"""

import hashlib
import json
import math
from collections import Counter
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from lco_lite import ranks, weights
from lco_lite.console import Console
from lco_lite.context import Context, InterruptGuard
from lco_lite.data.prompts import (
    Pair,
    Prompt,
    file_pairs,
    held_out,
    held_out_pairs,
    longest_response,
    recipe_task,
    rewarding_task,
    task_prompts,
)
from lco_lite.errors import DataError, Interrupted
from lco_lite.evaluation.evaluate import held_out_accuracy
from lco_lite.files import JsonLines, read_sealed_lines, remove, write_sealed_lines
from lco_lite.finite import witness
from lco_lite.metrics import read_log
from lco_lite.models.chat import ChatFormat
from lco_lite.models.language_model import Role, together
from lco_lite.objectives.logprobs import ChosenRejected, dpo_loss, token_logprobs
from lco_lite.recipe import TrainRm
from lco_lite.rollout.engine import Response, Sampling, open_engine
from lco_lite.run import StageFolder
from lco_lite.sequences import Example, collate, endless, own_micro_batches
from lco_lite.tasks.base import Item, Task
from lco_lite.train.guard import reward_model_stands
from lco_lite.train.rollouts import first_wrong_token, sample
from lco_lite.train.skipped import BatchRow
from lco_lite.train.training import StageTraining, fitting


def train_rm(ctx: Context, stage: StageFolder) -> None:
    """Trains the reward model's adapter (or its weights). Goes on at the last checkpoint."""
    recipe, rm = ctx.recipe, ctx.recipe.train_rm
    with ctx.clock("loading"):
        start = weights.open_start(ctx)
        chat = ChatFormat(start.model.tokenizer, recipe.chat.template_args, ctx.console.warn)
    if recipe.data.preferences == "sampled":
        pairs = sampled_pairs(ctx, stage, start, chat, weights.rows_of_reward_model(ctx, start))
    else:
        pairs = file_pairs(recipe, recipe_task(recipe), chat)
    with ctx.clock("loading"):
        reward_model, reference = weights.open_untrained_reward_model(ctx, start)
    pairs = fitting(ctx, pairs, reward_model.model.max_length, rm.max_length, "pairs", Pair.longest)
    drawn = held_out_pairs(recipe, chat)  # by prompt for all stages, where there is no task
    held = [pair for pair in drawn if pair.longest() <= min(rm.max_length, reward_model.model.max_length)]
    if len(held) < len(drawn):
        ctx.console.warn(f"{len(drawn) - len(held)} of {len(drawn)} held-out pairs are too long and left out")
    if not held:
        held, pairs = hold_out(pairs, rm.held_out)
    if round(len(pairs) * rm.held_out) and not held:
        ctx.console.warn("train_rm.held_out: every prompt has more pairs than that: none are held out, none are scored")
    updates = rm.max_steps or math.ceil(rm.epochs * len(pairs) / rm.batch_size)
    parameters = weights.trainable(ctx, reward_model, "rm")
    ctx.console.stage("train-rm", f"{len(pairs)} pairs, {updates} updates of {rm.batch_size}")
    training = StageTraining(ctx, stage, parameters, rm, updates, updates, weights.unrounded(ctx, reward_model))
    with training, together(reference, reward_model), reward_model.model.training_mode():
        training.try_longest(pairs, partial(accumulate, reward_model, reference, rm))
        for step in training.steps():
            places = endless(len(pairs), recipe.seed, step * rm.batch_size, rm.batch_size)
            chosen = [pairs[i] for i in places]
            with ctx.clock("update"):
                lengths = [[len(pair) for pair in chosen]]
                metrics = ranks.total(training.within_memory(accumulate, lengths, reward_model, reference, rm, chosen))
                numbers = {"loss": metrics["loss"], "hidden states": metrics.pop("hidden")}
                made = training.update(numbers, partial(batch_rows, chat, pairs, places))
            training.keep(step, metrics | made if made else {})
        training.end()
    weights.save(reward_model, stage, training.masters)
    training.let_go()
    result: dict[str, float] = {"updates": updates, "pairs": len(pairs)}
    if held:
        with ctx.clock("score"):
            measure, lengths = partial(accumulate, train=False), [[len(pair) for pair in held]]
            measured = ranks.total(training.within_memory(measure, lengths, reward_model, reference, rm, held))
            accuracy = measured["accuracy"]
        ctx.console.note(f"implicit reward: {accuracy:.3f} of {len(held)} held-out pairs are in the right order")
        result |= {"pair_accuracy": accuracy, "margin": measured["margin"], "held_out_pairs": len(held)}
    margins = [row["margin"] for row in read_log(stage.metrics) if row.get("margin") is not None]
    told = reward_model_stands(margins, result.get("pair_accuracy"))
    if told and recipe.rl.guard != "off":
        ctx.console.warn(f"{told} (`lco-lite train-rm --fresh`)")
    stage.finish(result | score_as_policy(ctx, start, reward_model, chat))


def hold_out(pairs: Sequence[Pair], share: float) -> tuple[list[Pair], list[Pair]]:
    """(at most this share of the pairs, the others): prompts in their order with all their pairs, as far as they fit,
    so that no prompt is on both sides. Something is left to train on."""
    prompts = [tuple(pair.chosen.prompt) for pair in pairs]
    room, held = min(round(len(pairs) * share), len(pairs) - 1), set()
    for prompt, n in Counter(prompts).items():
        if n <= room:
            held.add(prompt)
            room -= n
    sides = [(pair, prompt in held) for pair, prompt in zip(pairs, prompts, strict=True)]
    return [pair for pair, is_held in sides if is_held], [pair for pair, is_held in sides if not is_held]


def accumulate(
    reward_model: Role, reference: Role, rm: TrainRm, pairs: Sequence[Pair], micro_batch_tokens: int, train: bool = True
) -> dict[str, float]:
    """Adds the gradient of mean DPO loss + sft_weight · mean over the chosen responses' tokens of -log φ, each rank its
    share; with ``train`` off only measures. ``margin``: of the implicit reward β log φ_DPO/φ_ref; ``accuracy``: where
    it is > 0; ``hidden`` is finite where all hidden states are."""
    chosen_tokens = sum(len(p.chosen.response) for p in pairs)
    totals = {"loss": 0.0, "accuracy": 0.0, "margin": 0.0, "response_tokens": 0, "hidden": 0.0}
    for places in own_micro_batches([len(p) for p in pairs], micro_batch_tokens):
        with torch.set_grad_enabled(train):
            logps, ref_logps, states = pair_logprobs(reward_model, reference, [pairs[i] for i in places])
            losses, margins = dpo_loss(logps, ref_logps, rm.beta)
            part = losses.sum() / len(pairs) - rm.sft_weight * logps[0].sum() / chosen_tokens
        if train:
            part.backward()
        totals["loss"] += part.item()
        totals["response_tokens"] += sum(len(e.response) for i in places for e in (pairs[i].chosen, pairs[i].rejected))
        totals["hidden"] += states.item()
        totals["accuracy"] += (margins > 0).sum().item() / len(pairs)
        totals["margin"] += margins.sum().item() / len(pairs)
    return totals


def pair_logprobs(
    reward_model: Role, reference: Role, pairs: Sequence[Pair]
) -> tuple[ChosenRejected, ChosenRejected, Tensor]:
    """((chosen, rejected) under the reward model, likewise under the reference): each [pairs], summed over tokens; and
    a number that is finite where the hidden states of both are."""
    batch = collate([p.chosen for p in pairs] + [p.rejected for p in pairs], reward_model.model.pad_id)
    batch = batch.to(reward_model.model.device)

    states = list[Tensor]()

    def summed(role: Role) -> ChosenRejected:
        hidden = role.hidden(batch)
        states.append(witness([hidden]))
        logprobs, _ = token_logprobs(hidden, role.model.head, batch.actions)
        chosen, rejected = logprobs.new_zeros(2 * len(pairs)).index_add(0, batch.rows, logprobs).chunk(2)
        return chosen, rejected

    with torch.no_grad():
        ref = summed(reference)
    return summed(reward_model), ref, sum(states, torch.zeros((), device=states[0].device))


def batch_rows(chat: ChatFormat, pairs: Sequence[Pair], places: Sequence[int]) -> list[BatchRow]:
    """What a reader finds the pairs of a batch by: the number of each in their order, from 1, and its texts."""

    def row(i: int) -> BatchRow:
        texts = {"prompt": pairs[i].chosen.prompt, "chosen": pairs[i].chosen.response}
        texts["rejected"] = pairs[i].rejected.response
        return {"pair": i + 1} | {name: chat.tokenizer.decode(ids) for name, ids in texts.items()}

    return [row(i) for i in places]


def score_as_policy(ctx: Context, start: Role, reward_model: Role, chat: ChatFormat) -> dict[str, float]:
    """pass@1 on held-out items of φ_DPO and of the policy that it will teach; warns where it has nothing to teach."""
    task, rm = recipe_task(ctx.recipe), ctx.recipe.train_rm
    if task is None or not task.graded or not rm.check_items:
        return {}
    prompts = held_out(ctx.recipe, task, rm.check_items)
    with ctx.clock("eval"):
        scores = list[float]()
        for role in (start, reward_model):
            engine = open_engine([role], chat.end, settings=ctx.recipe.rollout, say=ctx.console.note)
            scores.append(held_out_accuracy(ctx, engine, role.model.max_length, chat, task, prompts))
        before, after = scores
    ctx.console.note(
        f"as a policy on {len(prompts)} held-out items: φ_DPO {after:.3f}, the policy that it will teach {before:.3f}"
    )
    if after <= before:
        ctx.console.warn(
            "φ_DPO is no better than the policy that it will teach: its advantages may point the wrong way. More "
            "updates help, or with `lco-lite train-rm --fresh` more or cleaner pairs, train_rm.sft_weight, "
            "cut_rejected; rl would not."
        )
    return {"rm_as_policy": after, "policy_before": before}


# pairs of the policy's own responses


def sampled_pairs(ctx: Context, stage: StageFolder, start: Role, chat: ChatFormat, rows: int) -> list[Pair]:
    """Those in ``rm/pairs.jsonl``; else made of responses, which are kept batch by batch until the pairs are there."""
    recipe, rm, task = ctx.recipe, ctx.recipe.train_rm, rewarding_task(ctx.recipe)
    assert task is not None, "the recipe makes sure"
    file, made_of = stage.path / "pairs.jsonl", stage.path / "responses.jsonl"
    if ranks.from_main(file.exists()):
        pairs = load_pairs(file)
        ranks.once(remove)(made_of)  # where that failed once
        return pairs
    longest = longest_response(recipe)
    sampling = Sampling(rm.temperature, rm.top_p, longest, recipe.rl.rollout_batch)
    asked = [(prompt, chat.prompt(prompt.messages)) for prompt in task_prompts(recipe, task)[: rm.prompts]]
    window = start.model.max_length
    asked = fitting(ctx, asked, window, rm.max_length, "prompts", lambda one: len(one[1]) + longest)
    engine = open_engine([start], chat.end, rows=rows, settings=recipe.rollout, say=ctx.console.note)
    total = len(asked) * rm.samples_per_prompt
    ids = [ids for _, ids in asked for _ in range(rm.samples_per_prompt)]
    ctx.begins()
    kept = kept_of(ids, sampling, made_of, ctx.console)
    ctx.console.stage(
        "train-rm", f"sampling {rm.samples_per_prompt} responses to each of {len(asked)} prompts for pairs"
    )
    with InterruptGuard(ctx.console) as interrupt:

        def stop_if_asked() -> None:
            if ranks.any_of(interrupt.requested):
                raise Interrupted(
                    f"stopped while sampling pairs; what is sampled is in {kept.path}, and the same "
                    "command goes on from there"
                )

        responses = sample(ctx, engine, ids, sampling, kept, ("pairs",), stop_if_asked)
    pairs = ranks.once(pair_up)(chat, task, [prompt for prompt, _ in asked], responses, rm)
    if len(pairs) < 2:
        raise DataError(
            f"{total} responses to {len(asked)} prompts gave {len(pairs)} pairs of right and wrong: raise "
            "train_rm.samples_per_prompt or train_rm.prompts, let sft train longer, or set "
            "train_rm.demonstrations_as_chosen: true"
        )
    ranks.once(save_pairs)(file, pairs, chat)
    ranks.once(remove)(made_of)
    return pairs


def kept_of(ids: Sequence[list[int]], sampling: Sampling, file: Path, console: Console) -> JsonLines:
    """The responses to these prompts that are in ``file``; of others, or of another length, none: they are deleted.
    Version 0.5.0 and earlier did not note which they are."""
    of = json.dumps([ids, sampling.max_new_tokens, sampling.temperature, sampling.top_p])
    kept, header = JsonLines(file), {"asked": hashlib.sha256(of.encode()).hexdigest()}
    if kept.rows and "asked" in kept.rows[0] and kept.rows[0] != header:
        console.warn(f"{file}: holds responses to other prompts, or of another length: they are sampled anew")
        ranks.once(remove)(file)
        kept = JsonLines(file)
    if not kept.rows:
        kept.append(header)
    return kept


def pair_up(
    chat: ChatFormat, task: Task, prompts: Sequence[Prompt], responses: Sequence[Response], rm: TrainRm
) -> list[Pair]:
    """Up to ``pairs_per_prompt`` pairs for each prompt that has both a right and a wrong response. The grade decides,
    as in rl and in scores; a right one that was cut is in no pair: it is no worse, and as chosen has no end to learn.
    """
    pairs, n = [], rm.samples_per_prompt
    for k, prompt in enumerate(prompts):
        item, right, wrong = prompt.item, list[Example](), list[Example]()
        assert item is not None, "prompts for sampled pairs are a task's items"
        for response in responses[k * n : (k + 1) * n]:
            if not task.grade(chat.text(response.example.response), item).right:
                wrong.append(response.example)
            elif not response.truncated:
                right.append(response.example)
        if not right and rm.demonstrations_as_chosen and item.demonstration:
            right = [chat.example(prompt.messages, item.demonstration)]
        if rm.cut_rejected:
            wrong = [cut_after_error(chat, task, item, example) for example in wrong]
        pairs += [Pair(c, r) for c, r in zip(right, wrong, strict=False)][: rm.pairs_per_prompt]
    return pairs


def cut_after_error(chat: ChatFormat, task: Task, item: Item, example: Example) -> Example:
    """The response up to and with the token that holds its first wrong character; whole where the task cannot tell."""
    wrong = first_wrong_token(chat, task, item, example)
    return example if wrong is None else Example(example.prompt, example.response[: wrong + 1])


def save_pairs(file: Path, pairs: Sequence[Pair], chat: ChatFormat) -> None:
    """Sealed JSONL with the text for people and the token ids, which are what was sampled."""
    rows = [
        {
            "pairs": len(pairs),
            "prompt": chat.tokenizer.decode(p.chosen.prompt),
            "chosen": chat.text(p.chosen.response),
            "rejected": chat.text(p.rejected.response),
            "prompt_ids": p.chosen.prompt,
            "chosen_ids": p.chosen.response,
            "rejected_ids": p.rejected.response,
        }
        for p in pairs
    ]
    write_sealed_lines(file, rows)


def load_pairs(file: Path) -> list[Pair]:
    """The pairs that ``save_pairs`` wrote, this version or an earlier one. DataError where they are others now."""
    remedy = "Put it back as it was, or delete the file: the pairs are sampled again"
    rows, seal = read_sealed_lines(file, remedy)
    if seal and len(rows) != (made := rows[0]["pairs"]):
        raise DataError(f"{file}: damaged: has {len(rows)} of its {made} pairs. {remedy}")
    try:
        return [
            Pair(Example(row["prompt_ids"], row["chosen_ids"]), Example(row["prompt_ids"], row["rejected_ids"]))
            for row in rows
        ]
    except KeyError as e:
        raise DataError(f"{file}: damaged: a line has no field {e}. {remedy}") from e
