"""The screen. Everything that a run says goes through ``Console``; nothing else prints.

On a terminal a live line shows the progress; elsewhere each step is one plain line. What comes from a model or a file
is shown as it is: no markup, no control characters.
"""

from __future__ import annotations

import json as json_format
import re
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TextIO

from rich.console import Console as RichConsole
from rich.console import Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from lco_lite.metrics import peak_mib

# what the line shows of a step's metrics, in this order: name, label, format
SHOWN: tuple[tuple[str, str, str], ...] = (
    ("loss", "loss", ".4f"),
    ("reward", "reward", ".3f"),
    ("accuracy", "accuracy", ".3f"),
    ("eval", "held-out", ".3f"),
    ("grad_norm", "grad", ".3g"),
    ("entropy", "entropy", ".3f"),
    ("kl_to_old", "KL(old)", ".4f"),
    ("tokens_per_second", "tok/s", ".0f"),
    ("peak_mib", "MiB", ".0f"),
)
_LIFE_SIGN_EVERY = 30.0  # seconds; without a terminal, a long phase inside a step still shows that it goes on
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


class Console:
    """``quiet``: only warnings (stderr) and the last line. ``json``: stdout is for ``emit``, stderr for all else."""

    def __init__(
        self,
        quiet: bool = False,
        json: bool = False,
        stdout: TextIO | None = None,
        stderr: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.clock = clock
        self._quiet, self._json = quiet, json
        self._stdout = stdout or sys.stdout
        self._err = _plain_console(stderr or sys.stderr)
        self._screen = self._err if json else _plain_console(self._stdout)
        self._active: list[Progress] = []
        self._live: Live | None = None

    def stage(self, name: str, detail: str = "") -> None:
        """Says what begins: ``rl-kld  3 steps of 512 prompts``."""
        self._say(f"\n{name}" + (f"  {detail}" if detail else ""), style="bold")

    def note(self, text: str) -> None:
        self._say(text)

    def warn(self, text: str) -> None:
        """To stderr, also when quiet."""
        shared = self._live is not None and self._err.is_terminal
        self._print(self._screen if shared else self._err, f"warning: {text}", "yellow")

    def table(self, title: str, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
        """Numbers are set right; floats are shown as given in text or with three decimals."""
        if self._quiet:
            return
        body = [[_cell(value) for value in row] for row in rows]
        table = Table(title=self._clean(title), title_justify="left")
        for i, column in enumerate(columns):
            numeric = bool(body) and all(_is_number(row[i]) for row in body)
            table.add_column(self._clean(column), justify="right" if numeric else "left", overflow="fold")
        for row in body:
            table.add_row(*map(self._clean, row))
        self._screen.print(table)

    def progress(self, total: int, label: str, done: int = 0) -> Progress:
        """A line for ``total`` equal parts of work, ``done`` of them earlier; a context manager.

        One inside another is shown below it.
        """
        return Progress(self, total, label, done)

    def emit(self, value: Any) -> None:
        """One JSON document on stdout, for ``--json``."""
        self._stdout.write(json_format.dumps(value, ensure_ascii=True, allow_nan=False) + "\n")
        self._stdout.flush()

    def done(self, path: Any, next_command: str | None = None) -> None:
        """The last line on stdout: what was made and what to type next. With json it goes to stderr."""
        line = f"{path}" + (f"  next: {next_command}" if next_command else "")
        if not self._json:
            self._print(_plain_console(self._stdout), line)
        elif not self._quiet:
            self._print(self._err, line)

    def _say(self, text: str, style: str = "") -> None:
        if not self._quiet:
            self._print(self._screen, text, style)

    def _print(self, console: RichConsole, text: str, style: str = "") -> None:
        console.print(Text(self._clean(text, console), style), soft_wrap=True)

    def _clean(self, text: str, console: RichConsole | None = None) -> str:
        encoding = (console or self._screen).encoding
        return visible(text).encode(encoding, "replace").decode(encoding)

    def _open(self, progress: Progress) -> None:
        self._active.append(progress)
        if self._screen.is_terminal and not self._quiet and self._live is None:
            self._live = Live(console=self._screen, get_renderable=self._bars, refresh_per_second=4)
            self._live.start()

    def _bars(self) -> Group:
        width = self._screen.width
        return Group(
            *(Text(self._clean(p.line()), no_wrap=True, overflow="ellipsis", end="\n")[:width] for p in self._active)
        )

    def _shown(self, progress: Progress) -> None:
        if self._live is not None:
            self._live.refresh()
        elif not self._quiet and progress.due(inner=progress is not self._active[0]):
            self._print(self._screen, progress.line())

    def _close(self, progress: Progress) -> None:
        if self._live is not None and len(self._active) == 1:
            self._live.stop()  # leaves the last state of the outermost bar on the screen
            self._live = None
        self._active.remove(progress)


class Progress:
    """Made by ``Console.progress``; use it in ``with``. ``update`` may be called as often as one likes."""

    def __init__(self, console: Console, total: int, label: str, done: int) -> None:
        self.total, self.label, self.done = total, label, done
        self._console = console
        self._metrics: dict[str, Any] = {}
        self._start = self._last_line = console.clock()
        self._done_at_start = self._done_at_last_line = done

    def update(self, done: int, **metrics: Any) -> None:
        """``done`` of ``total`` parts; ``metrics`` by their names in METRICS stay until they are given again."""
        self.done = done
        self._metrics |= metrics
        self._console._shown(self)

    def line(self) -> str:
        elapsed = self._console.clock() - self._start
        here = self.done - self._done_at_start  # what was done before this process took none of its time
        left = elapsed / here * (self.total - self.done) if here > 0 else None
        return progress_line(self.label, self.done, self.total, {**self._metrics, "peak_mib": peak_mib()}, left)

    def due(self, inner: bool) -> bool:
        """Whether to print a plain line now: at each step of the outermost line; else now and then, to show life."""
        now = self._console.clock()
        if (inner or self.done == self._done_at_last_line) and now - self._last_line < _LIFE_SIGN_EVERY:
            return False
        self._last_line, self._done_at_last_line = now, self.done
        return True

    def __enter__(self) -> Progress:
        self._console._open(self)
        return self

    def __exit__(self, *_: object) -> None:
        self._console._close(self)


def progress_line(label: str, done: int, total: int, metrics: dict[str, Any], seconds_left: float | None) -> str:
    """``rl-kld 2/4  reward 0.412  grad 0.83  …  1:20 left``; metrics that are absent or None are left out."""
    parts = [f"{label} {done}/{total}"]
    parts += [f"{text} {metrics[name]:{form}}" for name, text, form in SHOWN if metrics.get(name) is not None]
    if seconds_left is not None and done < total:
        parts.append(f"{clock_time(seconds_left)} left")
    return "  ".join(parts)


def clock_time(seconds: float) -> str:
    """``0:07``, ``12:30``, ``1:02:03``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def visible(text: str) -> str:
    """``text`` with control characters written out (``\\x1b``), so that what a model says cannot steer the terminal."""
    return _CONTROL.sub(lambda m: f"\\x{ord(m[0]):02x}", text)


def _plain_console(file: TextIO) -> RichConsole:
    return RichConsole(file=file, markup=False, emoji=False, highlight=False)


def _cell(value: Any) -> str:
    return f"{value:.3f}" if isinstance(value, float) else "" if value is None else str(value)


def _is_number(text: str) -> bool:
    return bool(re.match(r"^[-+]?[\d.,]+([eE][-+]?\d+)?%?( ?[±] ?[\d.]+)?$", text)) or text == ""
