"""What fits: sequences into the context window, the longest batch into memory. Asked before the first step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from lco_lite.errors import DataError
from lco_lite.models.language_model import LanguageModel
from lco_lite.stages.context import Context
from lco_lite.stages.training import Optimiser

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
