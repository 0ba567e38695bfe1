"""The picture of `bench/gpu_report.py`: ratios to the bare products, the roofline, errors, the update."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib

import heads_report
import roofline
from gpu_goals import HasRows
from record import Row

matplotlib.use("agg")
from matplotlib import pyplot as plt

OURS, OTHERS = "tab:orange", "tab:blue"


def plot(results: HasRows, machine: dict[str, Any], path: Path) -> None:
    """A panel for each case of the head, then the roofline, the errors and the update, of what came back."""
    panels: list[Callable[[Any], None]] = []
    for name in ("kernels", "peers", "cutlass"):  # rows of two runs are never in one panel
        panels += [_head(f"{name}: {case}", times) for case, times in _by_case(results.rows(name)).items()]
    matched = _matched(
        [row for name in ("kernels", "tiles", "peers", "cutlass") for row in results.rows(name)], machine
    )
    panels += [lambda axis: _roofline(axis, matched)] * bool(matched)
    panels += [lambda axis: _errors(axis, results.rows("errors"))] * bool(results.rows("errors"))
    panels += [_updates(case, times) for case, times in _by_case(results.rows("update")).items()]
    lines = max(1, -(-len(panels) // 2))
    figure, axes = plt.subplots(lines, 2, figsize=(15, 3.8 * lines), squeeze=False, layout="constrained")
    for axis, draw in zip(axes.flat, panels, strict=False):
        draw(axis)
        axis.tick_params(labelsize=7)
        axis.title.set_fontsize(9)
    for axis in axes.flat[len(panels) :]:
        axis.remove()
    figure.suptitle(machine["device"])
    figure.savefig(path, dpi=90)
    plt.close(figure)


def _matched(rows: list[Row], machine: dict[str, Any]) -> list[tuple[dict[str, Any], float]]:
    try:
        return roofline.matched(rows, roofline.card_of(machine))
    except ValueError:  # a card without a prediction has no such panel
        return []


def _by_case(rows: list[Row]) -> dict[str, dict[str, Row]]:
    """{case: {implementation: its row of times}} of one record."""
    found: dict[str, dict[str, Row]] = {}
    for row in rows:
        if row.get("metric") == "time":
            found.setdefault(row["case"], {})[row["impl"]] = row
    return found


def _bars(axis: Any, times: dict[str, Row], base: str, title: str) -> None:
    """Times relative to one of them, the fastest on top; whiskers are the 20% and 80% quantiles."""
    order = sorted(times, key=lambda impl: -times[impl]["median"])
    unit = times[base]["median"]
    for y, impl in enumerate(order):
        median, low, high = (times[impl][key] / unit for key in ("median", "p20", "p80"))
        colour = "black" if impl == heads_report.FLOOR else OURS if impl.startswith(("gapg", "+")) else OTHERS
        note = ", sums a cross entropy" if times[impl].get("computes") == heads_report.ENTROPY else ""
        axis.barh(y, median, xerr=[[median - low], [high - median]], color=colour, height=0.7)
        axis.text(max(high, median), y, f" {median:.2f}{note}", va="center", fontsize=7)
    axis.axvline(1.0, color="black", linewidth=0.8, linestyle="--")
    axis.set_yticks(range(len(order)), order)
    axis.set_title(title)
    axis.margins(x=0.2)


def _head(title: str, times: dict[str, Row]) -> Callable[[Any], None]:
    return lambda axis: _bars(axis, times, heads_report.FLOOR, f"{title}: times the bare products")


def _updates(case: str, times: dict[str, Row]) -> Callable[[Any], None]:
    base = next(reversed([impl for impl in times if impl.startswith(("gapg", "+"))] or list(times)))
    return lambda axis: _bars(axis, times, base, f"one update, times {base!r}: {case}")


def _roofline(axis: Any, matched: list[tuple[dict[str, Any], float]]) -> None:
    """From best to worst as a line, what was measured as a point."""
    for y, (predicted, seconds) in enumerate(reversed(matched)):
        best, worst = predicted["best"] * 1e3, predicted["worst"] * 1e3
        axis.plot([best, worst], [y, y], color="grey", linewidth=5, alpha=0.5)
        inside = best <= seconds * 1e3 <= worst
        axis.plot(seconds * 1e3, y, "o", color="tab:green" if inside else "tab:red")
    axis.set_yticks(range(len(matched)), [f"{p['impl']}\n{p['case']}" for p, _ in reversed(matched)])
    axis.set_title("predicted before the run (grey, best to worst) and measured (red: outside), ms")


def _errors(axis: Any, rows: list[Row]) -> None:
    """Relative error of dH by entropy."""
    found = [row for row in rows if row.get("metric") == "dH_error"]
    cases = list(dict.fromkeys(row["case"] for row in found))
    for impl in dict.fromkeys(row["impl"] for row in found):
        line = {row["case"]: row["median"] for row in found if row["impl"] == impl}
        points = [i for i, case in enumerate(cases) if case in line]
        colour = {"color": OURS} if impl == "gapg fused_policy_loss" else {"alpha": 0.5}
        axis.plot(points, [line[cases[i]] for i in points], "o-", label=impl, **colour)
    axis.set_yscale("log")
    axis.set_xticks(range(len(cases)), cases)
    axis.set_title("relative error of dH by entropy, against float64")
    axis.legend(fontsize=6)
