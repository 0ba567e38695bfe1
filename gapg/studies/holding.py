"""What holds the budget: a rho set wrong on purpose, and filter and controller each on and off."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from fractions import Fraction
from typing import TYPE_CHECKING, Any

import numpy as np

from gapg.studies import units
from gapg.studies.budgets import SEED_WITHIN
from gapg.studies.curves import FloatArray, accuracies_at
from gapg.studies.drawing import BLUE, COLOURS, GREEN, GREY, ORANGE, SMALL, panels, percent, seeds_strip
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
from gapg.studies.paired import Difference, covered, paired_difference, seed_difference, spread
from gapg.studies.settings import smoothed, steps
from gapg.studies.study import Finished, Report, Study, Table, Unit

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LAST = 50
"""Training steps at the end of a run over which its calls and its alpha_c are averaged."""
FRACTION = 0.3
RIGHT_RHO = Fraction(3, 7)
"""rho of a cloud fraction of 30%."""
RHO_FACTORS = {"half": 0.5, "right": 1.0, "twice": 2.0}


@dataclass(frozen=True)
class Setting:
    """The runs of one setting, in the order of the seeds, with what they did on the held-out problems."""

    label: str
    target: float
    methods: list[Method]
    training: list[list[dict[str, Any]]]
    """metrics.jsonl of each seed, training steps only."""

    @property
    def called(self) -> list[float]:
        """As trained, at the training temperature."""
        return [called(m.trained) for m in self.methods if m.trained]

    @property
    def errors(self) -> list[float]:
        return [value - self.target for value in self.called]

    @property
    def at_budget(self) -> list[FloatArray]:
        """[seeds][n] correctness with exactly the target called, greedily by the help phrase."""
        return [accuracies_at(m.routed, self.target) for m in self.methods]

    def late(self, key: str) -> list[float]:
        """A metric's mean over the last training steps, a seed."""
        return [float(np.mean([row[key] for row in rows[-LAST:]])) for rows in self.training]


def settings(finished: Sequence[Finished]) -> dict[str, Setting]:
    """The settings by label. Raises ValueError where the runs were measured on different problems."""
    left_out = unanswered(f.rows("heldout-masked") for f in finished)
    return {
        label: Setting(
            label,
            runs[0].config.budget.cloud_fraction,
            [by_help_phrase(label, run, left_out) for run in runs],
            [steps(run) for run in runs],
        )
        for label, runs in by_label(finished).items()
    }


def raw_rows(found: Mapping[str, Setting]) -> list[dict[str, Any]]:
    """A row a setting and seed, with the call fraction and alpha_c of training in tenths of the run."""
    rows = []
    for s in found.values():
        for i, m in enumerate(s.methods):
            assert m.trained is not None
            row: dict[str, Any] = {"setting": s.label, "seed": m.seed, "target": s.target}
            row |= {"called": s.called[i], "error": s.errors[i], "accuracy": accuracy(m.trained)}
            row |= {"at_budget": float(s.at_budget[i].mean()), "late_alpha_c": s.late("alpha_c")[i]}
            for key in ("call_fraction", "alpha_c"):
                tenths = np.array_split(np.array([r[key] for r in s.training[i]]), min(10, len(s.training[i])))
                row[f"training_{key}"] = [round(float(part.mean()), 4) for part in tenths]
            rows.append(row)
    return rows


def held_table(title: str, found: Mapping[str, Setting]) -> Table:
    cells = []
    for s in found.values():
        worst = max(s.errors, key=abs)
        trained = [accuracy(m.trained) for m in s.methods if m.trained]
        cells.append(
            [
                s.label,
                f"{spread(s.called).mean * 100:.1f}",
                " ".join(f"{value * 100:.1f}" for value in s.called),
                points(spread(s.errors).mean),
                points(worst),
                f"{spread(s.late('alpha_c')).mean:.2f}",
                percents(spread(trained).mean),
                f"{percents(spread(at := [float(a.mean()) for a in s.at_budget]).mean)} ({seeds_range(at)})",
            ]
        )
    target = next(iter(found.values())).target
    columns = ["setting", "called of 100 (T=1)", "each seed", "mean error", "worst seed", f"alpha_c, last {LAST} steps"]
    columns += ["accuracy as trained", f"accuracy at exactly {target:.0%} called, greedy (seeds)"]
    return Table(title, columns, cells)


def compare(a: Setting, b: Setting) -> Difference:
    """Accuracy at exactly the target called, a less b, paired by problem and seed."""
    return paired_difference(a.at_budget, b.at_budget)


def compare_calls(a: Setting, b: Setting) -> Difference:
    """The part of the problems called as trained, a less b, paired by seed."""
    return seed_difference(a.called, b.called)


def misses(s: Setting) -> float:
    """The mean distance from the target, over seeds."""
    return spread([abs(e) for e in s.errors]).mean


def draw(figure: Figure, found: Mapping[str, Setting], colours: Sequence[str]) -> None:
    """Where the runs land, how they came there, and their accuracy at equal calls."""
    axes = panels(figure, 3, width=6.0, height=max(4.4, 0.55 * len(found) + 2))
    names, target = list(found), next(iter(found.values())).target
    seeds_strip(axes[0], names, [s.called for s in found.values()], colours)
    for width, alpha in ((0.04, 0.25), (0.02, 0.45)):
        axes[0].axvspan(target - width, target + width, color=GREY, alpha=alpha, linewidth=0)
    axes[0].axvline(target, color="black", linewidth=0.8, linestyle="--")
    axes[0].set(xlabel="called of the held-out problems, as trained", title="a dot a seed; bands: ±2 and ±4 points")
    percent(axes[0], x=True)
    _training(axes[1], found, colours)
    at_budget = [[float(a.mean()) for a in s.at_budget] for s in found.values()]
    seeds_strip(axes[2], names, at_budget, colours)
    axes[2].set(xlabel=f"accuracy with exactly {target:.0%} called, greedy", title="accuracy at equal calls")
    percent(axes[2], x=True)


def _training(axis: Axes, found: Mapping[str, Setting], colours: Sequence[str]) -> None:
    """Call fractions of training, mean over seeds and over the ten steps before."""
    for s, colour in zip(found.values(), colours, strict=True):
        f = np.mean([[row["call_fraction"] for row in rows] for rows in s.training], axis=0)
        means = smoothed(f.tolist(), 10)
        at = np.arange(len(f) - len(means) + 1, len(f) + 1)
        axis.plot(at, means, color=colour, linewidth=1.5, label=s.label)
    axis.axhline(next(iter(found.values())).target, color="black", linewidth=0.8, linestyle="--")
    axis.set(xlabel="step", ylabel="called in training", title="on the way (mean over seeds and ten steps)")
    percent(axis, y=True)
    axis.legend(fontsize=SMALL)


def report(found: dict[str, Setting], title: str, pairs: Sequence[tuple[str, str, str]], said: list[str],
           colours: Sequence[str]) -> Report:  # fmt: skip
    """pairs: (what it shows, label, label); said: the two sentences."""
    cells, comparisons = [], []
    for what, a, b in pairs:
        right, calls = compare(found[a], found[b]), compare_calls(found[a], found[b])
        cells.append([what, a, b, interval(right), f"{right.wins} of {len(right.per_seed)}", interval(calls)])
        for figure_, d in (("accuracy at equal calls", right), ("called as trained", calls)):
            comparisons.append({"what": what, "a": a, "b": b, "figure": figure_, **asdict(d)})
    columns = ["what it shows", "setting", "less setting", "accuracy at equal calls, points (95%)"]
    columns += ["seeds the first wins", "called as trained, points (95%)"]
    paired = f"Accuracy at equal calls and calls as trained, paired; {covered(len(next(iter(found.values())).methods))}"

    def picture(figure: Figure) -> None:
        draw(figure, found, colours)

    return Report(
        rows=raw_rows(found),
        tables=[held_table(title, found), Table(paired, columns, cells)],
        comparisons=comparisons,
        conclusions=said,
        draw=picture,
    )


# ---- a rho set wrong on purpose


def rho_label(factor: str, controller: bool) -> str:
    return f"{factor} rho, {'controller' if controller else 'fixed alpha_c'}"


def rho_units(seed: int) -> list[Unit]:
    found = []
    for controller in (True, False):
        for factor, times in RHO_FACTORS.items():
            overrides = {**units.gapg_at(FRACTION, seed).overrides, **({} if controller else units.FIXED_PRICE)}
            if times != 1:
                overrides["budget.rho"] = f"{float(RIGHT_RHO * Fraction(times)):.12g}"
            found.append(Unit(rho_label(factor, controller), overrides, seed))
    return found


def analyse_rho(finished: list[Finished]) -> Report:
    found = settings(finished)
    pairs = [
        (f"{factor} rho, {'with' if on else 'without'} controller", rho_label(factor, on), rho_label("right", on))
        for on in (True, False)
        for factor in ("half", "twice")
    ]  # fmt: skip
    moved = [(what, compare_calls(found[a], found[b])) for what, a, b in pairs]
    worst = {on: max((e for f in RHO_FACTORS for e in found[rho_label(f, on)].errors), key=abs) for on in (True, False)}
    first = (
        f"{effects(moved, 'On the calls as trained', 'more with', 'fewer with')[:-1]}; the run furthest from"
        f" {FRACTION:.0%} is {points(worst[True])} points away with the controller and {points(worst[False])} without."
    )
    second = effects([(what, compare(found[a], found[b])) for what, a, b in pairs])
    title = f"rho set wrong on purpose: {FRACTION:.0%} needs {RIGHT_RHO}"
    colours = ("#63b3ed", BLUE, "#2a4365", "#f6ad55", ORANGE, "#7b341e")
    return report(found, title, pairs, [first, second], colours)


# ---- filter and controller, each on and off

CELLS = {"filter + controller": (True, True), "controller only": (False, True), "filter only": (True, False),
         "neither": (False, False)}  # fmt: skip


def cell_units(seed: int) -> list[Unit]:
    runs = {
        (True, True): units.gapg(seed),
        (False, True): units.without_filter(seed),
        (True, False): units.without_controller(seed),
        (False, False): units.collaboration_aware(seed),
    }
    return [replace(runs[cell], label=label) for label, cell in CELLS.items()]


def analyse_cells(finished: list[Finished]) -> Report:
    found = settings(finished)
    pairs = [
        ("the filter, with controller", "filter + controller", "controller only"),
        ("the filter, with a fixed alpha_c", "filter only", "neither"),
        ("the controller, with filter", "filter + controller", "filter only"),
        ("the controller, without filter", "controller only", "neither"),
        ("both", "filter + controller", "neither"),
    ]
    target = found["neither"].target
    away = [f"{label} {misses(s) * 100:.1f} (worst {points(max(s.errors, key=abs))})" for label, s in found.items()]
    kept = [label for label, s in found.items() if max(map(abs, s.errors)) <= SEED_WITHIN]
    within = f"within {SEED_WITHIN * 100:.0f} points on every seed"
    distance = {label: [abs(e) for e in s.errors] for label, s in found.items()}
    moved = [(what, seed_difference(distance[a], distance[b])) for what, a, b in pairs]
    on = f"On the distance from {target:.0%} as trained"
    first = f"As trained the runs call this many points beside {target:.0%}, mean over seeds: {listed(away)}; " + (
        f"{within}: {listed(kept)}." if kept else f"none is {within}."
    )
    first += f" {effects(moved, on, 'further away with', 'nearer with')}"
    second = effects([(what, compare(found[a], found[b])) for what, a, b in pairs])
    title = f"Filter and controller, each on and off; the budget is {target:.0%}"
    return report(found, title, pairs, [first, second], (BLUE, GREEN, ORANGE, COLOURS[3]))


def effects(
    differences: Sequence[tuple[str, Difference]],
    on: str = "On accuracy at equal calls",
    up: str = "a gain from",
    down: str = "a loss from",
) -> str:
    """One sentence: which of the compared things raise and which lower a figure, by whether intervals leave 0 out."""
    higher, nothing, lower = sides(differences)
    by_name = dict(differences)
    parts = [
        f"{verb} {listed([f'{name} ({interval(by_name[name])} points)' for name in names])}"
        for verb, names in ((up, higher), (down, lower), ("no effect is shown of", nothing))
        if names
    ]
    return f"{on}: {'; '.join(parts)}."


WRONG_RHO = Study(
    "wrong-rho",
    "What does the filter's rho do to the call fraction when it is set wrong, with and without the controller?",
    units.SEEDS,
    rho_units,
    analyse_rho,
    sets=("budget.rho", "budget.filter", "budget.controller"),
)
FILTER_CONTROLLER = Study(
    "filter-controller",
    "What do the prompt filter and the budget controller buy, each alone and together?",
    units.HEADLINE_SEEDS,
    cell_units,
    analyse_cells,
    sets=("budget.rho", "budget.filter", "budget.controller"),
)
