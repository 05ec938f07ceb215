"""What the studies' plots share: one look, curves with bands over seeds, and both formats on disk."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Any

from lco_lite.study.base import Plot

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# of Okabe and Ito, told apart by the colour-blind too
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8C564B", "#7F7F7F", "#B2A800")
STYLE: Any = {
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "legend.frameon": False,
    "svg.hashsalt": "lco-lite",
    "svg.fonttype": "none",
}


def band(axes: Axes, label: str, x: Sequence[float], curves: Sequence[Sequence[float]], **style: Any) -> None:
    """The mean of ``curves`` (one a seed, all as long as ``x``) with ± one standard deviation over seeds around it."""
    means = [fmean(values) for values in zip(*curves, strict=True)]
    spreads = [stdev(values) if len(values) > 1 else 0.0 for values in zip(*curves, strict=True)]
    (line,) = axes.plot(x, means, label=label, **{"linewidth": 1.8, **style})
    low, high = ([m + sign * s for m, s in zip(means, spreads, strict=True)] for sign in (-1, 1))
    if axes.get_yscale() == "log":
        low = [value if value > 0 else mean / 10 for value, mean in zip(low, means, strict=True)]
    axes.fill_between(x, low, high, color=line.get_color(), alpha=0.15, linewidth=0)


def smoothed(values: Sequence[float], over: int) -> list[float]:
    """A running mean of the last ``over`` values; numbers that are not finite are passed over."""
    window: list[float] = []
    made = []
    for value in values:
        window = [*window, value][-over:]
        finite = [v for v in window if math.isfinite(v)]
        made.append(fmean(finite) if finite else math.nan)
    return made


def save(plot: Plot, folder: Path) -> None:
    """``NAME.svg`` and ``NAME.png``; the same numbers give the same bytes."""
    from cycler import cycler
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with rc_context(STYLE | {"axes.prop_cycle": cycler(color=COLOURS)}):
        figure = Figure(figsize=plot.size, layout="constrained")
        FigureCanvasAgg(figure)
        plot.draw(figure)
        figure.savefig(folder / f"{plot.name}.svg", metadata={"Date": None})
        figure.savefig(folder / f"{plot.name}.png", dpi=150)
