"""Policy optimisation, by LCO or by what it is compared with: roll out, score, update against a fixed target, repeat.

for each step (one rollout phase):
    responses ~ π_old                                   rollout: temperature, top-p       (rollouts.py)
    z* = z_old + A/β, kept as hidden states             score: h_old and h_dpo - h_ref    (score.py)
    for each inner epoch, for each minibatch:
        minimise LCO(z*, z_θ) over response tokens      update                            (losses.py)

lco-lite rl --objective lch --beta 1.0
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from lco_lite import weights
from lco_lite.console import Progress as Line
from lco_lite.context import Context, InterruptGuard
from lco_lite.data.prompts import Prompt, held_out, recipe_task, rl_prompts
from lco_lite.errors import Diverged
from lco_lite.evaluation.evaluate import accuracy, eval_sampling, sample_scores
from lco_lite.feedback.advantages import live_groups
from lco_lite.feedback.rewards import open_rater
from lco_lite.metrics import JsonLog, MetricsLog, peak_mib, read_log
from lco_lite.models.chat import ChatFormat
from lco_lite.objectives.monitor import monitor
from lco_lite.objectives.policy_gradient import ValueHead
from lco_lite.rollout.engine import Response, Sampling, open_engine
from lco_lite.run import StageFolder
from lco_lite.sequences import Example
from lco_lite.train.guard import Guard
from lco_lite.train.methods import Scored, loss_part, score
from lco_lite.train.rollouts import Actors, Phase, Rollouts, engine_of, order_of_updates, plan_minibatches
from lco_lite.train.training import Optimiser, Progress, fitting, prefixed, preflight


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
    weights.save(loop.actors.policy, stage)
    stage.finish({"steps": rl.steps, "objective": rl.objective})


def open_loop(ctx: Context, stage: StageFolder, interrupt: InterruptGuard) -> Loop:
    """Models, prompts and optimiser; the optimiser and the weights as the last checkpoint left them."""
    recipe, rl = ctx.recipe, ctx.recipe.rl
    task = recipe_task(recipe)
    with ctx.clock("loading"):
        start = weights.open_start(ctx)
        policy = weights.open_policy(ctx, start)
        critic = ValueHead(policy.model.head.weight.shape[1]).to(ctx.device) if rl.objective == "ppo" else None
        actors = Actors(policy, start, *weights.open_judges(ctx, start), critic)
    model = policy.model
    chat = ChatFormat(model.tokenizer, recipe.chat.template_args)
    longest = rl.max_new_tokens or (task.max_new_tokens if task else rl.max_length // 2)

    def room(prompt: Prompt) -> int:
        shown = prompt.item.demonstration if prompt.item and rl.on_policy < 1 else None
        return len(chat.prompt(prompt.messages)) + max(longest, len(chat.response(shown)) if shown else 0)

    prompts = fitting(ctx, rl_prompts(recipe, task), model, rl.max_length, "prompts", room)
    sampling = Sampling(rl.temperature, rl.top_p, longest, rl.rollout_batch)
    engine = engine_of(actors, rl.teacher_mix, chat.end)
    rollouts = Rollouts(ctx, engine, chat, task, prompts, sampling, open_rater(rl, ctx.device))
    minibatches = -(-rl.prompts_per_step * rl.responses_per_prompt // rl.minibatch)
    trained = weights.trainable(ctx, policy, "rl") + ([] if critic is None else prefixed("critic", critic))
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
    if task is None or not task.graded:
        return None
    prompts = held_out(recipe, task, recipe.rl.eval_items)
    with loop.ctx.clock("eval"):
        rows = sample_scores(
            open_engine([loop.actors.policy], chat.end),
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


SAMPLES_A_STEP = 8  # responses kept in samples.jsonl for people to read


def pooled(diagnostics: Sequence[dict[str, Tensor]]) -> dict[str, float]:
    """Means over a minibatch's tokens; the norm of the logit gradient apart for tokens whose sampled advantage is
    positive and for the others."""
    found = {name: torch.cat([d[name] for d in diagnostics]) for name in diagnostics[0]}
    advantages, norms = found.pop("advantages"), found.pop("logit_grad_norm", None)
    means = {name: value.mean().item() for name, value in found.items()}
    if norms is not None:
        by_sign = {"pos": norms[advantages > 0], "neg": norms[advantages <= 0]}
        means |= {f"logit_grad_norm_{sign}": part.mean().item() for sign, part in by_sign.items() if len(part)}
    return means


def describe(phase: Phase, group: int) -> dict[str, Any]:
    """What the rollouts were like; ``group`` responses to each prompt."""
    metrics: dict[str, Any] = {"response_tokens": sum(len(r.example.response) for r in phase.responses)}
    own = ~torch.tensor(phase.shown)
    if own.any():
        sampled = [r for r, shown in zip(phase.responses, phase.shown, strict=True) if not shown]
        metrics["mean_response_tokens"] = fmean(len(r.example.response) for r in sampled)
        metrics["truncated"] = fmean(r.truncated for r in sampled)
    rewards = phase.grades if phase.rewards is None else phase.rewards
    if rewards is not None and own.any():
        metrics["reward"] = rewards[own].mean().item()
        if group > 1:
            metrics["dead_groups"] = 1 - live_groups(rewards, group).float().mean().item()
    if phase.grades is not None and own.any():
        metrics["accuracy"] = (phase.grades[own] > 0).float().mean().item()
    return metrics


def with_cost(metrics: dict[str, Any], seconds: dict[str, float], samples: int) -> dict[str, Any]:
    """``metrics`` and what it cost: ``seconds`` of the step by phase, ``samples`` drawn since the first step."""
    spent = sum(seconds.get(phase, 0.0) for phase in ("rollout", "score", "update"))
    return metrics | {
        "samples_seen": samples,
        "tokens_per_second": metrics["response_tokens"] / spent,
        "seconds": {name: seconds[name] for name in ("rollout", "score", "update", "eval") if name in seconds},
        "peak_mib": peak_mib(),
    }


def readable(phase: Phase, prompts: Sequence[Prompt], chat: ChatFormat, group: int, step: int) -> list[dict[str, Any]]:
    """The first responses of a step, as rows for samples.jsonl."""
    rewards = phase.grades if phase.rewards is None else phase.rewards
    return [
        {
            "step": step,
            "prompt": prompts[phase.chosen[i // group]].messages[-1]["content"],
            "response": chat.text(r.example.response),
            "truncated": r.truncated,
            "reward": None if rewards is None else rewards[i].item(),
        }
        for i, r in enumerate(phase.responses[:SAMPLES_A_STEP])
    ]
