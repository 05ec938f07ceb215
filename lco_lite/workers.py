"""Processes that answer lines, and how all that they start ends with them.

``LineWorker`` is the caller's side, ``serve`` the process's. A worker leads a process group of its own, which is killed
whole: when an answer is late, when the caller is done, and by ``Keeper`` when the caller is gone.
"""

from __future__ import annotations

import atexit
import contextlib
import math
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from subprocess import DEVNULL, PIPE
from typing import IO, NamedTuple

_START = (
    "import sys; sys.path[:] = filter(None, sys.path); import runpy; "
    "runpy.run_module(sys.argv.pop(1), run_name='__main__', alter_sys=True)"
)


def python(module: str, *arguments: str) -> list[str]:
    """``python -m MODULE ARGUMENTS`` that looks for no module in the working folder, as ``-P`` does since 3.11."""
    safe = ["-P"] if sys.version_info >= (3, 11) else []
    return [sys.executable, *safe, "-c", _START, module, *arguments]


def environment() -> dict[str, str]:
    """This process's, in which another finds this very package: a checkout need not be installed."""
    root = Path(__file__).resolve().parents[1]
    path = [] if root.name in ("site-packages", "dist-packages") else [str(root)]
    path += filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))  # an empty one is the working folder
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path)}


class NoAnswer(Exception):
    """A worker did not answer: why."""


class Keeper:
    """Sends ``name`` (KILL, TERM) to the process group ``group`` when this process is gone, however it went.

    A shell that waits for the end of a pipe which only we hold: it needs nothing of the process it ends, which may be
    stuck in native code, and it is not tied to the thread that started it, as Linux's PR_SET_PDEATHSIG is.
    """

    def __init__(self, group: int, name: str) -> None:
        self._shell: subprocess.Popen[bytes] | None = None
        if os.name == "posix":
            what = f"read _; kill -s {name} -- -{group}"
            self._shell = subprocess.Popen(
                ["/bin/sh", "-c", what], stdin=PIPE, stdout=DEVNULL, stderr=DEVNULL, start_new_session=True, bufsize=0
            )

    def dismiss(self) -> None:
        """The group has ended: nothing is sent."""
        if self._shell is not None:
            self._shell.kill()
            self._shell.wait()
            self.forget()

    def forget(self) -> None:
        """Lets go of the pipe; what is kept in a fork would hide this process's end."""
        if self._shell is not None:
            _let_go(self._shell.stdin)


class Started(NamedTuple):
    """``answers`` ends in None when no more will come."""

    process: subprocess.Popen[bytes]
    keeper: Keeper
    answers: queue.SimpleQueue[bytes | None]


class LineWorker:
    """``python -m MODULE ARGUMENTS``, which ``serve``s: ready within ``seconds``. Callers wait for each other.

    A question has a number, and only the answer with that number counts. The process and all it has started end when
    one is late, and the next question starts another.
    """

    def __init__(self, module: str, *arguments: str, seconds: float = 120.0) -> None:
        self._command, self._seconds = python(module, *arguments), seconds
        self._started: Started | None = None
        self._asked, self._first = 0, ""
        self._lock = threading.RLock()
        atexit.register(self.close)
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=self._forget)

    def ready(self) -> str:
        """What the process said when it was ready; it is started if need be. Raises NoAnswer."""
        with self._lock:
            if self._started is None or self._started.process.poll() is not None:
                self.close()
                process = subprocess.Popen(
                    self._command,
                    stdin=PIPE,
                    stdout=PIPE,
                    stderr=DEVNULL,
                    env=environment(),
                    start_new_session=True,
                    bufsize=0,
                )
                assert process.stdout
                self._started = Started(process, Keeper(process.pid, "KILL"), queue.SimpleQueue())
                threading.Thread(target=_read, args=(process.stdout, self._started.answers), daemon=True).start()
                self._first = self._exchange("", self._seconds)
            return self._first

    def ask(self, line: str, seconds: float) -> str:
        """The answer to ``line``. Raises NoAnswer where there is none within ``seconds``, or the process ends."""
        with self._lock:
            self.ready()
            return self._exchange(line, seconds)

    def close(self) -> None:
        """Ends the process's whole group. Waits for the process alone: what it has started may hold its pipes."""
        with self._lock:
            if self._started is not None:
                process, keeper, _ = self._started
                self._started = None
                _kill(process)
                process.wait()
                keeper.dismiss()
                _let_go(process.stdin)

    def _exchange(self, line: str, seconds: float) -> str:
        assert self._started and (pipe := self._started.process.stdin)
        (process, _, answers), settled = self._started, threading.Lock()  # held by who was first: answer or clock

        def stop() -> None:
            if settled.acquire(blocking=False):
                _kill(process)
                answers.put(None)

        self._asked += 1
        rest, timer = memoryview(f"{self._asked} {seconds} {line}\n".encode()), threading.Timer(seconds, stop)
        timer.daemon = True
        timer.start()
        try:
            with contextlib.suppress(OSError):  # a closed pipe: then there is no answer either
                while rest:
                    rest = rest[pipe.write(rest) :]
            while (answer := answers.get()) is not None:
                number, _, text = answer.decode("utf-8", "replace").strip().partition(" ")
                if number == str(self._asked) and settled.acquire(blocking=False):
                    return text
        except BaseException:
            self.close()
            raise
        finally:
            timer.cancel()
        late = not settled.acquire(blocking=False)
        if not late:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(1.0)  # how it ended by itself
        code = process.returncode
        self.close()
        if late:
            raise NoAnswer(f"no answer within {seconds:g} s")
        how = "" if code is None else f" with exit status {code}" if code >= 0 else f" by signal {-code}"
        raise NoAnswer(f"its process died{how}")

    def _forget(self) -> None:
        """In a fork of this process the worker is not ours, and nobody holds the lock."""
        self._lock = threading.RLock()
        if self._started is not None:
            _let_go(self._started.process.stdin)
            self._started.keeper.forget()
            self._started.process.returncode = 0  # not our child: nothing is to be waited for
            self._started = None


def _let_go(pipe: IO[bytes] | None) -> None:
    """Of a pipe that somebody may have closed under us (``os.closerange``)."""
    with contextlib.suppress(OSError):
        if pipe is not None:
            pipe.close()


def _read(pipe: IO[bytes], answers: queue.SimpleQueue[bytes | None]) -> None:
    rest = b""
    with contextlib.suppress(OSError), pipe:
        while part := pipe.read(2**16):
            *lines, rest = (rest + part).split(b"\n")
            for line in lines:
                answers.put(line)
    answers.put(None)


def _kill(process: subprocess.Popen[bytes]) -> None:
    """The process, its group, and descendants that have left the group."""
    import psutil

    strays = []
    if process.returncode is None:
        with contextlib.suppress(psutil.Error):
            strays = psutil.Process(process.pid).children(recursive=True)
    if os.name == "posix":
        with contextlib.suppress(ProcessLookupError, PermissionError):  # macOS refuses where only zombies are left
            os.killpg(process.pid, signal.SIGKILL)
    else:
        process.kill()
    for stray in strays:
        with contextlib.suppress(psutil.Error):
            stray.kill()


_due: list[float] = []  # when the caller of this process gives up on its question


def seconds_left() -> float:
    """In a process that ``serve``s: how long the caller still waits for the answer at hand."""
    return _due[-1] - time.monotonic() if _due else math.inf


def serve(prepare: Callable[[], Callable[[str], str]]) -> None:
    """The process's side, until the input ends. ``prepare`` makes what answers each line, the empty one too.

    Questions and answers have pipes that nothing else sees: not what prints or asks for input, and not a fork, which
    ends where it comes back here.
    """
    requests = os.fdopen(os.dup(0), encoding="utf-8")
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8", buffering=1)
    pipes, me = (requests.fileno(), replies.fileno()), os.getpid()
    nothing = os.open(os.devnull, os.O_RDWR)
    os.dup2(nothing, 0)
    os.dup2(2, 1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal's Ctrl-C is the parent's: it decides when this ends
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=lambda: [os.dup2(nothing, pipe, False) for pipe in pipes])

    def ours() -> None:
        if os.getpid() != me:
            os._exit(0)

    answer = prepare()
    ours()
    for line in requests:
        number, seconds, text = line.rstrip("\n").split(" ", 2)
        _due.append(time.monotonic() + float(seconds))
        said = answer(text)
        _due.clear()
        ours()
        replies.write(f"{number} {said}\n")
