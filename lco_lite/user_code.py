"""The user's own code, and processes that answer lines.

A function is named ``FILE.py:NAME`` in a recipe or on the command line. One whose time is bounded runs in a process of
its own: ``LineWorker`` is the caller's side, ``serve`` the process's; as a program this file serves a reward function.
"""

import atexit
import importlib.util
import json
import math
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from subprocess import DEVNULL, PIPE
from typing import Any

from lco_lite.errors import UsageError


def names_function(text: str) -> bool:
    """Whether ``text`` has the form FILE.py:NAME."""
    file, _, name = text.rpartition(":")
    return file.endswith(".py") and name.isidentifier()


@cache
def load_function(spec: str) -> Callable[..., Any]:
    """The function ``FILE.py:NAME``. Raises UsageError for a file or name that is not there, or fails."""
    if not names_function(spec):
        raise UsageError(f"{spec!r} is no FILE.py:NAME")
    file, _, name = spec.rpartition(":")
    module_spec = importlib.util.spec_from_file_location(Path(file).stem, file)
    if module_spec is None or module_spec.loader is None or not Path(file).is_file():
        raise UsageError(f"{file}: no such file")
    module = importlib.util.module_from_spec(module_spec)
    try:
        module_spec.loader.exec_module(module)
    except Exception as e:
        raise UsageError(f"{file}: cannot be imported: {type(e).__name__}: {e}") from e
    function = getattr(module, name, None)
    if not callable(function):
        raise UsageError(f"{file}: has no function {name!r}")
    return function


class LineWorker:
    """``python -m MODULE ARGUMENTS``, which answers an empty line when it is ready. Callers wait for each other."""

    def __init__(self, module: str, *arguments: str) -> None:
        self._command = [sys.executable, "-m", module, *arguments]
        self._process: subprocess.Popen[str] | None = None
        self._owner = 0
        self._lock = threading.RLock()
        atexit.register(self.close)

    def runs(self) -> bool:
        """Starts the process if need be; False where it does not start."""
        with self._lock:
            if self._process is not None and self._owner == os.getpid() and self._process.poll() is None:
                return True
            self.close()
            path = [str(Path(__file__).resolve().parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
            environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path)}
            self._process = subprocess.Popen(
                self._command, stdin=PIPE, stdout=PIPE, stderr=DEVNULL, env=environment, encoding="utf-8"
            )
            self._owner = os.getpid()
            return self._exchange("", seconds=120) is not None

    def ask(self, line: str, seconds: float) -> str | None:
        """The answer to ``line``, started if need be; None if there is none within ``seconds``, or the process died."""
        with self._lock:
            if not self.runs():
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

    def _exchange(self, line: str, seconds: float) -> str | None:
        process = self._process
        assert process and process.stdin and process.stdout
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
    """The process's side, until the input ends. ``prepare`` makes what answers each line, the empty one too."""
    replies = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8", buffering=1)
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # whatever the libraries print must not look like a reply
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal's Ctrl-C is the parent's: it decides when this ends
    answer = prepare()
    for line in sys.stdin:
        replies.write(answer(line.strip()) + "\n")


def answer(function: Callable[[list[str], list[str], list[dict[str, Any]]], Any], line: str) -> str:
    """[prompts, responses, data rows] -> ``{"rewards": [...]}`` or ``{"error": text, "response": index or null}``."""
    if not line:
        return "ready"
    prompts, responses, rows = json.loads(line)

    def wrong(text: str, response: int | None = None) -> str:
        return json.dumps({"error": text, "response": response})

    try:
        given = function(prompts, responses, rows)
    except Exception as e:
        text = f"{type(e).__name__}: {e}"
        for i, (prompt, response, row) in enumerate(zip(prompts, responses, rows, strict=True)):
            try:
                function([prompt], [response], [row])
            except Exception:
                return wrong(text, i)
        return wrong(text)
    try:
        rewards = list(given)
    except TypeError:
        return wrong(f"a list of numbers is needed, not {given!r:.80}")
    if len(rewards) != len(responses):
        return wrong(f"{len(rewards)} rewards for {len(responses)} responses")
    for i, reward in enumerate(rewards):
        try:
            rewards[i] = float(reward)
        except (TypeError, ValueError):
            return wrong(f"the reward is {reward!r:.80}, not a number", i)
        if not math.isfinite(rewards[i]):
            return wrong(f"the reward is {reward!r}; it must be finite", i)
    return json.dumps({"rewards": rewards})


if __name__ == "__main__":
    serve(lambda: partial(answer, load_function(sys.argv[1])))
