"""Policy optimisation, by LCO or by what it is compared with: roll out, score, update against a fixed target, repeat.

for each step (one rollout phase):
    responses ~ π_old                                   rollout: temperature, top-p
    z* = z_old + A/β, kept as hidden states             score: h_old and h_dpo - h_ref
    for each inner epoch, for each minibatch:
        minimise LCO(z*, z_θ) over response tokens      update

lco-lite rl --objective lch --beta 1.0
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import torch

from lco_lite.data.chat import ChatFormat
from lco_lite.data.prepare import Prompt, held_out, recipe_task, rl_prompts
from lco_lite.errors import Diverged
from lco_lite.feedback.rule import rule_rewards
from lco_lite.objectives.lco import lco_loss
from lco_lite.objectives.logprobs import token_logprobs
from lco_lite.objectives.monitor import monitor
from lco_lite.objectives.policy_gradient import POLICY_GRADIENTS, Clip, PolicyBatch
from lco_lite.objectives.value import ValueHead, value_loss
from lco_lite.rollout.engine import Response, Sampling
from lco_lite.rollout.local import LocalEngine
from lco_lite.run import StageFolder
from lco_lite.seeding import derive, seeded
from lco_lite.sequences import Example, endless
from lco_lite.stages import cast
from lco_lite.stages.context import Context
from lco_lite.stages.evaluate import accuracy, eval_sampling, sample_scores
from lco_lite.stages.phase import Actors, Phase, first_prompts, joined, order_of_updates, plan_minibatches, with_signal
from lco_lite.stages.phase_report import describe, pooled, readable, with_cost
from lco_lite.stages.score import Scored, score
from lco_lite.stages.training import Optimiser, Progress, prefixed
from lco_lite.stages.window import fitting, preflight
from lco_lite.tasks.base import Task
from lco_lite.telemetry.console import Progress as Line
from lco_lite.telemetry.guard import Guard
from lco_lite.telemetry.interrupt import InterruptGuard
from lco_lite.telemetry.metrics import JsonLog, MetricsLog, read_log

DYNAMIC_ROUNDS = 3  # how often a step samples again for groups without signal; the rest of the phase is smaller

Found = tuple[torch.Tensor, dict[str, torch.Tensor]]  # a loss, and diagnostics per token


@dataclass
class Loop:
    """What the steps share."""

    ctx: Context
    stage: StageFolder
    actors: Actors
    chat: ChatFormat
    task: Task | None
    prompts: Sequence[Prompt]
    sampling: Sampling
    optimiser: Optimiser
    progress: Progress


def train_rl(ctx: Context, stage: StageFolder) -> None:
    """Trains the policy's adapter (or its weights). Goes on at the last checkpoint, inside a phase too."""
    rl = ctx.recipe.rl
    with InterruptGuard() as interrupt:
        loop = open_loop(ctx, stage, interrupt)
        done, ui, group = loop.progress.done, ctx.console, rl.responses_per_prompt
        ui.stage(
            stage.name, f"{rl.steps} steps of {rl.prompts_per_step} prompts, feedback {rl.feedback}, β {rl.beta:g}"
        )
        try_longest(loop)
        guard = Guard(loop.actors.policy.model.head.rows)
        for before in read_log(stage.metrics)[:done]:
            guard.check(before)
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
                log.write(with_cost(metrics, ctx.clock.lap(), group * rl.prompts_per_step))
                for row in readable(phase, loop.prompts, loop.chat, group, step + 1):
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
    sampling = Sampling(rl.temperature, rl.top_p, longest, rl.rollout_batch)
    prompts = fitting(
        ctx, rl_prompts(recipe, task), model, rl.max_length, "prompts", lambda p: len(chat.prompt(p.messages)) + longest
    )
    minibatches = -(-rl.prompts_per_step * rl.responses_per_prompt // rl.minibatch)
    trained = cast.trainable(ctx, policy, "rl") + ([] if critic is None else prefixed("critic", critic))
    optimiser = Optimiser(trained, rl, rl.steps * rl.inner_epochs * minibatches)
    progress = Progress(stage, optimiser, interrupt, ctx.device)
    return Loop(ctx, stage, actors, chat, task, prompts, sampling, optimiser, progress)


def roll_out(loop: Loop, step: int) -> Phase:
    """Samples the step's responses from the policy as it is now, and grades them where a task can. With dynamic
    sampling groups without signal make room for those of other prompts."""
    rl = loop.ctx.recipe.rl
    phase = sample_phase(loop, step, 0)
    for again in range(1, DYNAMIC_ROUNDS + 1) if rl.dynamic_sampling else ():
        phase = with_signal(phase, rl.responses_per_prompt)
        if len(phase.chosen) >= rl.prompts_per_step:
            break
        phase = joined(phase, sample_phase(loop, step, again))
    return first_prompts(phase, rl.prompts_per_step, rl.responses_per_prompt)


def sample_phase(loop: Loop, step: int, again: int) -> Phase:
    """Responses to the step's prompts; ``again`` counts how often the step has sampled before."""
    recipe, rl = loop.ctx.recipe, loop.ctx.recipe.rl
    n = rl.prompts_per_step
    chosen = endless(len(loop.prompts), derive(recipe.seed, "prompts", again) if again else recipe.seed, step * n, n)

    def between_batches(done: int) -> None:
        line.update(done)
        if loop.progress.interrupt.requested:
            loop.progress.save(step)
            loop.progress.stop(step)

    ids = [loop.chat.prompt(loop.prompts[i].messages) for i in chosen for _ in range(rl.responses_per_prompt)]
    engine = LocalEngine(loop.actors.policy, loop.chat.end)
    with (
        loop.ctx.clock("rollout"),
        loop.ctx.console.progress(len(ids), "rollout") as line,
        seeded(recipe.seed, "rollout", step, *([again] if again else [])),
    ):
        responses = engine.generate(ids, loop.sampling, between_batches)
    return Phase(chosen, loop.sampling.max_new_tokens, responses, grade(loop, chosen, responses))


def grade(loop: Loop, chosen: Sequence[int], responses: Sequence[Response]) -> torch.Tensor | None:
    """[N] of +1 right and -1 wrong; None where prompts are not a task's items."""
    task, each = loop.task, loop.ctx.recipe.rl.responses_per_prompt
    items = [item for i in chosen if (item := loop.prompts[i].item) is not None for _ in range(each)]
    if task is None or len(items) < len(responses):
        return None
    texts = [loop.chat.text(r.example.response) for r in responses]
    return rule_rewards([task.grade(text, item).right for text, item in zip(texts, items, strict=True)])


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
        part, found = (lco if loop.ctx.recipe.rl.is_lco else policy_gradient)(loop, s, hidden, *size)
        part.backward()
        loss += part.item()
        diagnostics.append({name: value.cpu() for name, value in found.items()} | {"advantages": s.advantages.cpu()})
        old_head = None if s.target is None else s.target.old_head
        seen = seen or monitor(hidden, s.old, role.model.head, s.batch.actions, old_head)
    return {"loss": loss} | {name: value.item() for name, value in seen.items()} | pooled(diagnostics)


def lco(loop: Loop, s: Scored, hidden: torch.Tensor, tokens: int, sequences: int) -> Found:
    """This micro-batch's part of the mean over the minibatch's tokens (eqs 8 to 10)."""
    rl, head = loop.ctx.recipe.rl, loop.actors.policy.model.head
    assert s.target is not None
    loss, found = lco_loss(rl.objective, hidden, head, s.target, rl.weighting, standardise=rl.standardise)
    return loss * (len(s.advantages) / tokens), {"logit_grad_norm": found["logit_grad_norm"]}


def policy_gradient(loop: Loop, s: Scored, hidden: torch.Tensor, tokens: int, sequences: int) -> Found:
    """This micro-batch's part of the minibatch's loss, and of the critic's."""
    rl, head = loop.ctx.recipe.rl, loop.actors.policy.model.head
    assert s.old_logprobs is not None
    logprobs, _ = token_logprobs(hidden, head, s.batch.actions)
    batch = PolicyBatch(logprobs, s.old_logprobs, s.advantages, s.batch.rows, tokens, sequences)
    loss, found = POLICY_GRADIENTS[rl.objective](batch, Clip(rl.clip_low, rl.clip_high))
    if loop.actors.critic is not None:
        assert s.values is not None and s.returns is not None
        values = loop.actors.critic(hidden)
        loss = loss + rl.value_coef * value_loss(values, s.values, s.returns, rl.value_clip, tokens)
    return loss, found


def evaluate(loop: Loop) -> float | None:
    """pass@1 on held-out items, one sampling pass as in ``eval``; None without a task."""
    recipe = loop.ctx.recipe
    if loop.task is None:
        return None
    prompts = held_out(recipe, loop.task, recipe.rl.eval_items)
    with loop.ctx.clock("eval"):
        rows = sample_scores(
            LocalEngine(loop.actors.policy, loop.chat.end),
            loop.chat,
            loop.task,
            prompts,
            eval_sampling(recipe.eval, loop.task),
            recipe.seed,
        )
    return accuracy(rows)


def resume_phase(loop: Loop) -> Phase | None:
    """The phase that the checkpoint was written inside, if it was."""
    saved = loop.progress.state.pop("phase", None)
    return Phase.from_json(saved) if saved else None


def try_longest(loop: Loop) -> None:
    """Scores and updates on the longest micro-batch there can be, before the first rollout."""
    ids = max((loop.chat.prompt(p.messages) for p in loop.prompts), key=len)
    longest = Example(ids, [loop.chat.end] * loop.sampling.max_new_tokens)
    rl = loop.ctx.recipe.rl

    def score_and_update(examples: list[Example]) -> None:
        phase = Phase([], len(longest), [Response(e, True) for e in examples], torch.zeros(len(examples)))
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
