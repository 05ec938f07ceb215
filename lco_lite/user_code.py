"""The user's own code: a function is named ``FILE.py:NAME`` in a recipe or on the command line.

Objectives, targets and graders run in this process (``load_function``). As a program this file serves a reward
function, which runs in a worker (``workers.py``). Neither can end the trainer, and no import or call may take for ever.
"""

import atexit
import contextlib
import importlib.util
import itertools
import json
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Set
from functools import cache, partial, wraps
from pathlib import Path
from typing import Any, NoReturn

import psutil

from lco_lite.calling import RETURNS, Adapted, adapted
from lco_lite.errors import LcoError, UsageError
from lco_lite.files import is_there, not_there, sha256
from lco_lite.restoring import put_back
from lco_lite.visible import visible
from lco_lite.workers import seconds_left, serve

IMPORT_SECONDS = 120.0  # that importing a file of the user's may take in this process
END_SECONDS = 10.0
CALL_SECONDS = 300.0  # and a call of a function in it; the caller of a worker has limits of its own
SWALLOWED = 3  # times that what ends a late block may be caught in it
LARGEST = 3.4028234663852886e38  # of float32
_exit, _unbounded = os._exit, contextlib.nullcontext()


def names_function(text: str) -> bool:
    """Whether ``text`` has the form FILE.py:NAME."""
    file, _, name = text.rpartition(":")
    return file.endswith(".py") and name.isidentifier()


def function_file(spec: str) -> Path:
    """The file of ``FILE.py:NAME``. Raises UsageError for another form, and where there is no such file."""
    if not names_function(spec):
        raise UsageError(f"{spec!r:.200} is no FILE.py:NAME")
    file = Path(spec.rpartition(":")[0])
    if not is_there(file) or not file.is_file():
        raise UsageError(f"{file!s:.200}: {not_there(file)}")
    return file


def file_digest(spec: str) -> str:
    """Of the file that ``FILE.py:NAME`` names: an edited one gives other numbers."""
    return sha256(function_file(spec))[:16]


_LOADED = set[str]()  # files of the user's whose code runs in this process


def users_file(error: BaseException) -> str | None:
    """The file of the user's that ``error`` came out of, or what caused it; None where it is ours."""
    files = [frame.filename for frame in traceback.extract_tb(error.__traceback__)]
    found = next((file for file in reversed(files) if file in _LOADED), None)
    return found or (users_file(error.__cause__) if error.__cause__ else None)


@cache
def load_function(spec: str, in_worker: bool = False) -> Callable[..., Any]:
    """The function ``FILE.py:NAME``, ``contained``. A call that does not end raises TimeoutError, but ``in_worker``,
    whose caller ends it. Raises UsageError for a file or name that is not there, and for a file whose import fails,
    ends the process or does not end."""
    file, name = function_file(spec), spec.rpartition(":")[2]
    module_spec = importlib.util.spec_from_file_location(file.stem, file)
    assert module_spec and module_spec.loader, "it is a file that ends in .py"
    module = importlib.util.module_from_spec(module_spec)
    sys.modules.setdefault(module_spec.name, module)  # dataclasses look there
    try:
        with siblings(file), contained(in_worker), bounded(IMPORT_SECONDS, str(file)):
            module_spec.loader.exec_module(module)
    except Exception as e:
        if sys.modules[module_spec.name] is module:
            del sys.modules[module_spec.name]
        raise UsageError(f"{file}: cannot be imported: {told(e)}") from e
    if not _LOADED:
        atexit.register(_end_children)
    _LOADED.add(str(module.__file__))
    function = getattr(module, name, None)
    if not callable(function):
        raise UsageError(f"{file}: has no function {name!r}")

    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        with contained(in_worker), _unbounded if in_worker else bounded(CALL_SECONDS, str(file)):
            try:
                return function(*args, **kwargs)
            except TypeError as e:
                if e.__traceback__ is not None and e.__traceback__.tb_next is not None:  # inside it
                    raise
                wrong = told(e)
        raise UsageError(f"{spec}: it is called with {len(args) + len(kwargs)} arguments: {wrong}")

    return call


@contextlib.contextmanager
def siblings(file: Path) -> Iterator[None]:
    """The files beside ``file`` can be imported: first of all while it is read itself, as where Python runs it, and
    after all others by what it calls later."""
    folder = str(file.resolve().parent)
    sys.path.insert(0, folder)
    try:
        yield
    finally:
        sys.path.remove(folder)
        if folder not in sys.path:
            sys.path.append(folder)


def told(error: BaseException) -> str:
    """The error in one short line, whatever its own text does."""
    try:
        text = " ".join(str(error).split())
    except Exception:
        text = "(its message cannot be written)"
    return f"{type(error).__name__}: {text if len(text) <= 400 else text[:400] + '…'}"


@contextlib.contextmanager
def contained(in_worker: bool = False) -> Iterator[None]:
    """The user's code is run, and neither ends nor steers this process: ``sys.exit``, ``os._exit``, exceptions that
    mean something here and those that nobody catches are errors like others, and the working folder and what
    ``put_back`` knows of are what they were, but ``in_worker``. A fork that comes back ends here: one process goes on.
    """
    me, here = os.getpid(), None if in_worker else os.getcwd()
    on_interrupt = signal.getsignal(signal.SIGINT)

    def refused(status: int) -> NoReturn:
        if os.getpid() != me:  # a fork's own end
            _exit(status)
        raise RuntimeError(f"it calls os._exit({status!r}), which would end the training")

    os._exit = refused
    try:
        with contextlib.nullcontext() if in_worker else put_back():
            yield
    except SystemExit as e:
        if os.getpid() != me:
            _exit(e.code if isinstance(e.code, int) else int(e.code is not None))
        raise RuntimeError(f"it calls sys.exit({e.code!r:.80}), which would end the training") from e
    except BaseException as e:
        if isinstance(e, KeyboardInterrupt) and (in_worker or _came_from(on_interrupt, e)):
            raise
        if not isinstance(e, Exception) or _steers(e):
            raise RuntimeError(f"it raises {told(e)}") from e
        raise
    finally:
        os._exit = _exit
        if os.getpid() != me:
            _exit(0)
        if here is not None:
            os.chdir(here)


def _came_from(handler: Any, error: BaseException) -> bool:
    """Whether this handler of a signal raised it; Python's own leaves no trace of it."""
    frames = (frame for frame, _ in traceback.walk_tb(error.__traceback__))
    code = getattr(handler, "__code__", None)
    return handler is signal.default_int_handler or any(frame.f_code is code for frame in frames)


def _steers(error: Exception) -> bool:
    """Whether the trainer, or the command line, would take it for a word of its own."""
    return isinstance(error, (LcoError, BrokenPipeError)) or type(error).__module__.split(".")[0] in ("click", "typer")


class _Late(BaseException):
    """Raised in a block that takes too long: not an Exception, which the user's code may well catch."""


@contextlib.contextmanager
def bounded(seconds: float, file: str = "") -> Iterator[None]:
    """Raises TimeoutError for a block that takes longer. One that catches even ``_Late``, three times, ends the process
    with one message. Where there are no signals (Windows, other threads), and in native code that does not come back,
    it takes as long as it takes."""
    if not hasattr(signal, "setitimer") or threading.current_thread() is not threading.main_thread():
        yield
        return
    raised, is_over = 0, False

    def stop(number: int, frame: Any) -> None:
        nonlocal raised
        if is_over:
            return
        if raised == SWALLOWED:
            _end_at_once(
                f"{file}: " * bool(file) + f"it takes more than {seconds:g} s, and catches all that would end it"
            )
        raised += 1
        raise _Late

    before = signal.signal(signal.SIGALRM, stop)
    clock = signal.setitimer(signal.ITIMER_REAL, seconds, 1.0)  # again, should the block swallow the first
    try:
        yield
    except _Late as e:
        raise TimeoutError(f"it takes more than {seconds:g} s") from e
    finally:
        is_over = True
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        signal.setitimer(signal.ITIMER_REAL, *clock)


def _end_at_once(message: str) -> NoReturn:
    """As by a kill, out of code that nothing else ends: what is on the disk is whole at any moment."""
    try:
        signal.setitimer(signal.ITIMER_REAL, 0)
        if os.isatty(1):
            os.write(1, b"\x1b[?25h\n")  # live lines hide the cursor
        os.write(2, f"error: {visible(message)}\n".encode(errors="replace"))
        _end_children()
    finally:
        _exit(LcoError.exit_code)


def ends(status: int) -> None:
    """This process is about to end. Where a file of the user's was loaded, nothing that it left, threads or ``atexit``,
    holds the end up for more than ``END_SECONDS``; the processes that it has started end then too."""

    def at_last() -> None:
        if not threading.main_thread().is_alive():  # else somebody goes on after the command
            _end_children()
            _exit(status)

    if _LOADED:
        clock = threading.Timer(END_SECONDS, at_last)
        clock.daemon = True
        clock.start()


def _end_children() -> None:
    """Of this process's group: those of ``workers.py`` have groups of their own, and ends."""
    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error, ProcessLookupError):
            if os.getpgid(child.pid) == os.getpgrp():
                child.kill()


# a reward function's side of its worker


def answer(function: Adapted, line: str) -> str:
    """[prompts, responses, what is known of each] -> ``{"rewards": [...]}``, None for one that does not apply, or
    ``{"error": text, "response": index or null}``. ``about`` asks how the function is called."""
    if not line:
        return "ready"
    if line == "about":
        return json.dumps(function.about())
    prompts, responses, known = json.loads(line)

    def wrong(text: str, response: int | None = None) -> str:
        return json.dumps({"error": text, "response": response})

    try:
        given = function(prompts, responses, known)
        if isinstance(given, (str, bytes, Mapping, Set)) or not hasattr(given, "__iter__"):
            return wrong(f"came back {shown(given)}; {RETURNS}")
        rewards = list(itertools.islice(given, len(responses) + 1))
    except UsageError as e:
        return wrong(str(e))
    except BaseException as e:
        return wrong(told(e), _culprit(function, prompts, responses, known))
    if len(rewards) != len(responses):
        found = f"{len(rewards)}" if len(rewards) < len(responses) else f"more than {len(responses)}"
        return wrong(f"came back {found} rewards for {len(responses)} responses; {RETURNS}")
    for i, reward in enumerate(rewards):
        try:
            rewards[i] = None if reward is None else as_number(reward)
        except ValueError as e:
            return wrong(f"the reward is {e}; {RETURNS}", i)
    return json.dumps({"rewards": rewards})


def _culprit(function: Adapted, prompts: list[str], responses: list[str], known: list[Any]) -> int | None:
    """The first response for which alone the function raises; None where half of the time that is left finds none: the
    error itself is to be told before the caller gives up."""
    seconds = min(max(seconds_left() / 2, 0.01), CALL_SECONDS)
    over = time.monotonic() + seconds
    with contextlib.suppress(TimeoutError), bounded(seconds):
        for i, (prompt, response, one) in enumerate(zip(prompts, responses, known, strict=True)):
            try:
                list(function([prompt], [response], [one]))
            except BaseException:  # of the clock too, which may look like the function's own
                return i if time.monotonic() < over else None
            if time.monotonic() > over:
                break
    return None


def as_number(value: Any) -> float:
    """A number of Python, or a scalar of numpy or torch. Raises ValueError for anything else, such as text of digits,
    and for what is not finite in float32."""
    plain = value.item() if getattr(value, "shape", None) == () and callable(getattr(value, "item", None)) else value
    if not isinstance(plain, (int, float)):
        raise ValueError(f"{shown(value)}, not a number")
    if not -LARGEST <= plain <= LARGEST:
        raise ValueError(f"{shown(value)}; it must be finite in float32")
    return float(plain)


def shown(value: Any) -> str:
    try:
        return f"{value!r:.80}"
    except Exception:  # an int of too many digits, a __repr__ of the user's
        return f"a {type(value).__name__}"


def _served() -> Callable[[str], str]:
    """In the worker. What is wrong with the file is its first word, in place of ``ready``."""
    try:
        function = load_function(sys.argv[1], in_worker=True)
        try:
            return partial(answer, adapted(function))
        except UsageError as e:
            error = f"{sys.argv[1]}: {e}"
    except UsageError as e:
        error = str(e)
    except BaseException as e:  # a KeyboardInterrupt of the file's own
        error = f"{function_file(sys.argv[1])}: cannot be imported: {told(e)}"
    return lambda line: json.dumps({"error": error, "response": None})


if __name__ == "__main__":
    serve(_served)
