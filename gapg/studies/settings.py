"""One setting moved and all else kept: how a setting's runs do, beside the default's, on the same problems."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from gapg.studies.curves import FloatArray, Routed, accuracies_at
from gapg.studies.drawing import COLOURS, SMALL, percent, seeds_strip
from gapg.studies.methods import Rows, by_label, interval, routed, seeds_range, unanswered, without
from gapg.studies.paired import Difference, paired_difference
from gapg.studies.routers import help_margins
from gapg.studies.study import Finished, Table

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LAST = 20
"""Training steps at the end of a run over which its call fraction and alpha_c are averaged."""


def called(rows: Sequence[Mapping[str, Any]]) -> FloatArray:
    """[n] 1 where the response called."""
    return np.array([row["outcome"].startswith("cloud") for row in rows], dtype=np.float64)


def correctness(rows: Sequence[Mapping[str, Any]]) -> FloatArray:
    """[n] how right what came out is: 1 for a right local answer, the oracle's mean correctness for a call."""
    local = np.array([row["outcome"] == "local_correct" for row in rows], dtype=np.float64)
    cloud = np.array([row["oracle_score"] or 0.0 for row in rows], dtype=np.float64)
    return np.asarray(np.where(called(rows) > 0, cloud, local), dtype=np.float64)


def own_curve(name: str, masked: Rows) -> Routed:
    """A policy's greedy answers, routed by its own help margin."""
    return routed(name, masked, help_margins(masked))


def failures(finished: Iterable[Finished]) -> set[str]:
    """The problems on which the cloud failed in any of these runs: left out of all, so that all stay paired."""
    runs = list(finished)
    sampled = {row["id"] for f in runs for row in f.rows("heldout-sampled") if row["outcome"] == "unknown"}
    return sampled | unanswered(f.rows("heldout-masked") for f in runs)


def steps(finished: Finished) -> list[dict[str, Any]]:
    """The metrics of the training steps, without the row of an evaluation before the first."""
    return [row for row in finished.metrics() if "call_fraction" in row]


def figures(finished: Finished, left_out: set[str]) -> dict[str, Any]:
    """A run's raw row: as trained (T = 1) on the held-out problems, greedy at its cloud fraction, and how it ended."""
    c, sampled = finished.config.budget.cloud_fraction, without(finished.rows("heldout-sampled"), left_out)
    own = own_curve(finished.unit.label, without(finished.rows("heldout-masked"), left_out))
    last = steps(finished)[-LAST:]
    return {
        "label": finished.unit.label,
        "seed": finished.unit.seed,
        "n": len(sampled),
        "cloud_fraction": c,
        "called": float(called(sampled).mean()),
        "accuracy": float(correctness(sampled).mean()),
        "accuracy_at_c": float(accuracies_at(own, c).mean()),
        "local_alone": float(own.local.mean()),
        "cloud_alone": float(own.cloud.mean()),
        "called_in_training": float(np.mean([row["call_fraction"] for row in last])),
        "alpha_c": float(np.mean([row["alpha_c"] for row in last])),
    }


def greedy_at_c(runs: Iterable[Finished], left_out: set[str]) -> FloatArray:
    """[seeds, problems] correctness of the greedy policy with exactly its cloud fraction called."""
    return np.array(
        [
            accuracies_at(own_curve("", without(f.rows("heldout-masked"), left_out)), f.config.budget.cloud_fraction)
            for f in runs
        ]
    )


def compared(finished: Sequence[Finished], default: str) -> tuple[list[dict[str, Any]], list[Comparison]]:
    """(raw rows, each other label's greedy accuracy at the cloud fraction less the default's)."""
    left_out, groups = failures(finished), by_label(finished)
    greedy = {label: greedy_at_c(runs, left_out) for label, runs in groups.items()}
    comparisons = [
        Comparison(label, default, "greedy accuracy at the cloud fraction", paired_difference(a_SN, greedy[default]))
        for label, a_SN in greedy.items()
        if label != default
    ]
    return [figures(f, left_out) for f in finished], comparisons


@dataclass(frozen=True)
class Comparison:
    """`a` less `b`, paired by seed and problem."""

    a: str
    b: str
    what: str
    difference: Difference

    def row(self) -> dict[str, Any]:
        return {"a": self.a, "b": self.b, "what": self.what, **asdict(self.difference)}

    @property
    def verdict(self) -> str:
        """Whether the difference is told from zero by its interval."""
        if self.difference.low > 0:
            return "better than"
        return "worse than" if self.difference.high < 0 else "not told apart from"


def differences(comparisons: Iterable[Comparison]) -> str:
    """Every comparison in points, with its 95% interval."""
    return ", ".join(f"{c.a} {interval(c.difference)}" for c in comparisons)


def over_seeds(rows: Iterable[Mapping[str, Any]], key: str, label: str | None = None) -> list[float]:
    """A figure of all rows, or of those of one label, in their order."""
    return [row[key] for row in rows if label in (None, row["label"])]


def in_percent(values: Sequence[float]) -> str:
    """The mean, and the lowest and highest seed where there are several."""
    mean = f"{100 * float(np.mean(values)):.1f}%"
    return mean if len(values) == 1 else f"{mean} ({seeds_range(values)})"


def settings_table(
    title: str, rows: Sequence[Mapping[str, Any]], comparisons: Iterable[Comparison], default: str
) -> Table:
    """One line a label: means over seeds with the lowest and highest, and the difference to the default."""
    less = {c.a: interval(c.difference) for c in comparisons}
    cells = []
    for label in dict.fromkeys(row["label"] for row in rows):
        keys = ("accuracy_at_c", "accuracy", "called", "local_alone")
        line = [in_percent(over_seeds(rows, key, label)) for key in keys]
        alpha_c = f"{np.mean(over_seeds(rows, 'alpha_c', label)):.2f}"
        cells.append([label, *line, alpha_c, less.get(label, "")])
    c = rows[0]["cloud_fraction"]
    columns = (
        "", f"greedy, {c:.0%} called", "as trained (T=1)", "called (T=1)", "local alone, greedy", "alpha_c at the end",
        f"greedy at {c:.0%} less {default}, points",
    )  # fmt: skip
    return Table(title, columns, cells)


def draw_settings(axes: Sequence[Axes], rows: Sequence[Mapping[str, Any]]) -> None:
    """Two panels: greedy accuracy at the cloud fraction, and the call fraction as trained; a dot a seed."""
    labels = list(dict.fromkeys(row["label"] for row in rows))
    c = rows[0]["cloud_fraction"]
    for axis, key, title in (
        (axes[0], "accuracy_at_c", f"greedy accuracy, {c:.0%} called"),
        (axes[1], "called", "called, as trained (T = 1)"),
    ):
        seeds_strip(axis, labels, [over_seeds(rows, key, label) for label in labels], COLOURS[: len(labels)])
        axis.set(title=title)
        percent(axis, x=True)
    axes[1].axvline(c, color="black", linewidth=0.8, linestyle="--")


def smoothed(call_fractions: Sequence[float], window: int = LAST) -> FloatArray:
    """[steps - window + 1] the mean of the last `window` steps; of all of them where there are fewer."""
    window = min(window, len(call_fractions))
    return np.convolve(np.asarray(call_fractions, dtype=np.float64), np.full(window, 1 / window), mode="valid")


def draw_calls(axis: Axes, groups: Mapping[str, Sequence[Finished]]) -> None:
    """The smoothed call fraction of training over the steps: a line a run, a colour a label."""
    for (label, runs), colour in zip(groups.items(), COLOURS, strict=False):
        for i, f in enumerate(runs):
            means = smoothed([row["call_fraction"] for row in steps(f)])
            last = steps(f)[-1]["step"]
            at = np.arange(last - len(means) + 1, last + 1)
            axis.plot(at, means, color=colour, label=None if i else label)
    axis.set(xlabel="step", title=f"called in training, mean of {LAST} steps")
    axis.legend(fontsize=SMALL)
    percent(axis, y=True)
