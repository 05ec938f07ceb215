"""Policy optimisation, by LCO or by what it is compared with: roll out, score, update against a fixed target, repeat.

A and z* stand still for all minibatches and epochs of a step: refreshing π_old multiplies the advantage into the policy
once more, and doing so after every batch compounds noise.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from lco_lite import ranks, weights
from lco_lite.context import Context
from lco_lite.data.prompts import held_out
from lco_lite.errors import DataError
from lco_lite.evaluation.evaluate import held_out_accuracy, looked_by
from lco_lite.feedback.advantages import live_groups
from lco_lite.finite import rows_not_finite
from lco_lite.metrics import JsonLog, read_log
from lco_lite.models.chat import ChatFormat
from lco_lite.models.language_model import Role
from lco_lite.objectives.logprobs import kl_divergence
from lco_lite.objectives.policy_gradient import ADVANTAGE_ONLY, ValueHead
from lco_lite.recipe import Rl
from lco_lite.rollout.engine import Engine, Response, engine_for, open_engine
from lco_lite.rollout.lockstep import mixture
from lco_lite.run import StageFolder, verb
from lco_lite.sequences import Example
from lco_lite.train.guard import Guard, ends_in_loop
from lco_lite.train.methods import MicroBatch, Models, Seen, has_gradient, method_of, not_finite, score
from lco_lite.train.rollouts import Phase, Rollouts, order_of_updates, plan_minibatches
from lco_lite.train.samples import looked_at, readable, with_tokens
from lco_lite.train.skipped import BatchRow
from lco_lite.train.training import StageTraining

FEW_REFRESHES = 3  # on the quickstart task the paper's target is still sound after three, and worse after eight


def train_rl(ctx: Context, stage: StageFolder) -> None:
    """Trains the policy's adapter (or its weights). Goes on at the last checkpoint; no response is sampled twice."""
    recipe, rl = ctx.recipe, ctx.recipe.rl
    with ctx.clock("loading"):
        models, parameters = open_models(ctx)
        policy = models.policy
        chat = ChatFormat(policy.model.tokenizer, recipe.chat.template_args, ctx.console.warn)
        engine = rollout_engine(ctx, models, chat.end)
        window = min(role.model.max_length for role in (policy, models.reward_model) if role is not None)
        rollouts = Rollouts(ctx, window, engine, chat, stage)
    updates = rl.steps * rl.inner_epochs * -(-rl.prompts_per_step * rl.responses_per_prompt // rl.minibatch)
    what = f"{rl.steps} steps of {rl.prompts_per_step} prompts, feedback {rl.feedback}"
    ctx.console.stage(stage.name, what + (f", β {rl.beta:g}" if rl.has_beta else ""))
    if note := compounding(rl):
        ctx.console.note(note)
    training = StageTraining(ctx, stage, parameters, rl, rl.steps, updates, weights.unrounded(ctx, policy))
    with training:
        samples, update_log = training.log(stage.samples, JsonLog), training.log(stage.path / "updates.jsonl")
        history = steps_before(stage)
        guard = Guard(policy.model.head.rows, rl.eval_items, rl.compares_groups)
        for before in history:
            guard.check(before)
        longest = [Example(max(rollouts.ids, key=len), [chat.end] * rollouts.sampling.max_new_tokens)] * rl.minibatch
        training.try_longest(longest, partial(try_out, models, rl), rl.unit)
        for step in training.steps():
            engine.sync()  # π_old is the policy as it is now
            phase = rollouts.phase(step, training.stop_if_asked)  # on disk, batch by batch
            rows = readable(phase, rollouts, rl)
            ctx.console.sample(*(rows[-1][name] for name in ("prompt", "response", "right", "reward")))
            with ctx.clock("score"), ctx.console.progress(0, "score") as line:
                plan = plan_minibatches(phase.examples, rl, recipe.seed, step)
                lengths = [[len(phase.examples[i]) for places in minibatch for i in places] for minibatch in plan]
                in_plan = partial(score_in_plan, models, phase, rl, recipe.seed, step, line.update)
                # A and z* stand still until the next step
                minibatches = training.within_memory(in_plan, lengths, group=rl.unit)
                live, unfit = told_apart(minibatches, rl)
            report, order = Report(phase, rl), list(order_of_updates(len(minibatches), rl, recipe.seed, step))
            report.skipped = sum(not live[which] for which in order)  # AdamW would move by its momentum alone
            order = [which for which in order if live[which]]
            training.expect(len(order))
            last: tuple[list[MicroBatch], list[list[int]]] | None = None  # of the updates that were made
            updating = ctx.console.progress(len(order), "update")
            with ctx.clock("update"), updating as line, policy.model.training_mode():
                for which in order:
                    training.stop_if_asked()
                    minibatch, lengths = minibatches[which], [micro.batch.lengths for micro in minibatches[which]]
                    numbers, wrong = {name: math.nan for names in unfit[which].values() for name in names}, unfit[which]
                    if not wrong:
                        training.within_memory(accumulate, lengths, models, rl, report, minibatch, group=rl.unit)
                        numbers, wrong = report.numbers()
                    places = [i for micro in plan[which] for i in micro]
                    made = training.update(numbers, partial(batch_rows, phase, rollouts, rl, places, wrong))
                    if made is not None:
                        update_log.write({"step": step + 1, **report.update(made)})
                        line.update(len(report.updates))
                        training.line.update(step, metrics=report.updates[-1])
                        last = minibatch, lengths
            if last is not None:
                minibatch, lengths = last
                with ctx.clock("score"):
                    ctx.console.phase("KL to old")
                    kl = training.within_memory(kl_to_old, lengths, models, rl, minibatch, group=rl.unit)
                    report.kl_to_old = ranks.total(kl)
            if rl.samples:
                with ctx.clock("samples"):
                    lengths = [micro.batch.lengths for minibatch in minibatches for micro in minibatch]
                    looks = training.within_memory(looked_at, lengths, models, rl, minibatches)
                    with_tokens(rows, looks, rollouts.chat)
            if rl.eval_every and (step + 1) % rl.eval_every == 0:
                report.eval = evaluate(ctx, models, rollouts)
                keep_best(ctx, stage, policy, training, step + 1, report.eval)
            metrics = report.metrics(ctx.clock.seconds, history[-1]["samples_seen"] if history else 0)
            history.append(metrics)
            for row in rows:
                samples.write({"step": step + 1, **row})
            training.keep(step, metrics, guard.check(metrics) if rl.guard != "off" else ())
            rollouts.forget(training.oldest_checkpoint())
        training.end()
    weights.save(policy, stage, training.masters)
    rollouts.forget(rl.steps)
    stage.finish({"steps": rl.steps, "objective": rl.objective})
    if (best := stage.better_step()) is not None:
        told = f"the best held-out score, {best['score']:.3f}, is that of step {best['step']}, not of the last"
        ctx.console.note(f"{stage.name}: {told}: `lco-lite eval --policy {stage.name}@best`")


def steps_before(stage: StageFolder) -> list[dict[str, Any]]:
    """The metrics of the steps that are done. DataError where the last does not say how many samples were drawn."""
    history = read_log(stage.metrics)
    if history and history[-1].get("samples_seen") is None:
        remedy = f"Put it back, or start the stage again with `{verb(stage.name)} --fresh`"
        raise DataError(f"{stage.metrics}, line {len(history)}: damaged: samples_seen is missing. {remedy}")
    return history


def compounding(rl: Rl) -> str | None:
    """What to know of a target that is refreshed more often than ``FEW_REFRESHES`` with nothing that holds it."""
    if not (rl.is_lco and rl.is_dense and rl.anchor == 0 and rl.steps > FEW_REFRESHES):
        return None
    return (
        f"π_old is refreshed in each of {rl.steps} steps, and each multiplies the advantage in once more: the target "
        "compounds. rl.anchor: 0.5 holds it (docs/methods.md, The anchor)"
    )


def open_models(ctx: Context) -> tuple[Models, list[tuple[str, torch.nn.Parameter]]]:
    """Who takes part, and what is trained: the policy, and PPO's critic."""
    start = weights.open_start(ctx)
    policy = weights.open_policy(ctx, start)
    reward_model, reference = weights.open_feedback_models(ctx, start)
    parameters = weights.trainable(ctx, policy, "rl")
    if ctx.recipe.rl.objective != "ppo":
        return Models(policy, start, reward_model, reference), parameters
    critic = ValueHead(policy.model.head.weight.shape[1]).to(ctx.device)
    parameters += [(f"critic.{name}", p) for name, p in critic.named_parameters()]
    return Models(policy, start, reward_model, reference, critic), parameters


def rollout_engine(ctx: Context, models: Models, end: int) -> Engine:
    """The policy alone, or in step with its teacher (MiniLLM); over the tokens that whoever scores them has too."""
    policy, teacher, rl = models.policy, models.reward_model, ctx.recipe.rl
    if rl.teacher_mix:
        assert teacher is not None, "distillation has a teacher"
        return open_engine([policy, teacher], end, mixture(rl.teacher_mix), say=ctx.console.note)
    rows = None if teacher is None else teacher.model.head.rows
    if rl.mismatch != "none" and engine_for(ctx.recipe.rollout.engine, policy.model.device) == "hf":
        ctx.console.note(f"rl.mismatch {rl.mismatch}: hf samples in the trainer's own numerics, and every weight is 1")
    return open_engine([policy], end, rows=rows, settings=ctx.recipe.rollout, say=ctx.console.note)


def score_in_plan(
    models: Models,
    phase: Phase,
    rl: Rl,
    seed: int,
    step: int,
    tell: Callable[[int, int], None],
    micro_batch_tokens: int,
) -> list[list[MicroBatch]]:
    return score(models, phase, plan_minibatches(phase.examples, rl, seed, step, micro_batch_tokens), rl, tell)


def told_apart(minibatches: Sequence[Sequence[MicroBatch]], rl: Rl) -> tuple[list[bool], list[dict[int, list[str]]]]:
    """Of each minibatch whether an update is to be made of it, and response -> what of it is not finite; the same for
    all ranks. One that is not finite is live too: the update is what refuses and names it."""
    unfit = [
        {response: names for own in of_ranks for response, names in own.items()}
        for of_ranks in zip(*ranks.gather([not_finite(m) for m in minibatches]), strict=True)
    ]
    moves = [any(of_ranks) for of_ranks in zip(*ranks.gather([has_gradient(m, rl) for m in minibatches]), strict=True)]
    return [has or bool(wrong) for has, wrong in zip(moves, unfit, strict=True)], unfit


def on_device(models: Models, rl: Rl, minibatch: list[MicroBatch], micro_batch_tokens: int) -> Iterator[MicroBatch]:
    """One after the other, in parts where they were scored with more tokens than now fit."""
    for micro in (part for whole in minibatch for part in whole.within(micro_batch_tokens, rl.unit)):
        yield micro.to(models.policy.model.device)


def accumulate(
    models: Models, rl: Rl, report: Report | None, minibatch: list[MicroBatch], micro_batch_tokens: int
) -> None:
    """Adds the gradient of the minibatch's loss; tells ``report`` its numbers."""
    if report is not None:
        report.begin()
    for micro in on_device(models, rl, minibatch, micro_batch_tokens):
        hidden = models.policy.hidden(micro.batch)  # [T, d]
        loss, seen = method_of(rl).loss(models, micro, hidden, rl)
        loss.backward()
        if report is not None:
            report.add(micro, loss, seen | {"hidden": hidden.detach().sum(-1)})


@torch.no_grad()
def kl_to_old(models: Models, rl: Rl, minibatch: list[MicroBatch], micro_batch_tokens: int) -> float:
    """KL(π_θ ‖ π_old) a token of this minibatch, nats; of several ranks each has its share of the sum."""
    policy, total = models.policy, 0.0
    for micro in on_device(models, rl, minibatch, micro_batch_tokens):
        hidden = policy.hidden(micro.batch)
        total += kl_divergence(hidden, micro.old, policy.model.head, micro.old_head).sum().item()
    return total / minibatch[0].tokens if minibatch else 0.0


def evaluate(ctx: Context, models: Models, rollouts: Rollouts) -> float | None:
    """pass@1 on held-out items, one sampling pass as in ``eval``; None without a task that grades."""
    recipe, task, chat = ctx.recipe, rollouts.task, rollouts.chat
    if task is None or not task.graded:
        return None
    with ctx.clock("eval"):
        policy = models.policy
        engine = open_engine([policy], chat.end, settings=recipe.rollout, say=ctx.console.note)
        window = policy.model.max_length
        return held_out_accuracy(ctx, engine, window, chat, task, held_out(recipe, task, recipe.rl.eval_items))


def keep_best(
    ctx: Context, stage: StageFolder, policy: Role, training: StageTraining, step: int, score: float | None
) -> None:
    """``best/`` becomes the policy after ``step`` where no step has scored as high, in the same way on as many held-out
    items. Steps that are made again after a kill score the same, and the earliest stays."""
    rl, best = ctx.recipe.rl, stage.best_step()
    if not rl.keep_best or score is None:
        return
    now = {"step": step, "score": score, "items": rl.eval_items, "scored_by": looked_by(ctx.recipe.eval)}
    alike = best is not None and best["items"] == now["items"] and best["scored_by"] in ({}, now["scored_by"])
    if best is None or not alike or score > best["score"]:
        weights.save_best(policy, stage, training.masters, now)


class Report:
    """The numbers of one step, gathered micro-batch by micro-batch and update by update. All response tokens count."""

    def __init__(self, phase: Phase, rl: Rl) -> None:
        self.phase, self.rl = phase, rl
        self.updates: list[dict[str, float]] = []
        self.skipped = 0
        self.kl_to_old: float | None = None
        self.eval: float | None = None
        self.begin()

    def begin(self) -> None:
        """An update, or the same again."""
        self._loss, self._tokens = 0.0, list[dict[str, Tensor]]()

    def add(self, micro: MicroBatch, loss: Tensor, seen: Seen) -> None:
        self._loss += loss.item()
        if (log_w := micro.per_token.get("log_w")) is not None:
            told = log_w[~log_w.isnan()]
            seen = seen | {"mismatch": told.abs(), "mismatch_kl": told.exp() - 1 - told}
        of_batch = {"A": micro.advantages.cpu(), "of": micro.responses.cpu()}
        self._tokens.append({name: value.cpu() for name, value in seen.items()} | of_batch)

    def numbers(self) -> tuple[dict[str, float], dict[int, list[str]]]:
        """(what must be finite of the update that ``add`` has seen all of, other ranks' too, by its name in words; of
        responses whose own numbers are not, their names)."""
        self._tokens, self._loss = sum(ranks.gather(self._tokens), []), ranks.total(self._loss)
        wrong = dict[int, list[str]]()
        for tokens in self._tokens:
            if (rows := rows_not_finite(tokens["hidden"])) is not None:
                wrong |= dict.fromkeys(tokens["of"][rows].tolist(), ["hidden states"])
        return {"loss": self._loss, **({"hidden states": math.nan} if wrong else {})}, wrong

    def update(self, step_of_optimiser: dict[str, float]) -> dict[str, float]:
        """The update that ``numbers`` has told of: means over its tokens."""
        parts, loss = self._tokens, self._loss
        names = dict.fromkeys(name for tokens in parts for name in tokens if name not in ("of", "hidden"))
        seen = {name: torch.cat([tokens[name] for tokens in parts if name in tokens]) for name in names}
        advantages, norm = seen.pop("A"), seen.pop("logit_grad_norm", None)
        seen.pop("loss", None)  # that of the whole minibatch is told
        if "logprob" in seen:
            seen["sampled_prob"] = seen.pop("logprob").exp()
        if norm is not None:
            if "logit_grad_sampled" in seen:
                seen["logit_grad_others"] = (norm.square() - seen["logit_grad_sampled"].square()).clamp_min(0).sqrt()
            by_sign = {"pos": norm[advantages > 0], "neg": norm[advantages < 0]}
            seen |= {f"logit_grad_norm_{sign}": part for sign, part in by_sign.items() if len(part)}
        means = {name: value.mean().item() for name, value in seen.items() if len(value)}
        self.updates.append({"update": len(self.updates) + 1, "loss": loss} | means | step_of_optimiser)
        return self.updates[-1]

    def metrics(self, seconds: dict[str, float], samples_before: int) -> dict[str, Any]:
        """Of the whole step: means over the updates, what the rollouts were like, and what it took."""
        phase, group, scores = self.phase, self.rl.responses_per_prompt, self.phase.scores(self.rl)
        names = dict.fromkeys(name for update in self.updates for name in update)
        metrics: dict[str, Any] = {n: fmean(u[n] for u in self.updates if n in u) for n in names if n != "update"}
        if self.updates:
            metrics |= {"lr": self.updates[-1]["lr"], "kl_to_old": self.kl_to_old}
        if self.rl.objective in ADVANTAGE_ONLY:
            metrics["skipped_updates"] = self.skipped
        metrics["response_tokens"] = sum(len(example.response) for example in phase.examples)
        own = ~torch.tensor(phase.shown)
        if own.any():
            sampled = [response for response, shown in zip(phase.responses, phase.shown, strict=True) if not shown]
            metrics["mean_response_tokens"] = fmean(len(response.example.response) for response in sampled)
            metrics["truncated"] = fmean(response.truncated for response in sampled)
            texts = [r.example.response if r.truncated else r.example.response[:-1] for r in sampled]  # without an end
            metrics["repeated"] = fmean(map(ends_in_loop, texts))
            if scores is not None:
                metrics["reward"] = mean_reward(phase, self.rl, own, scores)
                if group > 1:
                    metrics["dead_groups"] = 1 - live_groups(scores, group).float().mean().item()
            if phase.rewards and self.rl.tells_rewards:
                metrics["rewards"] = {n: phase.given(n)[own].nanmean().item() for n in phase.rewards}
            if phase.grades is not None:
                metrics["accuracy"] = (torch.tensor(phase.grades)[own] > 0).float().mean().item()
        if self.eval is not None:
            metrics["eval"] = self.eval
        spent = sum(seconds.get(phase_name, 0.0) for phase_name in ("rollout", "score", "update"))
        metrics["tokens_per_second"] = metrics["response_tokens"] / spent
        return metrics | {"samples_seen": samples_before + phase.drawn}


def batch_rows(
    phase: Phase, rollouts: Rollouts, rl: Rl, places: list[int], wrong: dict[int, list[str]]
) -> list[BatchRow]:
    """What a reader finds the responses of a batch by: number in the phase, from 1, and texts; those of ``wrong`` with
    what is not finite of them."""

    def row(i: int) -> BatchRow:
        prompt = rollouts.prompts[phase.chosen[i // rl.responses_per_prompt]]
        texts = {"prompt": prompt.messages[-1]["content"], "response": rollouts.chat.text(phase.examples[i].response)}
        named = {"response_number": i + 1} | ({} if prompt.item is None else {"item": prompt.item.id}) | texts
        return named | ({"not_finite": wrong[i]} if i in wrong else {})

    return [row(i) for i in places]


def mean_reward(phase: Phase, rl: Rl, own: Tensor, scores: Tensor) -> float:
    """Over the policy's own responses; of rewards that do not apply everywhere each over those that it applies to."""
    if not any(None in values for values in phase.rewards.values()):
        return scores[own].mean().item()
    given = {name: phase.given(name)[own] for name in phase.rewards}
    known = {n: values.nanmean().item() for n, values in given.items() if not values.isnan().all()}
    weights = {name: rl.reward_parts[name].weight for name in known}
    return sum(weights[n] * known[n] for n in known) / sum(weights.values()) if known else math.nan


def try_out(models: Models, rl: Rl, examples: list[Example], micro_batch_tokens: int) -> None:
    """Scores these, and adds the gradient of an update on them."""
    n = len(examples)
    rewards: dict[str, list[float | None]] = {name: [0.0] * n for name in rl.reward_parts}
    phase = Phase([], 1, [Response(e, True) for e in examples], None, rewards, [False] * n, n)
    plain = rl.model_copy(update={"baseline": "none", "scale_rewards": False, "overlong_buffer": 0.0})
    (minibatch,) = score(models, phase, [[list(range(len(examples)))]], plain)
    with models.policy.model.training_mode():
        accumulate(models, plain, None, minibatch, micro_batch_tokens)
