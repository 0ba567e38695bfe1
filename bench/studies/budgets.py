"""Is the cloud budget held, by training to it and by calibrating one run to it?"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from studies import arms
from studies.arms import HEADLINE_SEEDS, Finished, Rows
from studies.drawing import BLUE, GREEN, GREY, ORANGE, SMALL, budget_bands, panels, percent
from studies.report import (
    Column,
    Record,
    Row,
    Study,
    Table,
    grouped,
    interval,
    mean_of,
    points,
    seeds_of,
    table_of,
    verdict,
)  # fmt: skip
from studies.statistics import Difference, at_calls, at_threshold, compare, curve, help_margins, problems, threshold_for

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

TARGETS = (0.1, 0.3, 0.5)
ONE_RUN = 0.3
"""The run that is also calibrated to every target."""
MEAN_WITHIN, SEED_WITHIN = 0.02, 0.04
"""What counts as held: the mean over seeds, and every seed, this near to the target."""

TRAINED, GREEDY, UNBIASED, CALIBRATED = (
    "trained to it, as trained (T=1)",
    "trained to it, greedy, calibrated",
    "trained to it, greedy, not calibrated",
    f"the {ONE_RUN:.0%} run, greedy, calibrated to it",
)
COLOURS = {TRAINED: BLUE, GREEDY: ORANGE, CALIBRATED: GREEN, UNBIASED: GREY}
JUDGED = (TRAINED, GREEDY, CALIBRATED)
"""The ways that are meant to hold the budget; without calibration, greedy decoding is not."""
GRID = np.linspace(0, 1, 21)


def label(target: float) -> str:
    return arms.gapg_at(target, 0).label


def measure(runs: list[Finished]) -> tuple[Rows, list[Difference]]:
    """A row a way, target and seed; each run's greedy curve; training to a target less calibrating one run to it."""
    table = problems(runs)
    of_run = {(run.arm.label, run.arm.seed): run for run in runs}
    parts = dict(list(table.groupby(["arm", "seed"])))
    seeds = sorted({run.arm.seed for run in runs})
    rows: Rows = []
    for c in TARGETS:
        for seed in seeds:
            own, one = (label(c), seed), (label(ONE_RUN), seed)
            scores = {key: help_margins(of_run[key].rows("train-masked")) for key in (own, one)}
            found = {
                TRAINED: (float(parts[own]["called"].mean()), float(parts[own]["correct"].mean())),
                GREEDY: at_threshold(parts[own], threshold_for(scores[own], c)),
                CALIBRATED: at_threshold(parts[one], threshold_for(scores[one], c)),
                # without a bias the phrase comes where its logit is the highest
                UNBIASED: at_threshold(parts[own], 0.0),
            }
            rows += [
                {"way": way, "target": c, "seed": seed, "called": called, "accuracy": right, "error": called - c}
                for way, (called, right) in found.items()
            ]
    for c in TARGETS:
        curves = {seed: curve(parts[label(c), seed]).at(GRID).tolist() for seed in seeds}
        rows += [{"way": "curve", "target": c, "seed": seed, "curve": found} for seed, found in curves.items()]
    comparisons = [
        {"a": f"trained to {c:.0%}", "b": f"the {ONE_RUN:.0%} run", "cloud_fraction": c}
        | compare(table, at_calls(table, c), label(c), label(ONE_RUN))
        for c in TARGETS
        if c != ONE_RUN
    ]
    return rows, comparisons


def of_ways(record: Record) -> dict[tuple[Any, ...], list[Row]]:
    """The rows of each (way, target), by way."""
    groups = grouped((row for row in record["rows"] if row["way"] != "curve"), "way", "target")
    return {(way, c): groups[way, c] for way in COLOURS for c in TARGETS}


def held(rows: Sequence[Row]) -> str:
    """Whether the mean and every seed are near enough to the target; not judged without calibration."""
    if rows[0]["way"] not in JUDGED:
        return ""
    errors = [row["error"] for row in rows]
    return "yes" if abs(np.mean(errors)) <= MEAN_WITHIN and max(map(abs, errors)) <= SEED_WITHIN else "no"


def called_table(record: Record) -> Table:
    def of_seed(seed: int) -> Column:
        return f"seed {seed}", lambda rows: next(f"{r['called'] * 100:.1f}" for r in rows if r["seed"] == seed)

    columns: list[Column] = [
        ("way", lambda rows: rows[0]["way"]),
        ("target", lambda rows: f"{rows[0]['target']:.0%}"),
        *map(of_seed, record["seeds"]),
        ("mean error", mean_of("error", points)),
        ("worst seed", seeds_of("error", lambda errors: points(max(errors, key=abs)))),
        ("held", held),
    ]
    how = "calibrated: called where the help margin of one pass with help masked is over a threshold, which is less the"
    how += " bias that `gapg calibrate` saves"
    within = f"held: within {MEAN_WITHIN * 100:.0f} points on average and {SEED_WITHIN * 100:.0f} on every seed"
    return table_of(f"Called of 100 held-out problems ({within}; {how})", of_ways(record).values(), columns)


def accuracy_table(record: Record) -> Table:
    """What the budget buys: where each way lands, and at exactly the target on its curve."""
    groups, differences = of_ways(record), {d["cloud_fraction"]: d for d in record["comparisons"]}

    def against(text: Callable[[Difference], str]) -> Callable[[list[Row]], str]:
        return lambda rows: text(differences[c]) if (c := rows[0]["target"]) in differences else ""

    def landed(way: str) -> Column:
        return way, lambda rows: seeds_of("accuracy")(groups[way, rows[0]["target"]])

    columns: list[Column] = [
        ("target", lambda rows: f"{rows[0]['target']:.0%}"),
        *map(landed, JUDGED),
        (f"at exactly the target, greedy: trained to it less the {ONE_RUN:.0%} run, points (95%)", against(interval)),
        ("training to it is", against(verdict)),
    ]
    title = "Accuracy together, mean over seeds (lowest to highest)"
    return table_of(title, [groups[TRAINED, c] for c in TARGETS], columns)


def draw(figure: Figure, record: Record) -> None:
    """Target against called, the same as an error, and accuracy against called."""
    axes = panels(figure, 3, width=5.6, height=5.2)
    high = max(TARGETS) + 0.1
    budget_bands(axes[0], high=high)
    budget_bands(axes[1], error=True, high=high)
    for i, (way, colour) in enumerate(COLOURS.items()):
        rows = [row for row in record["rows"] if row["way"] == way]
        x = np.array([row["target"] for row in rows]) + (i - (len(COLOURS) - 1) / 2) * 0.012
        style: dict[str, Any] = {"s": 26, "color": colour, "alpha": 0.85, "linewidth": 0, "zorder": 3}
        axes[0].scatter(x, [row["called"] for row in rows], label=way, **style)
        axes[1].scatter(x, [row["error"] * 100 for row in rows], **style)
        axes[2].scatter([row["called"] for row in rows], [row["accuracy"] for row in rows], **style)
    _mean_curves(axes[2], record)
    axes[0].set(xlabel="target", ylabel="called", title="target against called, a dot a seed", xlim=(0, high))
    axes[1].set(xlabel="target", ylabel="called less target, points", title="the same, as an error", xlim=(0, high))
    axes[2].set(xlabel="called", ylabel="accuracy together", title="accuracy (lines: greedy curves, mean over seeds)")
    axes[0].legend(fontsize=SMALL, loc="lower right")
    axes[2].legend(fontsize=SMALL, loc="lower right")
    percent(axes[0], x=True, y=True)
    percent(axes[1], x=True)
    percent(axes[2], x=True, y=True)


def _mean_curves(axis: Axes, record: Record) -> None:
    curves = grouped((row for row in record["rows"] if row["way"] == "curve"), "target")
    inside = max(TARGETS) + 0.15 >= GRID
    for ((c,), rows), style in zip(curves.items(), (":", "-", "--"), strict=True):
        y = np.mean([row["curve"] for row in rows], axis=0)[inside]
        axis.plot(GRID[inside], y, color="#4a5568", linestyle=style, linewidth=1.2, label=f"trained to {c:.0%}")


BUDGETS = Study(
    "budgets",
    "Does a run call as often as it was asked to, at 10, 30 and 50%, by training and by calibration of one run?",
    HEADLINE_SEEDS,
    lambda seed: [arms.gapg_at(c, seed) for c in TARGETS],
    measure,
    lambda record: [called_table(record), accuracy_table(record)],
    draw,
)
