"""How far is the work, how long will it take yet, and what are its numbers? In words, for a terminal or a log."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from math import isclose, isfinite
from statistics import fmean, median
from typing import Any

from rich.text import Text

from lco_lite.metrics import memory_mib
from lco_lite.visible import visible

# what the screen shows of a step's metrics, in this order: name, label (its first word is the column's), format; an
# empty one is ``compact``
SHOWN: tuple[tuple[str, str, str], ...] = (
    ("reward", "reward", ".3f"),
    ("accuracy", "accuracy", ".3f"),
    ("eval", "held-out", ".3f"),
    ("loss", "loss", ""),
    ("grad_norm", "grad", ""),
    ("kl_to_old", "KL", ""),
    ("entropy", "entropy", ".3f"),
    ("dead_groups", "dead groups", ".2f"),
    ("skipped_updates", "skipped", "d"),
    ("tokens_per_second", "tok/s overall", ".0f"),
)
TRENDS = ("eval", "reward", "accuracy", "loss")  # the first that there is has its trend shown
BLOCKS = "▁▂▃▄▅▆▇█"
LOOKS = {"eval"}  # phases at the end of a step without which its time is told
ONCE = ("loading", "preflight")  # phases before the first step
REMEMBERED = 15  # steps that the time left is estimated from
SOON = 1.0  # second of work without a whole part, from which on its rate is told
_LIFE_SIGN_EVERY = 30.0  # seconds; without a terminal, a long phase inside a step still shows that it goes on


class Progress:
    """Work of ``total`` equal parts, ``done`` of them earlier, made by ``Console.progress``. Without ``columns``, those
    of a terminal that shows it as it is, it says a plain line now and then, and after every step. ``every``: the phases
    that a step is known to have, and how many steps apart each is; 0: it has none."""

    def __init__(
        self,
        label: str,
        total: int,
        done: int,
        clock: Callable[[], float],
        say: Callable[..., object],
        columns: Callable[[], int] | None = None,
        outermost: bool = True,
        every: Mapping[str, int] | None = None,
    ) -> None:
        self.label, self.total, self.done, self._outermost, self._every = label, total, done, outermost, every or {}
        self._clock, self._say, self._columns = clock, say, columns
        self._metrics: dict[str, Any] = {}
        self._trends: dict[str, deque[float]] = {name: deque(maxlen=12) for name in TRENDS}
        self._start = self._at = self._said_at = clock()
        self._done_at_start = self._said = done
        self._jump = 0  # parts that the last update brought
        self._part = 0.0  # of what is under way, in parts
        self.at_least = False  # the time left last told: something comes on top of it
        self._within: dict[str, float] = {}  # seconds by phase of the step under way
        self._steps = deque[dict[str, float]](maxlen=REMEMBERED)  # seconds by phase; "": what is in none
        self._shown_left: float | None = None
        self._names: list[str] = []  # of the numbers that steps have had

    def recall(self, steps: Iterable[Mapping[str, Any]]) -> None:
        """Metrics of steps before this process: they have a trend, and took their time."""
        for metrics in steps:
            self._note_trend(metrics)
            self._steps.append({p: s for p, s in (metrics.get("seconds") or {}).items() if p not in ONCE})

    def update(
        self, done: int, total: int | None = None, metrics: Mapping[str, Any] | None = None, part: float = 0.0
    ) -> None:
        """``done`` of the total, and of what is under way ``part``, as many parts as it is worth so far; ``metrics`` by
        their names in METRICS stay until they are given again. May be called as often as one likes."""
        self._metrics, self._part = self._metrics | dict(metrics or {}), part
        self.total = self.total if total is None else total
        now = self._clock()
        if done != self.done:
            self.done, self._jump, self._at = done, done - self.done, now
        if self._columns is not None:
            return
        if (self._outermost and done == self.total != self._said) or now - self._said_at >= _LIFE_SIGN_EVERY:
            self._say_line(now)

    def step(self, done: int, seconds: Mapping[str, float], metrics: Mapping[str, Any]) -> None:
        """A step is done, which took ``seconds`` by phase: it leaves its line."""
        self._note_trend(metrics)
        took = self._clock() - self._at
        if took and metrics.get("response_tokens"):
            metrics = {"tokens_per_second": metrics["response_tokens"] / took, **metrics}
        own = {phase: time for phase, time in seconds.items() if phase != "loading"}
        self._steps.append({p: s for p, s in own.items() if p not in ONCE} | {"": max(0.0, took - sum(own.values()))})
        self._metrics, self._at, self.done, self._within = dict(metrics), self._clock(), done, {}
        if self._columns is None:
            return self._say_line(self._at)
        for line, style in self._row(metrics, took, self._columns()):
            self._say(line, style=style)

    def spent(self, phase: str, seconds: float) -> None:
        """The step under way has had this phase."""
        self._within[phase] = self._within.get(phase, 0.0) + seconds

    def seconds_left(self, phase: str = "", had: float = 0.0, left: float | None = None) -> float | None:
        """Of steps: what each phase of those to come usually takes, less what the one under way has had; of other
        work by its rate. It never rises by less than a quarter: that is noise, not news.

        In the first step: what is ``left`` of the ``phase`` under way, which has ``had`` its seconds so far, and for
        each step to come as much as this one takes; None while more than a look (``LOOKS``) is still to come, with
        which it is the least (``at_least``)."""
        since, here, self.at_least = self._clock() - self._at, self.done - self._done_at_start, False
        if self.done >= self.total:
            return 0.0 if self.total else None
        first = self._within | {phase: self._within.get(phase, 0.0) + had + (left or 0.0)}
        if self._steps:
            left = self._expected(self.done, self.total) - min(since, self._expected(self.done, self.done + 1))
        elif phase and left is not None and {name for name, n in self._every.items() if n} - LOOKS <= first.keys():
            self.at_least = any(n and name not in first for name, n in self._every.items())
            steps = range(self.done + 1, self.total)
            left += sum(s for name, s in first.items() for i in steps if (i + 1) % (self._every.get(name) or 1) == 0)
        elif here > 0:
            rate = (self._at - self._start) / here  # what was done before this process took none of its time
            left = rate * (self.total - self.done) - min(since, rate * min(self._jump, self.total - self.done))
        elif self._part and since >= SOON:
            left = since * (self.total - self.done - self._part) / self._part
        else:
            return None
        if self._shown_left is None or left < self._shown_left or left > 1.25 * self._shown_left + 5:
            self._shown_left = left
        return self._shown_left

    def _expected(self, first: int, end: int) -> float:
        """Seconds of the steps from ``first`` up to ``end``: a phase takes the median of its last times, so that one
        slow step says little; what is in no phase, checkpoints too, its mean."""
        total, steps = 0.0, list(self._steps)
        for phase in {name for step in steps for name in step}:
            times = [step[phase] for step in steps if phase in step]
            n = self._every.get(phase) or 1
            total += (end // n - first // n) * (median(times) if phase else fmean(times))
        return total

    def counted(self) -> Text:
        """As wide when all is done; without a total, which is not known yet, the label alone."""
        count = f" {self._count():<{2 * len(str(self.total)) + 1}}" if self.total else ""
        return Text.assemble((self.label, "bold" if self._outermost else ""), count)

    def bar(self, width: int) -> Text:
        return bar(self.done + self._part, self.total, width)

    def _count(self) -> str:
        return f"{int(self.done + self._part)}/{self.total}"

    def items(self) -> list[Text]:
        """Every number with its label, the trend behind the first that has one, and the memory."""
        trend = next((name for name in TRENDS if self._trends[name]), None)
        items, held_out = list[Text](), self._trends["eval"]  # which is not scored after every step
        for name, label, value in shown(({"eval": held_out[-1]} if held_out else {}) | self._metrics):
            items.append(Text.assemble((f"{label} ", "dim"), value))
            if name == trend:
                items[-1].append(f" {sparkline(self._trends[name])}", "green")
        return [*items, Text.assemble(("memory ", "dim"), memory())]

    def line(self) -> str:
        """``1:20 left  rl-kld 2/4  reward 0.412  grad 0.83  …  memory 3.1 of 11.6 GiB``."""
        left = self.seconds_left()
        head = [f"{clock_time(left)} left" if left else "", f"{self.label} {self._count()}"]
        numbers = [f"{label} {value}" for _, label, value in shown(self._metrics)]
        return "  ".join(filter(None, [*head, *numbers, f"memory {memory()}"]))

    def _say_line(self, now: float) -> None:
        self._said, self._said_at = self.done, now
        self._say(self.line())

    def end(self) -> None:
        """Work that is no steps leaves a line on a terminal, too."""
        if self._columns is not None and self._outermost and not self._names and self.done > self._done_at_start:
            self._say(f"{self.label} {self.done}/{self.total} in {clock_time(self._clock() - self._start)}")

    def _row(self, metrics: Mapping[str, Any], took: float, columns: int) -> list[tuple[str, str]]:
        """(line, style) of a step: a row below its header, which is said again where there are new columns; with
        labels where that is wider than the terminal."""
        place = f"{self.done}/{self.total}"
        cells = {label.split()[0]: value for _, label, value in shown(metrics)}
        self._names, before = list(dict.fromkeys([*self._names, *cells])), self._names
        cells |= {"step": place, "s": f"{took:.1f}"}
        widths = {"step": max(4, 2 * len(str(self.total)) + 1), "dead": 4, "tok/s": 5, "s": 5}
        widths |= {label: 7 for _, label, form in SHOWN if not form}
        widths = {name: widths.get(name, max(6, len(name))) for name in ["step", *self._names, "s"]}
        head, row = (
            "  ".join(f"{of.get(n, ''):>{w}}" for n, w in widths.items()) for of in ({n: n for n in widths}, cells)
        )
        if max(len(head), len(row)) <= columns:
            return [(head, "dim")] * (self._names != before) + [(row, "")]
        items = [f"{self.label} {place}", *(f"{name} {cells[name]}" for name in [*self._names, "s"] if name in cells)]
        return [(line.plain, "") for line in flow(map(Text, items), columns)]

    def _note_trend(self, metrics: Mapping[str, Any]) -> None:
        for name in TRENDS:
            if metrics.get(name) is not None and isfinite(metrics[name]):
                self._trends[name].append(metrics[name])


def shown(metrics: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    """(name, label, value as text) of the SHOWN ones, and after the reward its parts, where there are several."""
    for name, label, form in SHOWN:
        value = metrics.get(name)
        if (
            name == "accuracy"
            and value is not None
            and isclose(metrics.get("reward", 9.0), 2 * value - 1, abs_tol=1e-5)
        ):
            continue  # the same in other words
        if value is not None and (value or name != "skipped_updates"):
            yield name, label, f"{value:{form}}" if form else compact(value)
        if name == "reward" and len(parts := metrics.get("rewards") or {}) > 1:
            yield from ((f"rewards.{part}", visible(part, lines=False), f"{of:{form}}") for part, of in parts.items())


def compact(value: float) -> str:
    """Two or three significant digits in seven characters at most: ``0.146``, ``-0.0123``, ``1.2e-5``; zero has no
    sign."""
    size = abs(value)
    if size and not 1e-3 <= size < 1e5:
        return f"{value:.1e}".replace("e-0", "e-").replace("e+0", "e+")
    if size >= 99.95 or 0 < size < 0.1:
        return f"{value:.0f}" if size > 1 else f"{value:.4f}"
    return f"{value + 0.0:#.3g}"


def flow(items: Iterable[Text], width: int) -> list[Text]:
    """Lines of whole items, two spaces between them."""
    lines = list[Text]()
    for item in items:
        if lines and lines[-1].cell_len + 2 + item.cell_len <= width:
            lines[-1] = Text.assemble(lines[-1], "  ", item)
        else:
            lines.append(item)
    return lines


def bar(done: float, total: int, width: int) -> Text:
    halves = round(2 * width * min(1.0, done / total)) if total else 0
    full = "━" * (halves // 2) + "╸" * (halves % 2)
    return Text.assemble((full, "bar.complete"), ("━" * (width - len(full)), "bar.back"))


def sparkline(values: Iterable[float]) -> str:
    """``▁▃▅█``: each between the least and the greatest of them."""
    values = list(values)
    low, high = min(values), max(values)
    return "".join(BLOCKS[round((v - low) / (high - low) * (len(BLOCKS) - 1)) if high > low else 3] for v in values)


def memory() -> str:
    """``3.1 of 11.6 GiB, peak 4.0``."""
    now, peak, total = (mib / 1024 for mib in memory_mib())
    return f"{now:.1f} of {total:.1f} GiB, peak {peak:.1f}"


def clock_time(seconds: float) -> str:
    """``0:07``, ``12:30``, ``1:02:03``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
