"""The picture of the baselines' comparison."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from gapg.studies.curves import cost_curve, curve
from gapg.studies.drawing import BLUE, COLOURS, GREEN, GREY, SMALL, interval_bars, mean_line, panels, percent
from gapg.studies.methods import accuracy, called

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from gapg.studies.baselines import Measured

GRID = np.linspace(0.0, 1.0, 201)


def draw(figure: Figure, measured: Measured) -> None:
    """Accuracy against calls and against money, GAPG's lead at the budget, and where the thresholds really land."""
    names = list(measured.methods)
    others = iter(c for c in COLOURS if c != BLUE)
    fixed = {"GAPG": BLUE, "+ random offloading": GREY, "warm start": "#718096"}
    colours = {name: fixed[name] if name in fixed else next(others) for name in names}
    axes = panels(figure, 2, 2, width=7.2, height=5.4)
    _curves(axes[0], measured, colours)
    _money(axes[1], measured, colours)
    _lead(axes[2], measured, colours)
    _landed(axes[3], measured, colours)
    seeds = len(measured.methods["GAPG"])
    problems = measured.methods["GAPG"][0].routed.score.size
    figure.suptitle(f"{problems:,} held-out problems, mean over {seeds} seed{'s' if seeds > 1 else ''}")


def _line(name: str) -> dict[str, Any]:
    if name == "GAPG":
        return {"linewidth": 2.8, "zorder": 5}
    return {"linestyle": "--" if name in ("+ random offloading", "warm start") else "-"}


def _curves(axis: Axes, measured: Measured, colours: dict[str, str]) -> None:
    for name, methods in measured.methods.items():
        y_SK = np.array([np.interp(GRID, (c := curve(m.routed)).called, c.accuracy) for m in methods])
        if name == "GAPG":
            mean_line(axis, GRID, y_SK, colours[name], name, **_line(name))
        else:
            axis.plot(GRID, y_SK.mean(0), color=colours[name], label=name, **{"linewidth": 1.4, **_line(name)})
    axis.axvline(measured.cloud_fraction, color="black", linewidth=0.8, linestyle=":")
    _cloud(axis, measured)
    axis.set(xlabel="called", ylabel="accuracy together", title="accuracy against calls, greedy")
    percent(axis, x=True, y=True)
    axis.legend(fontsize=SMALL, loc="lower right", title="+ : routers of the task-tuned model", title_fontsize=SMALL)


def _cloud(axis: Axes, measured: Measured) -> None:
    axis.axhline(measured.cloud(), color=GREEN, linewidth=0.8, linestyle=":")
    at: dict[str, Any] = {"transform": axis.get_yaxis_transform(), "va": "bottom", "fontsize": SMALL, "color": GREEN}
    axis.text(0.02, measured.cloud(), "cloud only", **at)


def _money(axis: Axes, measured: Measured, colours: dict[str, str]) -> None:
    price = measured.prices
    grid = np.geomspace(max(price.local, 0.001 * price.call), 1.2 * price.call, 300)
    for name, methods in measured.methods.items():
        curves = []
        for m in methods:
            c, spent = cost_curve(m.routed, price.local * m.samples, price.call, answers_first=m.answers_first)
            curves.append(np.interp(grid, spent, c.accuracy, left=np.nan, right=np.nan))
        y_SK = np.array(curves)
        axis.plot(grid, y_SK.mean(0), color=colours[name], **{"linewidth": 1.4, **_line(name)})
    _cloud(axis, measured)
    axis.set_xscale("log")
    unit = "cloud calls" if price.call == 1 else "the config's currency"
    axis.set(xlabel=f"cost of a problem, in {unit}", ylabel="accuracy together", title="accuracy against money, greedy")
    percent(axis, y=True)


def _lead(axis: Axes, measured: Measured, colours: dict[str, str]) -> None:
    ordered = sorted(measured.at_own().items(), key=lambda item: -item[1].mean)
    names = [name for name, _ in ordered]
    bars = [(d.mean * 100, d.low * 100, d.high * 100) for _, d in ordered]
    interval_bars(axis, names, bars, [colours[name] for name in names])
    for i, (name, d) in enumerate(ordered):
        jitter = np.linspace(-0.22, 0.22, len(d.per_seed)) if len(d.per_seed) > 1 else np.zeros(1)
        axis.scatter(np.array(d.per_seed) * 100, i + jitter, s=10, color=colours[name], alpha=0.5, linewidth=0)
    axis.set(
        xlabel="points (95% interval of the mean; dots: seeds)",
        title=f"GAPG less each method, {measured.cloud_fraction:.0%} called",
    )


def _landed(axis: Axes, measured: Measured, colours: dict[str, str]) -> None:
    for name, methods in measured.methods.items():
        found = [r for m in methods if (r := m.at_threshold(measured.cloud_fraction))]
        if found:
            axis.scatter([called(r) for r in found], [accuracy(r) for r in found], s=26, color=colours[name], alpha=0.8)
        trained = [m.trained for m in methods if m.trained and name != "warm start"]
        if trained:
            x, y = [called(r) for r in trained], [accuracy(r) for r in trained]
            axis.scatter(x, y, s=30, facecolors="none", edgecolors=colours[name])
    axis.axvline(measured.cloud_fraction, color="black", linewidth=0.8, linestyle=":")
    axis.set(
        xlabel="called",
        ylabel="accuracy together",
        title="where thresholds land on the held-out problems (rings: as trained)",
    )
    percent(axis, x=True, y=True)
