"""Studies that move settings and keep all else: how each arm does beside another, on the same problems.

One measure, one picture and two forms of table do for all of them; a study of this kind is its arms and what is
compared with what.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from gapg.config import RunConfig
from studies.arms import Arm, Finished, Rows
from studies.drawing import COLOURS, SMALL, budget_spans, panels, percent, seeds_strip
from studies.report import (
    Column,
    Record,
    Row,
    Study,
    Table,
    covered,
    grouped,
    interval,
    mean_of,
    points,
    seeds_of,
    table_of,
    verdict,
)  # fmt: skip
from studies.statistics import Difference, at_calls, compare, compare_seeds, mean_by_seed, problems

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

LAST, LATE = 20, 50
"""Training steps at the end of a run over which its calls and its alpha_c are averaged, for tables of either form."""
AT_EQUAL_CALLS, AS_TRAINED = "accuracy at equal calls", "called as trained"

Pair = tuple[str, str, str]
"""(what it shows, label, label): the first label's arms less the second's."""


def settings_study(
    name: str,
    question: str,
    seeds: tuple[int, ...],
    arms: Callable[[int], list[Arm]],
    title: str,
    *,
    less: str | None = None,
    pairs: Sequence[Pair] = (),
    more: Callable[[Finished], Mapping[str, Any]] = lambda run: {},
    more_tables: Callable[[Rows], list[Table]] = lambda rows: [],
    colours: Sequence[str] = COLOURS,
    check: Callable[[RunConfig], None] | None = None,
    sets: tuple[str, ...] = (),
) -> Study:
    """A study of settings: every arm against the one called `less`, or each pair of `pairs`.

    more: further figures of a run, for its row. more_tables: made of all rows.
    """

    def tables(record: Record) -> list[Table]:
        rows, comparisons = record["rows"], record["comparisons"]
        own = (
            [less_table(title, rows, comparisons)]
            if less
            else [held_table(title, rows), pairs_table(rows, comparisons)]
        )
        return own + more_tables(rows)

    def draw(figure: Figure, record: Record) -> None:
        draw_settings(figure, record["rows"], colours)

    measure = partial(measure_settings, less=less, pairs=pairs, more=more)
    return Study(name, question, seeds, arms, measure, tables, draw, check, sets)


# ---- measure


def measure_settings(
    runs: Sequence[Finished], less: str | None, pairs: Sequence[Pair], more: Callable[[Finished], Mapping[str, Any]]
) -> tuple[Rows, list[Difference]]:
    table, c = problems(runs), runs[0].config.budget.cloud_fraction
    right = at_calls(table, c)
    rows = [{**summary(run, table, right), **more(run)} for run in runs]
    labels = dict.fromkeys(run.arm.label for run in runs)
    comparisons = []
    for what, a, b in pairs or [(label, label, less or "") for label in labels if label != less]:
        calls = compare_seeds(*(mean_by_seed(table, table["called"], arm) for arm in (a, b)))
        for figure, found in ((AT_EQUAL_CALLS, compare(table, right, a, b)), (AS_TRAINED, calls)):
            comparisons.append({"what": what, "a": a, "b": b, "figure": figure, **found})
    return rows, comparisons


def summary(run: Finished, table: pd.DataFrame, right: pd.Series) -> dict[str, Any]:
    """A run's row: as trained (T = 1), greedy with its cloud fraction called (`right`), and how training ended."""
    mine = ((table["arm"] == run.arm.label) & (table["seed"] == run.arm.seed)).to_numpy()
    means = {key: float(table.loc[mine, key].to_numpy().mean()) for key in ("called", "correct", "local", "cloud")}
    steps = run.metrics()
    return {
        "label": run.arm.label,
        "seed": run.arm.seed,
        "n": int(mine.sum()),
        "cloud_fraction": run.config.budget.cloud_fraction,
        "called": means["called"],
        "accuracy": means["correct"],
        "accuracy_at_c": float(right[mine].to_numpy().mean()),
        "local_alone": means["local"],
        "cloud_alone": means["cloud"],
        "called_in_training": float(np.mean([row["call_fraction"] for row in steps[-LAST:]])),
        "alpha_c": float(np.mean([row["alpha_c"] for row in steps[-LAST:]])),
        "late_alpha_c": float(np.mean([row["alpha_c"] for row in steps[-LATE:]])),
        "training_call_fraction": tenths(steps, "call_fraction"),
    }


def tenths(steps: Rows, key: str) -> list[float]:
    """A metric's means over the ten parts of the training steps."""
    parts = np.array_split(np.array([row[key] for row in steps]), min(10, len(steps)))
    return [round(float(part.mean()), 4) for part in parts]


# ---- tables


def less_table(title: str, rows: Rows, comparisons: Sequence[Difference]) -> Table:
    """One line a label: means over seeds with the lowest and highest, and the difference to one of them."""
    less = {d["a"]: d for d in comparisons if d["figure"] == AT_EQUAL_CALLS}
    default, c = comparisons[0]["b"], rows[0]["cloud_fraction"]

    def against(text: Callable[[Difference], str]) -> Callable[[list[Row]], str]:
        return lambda of_label: text(d) if (d := less.get(of_label[0]["label"])) else ""

    columns: list[Column] = [
        ("", lambda of_label: of_label[0]["label"]),
        (f"greedy, {c:.0%} called", seeds_of("accuracy_at_c")),
        ("as trained (T=1)", seeds_of("accuracy")),
        ("called (T=1)", seeds_of("called")),
        ("local alone, greedy", seeds_of("local_alone")),
        ("alpha_c at the end", mean_of("alpha_c", "{:.2f}".format)),
        (f"greedy at {c:.0%} less {default}, points", against(interval)),
        (f"than {default}", against(verdict)),
    ]
    return table_of(title, grouped(rows, "label").values(), columns)


def errors(rows: Iterable[Row]) -> list[float]:
    """The part called as trained less the target, a seed."""
    return [row["called"] - row["cloud_fraction"] for row in rows]


def of_100(value: float) -> str:
    return f"{value * 100:.1f}"


def held_table(title: str, rows: Rows) -> Table:
    """One line a label: how near its runs came to the budget."""
    c = rows[0]["cloud_fraction"]
    columns: list[Column] = [
        ("setting", lambda of_label: of_label[0]["label"]),
        ("called of 100 (T=1)", mean_of("called", of_100)),
        ("each seed", seeds_of("called", lambda values: " ".join(map(of_100, values)))),
        ("mean error", lambda of_label: points(float(np.mean(errors(of_label))))),
        ("worst seed", lambda of_label: points(max(errors(of_label), key=abs))),
        (f"alpha_c, last {LATE} steps", mean_of("late_alpha_c", "{:.2f}".format)),
        ("accuracy as trained", mean_of("accuracy")),
        (f"accuracy at exactly {c:.0%} called, greedy (seeds)", seeds_of("accuracy_at_c")),
    ]
    return table_of(title.format(budget=f"{c:.0%}"), grouped(rows, "label").values(), columns)


def pairs_table(rows: Rows, comparisons: Sequence[Difference]) -> Table:
    """One line a pair: accuracy at equal calls, calls as trained, and how much nearer those are to the budget."""
    by_label = {label: of_label for (label,), of_label in grouped(rows, "label").items()}
    c, seeds = rows[0]["cloud_fraction"], len(comparisons[0]["per_seed"])

    def nearer(pair: list[Row]) -> Difference:
        a, b = ([-abs(error) for error in errors(by_label[pair[0][side]])] for side in ("a", "b"))
        return compare_seeds(a, b)

    columns: list[Column] = [
        ("what it shows", lambda pair: pair[0]["what"]),
        ("setting", lambda pair: pair[0]["a"]),
        ("less setting", lambda pair: pair[0]["b"]),
        ("accuracy at equal calls, points (95%)", lambda pair: interval(pair[0])),
        ("seeds the first wins", lambda pair: f"{pair[0]['wins']} of {seeds}"),
        ("called as trained, points (95%)", lambda pair: interval(pair[1])),
        ("accuracy is", lambda pair: verdict(pair[0])),
        (f"nearer to {c:.0%} called, points (95%)", lambda pair: interval(nearer(pair))),
        ("its calls are", lambda pair: verdict(nearer(pair))),
    ]
    title = f"Accuracy at equal calls and calls as trained, paired; {covered(seeds)}"
    return table_of(title, grouped(comparisons, "what", "a", "b").values(), columns)


# ---- picture


def draw_settings(figure: Figure, rows: Rows, colours: Sequence[str] = COLOURS, more: int = 0) -> list[Any]:
    """Accuracy at equal calls, calls as trained, and calls on the way there; returns `more` empty panels after them.

    Records made before the calls of training were kept in them have no third panel.
    """
    groups = {label: of_label for (label,), of_label in grouped(rows, "label").items()}
    c, on_the_way = rows[0]["cloud_fraction"], "training_call_fraction" in rows[0]
    axes = panels(figure, 2 + on_the_way + more, width=5.2, height=max(4.4, 0.55 * len(groups) + 2))
    for axis, key in ((axes[0], "accuracy_at_c"), (axes[1], "called")):
        seeds_strip(axis, list(groups), [[row[key] for row in r] for r in groups.values()], colours[: len(groups)])
        percent(axis, x=True)
    axes[0].set_title(f"greedy accuracy, exactly {c:.0%} called; a dot a seed")
    budget_spans(axes[1], c)
    axes[1].set_title("called, as trained (T = 1); bands: ±2 and ±4 points")
    if on_the_way:
        for (label, of_label), colour in zip(groups.items(), colours, strict=False):
            means = np.mean([row["training_call_fraction"] for row in of_label], axis=0)
            axes[2].plot((np.arange(len(means)) + 0.5) / len(means), means, ".-", color=colour, label=label)
        axes[2].axhline(c, color="black", linewidth=0.8, linestyle="--")
        axes[2].set(xlabel="part of the training", title="called in training, mean over seeds")
        axes[2].legend(fontsize=SMALL)
        percent(axes[2], x=True, y=True)
    return axes[2 + on_the_way :]
