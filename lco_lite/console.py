"""The screen. Everything that a run says goes through ``Console``; nothing else prints.

On a terminal bars show the progress; elsewhere each step is one plain line. What comes from a model or a file is shown
as it is: no markup, no control characters.
"""

from __future__ import annotations

import json as json_format
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, TextIO

from rich.console import Console as RichConsole
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars
from rich.table import Column, Table
from rich.text import Text

from lco_lite.metrics import peak_mib

# what the screen shows of a step's metrics, in this order: name, label, format
SHOWN: tuple[tuple[str, str, str], ...] = (
    ("loss", "loss", ".4f"),
    ("reward", "reward", ".3f"),
    ("dead_groups", "dead groups", ".2f"),
    ("skipped_updates", "skipped", "d"),
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
_NUMBER = re.compile(r"([-+]?[\d.,]+([eE][-+]?\d+)?%?( ?[±] ?[\d.]+)?)?")


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
        plain = partial(RichConsole, markup=False, emoji=False, highlight=False)
        self._err = plain(file=stderr or sys.stderr)
        self._screen = self._err if json else plain(file=self._stdout)
        self._depth = 0  # how many progresses are open, one inside another
        self._bars: Bars | None = None

    def stage(self, name: str, detail: str = "") -> None:
        """Says what begins: ``rl-kld  3 steps of 512 prompts``."""
        self.note(f"\n{name}" + (f"  {detail}" if detail else ""), style="bold")

    def note(self, text: str, style: str = "") -> None:
        if not self._quiet:
            self._print(self._screen, text, style)

    def warn(self, text: str) -> None:
        """To stderr, also when quiet."""
        above_bars = self._bars is not None and self._err.is_terminal
        self._print(self._screen if above_bars else self._err, f"warning: {text}", "yellow")

    def table(self, title: str, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
        """Numbers are set right; floats are shown as given in text or with three decimals."""
        if self._quiet:
            return
        body = [[self._cell(value) for value in row] for row in rows]
        table = Table(title=self._clean(title), title_justify="left")
        for i, column in enumerate(columns):
            numeric = bool(body) and all(_NUMBER.fullmatch(row[i]) for row in body)
            table.add_column(self._clean(column), justify="right" if numeric else "left", overflow="fold")
        for row in body:
            table.add_row(*row)
        self._screen.print(table)

    @contextmanager
    def progress(self, total: int, label: str, done: int = 0) -> Iterator[Progress]:
        """Shows ``total`` equal parts of work, ``done`` of them earlier; one inside another is shown below it."""
        outermost = self._depth == 0
        if outermost and self._screen.is_interactive and not self._quiet:
            self._bars = _bars(self._screen, self.clock)
            self._bars.start()
        self._depth += 1
        progress = Progress(self, self._bars, self._clean(label), total, done, outermost)
        try:
            yield progress
        finally:
            self._depth -= 1
            if self._bars is not None and outermost:
                self._bars.stop()  # leaves the last state of the outermost bar on the screen
                self._bars = None
            elif self._bars is not None:
                self._bars.remove_task(progress.bar)

    def write(self, text: str) -> None:
        """To stdout, where the line before ended: for text that is made piece by piece."""
        self._stdout.write(self._clean(text))
        self._stdout.flush()

    @property
    def is_wide(self) -> bool:
        """Whether two texts can be read side by side."""
        return self._screen.is_interactive and self._screen.width >= 80

    @contextmanager
    def beside(self, titles: Sequence[str]) -> Iterator[Callable[[Sequence[str]], None]]:
        """Texts in columns, drawn anew as often as they are given: their ends while they grow, all of them at last."""
        texts = [""] * len(titles)

        def columns(rows: int | None) -> Table:
            grid, room = Table.grid(expand=True, padding=(0, 1)), self._screen.width // len(titles) - 2
            wrapped = [Text(self._clean(text)).wrap(self._screen, room) for text in texts]
            for title in titles:
                grid.add_column(ratio=1, header=Text(self._clean(title)))
            grid.add_row(*(Text(self._clean(title), "bold") for title in titles))
            grid.add_row(*(Text("\n").join(lines[-(rows or len(lines)) :]) for lines in wrapped))
            return grid

        try:
            with Live(console=self._screen, transient=True, refresh_per_second=12) as live:

                def draw(now: Sequence[str]) -> None:
                    texts[:] = now
                    live.update(columns(max(1, self._screen.height - 4)))

                yield draw
        finally:
            self._screen.print(columns(None))

    def emit(self, value: Any) -> None:
        """One JSON document on stdout, for ``--json``."""
        self._stdout.write(json_format.dumps(value, ensure_ascii=True, allow_nan=False) + "\n")
        self._stdout.flush()

    def done(self, path: Any, next_command: str | None = None) -> None:
        """The last line on stdout: what was made and what to type next. With json it goes to stderr."""
        if not (self._json and self._quiet):
            self._print(self._screen, f"{path}" + (f"  next: {next_command}" if next_command else ""))

    def _cell(self, value: Any) -> str:
        return f"{value:.3f}" if isinstance(value, float) else self._clean("" if value is None else str(value))

    def _print(self, console: RichConsole, text: str, style: str = "") -> None:
        console.print(Text(self._clean(text, console), style), soft_wrap=True)

    def _clean(self, text: str, console: RichConsole | None = None) -> str:
        encoding = (console or self._screen).encoding
        return visible(text).encode(encoding, "replace").decode(encoding)


class Progress:
    """Made by ``Console.progress``: a bar on a terminal, plain lines elsewhere."""

    def __init__(self, console: Console, bars: Bars | None, label: str, total: int, done: int, outermost: bool) -> None:
        self._console, self._bars, self._label, self._total, self._outermost = console, bars, label, total, outermost
        self._metrics: dict[str, Any] = {}
        self._start = self._said_at = console.clock()
        self._done_at_start = self._said = done
        if bars is not None:
            self.bar = bars.add_task(label, total=total, completed=done, left="", numbers="")

    def update(self, done: int, **metrics: Any) -> None:
        """``done`` of the total; ``metrics`` by their names in METRICS stay until they are given again. May be called
        as often as one likes."""
        self._metrics |= metrics
        shown, now = {**self._metrics, "peak_mib": peak_mib()}, self._console.clock()
        here = done - self._done_at_start  # what was done before this process took none of its time
        seconds_left = (now - self._start) / here * (self._total - done) if here > 0 else None
        if self._bars is not None:
            numbers = "  ".join(_numbers(shown))
            self._bars.update(self.bar, completed=done, left=_left(seconds_left), numbers=numbers, refresh=True)
        elif (self._outermost and done != self._said) or now - self._said_at >= _LIFE_SIGN_EVERY:
            self._said, self._said_at = done, now
            self._console.note(progress_line(self._label, done, self._total, shown, seconds_left))


def progress_line(label: str, done: int, total: int, metrics: Mapping[str, Any], seconds_left: float | None) -> str:
    """``rl-kld 2/4  reward 0.412  grad 0.83  …  1:20 left``; metrics that are absent or None are left out."""
    return "  ".join(filter(None, [f"{label} {done}/{total}", *_numbers(metrics), _left(seconds_left)]))


def _numbers(metrics: Mapping[str, Any]) -> list[str]:
    """The SHOWN ones, and after the reward its parts, where there are several."""
    numbers = list[str]()
    for name, text, form in SHOWN:
        if metrics.get(name) is not None:
            numbers.append(f"{text} {metrics[name]:{form}}")
        if name == "reward" and len(parts := metrics.get("rewards") or {}) > 1:
            numbers += [f"{part} {value:{form}}" for part, value in parts.items()]
    return numbers


def _left(seconds: float | None) -> str:
    return f"{clock_time(seconds)} left" if seconds else ""


def clock_time(seconds: float) -> str:
    """``0:07``, ``12:30``, ``1:02:03``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def visible(text: str) -> str:
    """``text`` with control characters written out (``\\x1b``), so that what a model says cannot steer the terminal."""
    return _CONTROL.sub(lambda m: f"\\x{ord(m[0]):02x}", text)


def _bars(screen: RichConsole, clock: Callable[[], float]) -> Bars:
    """Bars without rich's own time left: it looks back 30 s only, and one step may take minutes."""

    def text(field: str, column: Column | None = None) -> TextColumn:
        return TextColumn("{task." + field + "}", markup=False, table_column=column)

    numbers = text("fields[numbers]", Column(ratio=1, no_wrap=True, overflow="ellipsis"))  # whatever width is left
    columns = (text("description"), BarColumn(12), MofNCompleteColumn(), TimeElapsedColumn(), text("fields[left]"))
    return Bars(*columns, numbers, console=screen, get_time=clock, refresh_per_second=4, expand=True)
