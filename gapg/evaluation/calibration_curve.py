"""What a calibration says: accuracy against the part of the problems that call, as a table and a picture."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from rich.table import Table

from gapg.config import RunConfig
from gapg.console import printable, say, tables, warn
from gapg.evaluation.calibrate import LIMIT, Calibration, MaskedPass
from gapg.evaluation.report import BLUE, GREEN, GREY, save_figure
from gapg.evaluation.statistics import wilson
from gapg.files import write_whole
from gapg.jsonl import to_json

matplotlib.use("agg")
from matplotlib import pyplot as plt

SHOWN = (0.0, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0)
"""Call fractions of the table."""


def report(
    decoded: MaskedPass, entry: Calibration, folder: Path, config: RunConfig, settings: Mapping[str, Any]
) -> None:
    """The table on standard output, and the same in `summary.json` and `curve.png` in the folder."""
    rows = [_figures(decoded, decoded.fit(c), c) for c in SHOWN]
    chosen = _figures(decoded, entry.bias, _wanted(decoded, entry))
    low, high = entry.interval
    how = "greedy" if entry.temperature == 0 else f"T={entry.temperature:g}"
    cloud = f"oracle: {config.oracle.kind}" if decoded.cloud_N is not None else "the oracle was not asked"
    tables.print(printable(f"{how}, on {entry.calibrated_on} ({cloud})"))
    table = Table()
    for column in ("wanted", "called", "together", "local", "bias"):
        table.add_column(column, justify="right")
    for row in [*rows, chosen]:
        table.add_row(
            f"{100 * row['wanted']:.4g}%" + (" *" if row is chosen else ""),
            f"{row['called']:.3f}",
            "" if row["accuracy"] is None else f"{row['accuracy']:.3f}",
            f"{row['local_accuracy']:.3f}",
            f"{row['bias']:.3f}" if abs(row["bias"]) < LIMIT - 1 else f"{math.copysign(math.inf, row['bias'])}",
        )
    tables.print(table)
    tables.print(
        f"* saved: bias {entry.bias:+.4f}; of {entry.new} new problems of the same kind "
        f"{low:.1%} to {high:.1%} will call (95%)"
    )
    if entry.call_below is not None:
        answered, called = (
            "-" if math.isnan(x) else f"{x:.1%}" for x in (chosen["right_answered"], chosen["right_called"])
        )
        tables.print(
            f"  calls agree with S < {entry.call_below:g} (S: its own chance of answering) on {entry.agreement:.1%}\n"
            f"  right when nobody is called: {answered} of those it answers, {called} of those it calls on"
        )
        if chosen["wanted"] in (0.0, 1.0):
            warn(
                f"{'none' if chosen['wanted'] == 0 else 'all'} of these {entry.n} problems have S < "
                f"{entry.call_below:g}: the bias follows from that chance alone, no problem has tried it"
            )
        n = round(entry.n * (1 - entry.called))
        known = config.marginal.cloud != "ignore"  # then S is another chance than that of a right answer
        if n and not known and wilson(round(n * chosen["right_answered"]), n)[1] < entry.call_below:
            warn(
                f"of those it answers {answered} are right, where S says {entry.call_below:.4g} or more: S is no such "
                "chance yet; train for longer, or use --cloud-fraction"
            )
    if decoded.cloud_N is None:
        say(f"accuracy together needs oracle.kind={config.oracle.kind} asked {entry.n} times: --accuracy does it")
    if decoded.reachable < chosen["wanted"]:
        warn(f"only {decoded.reachable:.1%} of the responses come to where the phrase could begin: no bias calls more")
    summary = {"chosen": chosen, "rows": rows, "temperature": entry.temperature, "calibrated_on": entry.calibrated_on}
    summary |= {"call_below": entry.call_below, "agreement": entry.agreement}
    summary |= {"interval": entry.interval, "new": entry.new, "oracle": config.oracle.kind, **settings}
    write_whole(folder / "summary.json", to_json(summary, indent=1) + "\n")
    plot(decoded, entry, f"{how}; calibration set: {entry.calibrated_on}", folder / "curve.png")


def _wanted(decoded: MaskedPass, entry: Calibration) -> float:
    """The part of the problems that should call."""
    _, below, wanted = entry.key
    return float(np.mean(decoded.stays < wanted)) if below else wanted


def _figures(decoded: MaskedPass, bias: float, wanted: float) -> dict[str, Any]:
    """`right_answered`, `right_called`: the part of the problems of each that is right when nobody is called."""
    local, together = decoded.accuracy(bias)
    answered, right_called = decoded.right_among(bias)
    called = float(decoded.chances(bias).mean())
    figures = {"wanted": wanted, "called": called, "bias": bias, "accuracy": together, "local_accuracy": local}
    return figures | {"right_answered": answered, "right_called": right_called}


def plot(decoded: MaskedPass, entry: Calibration, title: str, path: Path) -> None:
    """Accuracy against call fraction on the calibration set, with the chosen point and its interval."""
    points = [_figures(decoded, decoded.fit(c), c) for c in np.linspace(0.0, decoded.reachable, 41)]
    chosen = _figures(decoded, entry.bias, _wanted(decoded, entry))
    figure, axis = plt.subplots(figsize=(7, 5), layout="constrained")
    called = [p["called"] for p in points]
    if chosen["accuracy"] is not None:
        axis.plot(called, [p["accuracy"] for p in points], color=BLUE, label="together")
        axis.plot(chosen["called"], chosen["accuracy"], "*", color=BLUE, markersize=14, label=f"bias {entry.bias:+.3f}")
    axis.plot(called, [p["local_accuracy"] for p in points], color=GREEN, label="answered locally and right")
    wanted = "wanted" if entry.call_below is None else f"S < {entry.call_below:g}"
    axis.axvline(chosen["wanted"], color="black", linewidth=0.8, linestyle="--", label=wanted)
    axis.axvspan(*entry.interval, color=GREY, alpha=0.3, label=f"95% on {entry.new} new problems")
    axis.set(xlabel="call fraction", ylabel="accuracy")
    axis.set_title(printable(title), parse_math=False)  # a task's name may hold dollars
    axis.legend(fontsize=8)
    save_figure(figure, path)
    plt.close(figure)
