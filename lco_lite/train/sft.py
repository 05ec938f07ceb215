"""Supervised fine-tuning: -log π(response | prompt), averaged over response tokens only (the warm-up before RL).

An update takes ``batch_size`` demonstrations in micro-batches of like length; the gradient is that of the mean over all
their response tokens, however they are split.
"""

import math
from collections.abc import Sequence
from functools import partial

from lco_lite import ranks, weights
from lco_lite.context import Context
from lco_lite.data.prompts import recipe_task, sft_examples
from lco_lite.finite import witness
from lco_lite.metrics import read_log
from lco_lite.models.chat import ChatFormat
from lco_lite.models.language_model import Role
from lco_lite.objectives.logprobs import token_logprobs
from lco_lite.run import StageFolder
from lco_lite.sequences import Example, collate, endless, own_micro_batches
from lco_lite.train.guard import sft_stands
from lco_lite.train.skipped import BatchRow
from lco_lite.train.training import StageTraining, fitting


def train_sft(ctx: Context, stage: StageFolder) -> None:
    """Trains an adapter (or the whole model) on demonstrations. Goes on at the last checkpoint."""
    recipe, sft = ctx.recipe, ctx.recipe.sft
    with ctx.clock("loading"):
        policy = weights.open_sft(ctx)
        chat = ChatFormat(policy.model.tokenizer, recipe.chat.template_args, ctx.console.warn)
        examples = sft_examples(recipe, recipe_task(recipe), chat)
        examples = fitting(ctx, examples, policy.model.max_length, sft.max_length, "demonstrations")
    updates = sft.max_steps or math.ceil(sft.epochs * len(examples) / sft.batch_size)
    parameters = weights.trainable(ctx, policy, "sft")
    ctx.console.stage("sft", f"{len(examples)} demonstrations, {updates} updates of {sft.batch_size}")
    training = StageTraining(ctx, stage, parameters, sft, updates, updates, weights.unrounded(ctx, policy))
    with training, policy.model.training_mode(dropout=True):
        training.try_longest(examples, partial(accumulate, policy))
        for step in training.steps():
            places = endless(len(examples), recipe.seed, step * sft.batch_size, sft.batch_size)
            chosen = [examples[i] for i in places]
            with ctx.clock("update"):
                metrics = ranks.total(training.within_memory(accumulate, [[len(e) for e in chosen]], policy, chosen))
                numbers = {"loss": metrics["loss"], "hidden states": metrics.pop("hidden")}
                made = training.update(numbers, partial(batch_rows, chat, examples, places))
            training.keep(step, metrics | made if made else {})
        training.end()
    weights.save(policy, stage, training.masters)
    told = sft_stands([row["loss"] for row in read_log(stage.metrics) if row.get("loss") is not None])
    if told and recipe.rl.guard != "off":
        ctx.console.warn(f"{told} (`lco-lite sft --fresh`)")
    stage.finish({"updates": updates, "examples": len(examples)})


def accumulate(policy: Role, examples: Sequence[Example], micro_batch_tokens: int) -> dict[str, float]:
    """Adds the gradient of the mean of -log π over all response tokens; returns loss, entropy and tokens, and a number
    that is finite where all ``hidden`` states are. Of several ranks each adds its share."""
    tokens, own = sum(len(e.response) for e in examples), 0
    loss = entropy = states = 0.0
    for places in own_micro_batches([len(e) for e in examples], micro_batch_tokens):
        batch = collate([examples[i] for i in places], policy.model.pad_id).to(policy.model.device)
        hidden = policy.hidden(batch)
        logprobs, seen = token_logprobs(hidden, policy.model.head, batch.actions)
        part = -logprobs.sum() / tokens
        part.backward()
        own += len(batch.actions)
        loss += part.item()
        states += witness([hidden]).item()
        entropy += seen["entropy"].sum().item() / tokens
    return {"loss": loss, "entropy": entropy, "response_tokens": own, "hidden": states}


def batch_rows(chat: ChatFormat, examples: Sequence[Example], places: Sequence[int]) -> list[BatchRow]:
    """What a reader finds the demonstrations of a batch by: each one's number in their order, from 1, and its texts."""
    texts = [map(chat.tokenizer.decode, (examples[i].prompt, examples[i].response)) for i in places]
    return [{"demonstration": i + 1, "prompt": p, "response": r} for i, (p, r) in zip(places, texts, strict=True)]
