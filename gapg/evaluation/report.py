"""What the tables and the pictures of evaluations share."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.padding import Padding
from rich.table import Table

from gapg.console import printable, tables
from gapg.files import replacing

if TYPE_CHECKING:
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
    tables.print(table)


def print_suite(suite: Mapping[str, Any]) -> None:
    """What `gapg.evaluation.suite.together` found, on standard output: a column for each set, a row for each decoding
    under the figure that it shows; the means are over the sets averaged, those out of domain."""
    sets, table, averaged = suite["sets"], Table(), bool(suite["averaged"])
    table.add_column("", min_width=16)
    for one in sets:
        # a name may break after its dashes, which rich does not do
        name = printable(one["name"]).replace("-", "-\n")
        table.add_column(name + "\n(in domain)" * one["in_domain"], justify="right")
    if averaged:
        table.add_column("mean,\nout of\ndomain", justify="right")
    decodings = [row for row in suite["rows"] if "accuracy" in row["mean"]]
    alone = [row for row in suite["rows"] if "accuracy" not in row["mean"]]
    failed = any(cell["unknown"] for row in decodings for cell in row["sets"].values())
    for title, figure, rows in (
        ("together", "accuracy", decodings),
        ("called", "call_fraction", decodings),
        ("unknown", "unknown", decodings if failed else []),
        ("right", "local_accuracy", alone),
    ):
        if rows:
            table.add_row(title)
        for row in rows:
            values = [row["sets"][one["key"]][figure] for one in sets] + [row["mean"].get(figure)] * averaged
            table.add_row(Padding(printable(row["name"]), (0, 0, 0, 2)), *map(_cell, values))
        table.add_section()
    table.add_row("problems", *(str(one["n"]) for one in sets))
    if any(one["too_long"] for one in sets):
        table.add_row("too long, left out", *(str(one["too_long"]) for one in sets))
    # of many sets it is wider than others, rather than without its digits
    least = tables.measure(table, options=tables.options.update(width=10_000)).minimum
    table.width = least if least > tables.width else None
    tables.print(table, crop=False)


def _cell(value: float | None) -> str:
    """A count, or a part of a whole: `?` where nobody knows it."""
    if not isinstance(value, float):
        return "" if value is None else str(value)
    return "?" if math.isnan(value) else f"{value:.3f}"


def print_reliability(figures: Mapping[str, Any], forecast: str) -> None:
    """What `gapg.evaluation.reliability` found, on standard output; and what S was trained to be, in its words."""
    table = Table(title=f"the decision (greedy, help masked, n = {figures['n']})")
    table.add_column("")
    table.add_column("", justify="right")
    for key, name in (
        ("right", "right alone"),
        ("brier", "Brier score of S"),
        ("auroc", "AUROC of S"),
        ("margin_auroc", "AUROC of the help margin"),
    ):
        low, high = figures[f"{key}_low"], figures[f"{key}_high"]
        known = not math.isnan(figures[key])
        table.add_row(name, f"{figures[key]:.3f}  ({low:.3f} to {high:.3f})" if known else "undefined")
    table.add_row("calibration error of S", f"{figures['ece']:.3f}  ({figures['ece_by_chance']:.3f} if calibrated)")
    table.add_row("log score of S", f"{figures['log_score']:.3f}")
    tables.print(table)
    tables.print("S: the chance that the policy answers instead of calling,")
    tables.print(printable(f"   {forecast}"))


def save_figure(figure: Figure, path: Path) -> None:
    """Replaces the PNG at `path` in one go, and a link, which in someone else's folder may point anywhere.

    Raises DiskFull and ConfigError.
    """
    with replacing(path) as partial:
        figure.savefig(partial, dpi=110, format="png")
