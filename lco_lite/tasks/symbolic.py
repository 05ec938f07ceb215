"""Equality by computer algebra in a second process, so that each comparison ends in time whatever the LaTeX says.

sympy can loop in native code, exhaust memory or overflow the stack; only the death of its process stops all three. The
process is started by the first comparison that needs it (a second or so) and lives on; one that is stopped is replaced.
"""

import atexit
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

from lco_lite.errors import LcoError

SECONDS = 3.0
_START_SECONDS = 120.0
_PACKAGE_PARENT = Path(__file__).resolve().parents[2]


class Verifier:
    """One worker process and the lock that callers share."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None
        self._owner = 0
        self._lock = threading.Lock()

    def equal(self, answer: str, gold: str, tolerance: float = 0.0) -> bool | None:
        """Is ``answer`` mathematically equal to ``gold`` (LaTeX without dollar signs)? None if it could not be told.

        With a ``tolerance``, values that differ by no more than that part of gold's count as equal.
        """
        with self._lock:
            self._start()
            line = self._exchange(json.dumps([answer, gold, tolerance]), SECONDS)
            if line is None:
                self.close()  # waits for its end: a process that is dying would still be taken for a live one
                return None
            return bool(json.loads(line))

    def close(self) -> None:
        """Ends the worker process; the next comparison starts another."""
        if self._process is not None and self._owner == os.getpid():
            self._process.kill()
            self._process.communicate()
        self._process = None

    def _start(self) -> None:
        if self._process is not None and self._owner == os.getpid() and self._process.poll() is None:
            return
        self.close()
        path = os.pathsep.join(filter(None, [str(_PACKAGE_PARENT), os.environ.get("PYTHONPATH")]))
        self._process = subprocess.Popen(
            [sys.executable, "-m", "lco_lite.tasks.symbolic_worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": path},
            text=True,
            encoding="utf-8",
        )
        self._owner = os.getpid()
        if self._exchange("", _START_SECONDS) is None:
            raise LcoError("the process that compares formulas does not start; is math-verify installed?")

    def _exchange(self, line: str, seconds: float) -> str | None:
        """Sends a line and reads one; None if the process dies or has to be killed after ``seconds``."""
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


_verifier = Verifier()
equal = _verifier.equal
atexit.register(_verifier.close)
