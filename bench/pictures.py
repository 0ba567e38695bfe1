"""The pictures of times: panels of bars, two beside each other."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

from record import Row

matplotlib.use("agg")
from matplotlib import pyplot as plt

OURS, OTHERS = "tab:orange", "tab:blue"


def grid(panels: Sequence[Callable[[Any], None]], path: Path, title: str) -> None:
    """Each panel draws on the axis it is given. Without panels there is no picture."""
    if not panels:
        return
    lines = -(-len(panels) // 2)
    figure, axes = plt.subplots(lines, 2, figsize=(15, 3.6 * lines), squeeze=False, layout="constrained")
    for axis, draw in zip(axes.flat, panels, strict=False):
        draw(axis)
        axis.tick_params(labelsize=7)
        axis.title.set_fontsize(9)
    for axis in axes.flat[len(panels) :]:
        axis.remove()
    figure.suptitle(title)
    figure.savefig(path, dpi=90)
    plt.close(figure)


def bars(
    axis: Any,
    rows: Mapping[str, Row],
    title: str,
    base: str,
    *,
    notes: Mapping[str, str] | None = None,
    by_time: bool = True,
) -> None:
    """Times of implementations relative to that of ``base``, with their 20% and 80% quantiles; ours are orange.

    Args:
        rows: each implementation's times.
        notes: what stands beside a bar's figure.
        by_time: the fastest on top; else in the order given.
    """
    order = sorted(rows, key=lambda impl: -rows[impl]["median"]) if by_time else list(rows)[::-1]
    unit = rows[base]["median"]
    for y, impl in enumerate(order):
        median, low, high = (rows[impl][key] / unit for key in ("median", "p20", "p80"))
        colour = "black" if impl.startswith("bare") else OURS if impl.startswith(("gapg", "+")) else OTHERS
        axis.barh(y, median, xerr=[[median - low], [high - median]], color=colour, height=0.7)
        note = (notes or {}).get(impl, "")
        axis.text(max(high, median), y, f" {median:.2f}{note}", va="center", fontsize=7)
    axis.axvline(1.0, color="black", linewidth=0.8, linestyle="--")
    axis.set_yticks(range(len(order)), order)
    axis.set_title(title)
    axis.margins(x=0.3)
