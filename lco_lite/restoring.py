"""What the user's code may set for itself while it runs, and is afterwards what it was: settings of this process that
the trainer's numbers, messages and Ctrl-C hang on. The environment is not put back: a file may set it for its calls.
"""

import contextlib
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from functools import cache, partial
from typing import Any

Setting = tuple[Callable[[], Any], Callable[[Any], object]]
"""How it is read, and how what was read is put back."""

STREAMS = ("stdin", "stdout", "stderr")


@contextlib.contextmanager
def put_back() -> Iterator[None]:
    """Settings are what they were before the block, and the standard streams are open whoever closes them in it."""
    before = [(read, write, read()) for read, write in _settings()]
    streams = {id(s): s for s in (getattr(sys, mark.format(n)) for n in STREAMS for mark in ("{}", "__{}__")) if s}
    for stream in streams.values():
        with contextlib.suppress(AttributeError):
            stream.close = lambda: None
    try:
        yield
    finally:
        for stream in streams.values():
            with contextlib.suppress(AttributeError):
                del stream.close  # an attribute of this one stream
        for read, write, value in before:
            if read() != value:
                write(value)


@cache
def _settings() -> list[Setting]:
    import numpy as np
    import torch

    def back_to_device(device: torch.device) -> None:
        torch.set_default_device(None if device.type == "cpu" else device)  # None: no mode stands in between

    return [
        (torch.get_default_device, back_to_device),
        (torch.get_default_dtype, torch.set_default_dtype),
        (torch.is_grad_enabled, torch.set_grad_enabled),
        (torch.get_deterministic_debug_mode, torch.set_deterministic_debug_mode),
        (torch.get_num_threads, torch.set_num_threads),
        (np.geterr, lambda errors: np.seterr(**errors)),
        (_filters, _back_to_filters),
        *((partial(getattr, sys, name), partial(setattr, sys, name)) for name in STREAMS),
        *((partial(signal.getsignal, n), partial(_back_to_handler, n)) for n in (signal.SIGINT, signal.SIGTERM)),
    ]


def _filters() -> tuple[Any, list[Any]]:
    return warnings.filters, list(warnings.filters)


def _back_to_filters(before: tuple[Any, list[Any]]) -> None:
    warnings.filters, were = before
    warnings.resetwarnings()  # which also tells those who have looked at them
    before[0].extend(were)


def _back_to_handler(number: int, handler: Any) -> None:
    """None: it was not installed from Python. Other threads cannot have changed it."""
    if handler is not None and threading.current_thread() is threading.main_thread():
        signal.signal(number, handler)
