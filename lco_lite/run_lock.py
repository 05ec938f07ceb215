"""One process a run: an advisory lock on ``runs/NAME/.lock`` that the system releases when its holder dies."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lco_lite.errors import UsageError
from lco_lite.files import write_errors

_PID_WIDTH = 20

if sys.platform == "win32":
    import msvcrt

    _LOCKED_BYTE = 2**30  # Windows forbids reading locked bytes, and the pid at the start of the file is to be read

    def _try_lock(handle: int) -> None:
        os.lseek(handle, _LOCKED_BYTE, os.SEEK_SET)
        msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)
else:
    import fcntl

    def _try_lock(handle: int) -> None:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Holds ``path`` for this process. UsageError names the process that has it. The file stays; its lock does not."""
    with write_errors(path):
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        _acquire(handle, path)
        try:
            yield
        finally:
            os.utime(path)  # the time of the last use: a run that ends after another began is the newer one
    finally:
        os.close(handle)  # releases the lock


def _acquire(handle: int, path: Path) -> None:
    try:
        _try_lock(handle)
    except OSError as e:
        if e.errno not in (errno.EWOULDBLOCK, errno.EACCES, errno.EDEADLK):
            raise UsageError(f"{path}: this file system has no locks ({e.strerror}): choose a local --runs DIR") from e
        os.lseek(handle, 0, os.SEEK_SET)
        holder = os.read(handle, _PID_WIDTH).decode("ascii", "replace").strip() or "unknown"
        raise UsageError(
            f"{path.parent} is in use by process {holder}: wait for it, stop it, or start another run with --name"
        ) from e
    with write_errors(path):
        os.lseek(handle, 0, os.SEEK_SET)
        os.write(handle, f"{os.getpid():<{_PID_WIDTH}}".encode("ascii"))  # one write: a reader never sees half of it
