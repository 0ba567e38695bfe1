"""The tables of the baselines' comparison."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from gapg.studies.curves import cost_curve, curve, measures
from gapg.studies.methods import Method, accuracy, called, interval, percents, seeds_range
from gapg.studies.paired import covered, spread
from gapg.studies.study import Table

if TYPE_CHECKING:
    from gapg.studies.baselines import Measured

OURS, OWN, WITH_HELP = "GAPG", "GAPG, its log-prob", "GAPG, its log-prob with help in it"
LOCAL, RANDOM, CLOUD = "task-tuning only", "+ random offloading", "cloud only"
MONEY = (0.1, 0.3, 0.5, 1.0)
"""Parts of a cloud call that a problem may cost, for the table of accuracy against money."""


def equal_calls(measured: Measured) -> Table:
    """Table A: every method's own curve at the budget."""
    cells = []
    for name in measured.methods:
        values = measured.at_budget(name)
        d = measured.at_own().get(name)
        against = ["", ""] if d is None else [interval(d), f"{d.wins} of {len(values)}"]
        cells.append([name, percents(spread(values).mean), seeds_range(values), *against])
    cells.sort(key=lambda row: float(row[1][:-1]))
    alone = measured.alone()
    cells.insert(0, [f"{LOCAL} (no calls)", percents(spread(alone).mean), seeds_range(alone), "", ""])
    cells.append([f"{CLOUD} (all calls)", percents(measured.cloud()), percents(measured.cloud()), "", ""])
    return Table(
        f"Accuracy with exactly {measured.cloud_fraction:.0%} of the held-out problems called;"
        f" {covered(len(measured.methods[OURS]))}",
        ["method", "accuracy", "seeds", "GAPG less it, points (95%)", "seeds GAPG wins"],
        cells,
    )


def differences_table(measured: Measured) -> Table:
    """All along the curve, because the runs are not trained to the same call fraction."""
    cells = [
        [
            name,
            *(interval(d[name]) for d in measured.differences.values()),
            interval(measured.apgr[name]) if name in measured.apgr else "–",
        ]
        for name in measured.methods
        if name != OURS
    ]
    fractions = [f"{f:.0%} called" for f in measured.differences]
    return Table(
        f"GAPG less it, points (95%), at exactly {', '.join(fractions)}, and in APGR (points of the gap);"
        f" {covered(len(measured.methods[OURS]))}",
        ["method", *fractions, "APGR"],
        cells,
    )


def operating_points(measured: Measured) -> Table:
    """Table B: what each method really does with the threshold that a calibration set gave it, and as trained."""
    cells = []
    for name, methods in measured.methods.items():
        calibrated = [r for m in methods if (r := m.at_threshold(measured.cloud_fraction))]
        trained = [m.trained for m in methods if m.trained]
        row = [name]
        for results in (calibrated, trained):
            if results:
                calls, right = [called(r) for r in results], [accuracy(r) for r in results]
                row += [percents(spread(calls).mean), seeds_range(calls), percents(spread(right).mean)]
            else:
                row += ["–", "–", "–"]
        cells.append(row)
    return Table(
        f"Operating points: threshold set to {measured.cloud_fraction:.0%} on calibration problems, greedy;"
        " and as trained, at the training temperature",
        ["method", "called", "seeds", "accuracy", "called, as trained", "seeds", "accuracy, as trained"],
        cells,
    )


def gap_table(measured: Measured) -> Table:
    """Table C: RouteLLM's measures; the gap is from the task-tuned model alone to the cloud, for every method."""
    cells = []
    for name, methods in measured.methods.items():
        figures = [measures(curve(m.routed), a) for m, a in zip(methods, measured.alone(), strict=True)]
        row = [name]
        for key in ("area", "apgr", "calls_for_20", "calls_for_50", "calls_for_80"):
            known = [value for f in figures if (value := f[key]) is not None]
            text = "–" if len(known) < len(figures) else f"{spread(known).mean:.3f}"
            row.append(percents(spread(known).mean) if text != "–" and key.startswith("calls") else text)
        cells.append(row)
    return Table(
        f"The whole curve; the gap is from the task-tuned model alone ({percents(spread(measured.alone()).mean)})"
        f" to the cloud ({percents(measured.cloud())})",
        ["method", "area", "APGR", "calls for 20% of the gap", "50%", "80%"],
        cells,
    )


def accuracy_for_money(m: Method, money: float, measured: Measured) -> float | None:
    """The accuracy on the method's curve at `money` a problem; None where it cannot be had for that."""
    points_, spent = cost_curve(
        m.routed, measured.prices.local * m.samples, measured.prices.call, answers_first=m.answers_first
    )
    return float(np.interp(money, spent, points_.accuracy)) if money >= spent[0] else None


def money_table(measured: Measured) -> Table:
    price, alone = measured.prices, measured.alone()
    moneys = [share * price.call for share in MONEY]
    found = {
        name: [[accuracy_for_money(m, money, measured) for m in methods] for money in moneys]
        for name, methods in measured.methods.items()
    }
    # neither calls on some problems only: what each costs is had or not
    found[LOCAL] = [[a if money >= price.local else None for a in alone] for money in moneys]
    found[CLOUD] = [[measured.cloud() if money >= price.call else None for _ in alone] for money in moneys]
    cells = []
    for name, columns in found.items():
        known = [[v for v in values if v is not None] for values in columns]
        cells.append([name, *(percents(spread(k).mean) if len(k) == len(alone) else "–" for k in known)])
    budgets = [f"{money:.2g} a problem" for money in moneys]
    return Table(f"Accuracy for money; {price.text}", ["method", *budgets], cells)
