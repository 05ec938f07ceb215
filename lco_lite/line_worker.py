"""A Python process that answers lines with lines, and whose death bounds every answer's time.

Code that may loop in native code, exhaust memory or overflow the stack is stopped by nothing else. The process is
started by the first question (a second or so) and lives on; the next question replaces one that had to be stopped.
"""

from __future__ import annotations

import atexit
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

_PACKAGE_PARENT = Path(__file__).resolve().parents[1]


class LineWorker:
    """``python -m MODULE ARGUMENTS``, which answers an empty line (a greeting) when it is ready. One caller at a time:
    others wait."""

    def __init__(self, module: str, arguments: Sequence[str] = (), start_seconds: float = 120.0) -> None:
        self._command = [sys.executable, "-m", module, *arguments]
        self._start_seconds = start_seconds
        self._process: subprocess.Popen[str] | None = None
        self._owner = 0
        self._lock = threading.Lock()
        atexit.register(self.close)

    def greet(self) -> str | None:
        """Starts the process if need be; its answer to the greeting, None where it does not start."""
        with self._lock:
            return "" if self._alive() else self._start()

    def ask(self, line: str, seconds: float) -> str | None:
        """The answer to ``line``, started if need be; None if there is none within ``seconds``, or the process died."""
        with self._lock:
            if not self._alive() and self._start() is None:
                return None
            answer = self._exchange(line, seconds)
            if answer is None:
                self.close()  # waits for its end: a process that is dying would still be taken for a live one
            return answer

    def close(self) -> None:
        """Ends the process; the next question starts another."""
        if self._process is not None and self._owner == os.getpid():
            self._process.kill()
            self._process.communicate()
        self._process = None

    def _alive(self) -> bool:
        return self._process is not None and self._owner == os.getpid() and self._process.poll() is None

    def _start(self) -> str | None:
        self.close()
        path = os.pathsep.join(filter(None, [str(_PACKAGE_PARENT), os.environ.get("PYTHONPATH")]))
        self._process = subprocess.Popen(
            self._command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": path},
            text=True,
            encoding="utf-8",
        )
        self._owner = os.getpid()
        return self._exchange("", self._start_seconds)

    def _exchange(self, line: str, seconds: float) -> str | None:
        process = self._process
        if process is None or process.stdin is None or process.stdout is None:
            return None
        timer = threading.Timer(seconds, process.kill)
        timer.start()
        try:
            process.stdin.write(line + "\n")
            process.stdin.flush()
            answer = process.stdout.readline()
        except OSError:
            answer = ""
        except BaseException:
            process.kill()  # half an exchange would answer the next question with this one's result
            raise
        finally:
            timer.cancel()
        return answer.strip() or None


def serve(prepare: Callable[[], Callable[[str], str]]) -> None:
    """The process's side. ``prepare`` makes the function that answers each line, the empty greeting too, until the
    input ends."""
    replies = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8", buffering=1)
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # whatever the libraries print must not look like a reply
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal's Ctrl-C is the parent's: it decides when this ends
    answer = prepare()
    for line in sys.stdin:
        replies.write(answer(line.strip()) + "\n")
