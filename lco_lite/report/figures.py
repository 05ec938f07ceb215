"""The page's figures as SVG and PNG: the same data, drawn by matplotlib."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lco_lite.files import write_errors
from lco_lite.study.base import Plot
from lco_lite.study.figures import COLOURS, save

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def draw(data: dict[str, Any], folder: Path, every: bool) -> int:
    """One ``ID.svg`` and ``ID.png`` a figure of ``gather``: of each task its scores, and the curves that the page shows
    first, or every one. Returns how many."""
    shown = [figure for figure in data["figures"] if every or figure["first"]]
    plots = [Plot(figure["id"], figure["metric"], _Curves(figure), (7.0, 4.0)) for figure in shown]
    for task in dict.fromkeys(row["task"] for row in data["scores"]):
        rows = [row for row in data["scores"] if row["task"] == task and row["main"]]
        labels = [row["label"] for row in rows]
        plots.append(Plot(f"scores-{task}", task, _Scores(rows, labels), (7.0, 1.2 + 0.35 * len(rows))))
    with write_errors(folder / "figure.svg"):
        folder.mkdir(parents=True, exist_ok=True)
        for plot in plots:
            save(plot, folder)
    return len(plots)


def study_pictures(study: Path, folder: Path) -> int:
    """Those that the study drew. Returns how many."""
    pictures = sorted([*study.glob("*.svg"), *study.glob("*.png")])
    with write_errors(folder / "figure.svg"):
        folder.mkdir(parents=True, exist_ok=True)
        for picture in pictures:
            if picture.parent.resolve() != folder.resolve():
                shutil.copyfile(picture, folder / picture.name)
    return len({picture.stem for picture in pictures})


class _Curves:
    """Thin lines are runs; a thick one with a band is the mean ± std of several."""

    def __init__(self, figure: dict[str, Any]) -> None:
        self.figure = figure

    def __call__(self, figure: Figure) -> None:
        from matplotlib.ticker import MaxNLocator

        axes = figure.subplots()
        for series in self.figure["series"]:
            colour, band = COLOURS[series["method"] % len(COLOURS)], series["band"]
            for run in series["runs"]:
                alone = (
                    {"linewidth": 1.8, "label": series["label"]} if band is None else {"linewidth": 0.7, "alpha": 0.5}
                )
                axes.plot(run["x"], run["y"], color=colour, marker="." if len(run["x"]) < 30 else None, **alone)
            if band is not None:
                low, high = ([m + s * d for m, d in zip(band["mean"], band["std"], strict=True)] for s in (-1, 1))
                if self.figure["share"]:
                    low, high = [max(0.0, value) for value in low], [min(1.0, value) for value in high]
                label = f"{series['label']} ({band['n']} seeds, mean ± std)"
                axes.plot(band["x"], band["mean"], color=colour, linewidth=2, label=label)
                axes.fill_between(band["x"], low, high, color=colour, alpha=0.15, linewidth=0)
        if self.figure["share"]:
            axes.set_ylim(_of_shares(axes.get_ylim(), axes.dataLim.intervaly, 1))
        axes.set_xlabel(f"step of {self.figure['kind']}")
        axes.set_ylabel(self.figure["metric"])
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.legend(fontsize=8)


class _Scores:
    """A dot a method with its 95 % interval; small dots are runs."""

    def __init__(self, rows: Sequence[dict[str, Any]], labels: Sequence[str]) -> None:
        self.rows, self.labels = rows, labels

    def __call__(self, figure: Figure) -> None:
        axes = figure.subplots()
        for place, row in enumerate(self.rows):
            scale = 1 if row["own"] else 100
            colour = COLOURS[row["method"] % len(COLOURS)]
            if row["interval"] is not None:
                axes.plot([scale * bound for bound in row["interval"]], [place, place], color=colour, linewidth=2)
            if len(row["runs"]) > 1:
                values = [scale * run["value"] for run in row["runs"]]
                axes.plot(values, [place + 0.2] * len(values), ".", color=colour, alpha=0.5)
            axes.plot(scale * row["mean"], place, "o", color=colour)
        if not self.rows[0]["own"]:
            axes.set_xlim(_of_shares(axes.get_xlim(), axes.dataLim.intervalx, 100))
        axes.set_yticks(range(len(self.rows)), self.labels)
        axes.invert_yaxis()
        axes.set_xlabel(f"{self.rows[0]['metric']}{'' if self.rows[0]['own'] else ', %'}, 95 % interval")


def _of_shares(limits: tuple[float, float], values: Sequence[float], most: float) -> tuple[float, float]:
    """The limits of an axis within 0 and ``most``, unless there are values outside of these."""
    low, high = limits
    return max(low, 0.0) if values[0] >= 0 else low, min(high, most) if values[1] <= most else high
