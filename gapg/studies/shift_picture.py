"""The picture of the shift study, drawn from its raw rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from gapg.studies.drawing import COLOURS, GREY, SMALL, panels, percent

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def draw(figure: Figure, rows: Sequence[Mapping[str, Any]], names: Sequence[str], edges: Sequence[float]) -> None:
    """Calls against failures by set, the same by difficulty, precision and recall, and success by the help margin."""
    sets, difficulty, decisions, margins = panels(figure, 4, width=4.8)
    for name, colour in zip(names, COLOURS, strict=False):
        of_set = [row for row in rows if row["set"] == name]
        sets.plot([r["failed"] for r in of_set], [r["called"] for r in of_set], "o", color=colour, label=name)
        known = [r for r in of_set if r["precision"] is not None and r["recall"] is not None]
        decisions.plot([r["recall"] for r in known], [r["precision"] for r in known], "o", color=colour, label=name)
        points = [b for r in of_set for b in r["buckets"] if b["n"]]
        difficulty.scatter(
            [b["failed"] for b in points], [b["called"] for b in points], s=[3 + b["n"] / 15 for b in points],
            color=colour, alpha=0.7, label=name,
        )  # fmt: skip
        centres = [edges[0] - 1.5, *(np.add(edges[:-1], edges[1:]) / 2), edges[-1] + 1.5]
        right = [_mean_bin(of_set, i) for i in range(len(centres))]
        margins.plot(centres, right, "o-", color=colour, markersize=4, label=name)
    for axis in (sets, difficulty):
        axis.plot([0, 1], [0, 1], color=GREY, linewidth=0.8, linestyle="--")
        axis.set(xlabel="fails alone", ylabel="called")
        percent(axis, x=True, y=True)
    sets.set_title("sets, a dot a seed")
    difficulty.set_title("by the number of ways to the target")
    decisions.set(xlabel="recall: failures that are called", ylabel="precision: calls that fail alone")
    decisions.set_title("calls against its own failures")
    percent(decisions, x=True, y=True)
    implied = float(np.mean([row["implied"] for row in rows]))
    margins.axhline(implied, color="black", linewidth=0.8, linestyle="--", label="alpha_c P(oracle right)")
    margins.axvline(0, color="black", linewidth=0.8)
    margins.set(xlabel="help margin, logits", ylabel="right alone", title="success at the call boundary")
    percent(margins, y=True)
    for axis in (sets, margins):
        axis.legend(fontsize=SMALL)


def _mean_bin(rows: Sequence[Mapping[str, Any]], i: int) -> float:
    """Over the seeds, weighed by their problems; NaN, which is not drawn, for an empty bin."""
    bins = [row["boundary"]["bins"][i] for row in rows]
    n = sum(b["n"] for b in bins)
    return sum(b["n"] * b["right"] for b in bins if b["n"]) / n if n else float("nan")
