"""The quickstart's picture: methods against the budget, curves over steps, seconds per phase."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib import colormaps
from matplotlib.figure import Figure

from gapg.console import printable
from gapg.evaluation.report import BLUE, GREEN, GREY, ORANGE, save_figure
from gapg.jsonl import read_jsonl


def draw(folder: Path, summary: dict[str, Any], path: Path) -> None:
    """One PNG."""
    metrics = [row for row in read_jsonl(folder / "metrics.jsonl") if row.get("step", 0) > 0]
    figure = Figure(figsize=(13, 9), layout="constrained")
    axes = figure.subplots(2, 2)
    _methods(axes[0, 0], summary)
    _curves(axes[0, 1], folder, summary["method"])
    _budget(axes[1, 0], metrics, summary["cloud_fraction"])
    _phases(axes[1, 1], metrics, summary["method"])
    title = printable(f"{folder.name}: seed {summary['seed']}, oracle: {summary['oracle']}")
    figure.suptitle(title, parse_math=False)  # a name may hold dollars
    save_figure(figure, path)


def _methods(axis: Any, summary: dict[str, Any]) -> None:
    rows = [r for r in summary["rows"] if r["name"] != "cloud only"]
    colours = colormaps["tab10"]
    for i, row in enumerate(rows):
        error = [[row["accuracy"] - row["accuracy_low"]], [row["accuracy_high"] - row["accuracy"]]]
        marker = "*" if row["name"].startswith(f"{summary['method']},") else "o"
        point = (row["call_fraction"], row["accuracy"])
        axis.errorbar(*point, yerr=error, fmt=marker, color=colours(i % 10), capsize=3, label=row["name"])
    axis.axvline(summary["cloud_fraction"], color="black", linewidth=0.8, linestyle="--", label="cloud budget")
    cloud = next((r for r in summary["rows"] if r["name"] == "cloud only"), None)
    if cloud:
        axis.axhline(cloud["accuracy"], color=GREEN, linewidth=0.8, linestyle=":", label="cloud only")
    axis.set(xlabel="call fraction", ylabel="accuracy together", title="held-out problems, 95% intervals")
    axis.legend(loc="center left", bbox_to_anchor=(0.12, 0.5), fontsize=7)


def _curves(axis: Any, folder: Path, method: str) -> None:
    runs = ((method, folder, BLUE), ("task-tuned", folder / "task-tuned", ORANGE))
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
    if "marginal/right" in metrics[0]:
        axis.plot(steps, [r["marginal/right"] for r in metrics], color=GREY, label="right without a call")
    else:
        axis.plot(steps, [r["alpha_c"] for r in metrics], color=GREY, label="alpha_c")
    axis.plot(steps, [r["local_accuracy"] for r in metrics], color=GREEN, linewidth=0.8, label="local accuracy")
    axis.axhline(cloud_fraction, color="black", linewidth=0.8, linestyle="--", label="cloud budget")
    axis.set(xlabel="step", ylim=(0, 1), title="the budget, step by step")
    axis.legend(fontsize=8)


def _phases(axis: Any, metrics: list[dict[str, Any]], method: str) -> None:
    names = [
        key.removeprefix("seconds/") for key in dict.fromkeys(k for r in metrics for k in r if k.startswith("seconds/"))
    ]
    totals = [sum(r.get(f"seconds/{name}", 0.0) for r in metrics) for name in names]
    bars = axis.barh(names, totals, color=BLUE)
    axis.bar_label(bars, fmt="%.1f s", fontsize=8, padding=3)
    axis.invert_yaxis()
    axis.margins(x=0.15)
    axis.set(xlabel="seconds", title=f"time spent per phase, {method} run")
