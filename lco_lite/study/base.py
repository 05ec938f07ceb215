"""What a study is: a question, a grid of cells that answers it, and what their numbers say.

A cell is one piece of work on one seed: a training run with its scores (``train``), or a look at a model (a probe). All
cells of a seed start from the same warm-up and reward model, so that differences between cells are paired by seed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, Field, FiniteFloat

from lco_lite.errors import DataError
from lco_lite.files import Count, read_json
from lco_lite.study.statistics import Interval, paired

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from lco_lite.recipe import Recipe

FEWEST = 3  # seeds that a verdict takes
TUNING_SEED = 0  # rates are chosen on it; scores are of the seeds from 1 on
Row = dict[str, Any]
"""What came out of a cell, as JSON: what its work returned, with its label, seed, settings and seconds; ``start``: the
scores of its seed's warm-up and reward model, by stage and task."""
Verdict = Literal["reproduced", "not reproduced", "unclear"]


class ScoreOfRow(BaseModel):
    mean: FiniteFloat


class RowKept(BaseModel):
    """``row.json``, as far as every study reads it."""

    id: str
    label: str
    seed: Count
    version: str
    seconds: Annotated[FiniteFloat, Field(ge=0)]
    failed: str | None = None
    before: ScoreOfRow | None = None
    after: ScoreOfRow | None = None
    scores: dict[str, dict[str, Any]] = {}
    updates: dict[str, list[FiniteFloat | None]] = {}
    steps: list[dict[str, Any]] = []


def read_row(file: Path, cell: str) -> Row:
    """What came out of the cell of this id. DataError where it is damaged, or another cell's."""
    remedy = "Delete it, and its run is made again"
    row = dict(read_json(file, RowKept, remedy))
    if row["id"] != cell:
        raise DataError(f"{file}: is that of {row['id']}, not of {cell}. {remedy}")
    return row


@dataclass(frozen=True)
class Cell:
    """``sets``: fields of the recipe, by dotted key. ``work``: ``train``, or MODULE:FUNCTION of this package, which is
    called with the cell's Context and ``options`` and returns a JSON object."""

    label: str
    seed: int
    sets: Mapping[str, Any] = field(default_factory=dict)
    work: str = "train"
    options: Mapping[str, Any] = field(default_factory=dict)


class Results:
    """The rows of a study's finished cells."""

    def __init__(self, rows: Iterable[Row] = ()) -> None:
        self.rows = list(rows)

    def labels(self) -> list[str]:
        return list(dict.fromkeys(row["label"] for row in self.rows))

    def of(self, label: str, tuning: bool = False) -> list[Row]:
        """By seed, without the one that rates are chosen on, or that alone. Runs that diverged are among them."""
        rows = [r for r in self.rows if r["label"] == label and (r["seed"] == TUNING_SEED) == tuning]
        return sorted(rows, key=lambda row: row["seed"])

    def ended(self, label: str) -> list[Row]:
        """Those of ``of`` that did not diverge, whose curves are as long as each other."""
        return [row for row in self.of(label) if row.get("failed") is None]

    def by_seed(self, label: str, number: Callable[[Row], float | None] | None = None) -> dict[int, float]:
        """Seed -> a number of its row, the score unless ``number`` says otherwise; not of seeds that have none."""
        values = {row["seed"]: (number or score)(row) for row in self.of(label)}
        return {seed: value for seed, value in values.items() if value is not None}

    def difference(self, a: str, b: str, number: Callable[[Row], float | None] | None = None) -> Interval | None:
        """``a`` less ``b`` over the seeds that both have; None for fewer than two."""
        return paired(self.by_seed(a, number), self.by_seed(b, number))


def score(row: Row) -> float | None:
    """Of the policy after training, the task's main metric: 0 to 1 for pass@1. None where there is none."""
    after = row.get("after")
    return None if after is None else float(after["mean"])


def seen(row: Row, metric: str, step: int | None = None) -> list[float]:
    """A metric at each update that has it, of one phase or of all."""
    values = row["updates"].get(metric, [])
    steps = row["updates"].get("step", [])
    return [v for v, s in zip(values, steps, strict=False) if v is not None and step in (None, s)]


@dataclass(frozen=True)
class Claim:
    """``threshold`` was written down before the study ran; ``why`` has the numbers."""

    name: str
    says: str
    threshold: str
    verdict: Verdict
    why: str


@dataclass(frozen=True)
class Table:
    """One CSV file ``NAME.csv`` and one table of the page. Cells are text or numbers."""

    name: str
    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]
    shown: bool = True  # on the page too, not as CSV alone


@dataclass(frozen=True)
class Plot:
    """One picture ``NAME.svg`` and ``NAME.png``; ``draw`` fills an empty figure of ``size`` inches."""

    name: str
    title: str
    draw: Callable[[Figure], None]
    size: tuple[float, float] = (8.0, 4.5)


@dataclass(frozen=True)
class Findings:
    claims: Sequence[Claim]
    tables: Sequence[Table] = ()
    plots: Sequence[Plot] = ()
    notes: Sequence[str] = ()  # paragraphs: what was cut, what is not comparable


class Study:
    """One file of this package each. ``name`` is its name on the command line, ``asks`` its question in one line."""

    name: str
    asks: str
    recipe: str = "quickstart"
    # --set items for this recipe: the same in all studies, so that they share cells
    usual: Sequence[str] = ("rl.steps=8", "rl.schedule=cosine", "eval.seeds=1", "eval.samples=8")
    seeds: int = 8
    labels: Sequence[str]  # of its cells, but those that find a rate
    only: Sequence[str] = ()  # these labels alone; none: all

    def cells(self, recipe: Recipe, seeds: Sequence[int], done: Results) -> list[Cell]:
        """All cells that can be named by now. It is asked again whenever all of them are done: what is tuned first
        comes first. ``recipe``: as given, under the user's ``--set``."""
        raise NotImplementedError

    def report(self, results: Results) -> Findings:
        """From whatever is done so far; a claim without its cells is unclear."""
        raise NotImplementedError


def told(interval: Interval | None) -> str:
    return "not measured yet" if interval is None else str(interval)


def judged(interval: Interval | None, at_least: float = 0.0) -> Verdict:
    """Of a claim that a difference exceeds ``at_least``: its 95 % interval lies above, below or around it. Fewer than
    ``FEWEST`` seeds tell nothing: by chance their differences are equal now and then."""
    if interval is None or interval.n < FEWEST:
        return "unclear"
    return "reproduced" if interval.low > at_least else "not reproduced" if interval.high < at_least else "unclear"


def ahead(results: Results, name: str, a: str, b: str) -> Claim:
    """The claim that ``a`` scores higher than ``b``."""
    found = results.difference(a, b)
    threshold = "the interval of the paired difference in pass@1 lies above 0."
    return Claim(name, f"{a} is ahead of {b}.", threshold, judged(found), f"Difference {told(found)}.")


def against(ratios: Mapping[int, float], bound: float, above: bool) -> tuple[Verdict, str]:
    """Whether a ratio's geometric mean over seeds lies above, or below, ``bound``; and it with its interval.
    ``ratios``: seed -> its log."""
    interval = paired(ratios, dict.fromkeys(ratios, 0.0))
    if interval is None:
        return "unclear", "–"
    mean, low, high, p, n = interval
    verdict = (
        judged(interval, math.log(bound)) if above else judged(Interval(-mean, -high, -low, p, n), -math.log(bound))
    )
    return verdict, f"{math.exp(mean):.3g} [{math.exp(low):.3g}, {math.exp(high):.3g}], n = {n}"
