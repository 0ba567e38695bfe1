"""What one sees of `bench/roofline.py`: its tables, its picture, and measurements beside predictions."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("agg")
from matplotlib import pyplot as plt

Prediction = dict[str, Any]


def table(rows: list[Prediction], headings: Mapping[str, str]) -> str:
    """One block for each card and shape, in milliseconds; ``headings``: of the terms, by name."""
    lines = []
    ends = ("worst", "best", "floor")
    heading = f"{'':32}{'chunks':>7}" + "".join(f"{name:>9}" for name in (*headings.values(), *ends))
    for card, case in dict.fromkeys((row["card"], row["case"]) for row in rows):
        lines += ["", f"{card}, T H V = {case}: predicted milliseconds, the terms in the worst case", heading]
        for row in rows:
            if (row["card"], row["case"]) == (card, case):
                seconds = [row["terms"][name][1] for name in headings] + [row[key] for key in ends]
                lines.append(f"{row['impl']:32}{row['chunks']:7}" + "".join(f"{s * 1e3:9.2f}" for s in seconds))
    return "\n".join(lines)


def beside(found: list[tuple[Prediction, float]]) -> list[str]:
    """Measured seconds beside their predictions, one line each: where they lie between best and worst."""
    if not found:
        return ["  no row of this record has a prediction"]
    lines = [f"{'':26}{'':32}{'best':>9}{'worst':>9}{'measured':>10}"]
    for row, seconds in found:
        figures = f"{row['best'] * 1e3:9.2f}{row['worst'] * 1e3:9.2f}{seconds * 1e3:10.2f}"
        lines.append(f"{row['case']:26}{row['impl']:32}{figures}  {place(row, seconds)}")
    return lines


def place(row: Prediction, seconds: float) -> str:
    """Where a measurement lies, in words."""
    best, worst = row["best"], row["worst"]
    if seconds < best:
        return f"{1 - seconds / best:.0%} below best: an assumption is too low"
    if seconds > worst:
        return f"{seconds / worst - 1:.0%} above worst: the model lacks a term"
    return f"{(seconds - best) / (worst - best):.0%} of the way from best to worst" if worst > best else "as predicted"


def plot(rows: list[Prediction], path: Path) -> None:
    """Stacked terms of every head: solid what they cost in the best case, pale what the worst case adds."""
    cards, cases = (list(dict.fromkeys(row[key] for row in rows)) for key in ("card", "case"))
    figure, axes = plt.subplots(len(cases), len(cards), figsize=(13, 17), sharex="row", sharey=True, squeeze=False)
    names = list(rows[0]["terms"])
    colours = dict(zip(names, plt.get_cmap("tab10").colors, strict=False))  # type: ignore[attr-defined]
    for i, case in enumerate(cases):
        for j, card in enumerate(cards):
            axis = axes[i][j]
            here = [row for row in rows if (row["card"], row["case"]) == (card, case)]
            for y, row in enumerate(here):
                left = 0.0
                for alpha, pick in ((1.0, lambda part: part[0]), (0.35, lambda part: part[1] - part[0])):
                    for name in names:
                        width = pick(row["terms"][name]) * 1e3
                        label = name if y == 0 and alpha == 1.0 else None
                        axis.barh(y, width, left=left, color=colours[name], alpha=alpha, label=label)
                        left += width
                axis.plot([row["floor"] * 1e3] * 2, [y - 0.45, y + 0.45], color="black", linewidth=1)
            axis.set_xlim(0, 1.03e3 * max(row["worst"] for row in rows if row["case"] == case))
            axis.set_title(f"{card}, T H V = {case}", fontsize=9)
            axis.set_yticks(range(len(here)), [row["impl"] for row in here], fontsize=8)
            axis.set_xlabel("predicted ms", fontsize=8)
            axis.tick_params(axis="x", labelsize=8)
    axes[0][0].invert_yaxis()
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.suptitle(
        "Predicted, not measured. Solid: the best case. Pale: what the worst case adds. Black mark: the products alone."
    )
    figure.legend(handles, labels, loc="lower center", ncols=len(names), fontsize=8)
    figure.tight_layout(rect=(0, 0.02, 1, 0.99))
    figure.savefig(path, dpi=90)
    plt.close(figure)
