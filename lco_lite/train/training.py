"""What every training stage shares around its plain loop: the optimiser's step, resuming, checkpoints, stopping."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn import Parameter

from lco_lite.checkpoint import load_latest, save_checkpoint
from lco_lite.context import Context, InterruptGuard
from lco_lite.errors import DataError, Diverged, Interrupted
from lco_lite.models.language_model import LanguageModel
from lco_lite.recipe.sections import Training
from lco_lite.run import StageFolder


def learning_rate(update: int, total: int, s: Training) -> float:
    """Of update 0..total-1: linear warm-up over ``warmup_steps``, then constant or a cosine to zero."""
    if update < s.warmup_steps:
        return s.lr * (update + 1) / s.warmup_steps
    if s.schedule == "constant":
        return s.lr
    progress = (update - s.warmup_steps) / max(1, total - s.warmup_steps)
    return s.lr * 0.5 * (1 + math.cos(math.pi * progress))


class Optimiser:
    """AdamW on the trainable parameters; the norm of the whole gradient is measured before it is clipped."""

    def __init__(self, parameters: Iterable[tuple[str, Parameter]], settings: Training, total: int) -> None:
        self.parameters = dict(parameters)
        self.settings = settings
        self.total = total
        self.adamw = torch.optim.AdamW(
            list(self.parameters.values()),
            lr=settings.lr,
            betas=settings.adam_betas,
            weight_decay=settings.weight_decay,
        )

    def step(self, update: int) -> tuple[float, float]:
        """Clip, update, clear. Returns (2-norm before clipping, learning rate). Diverged where it is not finite."""
        limit = self.settings.max_grad_norm
        norm = torch.nn.utils.clip_grad_norm_(self.parameters.values(), math.inf if limit is None else limit).item()
        if not math.isfinite(norm):
            raise Diverged(f"the gradient's norm is {norm} at update {update + 1}")
        lr = learning_rate(update, self.total, self.settings)
        for group in self.adamw.param_groups:
            group["lr"] = lr
        self.adamw.step()
        self.adamw.zero_grad(set_to_none=True)
        return norm, lr

    def weights(self) -> dict[str, Tensor]:
        """A copy of the trained weights by name, on the CPU."""
        return {name: p.detach().to("cpu", copy=True) for name, p in self.parameters.items()}

    @contextlib.contextmanager
    def holding(self, weights: dict[str, Tensor]) -> Iterator[None]:
        """Other weights for as long as the block takes; none given, nothing changes."""
        now = self.weights() if weights else {}
        self.load_weights(weights)
        yield
        self.load_weights(now)

    @torch.no_grad()
    def load_weights(self, weights: dict[str, Tensor]) -> None:
        for name, value in weights.items():
            self.parameters[name].copy_(value)


class Progress:
    """Resumes a stage at its last checkpoint and writes the next ones.

    ``done``: steps behind us; ``state`` and ``extra``: what else the stage put into that checkpoint (JSON, tensors).
    """

    def __init__(
        self, stage: StageFolder, optimiser: Optimiser, interrupt: InterruptGuard, device: torch.device
    ) -> None:
        self.stage, self.optimiser, self.interrupt = stage, optimiser, interrupt
        self.done, self.state, self.extra = 0, {}, {}
        found = load_latest(stage.checkpoints, optimiser.adamw, device)
        if found is not None:
            self.done, self.state = found.step, found.state
            self.extra = {k: v for k, v in found.tensors.items() if not k.startswith("weights.")}
            optimiser.load_weights({k[8:]: v for k, v in found.tensors.items() if k.startswith("weights.")})

    def save(self, step: int, state: dict[str, Any] | None = None, extra: dict[str, Tensor] | None = None) -> None:
        """A checkpoint after ``step`` whole steps; ``state`` and ``extra`` where a stage stops inside the next one."""
        tensors = {f"weights.{name}": w for name, w in self.optimiser.weights().items()} | (extra or {})
        save_checkpoint(self.stage.checkpoints, step, tensors, self.optimiser.adamw, state or {})

    def checkpoint(self, step: int, every: int) -> None:
        """After ``step``: save where it is time, and stop after saving where the user asks."""
        if step % every == 0 or self.interrupt.requested:
            self.save(step)
        if self.interrupt.requested:
            self.stop(step)

    def stop(self, step: int) -> None:
        """Leave after a checkpoint. Always raises Interrupted."""
        raise Interrupted(
            f"stopped after step {step}; the checkpoint is in {self.stage.checkpoints}, "
            "and the same command goes on from there"
        )


def prefixed(prefix: str, module: torch.nn.Module) -> list[tuple[str, Parameter]]:
    """A module's parameters by name, for an optimiser that trains others too."""
    return [(f"{prefix}.{name}", p) for name, p in module.named_parameters()]


Sized = TypeVar("Sized", bound=Any)


def fitting(
    ctx: Context,
    found: Sequence[Sized],
    model: LanguageModel,
    max_length: int,
    what: str,
    length: Callable[[Sized], int] = len,
) -> list[Sized]:
    """Those within the window; the others are left out and counted on the screen. DataError where none is left."""
    limit = min(max_length, model.max_length)
    kept = [x for x in found if length(x) <= limit]
    if len(kept) < len(found):
        ctx.console.warn(
            f"{len(found) - len(kept)} of {len(found)} {what} are longer than {limit} tokens and are left out"
        )
    if not kept:
        raise DataError(
            f"no {what} are left: all {len(found)} are longer than {limit} tokens (max_length, or the model's window)"
        )
    return kept


def preflight(
    ctx: Context,
    found: Sequence[Sized],
    micro_batch_tokens: int,
    accumulate: Callable[[list[Sized]], Any],
    optimiser: Optimiser,
) -> None:
    """Forward and backward on the largest micro-batch there can be, where memory is a device's own: what cannot fit
    fails at once, not hours later. Its gradient is thrown away."""
    if ctx.device.type == "cpu":
        return
    longest = sorted(found, key=len, reverse=True)[: max(1, micro_batch_tokens // max(map(len, found)))]
    with ctx.clock("preflight"):
        accumulate(longest)
    optimiser.adamw.zero_grad(set_to_none=True)
