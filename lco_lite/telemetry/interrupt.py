"""Ctrl-C once: finish the batch, write a checkpoint, stop. Twice: stop now."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from types import FrameType
from typing import Any

_MESSAGE = b"\nfinishing the current batch, then a checkpoint; press Ctrl-C again to stop at once\n"
_STDERR = 2


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
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            # None: the handler before was not installed from Python and cannot be put back
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._before.clear()

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
        # print is not safe here: the signal may have come in the middle of another print. And a stderr that was closed
        # must not keep the checkpoint from being written
        with contextlib.suppress(OSError):
            os.write(_STDERR, _MESSAGE)
