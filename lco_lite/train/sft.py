"""Supervised fine-tuning: -log π(response | prompt), averaged over response tokens only (the warm-up before RL).

An update takes ``batch_size`` demonstrations in micro-batches of like length; the gradient is that of the mean over all
their response tokens, however they are split.

    lco-lite sft recipes/quickstart.yaml
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from lco_lite import weights
from lco_lite.context import Context, InterruptGuard
from lco_lite.data.prompts import recipe_task, sft_examples
from lco_lite.metrics import MetricsLog, peak_mib
from lco_lite.models.chat import ChatFormat
from lco_lite.models.language_model import Role
from lco_lite.objectives.logprobs import token_logprobs
from lco_lite.run import StageFolder
from lco_lite.sequences import Example, collate, endless, micro_batches
from lco_lite.train.training import Optimiser, Progress, fitting, preflight


def train_sft(ctx: Context, stage: StageFolder) -> None:
    """Trains an adapter (or the whole model) on demonstrations. Goes on at the last checkpoint."""
    recipe, s = ctx.recipe, ctx.recipe.sft
    with ctx.clock("loading"):
        policy = weights.open_sft(ctx)
        chat = ChatFormat(policy.model.tokenizer, recipe.chat.template_args)
        examples = fitting(
            ctx, sft_examples(recipe, recipe_task(recipe), chat), policy.model, s.max_length, "demonstrations"
        )
    total = s.max_steps or math.ceil(s.epochs * len(examples) / s.batch_size)
    optimiser = Optimiser(weights.trainable(ctx, policy, "sft"), s, total)

    with InterruptGuard() as interrupt, policy.model.training_mode():
        progress = Progress(stage, optimiser, interrupt, ctx.device)
        ctx.console.stage("sft", f"{len(examples)} demonstrations, {total} updates of {s.batch_size}")
        preflight(ctx, examples, s.micro_batch_tokens, lambda x: accumulate(policy, x, s.micro_batch_tokens), optimiser)
        with (
            MetricsLog(stage.metrics, progress.done or None) as log,
            ctx.console.progress(total, "sft", progress.done) as line,
        ):
            for step in range(progress.done + 1, total + 1):
                chosen = endless(len(examples), recipe.seed, (step - 1) * s.batch_size, s.batch_size)
                with ctx.clock("update"):
                    metrics = accumulate(policy, [examples[i] for i in chosen], s.micro_batch_tokens)
                    metrics["grad_norm"], metrics["lr"] = optimiser.step(step - 1)
                log.write({"step": step, **metrics, "seconds": ctx.clock.lap(), "peak_mib": peak_mib()})
                line.update(step, **metrics)
                progress.checkpoint(step, s.save_every)
    weights.save(policy, stage)
    stage.finish({"updates": total, "examples": len(examples)})


def accumulate(policy: Role, examples: Sequence[Example], micro_batch_tokens: int) -> dict[str, float]:
    """Adds the gradient of the mean of -log π over all response tokens; returns loss, entropy and tokens."""
    tokens = sum(len(e.response) for e in examples)
    loss = entropy = 0.0
    for group in micro_batches([len(e) for e in examples], micro_batch_tokens):
        batch = collate([examples[i] for i in group], policy.model.pad_id).to(policy.model.device)
        logprobs, seen = token_logprobs(policy.hidden(batch), policy.model.head, batch.actions)
        part = -logprobs.sum() / tokens
        part.backward()
        loss += part.item()
        entropy += seen["entropy"].sum().item() / tokens
    return {"loss": loss, "entropy": entropy, "response_tokens": tokens}
