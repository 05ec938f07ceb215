"""What every stage is given: run, recipe, screen, device, a clock of its phases, what its memory holds at once; and how
Ctrl-C reaches it."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar
from weakref import WeakSet

import torch
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size

from lco_lite import ranks
from lco_lite.console import Console
from lco_lite.recipe import Recipe
from lco_lite.run import Run

Made = TypeVar("Made")
STOPPING = "finishing the current batch, then a checkpoint; press Ctrl-C again to stop at once"


@dataclass
class Clock:
    """Seconds spent in each phase since the last ``lap``; ``phase`` is under way, and named when memory runs out."""

    phase: str = "loading"
    seconds: dict[str, float] = field(default_factory=dict)
    tell: Callable[[str], object] = lambda phase: None  # which begins; an empty one where it has ended

    @contextlib.contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        self.phase, start = phase, time.perf_counter()
        self.tell(phase)
        try:
            yield
            if torch.cuda.is_initialized():
                torch.cuda.synchronize()
            self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - start
        finally:
            self.tell("")

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
    stage: str = ""  # the one that is trained
    said: frozenset[str] | None = None  # the settings, by dotted key, that recipe file and flags name; None: all
    begins: Callable[[], None] = lambda: None  # what the stage works with is open: from here on the run remembers it
    bases: WeakSet[Any] = field(default_factory=WeakSet)  # that share the device (models/residency.py)
    _rooms: dict[str, Room] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.clock.tell = self.console.phase

    def room(self, setting: str, size: int) -> Room:
        """The one room of this setting, which begins with ``size``."""
        return self._rooms.setdefault(setting, Room(self, setting, size))


@dataclass
class Room:
    """How much is done at once, in the unit of ``setting``; what is too much for the memory is done again in halves."""

    ctx: Context
    setting: str
    size: int

    def do(self, work: Callable[[int], Made], half: Callable[[int], tuple[int, int] | None], then: str = "") -> Made:
        """``work(size)``. Where memory runs out it starts again, with the random numbers that it had, and ``half`` of
        what was too much (both; None: there is no less). That is the size from there on; it is said, and ``then``."""
        cpu, gpus = torch.get_rng_state(), torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
        while True:
            try:
                return work(self.size)
            except Exception as e:
                found = half(self.size) if out_of_memory(e) else None
                if found is None:
                    raise
            clear_device_cache(garbage_collection=True)  # out here no traceback holds tensors any more
            torch.set_rng_state(cpu)
            if gpus:
                torch.cuda.set_rng_state_all(gpus)
            too_much, self.size = found
            what = f"{self.ctx.clock.phase}: out of memory with {self.setting} {too_much}"
            what += f": done again, and from here on, with {self.size}{then}"
            self.ctx.console.warn(what)
            ranks.aside(f"warning: {what}")


def out_of_memory(error: Exception) -> bool:
    """On a device, on the host, or of an engine's cache."""
    is_torchs = isinstance(error, RuntimeError) and should_reduce_batch_size(RuntimeError(str(error)))
    return is_torchs or isinstance(error, (torch.OutOfMemoryError, MemoryError))


class InterruptGuard:
    """``with InterruptGuard() as guard``: the loop looks at ``guard.requested`` between batches.

    The first SIGINT or SIGTERM sets it, a second raises KeyboardInterrupt. The handlers before come back at the end.
    Outside the main thread signals cannot be caught, and ``requested`` stays False. Of several processes any may have
    got it: ``ranks.any_of(guard.requested)``.
    """

    def __init__(self, console: Console | None = None) -> None:
        self.requested, self._console = False, console
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
        if ranks.world() > 1:
            return  # torchrun says that it stops them
        if self._console is not None and self._console.notice(STOPPING):
            return
        # print is not safe here: the signal may have come in the middle of another print. And a stderr that was closed
        # must not keep the checkpoint from being written
        with contextlib.suppress(OSError):
            os.write(2, f"\n{STOPPING}\n".encode())
