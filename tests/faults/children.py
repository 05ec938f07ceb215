"""Commands of the trainer in children of this process, and what happens to them: kills, signals, a disk that fails.

A child is a fork of a process that has imported everything and computed nothing: it costs what its command costs. What
fails in it is put there after the fork; nothing of that is in the product.
"""

from __future__ import annotations

import atexit
import builtins
import errno
import io
import json
import os
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

LIMIT = 240.0  # seconds that a command of a second or two may take on a machine that is busy: beyond it, it hangs


@dataclass(frozen=True)
class Fault:
    """What happens to the ``at``-th (from 1) ``write``, ``sync``, ``rename`` or ``unlink`` below a folder: an error of
    the system by its name (``ENOSPC``, ``EIO``), or the end of the process, in the middle of it (``die``); ``lasting``:
    to all that come after it too. ``room``: bytes that can be written in all, in place of a number."""

    what: str
    at: int
    how: str
    lasting: bool = False

    @classmethod
    def read(cls, text: str) -> Fault:
        what, at, how, *lasting = text.split(":")
        return cls(what, int(at), how, bool(lasting))

    def __str__(self) -> str:
        return f"{self.what}:{self.at}:{self.how}" + (":lasting" if self.lasting else "")


@dataclass(frozen=True)
class Ended:
    """``status``: an exit status, or minus the signal that ended it. ``counts``: operations on the disk by kind."""

    status: int
    out: str
    err: str
    seconds: float
    hung: bool
    counts: Mapping[str, int]


def run(
    arguments: Iterable[object],
    below: Path,
    fault: Fault | None = None,
    signals: Iterable[tuple[float, int]] = (),
    prepare: Callable[[], object] | None = None,
    limit: float = LIMIT,
) -> Ended:
    """``lco-lite ARGUMENTS`` in a child. ``signals``: (seconds after the start, number) each; ``prepare`` is called in
    the child before the command; ``fault`` befalls what is written ``below``."""
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / name for name in ("out", "err", "counts.json")]
        sys.stdout.flush()
        sys.stderr.flush()
        begins, tells = os.pipe()
        if (pid := os.fork()) == 0:
            os.close(begins)
            _child([str(a) for a in arguments], below, fault, prepare, files, tells)
        os.close(tells)
        os.read(begins, 1)
        os.close(begins)
        began = time.monotonic()
        coming, hung, ended = sorted(signals), False, 0
        while True:
            ended, status = os.waitpid(pid, os.WNOHANG)
            now = time.monotonic() - began
            if ended:
                break
            while coming and now >= coming[0][0]:
                os.kill(pid, coming.pop(0)[1])
            if now > limit and not hung:
                hung = True
                os.killpg(pid, signal.SIGKILL)
            time.sleep(0.002)
        ended_well = os.waitstatus_to_exitcode(status) == 0
        out, err = (f.read_text(errors="replace") if f.exists() else "" for f in files[:2])
        counts = json.loads(files[2].read_text()) if ended_well and files[2].exists() else {}
        return Ended(os.waitstatus_to_exitcode(status), out, err, time.monotonic() - began, hung, counts)


def _child(
    arguments: list[str],
    below: Path,
    fault: Fault | None,
    prepare: Callable[[], object] | None,
    files: list[Path],
    tells: int,
) -> None:
    status = 70
    try:
        os.setsid()
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
        for place, file in ((1, files[0]), (2, files[1])):
            os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT, 0o600), place)
        sys.stdout, sys.stderr = (open(i, "w", 1, "utf-8", closefd=False) for i in (1, 2))  # noqa: SIM115
        atexit._clear()
        disk = Disk(below, fault)
        disk.install()
        if prepare is not None:
            prepare()
        from lco_lite.__main__ import main

        sys.argv = ["lco-lite", *arguments]
        try:
            os.close(tells)
            main()
            status = 0
        except SystemExit as e:
            status = e.code if isinstance(e.code, int) else int(e.code is not None)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)  # it has ended: what comes now is for nobody
        disk.remove()
        threading._shutdown()  # as an interpreter that ends: it waits for threads, then calls what is registered
        atexit._run_exitfuncs()
        files[2].write_text(json.dumps(disk.counts))
    except KeyboardInterrupt:
        pass  # between the two lines above
    except BaseException:
        import traceback

        traceback.print_exc()
        status = 1
    finally:
        for stream in (sys.stdout, sys.stderr):
            try:
                stream.flush()
            except OSError:
                status = status or 1
        os._exit(status)


class Disk:
    """Counts what is done below a folder, and fails where ``fault`` says."""

    def __init__(self, below: Path, fault: Fault | None) -> None:
        self.below, self.fault, self.counts = str(below), fault, Counter[str]()
        self._before: list[tuple[Any, str, Any]] = []

    def install(self) -> None:
        import safetensors.torch

        def patch(owner: Any, name: str, make: Callable[[Any], Any]) -> None:
            real = getattr(owner, name)
            self._before.append((owner, name, real))
            setattr(owner, name, make(real))

        def opened(real: Any) -> Any:
            def open_(file: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
                made = real(file, mode, *args, **kwargs)
                return Watched(made, self) if set(mode) & set("wax+") and self.concerns(file) else made

            return open_

        def first_of(what: str) -> Callable[[Any], Any]:
            def make(real: Any) -> Any:
                def call(path: Any, *args: Any, **kwargs: Any) -> Any:
                    near = kwargs.get("dir_fd")
                    within = path if near is None else os.readlink(f"/proc/self/fd/{near}")
                    if self.concerns(args[0] if what == "rename" else within):
                        self.turn(what)
                    return real(path, *args, **kwargs)

                return call

            return make

        def synced(real: Any) -> Any:
            def fsync(handle: Any) -> None:
                if self.concerns(os.readlink(f"/proc/self/fd/{handle}")):
                    self.turn("sync")
                real(handle)

            return fsync

        def serialized(real: Any) -> Any:
            def serialize(tensors: Any, file: Any, *args: Any, **kwargs: Any) -> None:
                if self.concerns(file):
                    try:
                        self.turn("write", lambda: Path(file).write_bytes(b"\x10" * 20), 2**16)
                    except OSError as e:
                        text = f"Error while serializing: I/O error: {os.strerror(e.errno)} (os error {e.errno})"
                        raise safetensors.SafetensorError(text) from None
                real(tensors, file, *args, **kwargs)

            return serialize

        patch(io, "open", opened)
        patch(builtins, "open", opened)
        patch(os, "replace", first_of("rename"))
        patch(os, "unlink", first_of("unlink"))
        patch(os, "fsync", synced)
        patch(safetensors.torch, "serialize_file", serialized)

    def remove(self) -> None:
        for owner, name, real in reversed(self._before):
            setattr(owner, name, real)

    def concerns(self, file: Any) -> bool:
        return isinstance(file, (str, os.PathLike)) and os.path.abspath(file).startswith(self.below)

    def turn(self, what: str, half: Callable[[], object] = lambda: None, size: int = 0) -> None:
        """One more of ``what``: raises or ends the process where it is the one, after ``half`` of it was done."""
        self.counts[what] += 1
        if what == "write":
            self.counts["room"] += size
        if (fault := self.fault) is None or fault.what not in (what, "room" if what == "write" else what):
            return
        count = self.counts[fault.what]
        if count == fault.at or (count > fault.at and (fault.lasting or fault.what == "room")):
            half()
            if fault.how == "die":
                os.kill(os.getpid(), signal.SIGKILL)
            number = getattr(errno, fault.how)
            raise OSError(number, os.strerror(number))


class Watched:
    """A file whose every write may be the one that fails, half-way."""

    def __init__(self, file: Any, disk: Disk) -> None:
        self._file, self._disk = file, disk

    def write(self, data: Any) -> Any:
        def half() -> None:
            self._file.write(data[: len(data) // 2])
            self._file.flush()

        self._disk.turn("write", half, len(data))
        return self._file.write(data)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def __enter__(self) -> Watched:
        self._file.__enter__()
        return self

    def __exit__(self, *why: Any) -> Any:
        return self._file.__exit__(*why)

    def __iter__(self) -> Any:
        return iter(self._file)
