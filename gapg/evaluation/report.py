"""Tables and pictures of a run, drawn from the files it wrote."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
from rich.console import Console
from rich.table import Table

from gapg.files import partial_name, writing
from gapg.jsonl import read_jsonl
from gapg.runs.tracking import printable

matplotlib.use("agg")
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

BLUE, ORANGE, GREY, GREEN = "#2b6cb0", "#dd6b20", "#a0aec0", "#2f855a"


def print_table(rows: Sequence[dict[str, Any]], cloud_fraction: float | None = None) -> None:
    """The rows of a summary on standard output, each figure with its 95% interval; and where calls failed, how many."""
    table = Table(title=None if cloud_fraction is None else f"cloud budget {cloud_fraction:.0%}")
    failed = any(row.get("unknown") for row in rows)
    for column in ("", "together", "local", "called", "n", *(["unknown"] if failed else [])):
        table.add_column(column, justify="right" if column else "left")
    for row in rows:
        low, high = row["accuracy_low"], row["accuracy_high"]
        cells = (
            row["name"],
            "unknown" if math.isnan(row["accuracy"]) else f"{row['accuracy']:.3f}  ({low:.3f} to {high:.3f})",
            f"{row['local_accuracy']:.3f}",
            f"{row['call_fraction']:.3f}",
            str(row["n"]),
            *([str(row.get("unknown", 0))] if failed else []),
        )
        table.add_row(*map(printable, cells))
    Console(highlight=False, markup=False, emoji=False, width=100).print(table)


def save_figure(figure: Figure, path: Path) -> None:
    """Replaces the PNG at `path` in one go, and a link, which in someone else's folder may point anywhere.

    Raises DiskFull and ConfigError.
    """
    partial = partial_name(path)
    with writing(path):
        try:
            figure.savefig(partial, dpi=110, format="png")
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)


def plot_run(folder: Path, summary: dict[str, Any], path: Path) -> None:
    """One PNG: methods against the budget, curves over steps, seconds per phase."""
    metrics = [row for row in read_jsonl(folder / "metrics.jsonl") if row.get("step", 0) > 0]
    figure, axes = plt.subplots(2, 2, figsize=(13, 9), layout="constrained")
    _methods(axes[0, 0], summary)
    _curves(axes[0, 1], folder, summary["cloud_fraction"])
    _budget(axes[1, 0], metrics, summary["cloud_fraction"])
    _phases(axes[1, 1], metrics)
    title = printable(f"{folder.name}: seed {summary['seed']}, oracle: {summary['oracle']}")
    figure.suptitle(title, parse_math=False)  # a name may hold dollars
    save_figure(figure, path)
    plt.close(figure)


def _methods(axis: Any, summary: dict[str, Any]) -> None:
    rows = [r for r in summary["rows"] if r["name"] != "cloud only"]
    colours = plt.get_cmap("tab10")
    for i, row in enumerate(rows):
        error = [[row["accuracy"] - row["accuracy_low"]], [row["accuracy_high"] - row["accuracy"]]]
        marker = "*" if row["name"].startswith("GAPG") else "o"
        point = (row["call_fraction"], row["accuracy"])
        axis.errorbar(*point, yerr=error, fmt=marker, color=colours(i % 10), capsize=3, label=row["name"])
    axis.axvline(summary["cloud_fraction"], color="black", linewidth=0.8, linestyle="--", label="cloud budget")
    cloud = next((r for r in summary["rows"] if r["name"] == "cloud only"), None)
    if cloud:
        axis.axhline(cloud["accuracy"], color=GREEN, linewidth=0.8, linestyle=":", label="cloud only")
    axis.set(xlabel="call fraction", ylabel="accuracy together", title="held-out problems, 95% intervals")
    axis.legend(loc="center left", bbox_to_anchor=(0.12, 0.5), fontsize=7)


def _curves(axis: Any, folder: Path, cloud_fraction: float) -> None:
    runs = (("GAPG", folder, BLUE), ("task-tuned", folder / "task-tuned", ORANGE))
    for name, where, colour in runs:
        rows = [r for r in read_jsonl(where / "metrics.jsonl") if "eval/accuracy" in r]
        steps = [r["step"] for r in rows]
        if rows:
            axis.plot(steps, [r["eval/accuracy"] for r in rows], color=colour, label=f"{name}: together")
            axis.plot(steps, [r["eval/local_accuracy"] for r in rows], color=colour, ls="--", label=f"{name}: local")
    axis.set(xlabel="step", ylabel="accuracy", title="validation problems, T = 1")
    axis.legend(fontsize=8)


def _budget(axis: Any, metrics: list[dict[str, Any]], cloud_fraction: float) -> None:
    steps = [r["step"] for r in metrics]
    axis.plot(
        steps, [r["call_fraction"] for r in metrics], color=BLUE, linewidth=0.8, label="called (training samples)"
    )
    axis.plot(steps, [r["alpha_c"] for r in metrics], color=GREY, label="alpha_c")
    axis.plot(steps, [r["local_accuracy"] for r in metrics], color=GREEN, linewidth=0.8, label="local accuracy")
    axis.axhline(cloud_fraction, color="black", linewidth=0.8, linestyle="--", label="cloud budget")
    axis.set(xlabel="step", ylim=(0, 1), title="the budget, step by step")
    axis.legend(fontsize=8)


def _phases(axis: Any, metrics: list[dict[str, Any]]) -> None:
    names = [
        key.removeprefix("seconds/") for key in dict.fromkeys(k for r in metrics for k in r if k.startswith("seconds/"))
    ]
    totals = [sum(r.get(f"seconds/{name}", 0.0) for r in metrics) for name in names]
    bars = axis.barh(names, totals, color=BLUE)
    axis.bar_label(bars, fmt="%.1f s", fontsize=8, padding=3)
    axis.invert_yaxis()
    axis.margins(x=0.15)
    axis.set(xlabel="seconds", title="time spent per phase, GAPG run")
