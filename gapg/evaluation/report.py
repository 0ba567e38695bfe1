"""What the tables and the pictures of evaluations share."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

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


def save_figure(figure: Figure, path: Path) -> None:
    """Replaces the PNG at `path` in one go, and a link, which in someone else's folder may point anywhere.

    Raises DiskFull and ConfigError.
    """
    with replacing(path) as partial:
        figure.savefig(partial, dpi=110, format="png")
