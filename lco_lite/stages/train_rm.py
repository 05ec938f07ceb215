"""The reward model φ_DPO: DPO on preference pairs (paper, section 4; loss of Rafailov et al. 2023, eq 7).

The pairs come from data, or are made here: responses of the policy before RL, graded by the task, right paired with
wrong, and the wrong one cut after its first wrong token where the task knows it. φ_DPO is then scored as a policy on
held-out items: if it is no better than the policy it shall teach, its advantage points the wrong way.

    lco-lite train-rm recipes/quickstart.yaml
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from lco_lite.data.chat import ChatFormat
from lco_lite.data.prepare import Pair, file_pairs, held_out, recipe_task, task_prompts
from lco_lite.data.sampled_pairs import load_pairs, sample_pairs, save_pairs
from lco_lite.errors import DataError
from lco_lite.models.roles import Role
from lco_lite.objectives.logprobs import token_logprobs
from lco_lite.objectives.preference import ChosenRejected, dpo_loss
from lco_lite.recipe import TrainRm
from lco_lite.rollout.engine import Sampling
from lco_lite.rollout.local import LocalEngine
from lco_lite.run import StageFolder
from lco_lite.seeding import seeded
from lco_lite.sequences import collate, endless, micro_batches
from lco_lite.stages import cast
from lco_lite.stages.context import Context
from lco_lite.stages.evaluate import accuracy, eval_sampling, sample_scores
from lco_lite.stages.training import Optimiser, Progress
from lco_lite.stages.window import fitting, preflight
from lco_lite.tasks.base import grades
from lco_lite.telemetry.interrupt import InterruptGuard
from lco_lite.telemetry.memory import peak_mib
from lco_lite.telemetry.metrics import MetricsLog


def train_rm(ctx: Context, stage: StageFolder) -> None:
    """Trains the reward model's adapter (or its weights). Goes on at the last checkpoint."""
    recipe, s = ctx.recipe, ctx.recipe.train_rm
    with ctx.clock("loading"):
        start = cast.open_start(ctx)
        chat = ChatFormat(start.model.tokenizer, recipe.chat.template_args)
        reward_model, reference = cast.open_untrained_reward_model(ctx, start)
    engine = LocalEngine(start, chat.end, reward_model.model.head.rows)
    pairs = fitting(ctx, make_pairs(ctx, stage, engine, chat), start.model, s.max_length, "pairs", Pair.longest)
    kept_out = min(round(len(pairs) * s.held_out), len(pairs) - 1)
    held, pairs = pairs[:kept_out], pairs[kept_out:]
    total = s.max_steps or math.ceil(s.epochs * len(pairs) / s.batch_size)
    optimiser = Optimiser(cast.trainable(ctx, reward_model, "rm"), s, total)

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
    cast.save(reward_model, stage)
    result = {"updates": total, "pairs": len(pairs)} | pair_accuracy(ctx, reward_model, reference, held)
    result |= score_as_policy(ctx, start, reward_model, chat)
    stage.finish(result)


def make_pairs(ctx: Context, stage: StageFolder, engine: LocalEngine, chat: ChatFormat) -> list[Pair]:
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
        engine.model,
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
    if task is None or not grades(task) or not s.check_items:
        return {}
    prompts = held_out(ctx.recipe, task, s.check_items)
    sampling = eval_sampling(ctx.recipe.eval, task)
    with ctx.clock("eval"):
        before, after = (
            accuracy(sample_scores(LocalEngine(role, chat.end), chat, task, prompts, sampling, ctx.recipe.seed))
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
