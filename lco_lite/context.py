"""What every stage is given: run, recipe, screen, device, a clock of its phases; and how Ctrl-C reaches it."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from lco_lite.console import Console
from lco_lite.recipe import Recipe
from lco_lite.run import Run


@dataclass
class Clock:
    """Seconds spent in each phase since the last ``lap``; ``phase`` is under way, and named when memory runs out."""

    phase: str = "loading"
    seconds: dict[str, float] = field(default_factory=dict)

    @contextlib.contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        self.phase, start = phase, time.perf_counter()
        yield
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - start

    def lap(self) -> dict[str, float]:
        seconds, self.seconds = {k: round(v, 3) for k, v in self.seconds.items()}, {}
        return seconds


@dataclass
class Context:
    run: Run
    recipe: Recipe
    console: Console
    device: torch.device
    adapter: Path | None = None  # scored on the base instead of a stage's
    clock: Clock = field(default_factory=Clock)


class InterruptGuard:
    """``with InterruptGuard() as guard``: the loop looks at ``guard.requested`` between batches.

    The first SIGINT or SIGTERM sets it, a second raises KeyboardInterrupt. The handlers before come back at the end.
    Outside the main thread signals cannot be caught, and ``requested`` stays False.
    """

    def __init__(self) -> None:
        self.requested = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> InterruptGuard:
        if threading.current_thread() is threading.main_thread():
            self._before = {n: signal.signal(n, self._on_signal) for n in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            # None: the handler before was not installed from Python and cannot be put back
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
        # print is not safe here: the signal may have come in the middle of another print. And a stderr that was closed
        # must not keep the checkpoint from being written
        with contextlib.suppress(OSError):
            os.write(2, b"\nfinishing the current batch, then a checkpoint; press Ctrl-C again to stop at once\n")
