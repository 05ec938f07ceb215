"""The screen. Everything that is said goes through ``Console``; nothing else prints, and nothing of others' text gets
there raw (visible.py).

On a terminal the lowest lines are alive: time left, stage, phase, numbers, the last response; each step leaves a line
above them. Elsewhere each step is one plain line.
"""

from __future__ import annotations

import json as json_format
import re
import sys
import textwrap
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, TextIO

from rich.console import Console as RichConsole
from rich.console import ConsoleRenderable, Group
from rich.control import Control
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from lco_lite.progress import Progress, clock_time, flow
from lco_lite.visible import visible

WIDEST = 100  # columns of the live lines at most: they are read at a glance, and a narrower window breaks none of them
PANEL = (100, 24)  # columns and rows from which on the last response is shown
HEAD, PHASE = len("1:02:03 left"), len("rollout 640/640")  # columns that the time left and a phase take: fixed places
SHARE = 0.004  # of a processor's time, for the live lines at most
_NUMBER = re.compile(r"([-+]?[\d.,]+([eE][-+]?\d+)?%?( ?[±] ?[\d.]+)?)?")


class Console:
    """``quiet``: only warnings (stderr), results and the last line. ``json``: stdout is for ``emit``, stderr for all
    else."""

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
        self.draws = self._screen.is_interactive and self._screen.file.isatty() and not quiet  # lines anew, in place
        self._open: list[Progress] = []  # one inside another
        self._live: _Area | None = None
        self._phase: tuple[str, float] | None = None  # its name and beginning
        self._sample: tuple[str, str, str] | None = None  # verdict, prompt, response
        self._rows = 0  # of the live lines, so far
        self._notice = ""

    def stage(self, name: str, detail: str = "") -> None:
        """Says what begins: ``rl-kld  3 steps of 512 prompts``."""
        self.note(f"\n{name}" + (f"  {detail}" if detail else ""), style="bold")

    def note(self, text: str, style: str = "") -> None:
        if not self._quiet:
            self._print(self._screen, text, style)

    def result(self, text: str) -> None:
        """What the command was for: also when quiet."""
        self._print(self._screen, text)

    def warn(self, text: str) -> None:
        """To stderr, also when quiet."""
        above = self._live is not None and self._err.is_terminal
        self._print(self._screen if above else self._err, f"warning: {text}", "yellow")

    def error(self, text: str) -> None:
        self._print(self._err, text)

    def say(self, text: str, end: str = "\n") -> None:
        """To stdout as it is, but for control characters: a recipe, an example, a list."""
        self._screen.print(Text(self._clean(text)), soft_wrap=True, end=end)

    def table(self, title: str, columns: Sequence[str], rows: Iterable[Sequence[Any]], result: bool = False) -> None:
        """Numbers are set right; floats are shown as given in text or with three decimals. ``result``: also when
        quiet."""
        if self._quiet and not result:
            return
        body = [[self._cell(value) for value in row] for row in rows]
        if title:  # a line of its own: as a part of a narrow table it would be broken
            self._put(self._screen, Text(self._clean(title), "italic"))
        table = Table()
        for i, column in enumerate(columns):
            numeric = bool(body) and all(_NUMBER.fullmatch(row[i]) for row in body)
            table.add_column(self._clean(column), justify="right" if numeric else "left", overflow="fold")
        for row in body:
            table.add_row(*row)
        self._put(self._screen, table)

    @contextmanager
    def progress(
        self, total: int, label: str, done: int = 0, every: Mapping[str, int] | None = None
    ) -> Iterator[Progress]:
        """Shows how far the work is (progress.py); one inside another is its phase."""
        columns = (lambda: self._screen.width) if self.draws else None
        label = self._clean(label, lines=False)
        progress = Progress(label, total, done, self.clock, self.note, columns, not self._open, every)
        if not self._open:
            self._phase, self._sample, self._notice, self._rows = None, None, "", 0
        self._open.append(progress)
        try:
            self._draw()
            yield progress
        finally:
            if len(self._open) == 1:
                self._draw_no_more()
            self._open.remove(progress)
        progress.end()

    def phase(self, name: str) -> None:
        """What is under way, in a step or by itself; nothing where it is empty, with which a phase always ends."""
        if self._phase is not None and self._open:
            self._open[0].spent(self._phase[0], self.clock() - self._phase[1])
        self._phase = (name, self.clock()) if name else None
        if name:
            self._draw()
        elif not self._open:
            self._draw_no_more()

    @contextmanager
    def waiting(self, name: str) -> Iterator[None]:
        """A phase by itself."""
        self.phase(name)
        try:
            yield
        finally:
            self.phase("")

    def _draw(self) -> None:
        if self.draws and self._live is None:
            self._live = _Area(self._screen, self._area)
            self._live.start()

    def _draw_no_more(self) -> None:
        """The terminal is as it was, whatever has happened."""
        if self._live is not None:
            self._live.stop()
            self._live = None

    def sample(self, prompt: str, response: str, right: bool | None, reward: float | None = None) -> None:
        """The last response and its grade, for the panel."""
        verdict = {True: "✓ right", False: "✗ wrong", None: ""}[right]
        told = "" if reward is None else f"reward {reward:.3g}"
        self._sample = "  ".join(filter(None, (verdict, told))) or "last response", prompt, response

    def notice(self, text: str) -> bool:
        """Says it below the live lines; False where there are none. A signal may come at any moment: nothing is drawn
        here."""
        self._notice = text
        return self._live is not None

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
            for _ in titles:
                grid.add_column(ratio=1)
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
        text = json_format.dumps(value, ensure_ascii=True, allow_nan=False)
        self._stdout.write(text.replace("\x7f", "\\u007f") + "\n")
        self._stdout.flush()

    def done(self, path: Any, next_command: str | None = None) -> None:
        """The last line on stdout: what was made and what to type next. With json it goes to stderr."""
        if not (self._json and self._quiet):
            text = f"{path}" + (f"  next: {next_command}" if next_command else "")
            self._put(self._screen, Text(self._clean(text)))  # a command that is copied is one line

    def _cell(self, value: Any) -> str:
        return f"{value:.3f}" if isinstance(value, float) else self._clean("" if value is None else str(value))

    def _print(self, console: RichConsole, text: str, style: str = "") -> None:
        """On a terminal wrapped at words; elsewhere a line is a line."""
        text = self._clean(text, console)
        self._put(console, Text(at_words(text, console.width) if console.is_terminal else text, style))

    def _put(self, console: RichConsole, what: Text | Table) -> None:
        if self._live is not None and console is self._screen:
            self._live.above.append(what)
        else:
            console.print(what, soft_wrap=isinstance(what, Text))

    def _clean(self, text: str, console: RichConsole | None = None, lines: bool = True) -> str:
        encoding = (console or self._screen).encoding
        return visible(text, lines).encode(encoding, "replace").decode(encoding)

    def _area(self) -> Group:
        """The live lines. Drawn by another thread than the one that works: it reads, and changes nothing else than how
        many there are."""
        at, phase, sample, (columns, rows) = list(self._open), self._phase, self._sample, self._screen.size
        width = min(columns, WIDEST) - 1  # a full line would make some terminals begin another
        now = Text() if phase is None else Text.assemble((phase[0], "dim"), f" {clock_time(self.clock() - phase[1])}")
        if not at:
            return Group(now)
        outer, inner = at[0], at[-1] if len(at) > 1 else None
        of_phase = None if inner is None else inner.seconds_left()
        name, since = phase or ("", self.clock())
        left = outer.seconds_left(name, self.clock() - since, of_phase)
        told = "…" if left is None else f"{'≥' * outer.at_least}{clock_time(left)}"
        head, stage = Text(f"{told} left", "bold cyan"), outer.counted()
        long = max(4, min(24, (width - 2 * HEAD - stage.cell_len - PHASE - 7) // 2))  # a bar
        head.pad_right(HEAD - head.cell_len)
        stage.append(" ").append_text(outer.bar(long))
        if inner is not None:
            now = inner.counted()
            now.pad_right(PHASE - now.cell_len)
            now.append(" ").append_text(inner.bar(long))
            now.append("" if of_phase is None else f" {clock_time(of_phase)} left", "cyan")
        lines = [*flow([head, stage, now] if now else [head, stage], width), *flow(outer.items(), width)]
        self._rows = max(self._rows, len(lines))
        lines += [Text()] * (self._rows - len(lines))  # numbers that come and go leave the lines where they are
        if self._notice:
            lines.append(Text(self._notice, "yellow"))
        for line in lines:
            line.truncate(width, overflow="ellipsis")  # in a window of some thirty columns
        if sample is None or columns < PANEL[0] or rows < PANEL[1]:
            return Group(*lines[: max(1, rows - 1)])
        return Group(self._panel(*sample, width, min(8, rows // 3)), *lines)

    def _panel(self, verdict: str, prompt: str, response: str, width: int, rows: int) -> Panel:
        asked = clipped(self._clean(" ".join(prompt.split())), self._screen, width - 4, 1)
        said = clipped(self._clean(response.expandtabs(4)), self._screen, width - 4, rows)
        for line in asked:
            line.stylize("dim")
        title = Text(self._clean(verdict), {"✓": "bold green", "✗": "bold red"}.get(verdict[0], "bold cyan"))
        return Panel(Group(*asked, *said), title=title, title_align="left", border_style="bright_black", width=width)


class _Area(Live):
    """rich's live lines, with what is said above them; the window may become narrower while they stand there.

    They are drawn by a thread, at most four times a second and less often where that would take more than ``SHARE`` of
    a processor: who says something does not wait for it.
    """

    def __init__(self, screen: RichConsole, render: Callable[[], Group]) -> None:
        super().__init__(console=screen, get_renderable=render, transient=True, refresh_per_second=4)
        self.above = deque[Text | Table]()
        self._render, self._drawn = render, Group()
        self._widths: list[int] = []  # of the lines that stand there
        self._due = 0.0

    def refresh(self) -> None:
        if self._started and time.monotonic() < self._due:
            return
        began, said = time.thread_time(), list[Any]()
        while self.above:
            said.append(self.above.popleft())
        with self._lock:
            self._drawn = self._render()
            self._live_render.set_renderable(self._drawn)
            self.console.print(*(said or [Control()]), sep="\n", soft_wrap=True)
        self._due = time.monotonic() + (time.thread_time() - began) / SHARE

    def process_renderables(self, renderables: list[ConsoleRenderable]) -> list[ConsoleRenderable]:
        if self._widths:  # a line that is wider than the window by now has become several
            rows = sum(max(1, -(-width // self.console.width)) for width in self._widths)
            self._live_render._shape = max(self._widths), rows
        self._widths = [width for part in self._drawn.renderables for width in _widths(part)]
        return super().process_renderables(renderables)


def _widths(part: Any) -> list[int]:
    """Of the lines of a Text without line ends, or of a panel."""
    return [part.cell_len] if isinstance(part, Text) else [part.width] * (2 + len(part.renderable.renderables))


def at_words(text: str, width: int) -> str:
    """Every line wrapped to ``width``, indented as it begins; a word that is wider, a path, stays whole."""
    how: dict[str, Any] = {"break_long_words": False, "break_on_hyphens": False, "replace_whitespace": False}
    return "\n".join(
        textwrap.fill(line, width, subsequent_indent=line[: len(line) - len(line.lstrip())], **how) if line else line
        for line in text.split("\n")
    )


def clipped(text: str, screen: RichConsole, width: int, rows: int) -> list[Text]:
    """``text`` in lines, wrapped at words; what is more than ``rows`` of them is left out of the middle."""
    most = width * rows  # characters from either end: no more can be seen
    text = text if len(text) <= 2 * most else f"{text[:most]}{text[-most:]}"
    lines = list(Text(text).wrap(screen, width))
    if len(lines) <= rows:
        return lines
    if rows == 1:
        return [Text(f"{text[: width // 2 - 2]} … {text[2 - width // 2 :]}", no_wrap=True)]
    return [*lines[: rows // 2], Text("⋯", "dim"), *lines[rows // 2 + 1 - rows :]]
