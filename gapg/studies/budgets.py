"""Is the cloud budget held, by training to it and by calibrating one run to it? `gapg experiment budgets`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from gapg.studies import units
from gapg.studies.curves import accuracies_at, apply_threshold, curve
from gapg.studies.drawing import BLUE, GREEN, GREY, ORANGE, SMALL, budget_bands, panels, percent
from gapg.studies.methods import (
    Method,
    accuracy,
    by_help_phrase,
    by_label,
    called,
    interval,
    listed,
    percents,
    points,
    seeds_range,
    sides,
    unanswered,
)
from gapg.studies.paired import Difference, paired_difference, spread
from gapg.studies.study import Finished, Report, Study, Table, Unit

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
WAYS = (TRAINED, GREEDY, CALIBRATED, UNBIASED)
JUDGED = (TRAINED, GREEDY, CALIBRATED)
"""The ways that are meant to hold the budget; without calibration, greedy decoding is not."""
COLOURS = {TRAINED: BLUE, GREEDY: ORANGE, CALIBRATED: GREEN, UNBIASED: GREY}


def budget_units(seed: int) -> list[Unit]:
    return [units.gapg_at(c, seed) for c in TARGETS]


@dataclass(frozen=True)
class Held:
    """What one way to hold a budget did on the held-out problems of one seed."""

    way: str
    target: float
    seed: int
    called: float
    accuracy: float

    @property
    def error(self) -> float:
        return self.called - self.target


@dataclass(frozen=True)
class Measured:
    held: list[Held]
    methods: dict[float, list[Method]]
    """The runs trained to each target, in the order of the seeds."""
    differences: dict[float, Difference]
    """Accuracy at exactly the target: the run trained to it less the one run calibrated to it."""

    def of(self, way: str, target: float) -> list[Held]:
        return [h for h in self.held if h.way == way and h.target == target]


def measure(finished: Sequence[Finished]) -> Measured:
    """Raises ValueError where the runs were measured on different problems."""
    left_out = unanswered(f.rows("heldout-masked") for f in finished)
    runs = by_label(finished)
    methods = {c: [by_help_phrase(label(c), run, left_out) for run in runs[label(c)]] for c in TARGETS}
    held = []
    for c in TARGETS:
        for own, one in zip(methods[c], methods[ONE_RUN], strict=True):
            results = {
                TRAINED: own.trained,
                GREEDY: own.at_threshold(c),
                CALIBRATED: one.at_threshold(c),
                # without a bias the phrase comes where its logit is the highest
                UNBIASED: apply_threshold(own.routed, 0.0),
            }
            held += [Held(way, c, own.seed, called(r), accuracy(r)) for way, r in results.items() if r is not None]
    differences = {
        c: paired_difference(
            [accuracies_at(m.routed, c) for m in methods[c]], [accuracies_at(m.routed, c) for m in methods[ONE_RUN]]
        )
        for c in TARGETS
        if c != ONE_RUN
    }
    return Measured(held, methods, differences)


def label(target: float) -> str:
    return units.gapg_at(target, 0).label


def analyse(finished: list[Finished]) -> Report:
    measured = measure(finished)

    def picture(figure: Figure) -> None:
        draw(figure, measured)

    return Report(
        rows=[asdict(h) | {"error": h.error} for h in measured.held] + curve_rows(measured),
        tables=[called_table(measured), accuracy_table(measured)],
        comparisons=[
            {"a": f"trained to {c:.0%}", "b": f"the {ONE_RUN:.0%} run", "cloud_fraction": c, **asdict(d)}
            for c, d in measured.differences.items()
        ],
        conclusions=conclusions(measured),
        draw=picture,
    )


def curve_rows(measured: Measured) -> list[dict[str, Any]]:
    """Each run's greedy curve at every twentieth of the calls."""
    return [
        {"way": "curve", "target": c, "seed": m.seed, "curve": np.interp(np.linspace(0, 1, 21), *_xy(m)).tolist()}
        for c, methods in measured.methods.items()
        for m in methods
    ]


def _xy(m: Method) -> tuple[Any, Any]:
    points_ = curve(m.routed)
    return points_.called, points_.accuracy


def holds(held: Sequence[Held]) -> bool:
    """Whether the mean and every seed are near enough to the target."""
    errors = [h.error for h in held]
    return abs(spread(errors).mean) <= MEAN_WITHIN and max(map(abs, errors)) <= SEED_WITHIN


def worst(held: Sequence[Held]) -> float:
    return max((h.error for h in held), key=abs)


def called_table(measured: Measured) -> Table:
    seeds = [h.seed for h in measured.of(TRAINED, TARGETS[0])]
    cells = []
    for way in WAYS:
        for c in TARGETS:
            held = measured.of(way, c)
            mean_error = spread([h.error for h in held]).mean
            verdict = ("yes" if holds(held) else "no") if way in JUDGED else ""
            each = [f"{h.called * 100:.1f}" for h in held]
            cells.append([way, f"{c:.0%}", *each, points(mean_error), points(worst(held)), verdict])
    each_seed = [f"seed {seed}" for seed in seeds]
    columns = ["way", "target", *each_seed, "mean error", "worst seed", "held"]
    how = "calibrated: called where the help margin of one pass with help masked is over a threshold, which is less the"
    how += " bias that `gapg calibrate` saves"
    within = f"held: within {MEAN_WITHIN * 100:.0f} points on average and {SEED_WITHIN * 100:.0f} on every seed"
    return Table(f"Called of 100 held-out problems ({within}; {how})", columns, cells)


def accuracy_table(measured: Measured) -> Table:
    """What the budget buys: where each way lands, and at exactly the target on its curve."""
    cells = []
    for c in TARGETS:
        row = [f"{c:.0%}"]
        for way in JUDGED:
            values = [h.accuracy for h in measured.of(way, c)]
            row.append(f"{percents(spread(values).mean)} ({seeds_range(values)})")
        d = measured.differences.get(c)
        cells.append([*row, "" if d is None else interval(d)])
    gain = f"at exactly the target, greedy: trained to it less the {ONE_RUN:.0%} run, points (95%)"
    return Table("Accuracy together, mean over seeds (lowest to highest)", ["target", *JUDGED, gain], cells)


def conclusions(measured: Measured) -> list[str]:
    """Whether each way holds all budgets, and where not; whether training to a budget beats calibrating to it."""
    kept, missed = [], []
    for way in JUDGED:
        failed = [c for c in TARGETS if not holds(measured.of(way, c))]
        everything = [h for c in TARGETS for h in measured.of(way, c)]
        if failed:
            where = [f"{c:.0%} (worst seed {points(worst(measured.of(way, c)))} points)" for c in failed]
            missed.append(f"{way}, misses {listed(where)}")
        else:
            kept.append(f"{way} (worst seed {points(worst(everything))} points)")
    parts = [f"The budget is held at {listed([f'{c:.0%}' for c in TARGETS])} by: {'; '.join(kept)}"] if kept else []
    parts += [f"it is not held by: {'; '.join(missed)}"] if missed else []
    first = "; ".join(parts) + "."
    named = [(f"{c:.0%} called ({interval(d)} points)", d) for c, d in measured.differences.items()]
    lose, tie, win = sides(named)
    said = []
    if lose:
        said.append(f"training to the target beats calibrating the {ONE_RUN:.0%} run to it at {listed(lose)}")
    if tie:
        said.append(
            f"training to the target shows no gain over calibrating the {ONE_RUN:.0%} run to it at {listed(tie)}"
        )
    if win:
        said.append(f"calibrating the {ONE_RUN:.0%} run beats training to the target at {listed(win)}")
    second = "; ".join(said)
    return [first[:1].upper() + first[1:], f"At equal calls {second}."]


def draw(figure: Figure, measured: Measured) -> None:
    """Target against called, the same as an error, and accuracy against called."""
    axes = panels(figure, 3, width=5.6, height=5.2)
    high = max(TARGETS) + 0.1
    budget_bands(axes[0], high=high)
    budget_bands(axes[1], error=True, high=high)
    for i, way in enumerate(WAYS):
        held = [h for h in measured.held if h.way == way]
        offset = (i - (len(WAYS) - 1) / 2) * 0.012
        x = np.array([h.target for h in held]) + offset
        style: dict[str, Any] = {"s": 26, "color": COLOURS[way], "alpha": 0.85, "linewidth": 0, "zorder": 3}
        axes[0].scatter(x, [h.called for h in held], label=way, **style)
        axes[1].scatter(x, [h.error * 100 for h in held], **style)
        axes[2].scatter([h.called for h in held], [h.accuracy for h in held], **style)
    _mean_curves(axes[2], measured)
    axes[0].set(xlabel="target", ylabel="called", title="target against called, a dot a seed", xlim=(0, high))
    axes[1].set(xlabel="target", ylabel="called less target, points", title="the same, as an error", xlim=(0, high))
    axes[2].set(xlabel="called", ylabel="accuracy together", title="accuracy (lines: greedy curves, mean over seeds)")
    axes[0].legend(fontsize=SMALL, loc="lower right")
    axes[2].legend(fontsize=SMALL, loc="lower right")
    percent(axes[0], x=True, y=True)
    percent(axes[1], x=True)
    percent(axes[2], x=True, y=True)


def _mean_curves(axis: Axes, measured: Measured) -> None:
    grid = np.linspace(0.0, max(TARGETS) + 0.15, 120)
    for (c, methods), style in zip(measured.methods.items(), (":", "-", "--"), strict=True):
        y = np.mean([np.interp(grid, *_xy(m)) for m in methods], axis=0)
        axis.plot(grid, y, color="#4a5568", linestyle=style, linewidth=1.2, label=f"trained to {c:.0%}")


BUDGETS = Study(
    "budgets",
    "Does a run call as often as it was asked to, at 10, 30 and 50%, by training and by calibration of one run?",
    units.HEADLINE_SEEDS,
    budget_units,
    analyse,
)
