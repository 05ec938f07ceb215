"""What every stage is given, and the clock that knows which phase it is in."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch

from lco_lite.recipe import Recipe
from lco_lite.run import Run
from lco_lite.telemetry.console import Console


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
