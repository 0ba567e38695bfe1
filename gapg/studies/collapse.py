"""What a fixed alpha_c does to calling, and which one a price asks for: `gapg experiment collapse`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from gapg.studies import units
from gapg.studies.curves import FloatArray
from gapg.studies.drawing import COLOURS, SMALL, panels, percent
from gapg.studies.methods import by_label, interval, listed, percents, without
from gapg.studies.paired import paired_difference
from gapg.studies.settings import (
    LAST,
    Comparison,
    called,
    correctness,
    draw_calls,
    failures,
    figures,
    over_seeds,
    smoothed,
    steps,
)
from gapg.studies.study import Finished, Report, Study, Table, Unit

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

ALPHAS = (0.1, 0.3, 0.5, 0.7, 0.9)
PRICE = 0.25
"""What a call costs, in right answers. The best policy at price p and oracle accuracy q has alpha_c = 1 - p / q."""
PRICES = (PRICE, 2 * PRICE)
FEW, NEARLY_ALL = 0.02, 0.98


@dataclass(frozen=True)
class Fate:
    """What became of calling in a run, judged by the mean call fraction of the last 20 training steps.

    state: "never calls" where that mean ends under 2%, "always calls" where it ends over 98%, else "healthy".
    step: the first step from which on it stayed beyond that bound; None for healthy.
    lowest, highest: of that mean, over the run.
    """

    state: str
    step: int | None
    lowest: float
    highest: float


def fate(call_fractions: Sequence[float], window: int = LAST) -> Fate:
    """Of a run with these call fractions of all samples, one a training step, the first step being 1."""
    means = smoothed(call_fractions, window)
    begin = len(call_fractions) - len(means) + 1
    for state, beyond in (("never calls", means < FEW), ("always calls", means > NEARLY_ALL)):
        if beyond[-1]:
            inside = np.flatnonzero(~beyond)
            step = begin + (int(inside[-1]) + 1 if inside.size else 0)
            return Fate(state, step, float(means.min()), float(means.max()))
    return Fate("healthy", None, float(means.min()), float(means.max()))


def collapse_units(seed: int) -> list[Unit]:
    return [Unit(f"alpha_c {alpha}", {**units.FIXED_PRICE, "reward.alpha_c": f"{alpha}"}, seed) for alpha in ALPHAS]


def utilities(rows: Sequence[Mapping[str, Any]], price: float) -> FloatArray:
    """[n] correctness less what the call cost, problem by problem."""
    return correctness(rows) - price * called(rows)


def best_at(
    sampled: Mapping[str, Sequence[Sequence[Mapping[str, Any]]]], price: float
) -> tuple[str, dict[str, Comparison]]:
    """(the label worth most at this price, its utility less each other's).

    sampled: label -> predictions a seed, on the same problems.
    """
    worth = {label: np.array([utilities(rows, price) for rows in of_seeds]) for label, of_seeds in sampled.items()}
    best = max(worth, key=lambda label: float(worth[label].mean()))
    return best, {
        label: Comparison(best, label, f"utility at {price:g} a call", paired_difference(worth[best], worth[label]))
        for label in worth
        if label != best
    }


def analyse_collapse(finished: list[Finished]) -> Report:
    left_out, groups = failures(finished), by_label(finished)
    sampled = {label: [without(f.rows("heldout-sampled"), left_out) for f in runs] for label, runs in groups.items()}
    rows = []
    for f in finished:
        found = fate([row["call_fraction"] for row in steps(f)])
        predictions = without(f.rows("heldout-sampled"), left_out)
        rows.append(
            figures(f, left_out)
            | {"state": found.state, "step": found.step, "lowest": found.lowest, "highest": found.highest}
            | {f"utility_{price:g}": float(utilities(predictions, price).mean()) for price in PRICES}
        )
    choices = [best_at(sampled, price) for price in PRICES]
    return Report(
        rows,
        [_table(rows)],
        [comparison.row() for _, others in choices for comparison in others.values()],
        [_map_sentence(rows), _price_sentence(rows, choices)],
        lambda figure: _draw(figure, groups, rows),
    )


def _alpha(row: Mapping[str, Any]) -> str:
    return str(row["label"]).removeprefix("alpha_c ")


def _table(rows: Sequence[Mapping[str, Any]]) -> Table:
    cells = [
        [
            _alpha(row),
            str(row["seed"]),
            row["state"],
            "" if row["step"] is None else str(row["step"]),
            f"{percents(row['lowest'])} to {percents(row['highest'])}",
            *(percents(row[key]) for key in ("called", "accuracy", "local_alone")),
            *(f"{row[f'utility_{price:g}']:.3f}" for price in PRICES),
        ]
        for row in rows
    ]
    columns = (
        "alpha_c", "seed", "", "from step", f"called in training, mean of {LAST} steps", "called (T=1)",
        "together (T=1)", "local alone, greedy", *(f"worth at {price:g} a call" for price in PRICES),
    )  # fmt: skip
    return Table("A fixed alpha_c: what became of calling, and what the policy is worth at two prices", columns, cells)


def _map_sentence(rows: Sequence[Mapping[str, Any]]) -> str:
    seeds = len({row["seed"] for row in rows})
    states: dict[str, list[str]] = {}
    for label in dict.fromkeys(row["label"] for row in rows):
        of_label = [row for row in rows if row["label"] == label]
        for state in dict.fromkeys(row["state"] for row in of_label):
            chosen = [row for row in of_label if row["state"] == state]
            since = [str(row["step"]) for row in chosen if row["step"] is not None]
            notes = [f"{len(chosen)} of {seeds} seeds"] if len(chosen) < seeds else []
            notes += [f"from step {listed(since)}"] if since else []
            text = _alpha(chosen[0]) + (f" ({', '.join(notes)})" if notes else "")
            states.setdefault(state, []).append(text)
    found = "; ".join(f"{state} at {listed(names)}" for state, names in states.items())
    calls = {_alpha(row): float(np.mean(over_seeds(rows, "called", row["label"]))) for row in rows}
    low, high = min(calls, key=lambda alpha: calls[alpha]), max(calls, key=lambda alpha: calls[alpha])
    return (
        f"With alpha_c fixed the policy is, by alpha_c: {found}; as trained it calls on {percents(calls[low])} of the "
        f"held-out problems at {low} and on {percents(calls[high])} at {high}."
    )


def _price_sentence(rows: Sequence[Mapping[str, Any]], choices: Sequence[tuple[str, dict[str, Comparison]]]) -> str:
    (before, _), (after, others) = choices
    q = float(np.mean(over_seeds(rows, "cloud_alone")))
    asked = [max(0.0, 1 - price / q) for price in PRICES]
    rule = f"1 - price / P(oracle right) asks for {asked[0]:.2f} and {asked[1]:.2f}"
    start = f"Where a call costs {PRICE:g} right answers {before} is worth most"
    if before == after:
        return f"{start}, and at twice the price it still is ({rule})."
    return (
        f"{start}, at twice the price {after}, {interval(others[before].difference)} points more than {before} is then "
        f"({rule})."
    )


def _draw(figure: Figure, groups: Mapping[str, Sequence[Finished]], rows: Sequence[Mapping[str, Any]]) -> None:
    over_time, outcome, worth = panels(figure, 3)
    draw_calls(over_time, groups)
    over_time.set_ylim(-0.02, 1.02)
    for key, name, colour in (
        ("called", "called", COLOURS[0]),
        ("accuracy", "right, together", COLOURS[1]),
        ("local_alone", "right, local alone (greedy)", COLOURS[2]),
    ):
        _over_alpha(outcome, groups, rows, key, name, colour)
    outcome.set(xlabel="alpha_c", ylim=(-0.02, 1.02), title="held-out problems, as trained (T = 1)")
    percent(outcome, y=True)
    for price, colour in zip(PRICES, (COLOURS[0], COLOURS[4]), strict=True):
        _over_alpha(worth, groups, rows, f"utility_{price:g}", f"{price:g} a call", colour, star=True)
    worth.set(xlabel="alpha_c", title="right answers a problem, less the price of its call")
    for axis in (outcome, worth):
        axis.legend(fontsize=SMALL)


def _over_alpha(
    axis: Axes,
    labels: Mapping[str, Any],
    rows: Sequence[Mapping[str, Any]],
    key: str,
    name: str,
    colour: str,
    *,
    star: bool = False,
) -> None:
    alphas = [float(label.removeprefix("alpha_c ")) for label in labels]
    values = [float(np.mean(over_seeds(rows, key, label))) for label in labels]
    axis.plot(alphas, values, "o-", color=colour, label=name)
    if star:
        axis.plot(alphas[int(np.argmax(values))], max(values), "*", color=colour, markersize=16)


COLLAPSE = Study(
    "collapse",
    "Where does a fixed alpha_c make calling die out or take over, and which one does a doubled price ask for?",
    units.SEEDS[:1],
    collapse_units,
    analyse_collapse,
)
