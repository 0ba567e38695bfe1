"""How the studies' pictures look: one plain style, the colours of the reports, a few shapes that come up again."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from gapg.evaluation.report import BLUE as BLUE
from gapg.evaluation.report import GREEN as GREEN
from gapg.evaluation.report import GREY as GREY
from gapg.evaluation.report import ORANGE as ORANGE

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

RED, PURPLE, TEAL, BROWN, PINK = "#c53030", "#6b46c1", "#319795", "#8d5524", "#d53f8c"
COLOURS = (
    BLUE, ORANGE, GREEN, PURPLE, RED, TEAL, BROWN, PINK,
    "#b7791f", "#4a5568", "#63b3ed", "#68d391", "#f6ad55", "#b794f4",
)  # fmt: skip
"""In the order to give them out; grey is left for what is only there to compare with."""
SMALL = 8


def panels(figure: Figure, columns: int, rows: int = 1, *, width: float = 5.6, height: float = 4.4) -> list[Axes]:
    """Plain axes on a figure sized for them, row by row: no frame at top and right, a pale grid behind the data."""
    figure.set_size_inches(width * columns, height * rows)
    axes: list[Axes] = list(np.atleast_1d(figure.subplots(rows, columns)).ravel())
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(True, color="#e2e8f0", linewidth=0.8)
        axis.set_axisbelow(True)
        axis.tick_params(labelsize=SMALL)
    return axes


def percent(axis: Axes, *, x: bool = False, y: bool = False) -> None:
    """Shows fractions on an axis as percent."""
    from matplotlib.ticker import PercentFormatter

    if x:
        axis.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=None))
    if y:
        axis.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=None))


def seeds_strip(axis: Axes, names: Sequence[str], values: Sequence[Sequence[float]], colours: Sequence[str]) -> None:
    """A line of dots a name, one a seed, with a bar at the mean; the first name is on top."""
    for i, (of_seeds, colour) in enumerate(zip(values, colours, strict=True)):
        jitter = np.linspace(-0.16, 0.16, len(of_seeds)) if len(of_seeds) > 1 else np.zeros(1)
        axis.scatter(of_seeds, i + jitter, s=18, color=colour, alpha=0.75, linewidth=0)
        mean = float(np.mean(of_seeds))
        axis.plot([mean, mean], [i - 0.32, i + 0.32], color=colour, linewidth=2.2)
    axis.set_yticks(range(len(names)), names, fontsize=SMALL)
    axis.invert_yaxis()
    axis.grid(False, axis="y")


def line_over(axis: Axes, rows: Sequence[dict[str, Any]], x: str, y: str, colour: str, label: str) -> None:
    """The mean over seeds of figure `y` against `x`, and a dot a seed."""
    means = pd.DataFrame(rows).groupby(x)[y].mean()
    axis.plot(means.index, means, color=colour, label=label)
    axis.plot([row[x] for row in rows], [row[y] for row in rows], "o", color=colour, markersize=4, alpha=0.6)


BANDS = ((0.04, 0.25), (0.02, 0.45))
"""(how far from the budget, how dark)."""


def budget_spans(axis: Axes, target: float) -> None:
    """Bands of ±2 and ±4 points around the target on the x axis."""
    for width, alpha in BANDS:
        axis.axvspan(target - width, target + width, color=GREY, alpha=alpha, linewidth=0, zorder=0)
    axis.axvline(target, color="black", linewidth=0.8, linestyle="--")


def budget_bands(axis: Axes, *, error: bool = False, high: float = 0.6) -> None:
    """Bands of ±2 and ±4 points around what a target on the x axis asks for: a slope, or with `error` around 0."""
    x = np.array([0.0, high])
    middle, unit = (np.zeros(2), 100.0) if error else (x, 1.0)
    for width, alpha in BANDS:
        low, top = middle - width * unit, middle + width * unit
        axis.fill_between(x, low, top, color=GREY, alpha=alpha, linewidth=0, label=f"±{width * 100:.0f} points")
    axis.plot(x, middle, color="black", linewidth=0.8, linestyle="--")
