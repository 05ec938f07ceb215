"""A small terminal for tests: a program runs on a pseudo-terminal of a given size, and what it writes is drawn."""

from __future__ import annotations

import errno
import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from collections.abc import Callable, Sequence
from typing import Any

from rich.cells import cell_len

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def on_terminal(
    command: Sequence[str],
    columns: int = 80,
    rows: int = 24,
    then: Callable[[bytes, int], object] | None = None,
    **env: str,
) -> tuple[str, int]:
    """(all that ``python *command`` writes, its exit status). ``then`` hears what there is so far, and the process."""
    leader, follower = pty.openpty()
    resize(leader, columns, rows)
    keep = {k: v for k, v in os.environ.items() if k not in ("COLUMNS", "LINES", "NO_COLOR", "FORCE_COLOR")}
    path = os.pathsep.join(filter(None, [ROOT, os.environ.get("PYTHONPATH")]))
    keep |= {"TERM": "xterm-256color", "PYTHONPATH": path}
    own: dict[str, Any] = {"start_new_session": True, "preexec_fn": lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0)}
    own |= dict.fromkeys(("stdin", "stdout", "stderr"), follower)
    process = subprocess.Popen([sys.executable, *command], env=keep | env, **own)
    os.close(follower)
    written = b""
    while True:
        try:
            some = os.read(leader, 65536)
        except OSError as e:  # the end, on Linux
            if e.errno != errno.EIO:
                raise
            some = b""
        if not some:
            break
        written += some
        if then is not None:
            then(written, leader)
    os.close(leader)
    return written.decode("utf-8"), process.wait()


def resize(terminal: int, columns: int, rows: int = 24) -> None:
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))


class Drawn:
    """What stands on a terminal after ``written``: ``lines``, with all that has scrolled away, and the ``widest``.

    ``narrowed``: after how many characters the window got fewer columns, and which; lines that are wider are wrapped.
    """

    def __init__(self, written: str, narrowed: tuple[int, int] | None = None) -> None:
        self.lines, self.row, self.column, self.widest, self.cursor = [""], 0, 0, 0, True
        at, columns = narrowed or (len(written), 0)
        self._write(written[:at])
        if columns:
            pieces = [[line[i : i + columns] for i in range(0, max(1, len(line)), columns)] for line in self.lines]
            self.row = sum(map(len, pieces[: self.row])) + self.column // columns
            self.lines, self.column = sum(pieces, []), self.column % columns
        self._write(written[at:])

    def _write(self, written: str) -> None:
        for part in re.split(r"(\x1b\[[0-9;?]*[A-Za-z]|\r|\n)", written):
            self._take(part)

    def _take(self, part: str) -> None:
        if part == "\r":
            self.column = 0
        elif part == "\n":
            self.row += 1
            if self.row == len(self.lines):
                self.lines.append("")
        elif part.startswith("\x1b["):
            number, letter = part[2:-1], part[-1]
            if letter == "A":
                self.row = max(0, self.row - int(number or 1))
            elif letter == "K":
                self.lines[self.row] = ""
            elif number == "?25":
                self.cursor = letter == "h"
            else:
                assert letter == "m", part
        elif part:
            assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", part), repr(part)
            line = self.lines[self.row].ljust(self.column)
            self.lines[self.row] = line[: self.column] + part + line[self.column + len(part) :]
            self.column += len(part)
            self.widest = max(self.widest, cell_len(self.lines[self.row].rstrip()))

    def __str__(self) -> str:
        return "\n".join(line.rstrip() for line in self.lines).strip("\n")
