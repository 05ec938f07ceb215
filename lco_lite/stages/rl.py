"""Policy optimisation, by LCO or by what it is compared with: roll out, score, update against a fixed target, repeat.

for each step (one rollout phase):
    responses ~ π_old                                   rollout: temperature, top-p       (rollouts.py)
    z* = z_old + A/β, kept as hidden states             score: h_old and h_dpo - h_ref    (score.py)
    for each inner epoch, for each minibatch:
        minimise LCO(z*, z_θ) over response tokens      update                            (losses.py)

lco-lite rl --objective lch --beta 1.0
"""

from __future__ import annotations

from dataclasses import dataclass
from statistics import fmean
from typing import Any

import torch

from lco_lite.data.chat import ChatFormat
from lco_lite.data.prepare import Prompt, held_out, recipe_task, rl_prompts
from lco_lite.errors import Diverged
from lco_lite.feedback.responses import open_rater
from lco_lite.objectives.monitor import monitor
from lco_lite.objectives.value import ValueHead
from lco_lite.rollout.engine import Response, Sampling
from lco_lite.rollout.local import LocalEngine
from lco_lite.run import StageFolder
from lco_lite.sequences import Example
from lco_lite.stages import cast
from lco_lite.stages.context import Context
from lco_lite.stages.evaluate import accuracy, eval_sampling, sample_scores
from lco_lite.stages.losses import loss_part
from lco_lite.stages.phase import Actors, Phase, order_of_updates, plan_minibatches
from lco_lite.stages.phase_report import describe, pooled, readable, with_cost
from lco_lite.stages.rollouts import Rollouts, open_engine
from lco_lite.stages.score import Scored, score
from lco_lite.stages.training import Optimiser, Progress, prefixed
from lco_lite.stages.window import fitting, preflight
from lco_lite.tasks.base import grades
from lco_lite.telemetry.console import Progress as Line
from lco_lite.telemetry.guard import Guard
from lco_lite.telemetry.interrupt import InterruptGuard
from lco_lite.telemetry.metrics import JsonLog, MetricsLog, read_log


@dataclass
class Loop:
    """What the steps share."""

    ctx: Context
    stage: StageFolder
    actors: Actors
    rollouts: Rollouts
    optimiser: Optimiser
    progress: Progress


def train_rl(ctx: Context, stage: StageFolder) -> None:
    """Trains the policy's adapter (or its weights). Goes on at the last checkpoint, inside a phase too."""
    rl = ctx.recipe.rl
    with InterruptGuard() as interrupt:
        loop = open_loop(ctx, stage, interrupt)
        done, ui, group = loop.progress.done, ctx.console, rl.responses_per_prompt
        strength = f", β {rl.beta:g}" if rl.is_lco else ""
        ui.stage(stage.name, f"{rl.steps} steps of {rl.prompts_per_step} prompts, feedback {rl.feedback}{strength}")
        try_longest(loop)
        guard = Guard(loop.actors.policy.model.head.rows)
        samples_seen = 0
        for before in read_log(stage.metrics)[:done]:
            guard.check(before)
            samples_seen = before["samples_seen"]
        with (
            MetricsLog(stage.metrics, done or None) as log,
            JsonLog(stage.samples, done or None) as samples,
            ui.progress(rl.steps, stage.name, done) as line,
        ):
            for step in range(done, rl.steps):
                phase = resume_phase(loop) or roll_out(loop, step)
                scored = score_phase(loop, phase, step)
                metrics = {"step": step + 1} | update_policy(loop, phase, scored, step, line) | describe(phase, group)
                if rl.eval_every and (step + 1) % rl.eval_every == 0:
                    metrics["eval"] = evaluate(loop)
                samples_seen += phase.drawn
                log.write(with_cost(metrics, ctx.clock.lap(), samples_seen))
                for row in readable(phase, loop.rollouts.prompts, loop.rollouts.chat, group, step + 1):
                    samples.write(row)
                line.update(step + 1, **metrics)
                heed(loop, guard.check(metrics), step + 1)
                loop.progress.checkpoint(step + 1, rl.save_every)
    cast.save(loop.actors.policy, stage)
    stage.finish({"steps": rl.steps, "objective": rl.objective})


def open_loop(ctx: Context, stage: StageFolder, interrupt: InterruptGuard) -> Loop:
    """Models, prompts and optimiser; the optimiser and the weights as the last checkpoint left them."""
    recipe, rl = ctx.recipe, ctx.recipe.rl
    task = recipe_task(recipe)
    with ctx.clock("loading"):
        start = cast.open_start(ctx)
        policy = cast.open_policy(ctx, start)
        critic = ValueHead(policy.model.head.weight.shape[1]).to(ctx.device) if rl.objective == "ppo" else None
        actors = Actors(policy, start, *cast.open_judges(ctx, start), critic)
    model = policy.model
    chat = ChatFormat(model.tokenizer, recipe.chat.template_args)
    longest = rl.max_new_tokens or (task.max_new_tokens if task else rl.max_length // 2)

    def room(prompt: Prompt) -> int:
        shown = prompt.item.demonstration if prompt.item and rl.on_policy < 1 else None
        return len(chat.prompt(prompt.messages)) + max(longest, len(chat.response(shown)) if shown else 0)

    prompts = fitting(ctx, rl_prompts(recipe, task), model, rl.max_length, "prompts", room)
    sampling = Sampling(rl.temperature, rl.top_p, longest, rl.rollout_batch)
    engine = open_engine(actors, rl.teacher_mix, chat.end)
    rollouts = Rollouts(ctx, engine, chat, task, prompts, sampling, open_rater(rl, ctx.device))
    minibatches = -(-rl.prompts_per_step * rl.responses_per_prompt // rl.minibatch)
    trained = cast.trainable(ctx, policy, "rl") + ([] if critic is None else prefixed("critic", critic))
    optimiser = Optimiser(trained, rl, rl.steps * rl.inner_epochs * minibatches)
    progress = Progress(stage, optimiser, interrupt, ctx.device)
    return Loop(ctx, stage, actors, rollouts, optimiser, progress)


def roll_out(loop: Loop, step: int) -> Phase:
    """The step's responses; Ctrl-C between two batches of them is a stop before the step."""

    def heed_interrupt() -> None:
        if loop.progress.interrupt.requested:
            loop.progress.save(step)
            loop.progress.stop(step)

    return loop.rollouts.phase(step, heed_interrupt)


def score_phase(loop: Loop, phase: Phase, step: int) -> list[list[Scored]]:
    """The phase's targets. Inside a phase that is resumed π_old is not the policy as it is now: its weights come back
    from the checkpoint for as long as this takes."""
    recipe = loop.ctx.recipe
    plan = plan_minibatches(phase.examples, recipe.rl, recipe.seed, step)
    with loop.ctx.clock("score"), loop.optimiser.holding(loop.progress.extra):
        return score(loop.actors, phase, plan, recipe.rl)


def update_policy(loop: Loop, phase: Phase, scored: list[list[Scored]], step: int, line: Line) -> dict[str, Any]:
    """All minibatches of the phase, ``inner_epochs`` times; returns means over the updates, and the KL at the end."""
    recipe, progress = loop.ctx.recipe, loop.progress
    order = order_of_updates(len(scored), recipe.rl, recipe.seed, step)
    behaviour = progress.extra or loop.optimiser.weights()
    first = progress.state.pop("updates", 0)
    progress.extra = {}
    history: list[dict[str, float]] = progress.state.pop("history", [])
    with loop.ctx.clock("update"), loop.actors.policy.model.training_mode():
        for k, index in enumerate(order[first:], first):
            metrics = accumulate(loop, scored[index])
            metrics["grad_norm"], metrics["lr"] = loop.optimiser.step(step * len(order) + k)
            history.append(metrics)
            line.update(step, **metrics)
            if progress.interrupt.requested and k + 1 < len(order):
                state = {"phase": phase.to_json(), "updates": k + 1, "history": history}
                progress.save(step, state, behaviour)
                progress.stop(step)
    means = {name: fmean(m[name] for m in history if name in m) for m in history for name in m}
    return means | {name: history[-1][name] for name in ("kl_to_old", "lr")}


def accumulate(loop: Loop, minibatch: list[Scored]) -> dict[str, float]:
    """Adds the gradient of the objective's mean over the minibatch; returns what it saw."""
    role = loop.actors.policy
    size = sum(len(s.advantages) for s in minibatch), sum(int(s.batch.rows[-1]) + 1 for s in minibatch)
    loss = 0.0
    diagnostics: list[dict[str, torch.Tensor]] = []
    seen: dict[str, torch.Tensor] = {}
    for s in (kept.to(role.model.device) for kept in minibatch):
        hidden = role.hidden(s.batch)
        part, found = loss_part(loop.actors, s, hidden, *size, loop.ctx.recipe.rl)
        part.backward()
        loss += part.item()
        diagnostics.append({name: value.cpu() for name, value in found.items()} | {"advantages": s.advantages.cpu()})
        old_head = getattr(s.target, "old_head", None)
        seen = seen or monitor(hidden, s.old, role.model.head, s.batch.actions, old_head)
    return {"loss": loss} | {name: value.item() for name, value in seen.items()} | pooled(diagnostics)


def evaluate(loop: Loop) -> float | None:
    """pass@1 on held-out items, one sampling pass as in ``eval``; None without a task that grades."""
    recipe = loop.ctx.recipe
    task, chat = loop.rollouts.task, loop.rollouts.chat
    if task is None or not grades(task):
        return None
    prompts = held_out(recipe, task, recipe.rl.eval_items)
    with loop.ctx.clock("eval"):
        rows = sample_scores(
            LocalEngine(loop.actors.policy, chat.end),
            chat,
            task,
            prompts,
            eval_sampling(recipe.eval, task),
            recipe.seed,
        )
    return accuracy(rows)


def resume_phase(loop: Loop) -> Phase | None:
    """The phase that the checkpoint was written inside, if it was."""
    saved = loop.progress.state.pop("phase", None)
    return Phase.from_json(saved) if saved else None


def try_longest(loop: Loop) -> None:
    """Scores and updates on the longest micro-batch there can be, before the first rollout."""
    chat, limit = loop.rollouts.chat, loop.rollouts.sampling.max_new_tokens
    ids = max((chat.prompt(p.messages) for p in loop.rollouts.prompts), key=len)
    longest = Example(ids, [chat.end] * limit)
    rl = loop.ctx.recipe.rl

    def score_and_update(examples: list[Example]) -> None:
        phase = Phase([], limit, [Response(e, True) for e in examples], rewards=torch.zeros(len(examples)))
        group = list(range(len(examples)))
        plain = rl.model_copy(update={"baseline": "none", "scale_rewards": False})
        accumulate(loop, score(loop.actors, phase, [[group]], plain)[0])

    with loop.actors.policy.model.training_mode():
        preflight(loop.ctx, [longest] * rl.minibatch, rl.micro_batch_tokens, score_and_update, loop.optimiser)


def heed(loop: Loop, warnings: list[str], step: int) -> None:
    """Says what the guard saw; stops where the recipe asks for that."""
    guard = loop.ctx.recipe.rl.guard
    for warning in warnings if guard != "off" else []:
        loop.ctx.console.warn(f"step {step}: {warning}")
    if warnings and guard == "stop":
        loop.progress.save(step)
        raise Diverged(f"stopped by rl.guard: stop after step {step}: {warnings[0]}")
