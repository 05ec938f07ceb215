"""What every training loop stands in: AdamW, checkpoints, logs, the screen, Ctrl-C. The loop is each stage's own."""

from __future__ import annotations

import contextlib
import importlib.util
import math
import weakref
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn import Parameter

from lco_lite import ranks
from lco_lite.checkpoint import capture_rng, load_latest, restore_rng, save_checkpoint
from lco_lite.context import Context, InterruptGuard
from lco_lite.errors import DataError, Diverged, Interrupted, UsageError, WeightsLost
from lco_lite.finite import witness
from lco_lite.metrics import JsonLog, MetricsLog, peak_mib, read_log
from lco_lite.recipe.sections import Training
from lco_lite.run import StageFolder, section, verb
from lco_lite.sequences import halved, seeded
from lco_lite.trackers import Trackers
from lco_lite.train.guard import Warned
from lco_lite.train.skipped import BatchRow, Skipped

Sized = TypeVar("Sized", bound=Any)
Made = TypeVar("Made")
SMALLEST_PAGED = 100_000  # numbers of a weight whose moments bitsandbytes pages out; smaller ones stay on the device
SMALLEST_8BIT = 4096  # numbers of a weight whose moments are in 8 bits; bitsandbytes' default
LARGEST_NORM = 1e18  # of a gradient: AdamW keeps squares, and those of larger numbers are none in fp32


class StageTraining:
    """Trains ``parameters``, by name, for ``steps`` steps, ``updates`` in all; goes on at the last checkpoint, after
    ``done`` of them. Open it last before the loop: it puts the random states back.

    A weight of 16 bits has a master in fp32, which gathers its gradients, is what AdamW works on and what a checkpoint
    holds; the weight is its master, rounded. A step of 1e-6 is lost on a weight of 0.01 in bfloat16. Masters start as
    in ``unrounded``, else as the weights. Parameters named ``critic.…`` are clipped and logged apart.
    """

    def __init__(
        self,
        ctx: Context,
        stage: StageFolder,
        parameters: Sequence[tuple[str, Parameter]],
        settings: Training,
        steps: int,
        updates: int,
        unrounded: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.ctx, self.stage, self.settings = ctx, stage, settings
        self.section = section(stage.name)
        self.room = ctx.room(f"{self.section}.micro_batch_tokens", settings.micro_batch_tokens)
        self.steps_planned, self.updates_planned = steps, updates
        self.updates_a_step = updates // steps
        self.parameters = dict(parameters)
        self.masters = {
            name: p if p.element_size() > 2 else master_of(p, (unrounded or {}).get(name, p))
            for name, p in self.parameters.items()
        }
        self.adamw = open_optimizer(list(self.masters.values()), settings)
        self.done = self.updates = 0
        self.saved: int | None = None  # step of the newest checkpoint
        self.inside_step = False  # some of the next step's updates are made
        self.told_how = False  # to change settings after a warning
        self.owner = stage.owner()
        held = {f"weights.{name}": master for name, master in self.masters.items()}
        checkpoint = load_latest(stage.checkpoints, self.adamw, ctx.device, self.owner, held)
        if checkpoint is not None:
            page_out(self.adamw)
            if "phase" in checkpoint.state:
                raise UsageError(
                    f"{checkpoint.path}: version 0.1 stopped here inside a step, and this version goes on between "
                    "steps only: finish the stage with version 0.1, or start it again with --fresh"
                )
            if checkpoint.step > steps:
                raise UsageError(
                    f"{checkpoint.path}: {checkpoint.step} steps are done, and {steps} are asked for: ask for as many, "
                    f"or start this stage again with `{verb(stage.name)} --fresh`"
                )
            self.done = self.saved = checkpoint.step
            self.updates = checkpoint.state.get("updates", checkpoint.step * updates // steps)
        self.updates_kept = self.updates  # of the steps that are done
        if checkpoint is not None:
            with torch.no_grad():
                for name, master in self.masters.items():
                    master.copy_(checkpoint.tensors[f"weights.{name}"])
            self.round()
        ctx.begins()
        self.owner = stage.owner()  # that of a stage that starts
        self.skipped, self.left_out = Skipped(stage.path / "skipped.jsonl", settings.skip_batches), 0

    def __enter__(self) -> StageTraining:
        self._open = contextlib.ExitStack()
        self.stage.plan(self.steps_planned)
        self.trackers, random_states = Trackers(), capture_rng()
        self.trackers.start(self.ctx.recipe, self.ctx.run, self.stage, self.done, self.ctx.console.warn)
        restore_rng(*random_states)  # a tracker may draw a name
        self._open.callback(self.trackers.finish)
        self.interrupt = self._open.enter_context(InterruptGuard(self.ctx.console))
        self.metrics = self.log(self.stage.metrics)
        label = "train-rm" if self.stage.name == "rm" else self.stage.name
        rl, every = self.ctx.recipe.rl, dict[str, int]()
        if self.stage.name.startswith("rl"):
            scored = rl.eval_every if self.ctx.recipe.task else 0
            every = {"rollout": 1, "score": 1, "update": 1, "eval": scored}
        line = self.ctx.console.progress(self.steps_planned, label, self.done, every)
        self.line = self._open.enter_context(line)
        self.line.recall(read_log(self.stage.metrics))
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    def log(self, path: Path, kind: type[JsonLog] = MetricsLog) -> JsonLog:
        """A log of the stage, cut back to the checkpoint that it goes on from."""
        return kind(path, self.done)

    def oldest_checkpoint(self) -> int:
        """The step of the oldest checkpoint that is kept: a damaged one makes the stage go back to it. 0: none."""
        return min(self.stage.kept_steps(), default=0)

    def within_memory(
        self, work: Callable[..., Made], minibatches: Sequence[Sequence[int]], *given: Any, group: int = 1
    ) -> Made:
        """``work(*given, micro_batch_tokens)`` on minibatches of sequences of these lengths, in units of ``group``.

        Where memory runs out it is done again in micro-batches of half the size: the gradients that it has added by
        then are dropped. The gradient of a minibatch is a mean over its tokens, however they are split. Raises what
        ``work`` raised where one unit alone does not fit.
        """

        def anew(tokens: int) -> Made:
            self.drop_gradients()
            with self.own_random_numbers():
                return work(*given, tokens)

        return self.room.do(anew, lambda tokens: halved(minibatches, tokens, group))

    def own_random_numbers(self) -> contextlib.AbstractContextManager[None]:
        """Several ranks drop out of different sequences by different numbers, which those before do not decide."""
        if ranks.world() == 1:
            return contextlib.nullcontext()
        return seeded(self.ctx.recipe.seed, self.stage.name, self.updates, ranks.rank(), ranks.world())

    def drop_gradients(self) -> None:
        for parameter in (*self.parameters.values(), *self.masters.values()):
            parameter.grad = None

    def try_longest(
        self, examples: Sequence[Sized], accumulate: Callable[[list[Sized], int], Any], group: int = 1
    ) -> None:
        """Forward and backward on the largest micro-batch there can be, beside as much memory as the optimiser's states
        will take, where memory is a device's own: what cannot fit fails at once, not hours later. Nothing is left of
        it but the size that fits."""
        if self.ctx.device.type == "cpu":
            return
        longest = sorted(examples, key=len, reverse=True)
        length = len(longest[0])

        def attempt(tokens: int) -> None:
            accumulate(longest[: max(1, tokens // length // group) * group], tokens)

        with ranks.apart(), self.ctx.clock("preflight"), seeded(self.ctx.recipe.seed, "preflight"):
            states = self.states_to_come()
            self.within_memory(attempt, [[length] * len(longest)], group=group)
        self.drop_gradients()
        size = sum(state.nbytes for state in states) / 2**20
        fits = f"a micro-batch of the longest sequences ({length} tokens) fits, up to {self.room.size} tokens"
        self.ctx.console.note(f"{fits}, beside {size:.0f} MiB of optimiser states: peak {peak_mib():.0f} MiB")

    def states_to_come(self) -> list[Tensor]:
        """Of the size of the moments that the first update will make on the device; none once they are there."""
        if self.adamw.state:
            return []
        pages, short = (word in self.settings.optimizer for word in ("paged", "8bit"))
        there = [p for p in self.masters.values() if not pages or p.numel() < SMALLEST_PAGED]
        kinds = [(p, torch.uint8 if short and p.numel() >= SMALLEST_8BIT else torch.float32) for p in there]
        return [torch.empty_like(p, dtype=dtype) for p, dtype in kinds for _ in range(2)]

    def let_go(self) -> None:
        """The weights are saved: the optimiser's states, masters and gradients make room for what follows."""
        self.drop_gradients()
        self.masters.clear()
        self.adamw.state.clear()
        self.adamw.param_groups.clear()

    def steps(self) -> range:
        """The steps that are left, from 0."""
        return range(self.done, self.steps_planned)

    def expect(self, updates: int) -> None:
        """This step makes ``updates``, fewer than planned where dynamic sampling found less or some have no signal:
        the schedule still ends with the last update of all."""
        left = self.steps_planned - self.done - 1
        self.updates_planned = self.updates + updates + left * self.updates_a_step

    def update(
        self, numbers: Mapping[str, float] | None = None, rows: Callable[[], Sequence[BatchRow]] = tuple
    ) -> dict[str, float] | None:
        """One step of AdamW on the gradients there are, summed over ranks. ``grad_norm``, and of a critic
        ``critic_grad_norm``, are measured before clipping. ``numbers`` are those of the batch, the same on every rank,
        by their names in words; ``rows`` are the batch's.

        Where a number or a gradient is not finite no weight changes and None is returned: the batch is left out (see
        ``skip``). Raises WeightsLost where a weight is not finite after the step, Diverged as ``skip`` does.
        """
        ranks.sum_gradients(list(self.masters.values()))
        limit, norms = self.settings.max_grad_norm, dict[str, float]()
        critic = [p for name, p in self.masters.items() if name.startswith("critic.")]
        policy = [p for name, p in self.masters.items() if not name.startswith("critic.")]
        for name, trained in {"grad_norm": policy, "critic_grad_norm": critic}.items():
            if trained:
                norms[name] = torch.nn.utils.clip_grad_norm_(trained, math.inf if limit is None else limit).item()
        wrong = [name for name, value in (numbers or {}).items() if not math.isfinite(value)]
        wrong += ["gradient"] * any(not norm < LARGEST_NORM for norm in norms.values())
        if wrong or self.updates + 1 in self.skipped:
            self.skip(wrong, rows)
            return None
        lr = learning_rate(self.updates, self.updates_planned, self.settings)
        for group in self.adamw.param_groups:
            group["lr"] = lr
        self.adamw.step()
        self.round()
        if not self.weights_are_finite():
            self.skip(["weights after the step"], rows)
            return None
        self.drop_gradients()
        self.updates += 1
        self.inside_step = True
        return {**norms, "lr": lr}

    def weights_are_finite(self) -> bool:
        """Those that are trained, and what they are rounded from. One pass over them, which is read at once."""
        rounded = [p for name, p in self.parameters.items() if p is not self.masters[name]]
        return math.isfinite(sum(witness(weights).item() for weights in (self.masters.values(), rounded)))

    def skip(self, wrong: Sequence[str], rows: Callable[[], Sequence[BatchRow]]) -> None:
        """The next update is not made: its batch, where ``wrong`` is not finite, is named in ``skipped.jsonl``.

        Raises Diverged where more batches are left out than ``skip_batches``, after a checkpoint if weights are
        finite and no update of the step is made; WeightsLost where weights are not: the stage goes on from its last
        checkpoint without this batch.
        """
        self.drop_gradients()
        update, sound = self.updates + 1, self.weights_are_finite()
        known = update in self.skipped
        may = known or self.skipped.add(self.done + 1, update, wrong, rows())
        told = self.skipped.say(update)
        if not may:
            if sound and not self.inside_step and self.saved != self.done:
                self.save()
            allowed = f"{self.section}.skip_batches allows {self.settings.skip_batches} such batches"
            raise Diverged(f"{told}. {allowed}; all are in {self.skipped.lines.path}")
        if not sound and known:  # not by this batch, and going back would not end
            raise Diverged(f"{told}. It was left out, and weights are not finite all the same")
        if not sound:
            raise WeightsLost(told)
        self.ctx.console.warn(f"{told}. The batch is left out ({self.skipped.lines.path})")
        self.updates += 1
        self.left_out += 1

    @torch.no_grad()
    def round(self) -> None:
        """Weights of 16 bits become what their masters are now."""
        for name, parameter in self.parameters.items():
            if self.masters[name] is not parameter:
                parameter.copy_(self.masters[name])

    def keep(self, step: int, metrics: dict[str, Any], warnings: Sequence[Warned] = ()) -> None:
        """``step`` is done: writes and shows its metrics, says what the guard saw, saves where it is time, and leaves
        where the user, or ``rl.guard: stop``, asks for it."""
        self.done, self.inside_step, self.updates_kept = step + 1, False, self.updates
        left_out, self.left_out = self.left_out, 0
        metrics = metrics | ({"not_finite": left_out} if left_out else {})
        seconds = self.ctx.clock.lap()
        line = {"step": step + 1, **metrics, "seconds": seconds, "peak_mib": peak_mib()}
        self.metrics.write(line)
        self.trackers.log(step + 1, line)
        self.line.step(step + 1, seconds, metrics)
        warnings = ranks.from_main(warnings)  # all stop, or none
        for warning in warnings:
            self.ctx.console.warn(f"step {step + 1}: {warning.text}")
        if warnings and not self.told_how:
            self.told_how = True
            self.ctx.console.note(f"other settings take `{verb(self.stage.name)} --fresh`, or a new run by --name")
        collapses = [warning.text for warning in warnings if warning.stops and self.ctx.recipe.rl.guard == "stop"]
        if (step + 1) % self.settings.save_every == 0 or collapses or left_out:  # which may be the first of several
            self.save()
        if collapses:
            raise Diverged(f"stopped by rl.guard: stop after step {step + 1}: {collapses[0]}")
        self.stop_if_asked()

    def save(self) -> None:
        """A checkpoint after the steps that are done."""
        tensors = {f"weights.{name}": p.detach() for name, p in self.masters.items()}
        state = {"updates": self.updates_kept} | ({"owner": self.owner} if self.owner else {})
        save_checkpoint(self.stage.checkpoints, self.done, tensors, self.adamw, state)
        self.saved = self.done

    def end(self) -> None:
        """All steps are done. The last has a checkpoint whatever ``save_every`` is: more steps would go on from it."""
        if self.saved != self.done:
            self.save()

    def stop_if_asked(self) -> None:
        """Raises Interrupted after Ctrl-C. Between two steps nothing is lost; inside one its updates are made again."""
        if not ranks.any_of(self.interrupt.requested):
            return
        if not self.inside_step and self.saved != self.done:
            self.save()
        where = f"after step {self.done}" if not self.inside_step else f"inside step {self.done + 1}"
        kept = f"the checkpoint of step {self.saved} is in {self.stage.checkpoints}" if self.saved is not None else ""
        if self.inside_step:
            kept = f"its responses are kept, its updates are made again{'; ' if kept else ''}{kept}"
        raise Interrupted(f"stopped {where}; {kept}, and the same command goes on from there")


def master_of(parameter: Parameter, value: Tensor) -> Parameter:
    """``value`` in fp32, to which the parameter, its rounding, hands every gradient that it gets."""
    master = Parameter(value.detach().float())
    held = weakref.ref(master)  # the weight outlives it

    def hand_on(parameter: Tensor) -> None:
        master = held()
        assert parameter.grad is not None and master is not None
        master.grad = parameter.grad.float() if master.grad is None else master.grad.add_(parameter.grad)
        parameter.grad = None

    parameter.register_post_accumulate_grad_hook(hand_on)
    return master


def open_optimizer(weights: list[Parameter], settings: Training) -> torch.optim.Optimizer:
    """AdamW. In 8 bits its two moments are stored in blocks of 256 numbers with a scale each; those of weights of fewer
    than 4,096 numbers stay in 32."""
    how: dict[str, Any] = {"lr": settings.lr, "betas": settings.adam_betas, "eps": settings.eps}
    how["weight_decay"] = settings.weight_decay
    if settings.optimizer == "adamw":
        return torch.optim.AdamW(weights, **how)
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UsageError(f"optimizer: {settings.optimizer} needs bitsandbytes: pip install bitsandbytes")
    import bitsandbytes as bnb

    kind = bnb.optim.AdamW8bit if settings.optimizer == "adamw_8bit" else bnb.optim.PagedAdamW8bit
    optimizer: torch.optim.Optimizer = kind(weights, min_8bit_size=SMALLEST_8BIT, **how)
    return optimizer


@torch.no_grad()
def page_out(optimizer: Any) -> None:
    """Moments that were loaded go where a paged optimiser keeps its own: loading puts them on the device for good."""
    for weight, state in optimizer.state.items() if getattr(optimizer, "is_paged", False) else ():
        for name in ("state1", "state2"):
            state[name] = optimizer.get_state_buffer(weight, dtype=state[name].dtype).copy_(state[name])


def learning_rate(update: int, total: int, settings: Training) -> float:
    """Of update 0..total-1: linear warm-up over ``warmup_steps``, then constant or a cosine to zero."""
    if update < settings.warmup_steps:
        return settings.lr * (update + 1) / settings.warmup_steps
    if settings.schedule == "constant":
        return settings.lr
    progress = (update - settings.warmup_steps) / max(1, total - settings.warmup_steps)
    return settings.lr * 0.5 * (1 + math.cos(math.pi * progress))


def fitting(
    ctx: Context,
    sequences: Sequence[Sized],
    window: int,
    max_length: int,
    what: str,
    length: Callable[[Sized], int] = len,
) -> list[Sized]:
    """Those within ``max_length`` and the models' ``window``; the others are left out and counted on the screen.
    DataError where none is left."""
    limit = min(max_length, window)
    kept = [x for x in sequences if length(x) <= limit]
    if len(kept) < len(sequences):
        left_out = len(sequences) - len(kept)
        ctx.console.warn(f"{left_out} of {len(sequences)} {what} are longer than {limit} tokens and are left out")
    if not kept:
        raise none_fits(what, limit)
    return kept


def none_fits(what: str, limit: int) -> DataError:
    return DataError(f"no {what} are left: all are longer than {limit} tokens (max_length, or the window)")
