"""The tables and the picture of `studies.along_the_curve`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from studies.along_the_curve import FRACTIONS, GRID, LANDED, Contest
from studies.drawing import BLUE, COLOURS, SMALL, panels, percent
from studies.report import (
    Column,
    Record,
    Row,
    Table,
    grouped,
    interval,
    mean_of,
    percents,
    seeds_of,
    seeds_range,
    table_of,
    verdict,
)
from studies.statistics import Difference

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NAME: Column = ("method", lambda rows: str(rows[0]["method"]))
LEVEL = 0.05
PALE = "#cbd5e0"
Lines = Sequence[list[Row]]


def tables(contest: Contest, record: Record) -> list[Table]:
    lines = sorted(grouped(record["rows"], "method").values(), key=lambda rows: -_mean_at(rows, 0.3))
    return [
        _goal(contest, record),
        _curves(lines),
        _less(contest, record, [r for r in lines if r[0]["method"] not in (contest.ours, *contest.ceilings)]),
        _landed(lines),
        _chosen([rows for rows in lines if "chosen" in rows[0]]),
        _members([rows for rows in lines if "members" in rows[0]]),
    ]


def _intervals(record: Record) -> str:
    """What the intervals say something about; they are over seeds, so those of one seed hold everything."""
    n = len(record["seeds"])
    return (
        f"intervals: over {n} seeds (Student's t), the held-out problems are the same in all" if n > 1 else "one seed"
    )


def _mean_at(rows: list[Row], c: float) -> float:
    return float(np.mean([row["at"][f"{c:g}"] for row in rows]))


def outcome(d: Difference) -> str:
    """The verdict of the interval, and whether it outlives the correction for the number of comparisons."""
    found = verdict(d)
    return found if found == "same" or d["holm"] >= LEVEL else f"{found} (corrected too)"


def _goal(contest: Contest, record: Record) -> Table:
    """At each call fraction, ours beside the best of the methods that the goal is about."""
    of = {name: rows for (name,), rows in grouped(record["rows"], "method").items()}
    cells = []
    for c in FRACTIONS:
        here = {d["b"]: d for d in record["comparisons"] if d.get("cloud_fraction") == c and d["family"] == "goal"}
        best = max(here, key=lambda name: _mean_at(of[name], c))
        worse = [name for name, d in here.items() if verdict(d) == "worse"]
        d = here[best]
        cells.append(
            [
                f"{c:.0%}",
                percents(_mean_at(of[contest.ours], c)),
                f"{best} ({percents(_mean_at(of[best], c))})",
                interval(d),
                f"{d['holm']:.3f}",
                outcome(d),
                ", ".join(worse) or "none",
            ]
        )
    title = f"The goal: {contest.ours} beside the best of {len(contest.goal)} others; {_intervals(record)}"
    columns = ["called", contest.ours, "best of the others", "less it, points (95%)", "p, corrected",
               f"{contest.ours} is", "others that are better"]  # fmt: skip
    return Table(title, columns, cells)


def _curves(lines: Lines) -> Table:
    def at(c: float) -> Column:
        return f"{c:.0%}", lambda rows: percents(_mean_at(rows, c))

    columns = [NAME, *(at(c) for c in (0.0, *FRACTIONS))]
    columns += [(title, mean_of(key, "{:.3f}".format)) for title, key in (("area", "area"), ("APGR", "apgr"))]
    columns += [("calls for half of the gap", mean_of("calls_for_50")), ("80%", mean_of("calls_for_80"))]
    columns += [("AUROC", mean_of("auroc", "{:.3f}".format))]
    return table_of("Right of the held-out problems with exactly so many called, mean over seeds", lines, columns)


def _less(contest: Contest, record: Record, others: Lines) -> Table:
    found = {(d["b"], d.get("cloud_fraction", "apgr")): d for d in record["comparisons"]}

    def at(c: float | str, text: Callable[[Difference], str]) -> Callable[[list[Row]], str]:
        return lambda rows: text(d) if (d := found.get((rows[0]["method"], c))) else "–"

    def sentence(corrected: bool) -> Callable[[list[Row]], str]:
        def say(rows: list[Row]) -> str:
            words: dict[str, list[str]] = {"better": [], "worse": []}
            for c in FRACTIONS:
                d = found[rows[0]["method"], c]
                if (word := verdict(d)) != "same" and (not corrected or d["holm"] < LEVEL):
                    words[word].append(f"{c:.0%}")
            return "; ".join(f"{word} at {', '.join(where)}" for word, where in words.items() if where) or "same"

        return say

    columns: list[Column] = [NAME, *((f"{c:.0%} called", at(c, interval)) for c in FRACTIONS)]
    columns += [("APGR", at("apgr", interval)), (f"{contest.ours} is", sentence(False))]
    columns += [("corrected for the number of comparisons", sentence(True))]
    title = f"{contest.ours} less it, points (95%); {_intervals(record)}"
    return table_of(title, others, columns)


def _landed(lines: Lines) -> Table:
    def called(c: float) -> Column:
        return f"{c:.0%}: called", lambda rows: seeds_range(sorted(row["landed"][f"{c:g}"][0] for row in rows))

    def right(c: float) -> Column:
        return "right", lambda rows: percents(float(np.mean([row["landed"][f"{c:g}"][1] for row in rows])))

    columns = [NAME, *(column(c) for c in LANDED for column in (called, right))]
    columns += [("as trained (T=1): called", seeds_of("trained_called")), ("right", mean_of("trained_accuracy"))]
    return table_of("Where thresholds set on the validation problems land, greedy; and as trained", lines, columns)


def _chosen(lines: Lines) -> Table:
    def at(c: float) -> Column:
        return f"{c:.0%}", lambda rows: "; ".join(_short(row["chosen"][f"{c:g}"]) for row in rows)

    columns = [NAME, *map(at, FRACTIONS)]
    return table_of("Chosen on the validation problems, a seed after the other", lines, columns)


def _members(lines: Lines) -> Table:
    cells = []
    for rows in lines:
        for member in (name for name, found in rows[0]["members"].items() if found):
            trained = [row["members"][member] for row in rows]
            called = seeds_range(sorted(t["trained_called"] for t in trained))
            right = percents(float(np.mean([t["trained_accuracy"] for t in trained])))
            cells.append([str(rows[0]["method"]), _short(member), called, right])
    title = "What was trained for the methods with several runs, as trained (T=1)"
    return Table(title, ["method", "run", "called", "right"], cells)


def _short(member: str) -> str:
    """What tells a member from the others: "alpha_c 0.3" of "GAPG, alpha_c 0.3"."""
    return member.partition(", ")[2] or member


def draw(contest: Contest, figure: Figure, record: Record) -> None:
    """Accuracy against calls, and ours less each, along the curve: some methods of the goal in colour, all in grey."""
    of = {name: rows for (name,), rows in grouped(record["rows"], "method").items()}
    curves, lead = panels(figure, 2, width=6.6, height=5.0)
    ours = np.array([row["curve"] for row in of[contest.ours]])
    less = grouped([d for d in record["comparisons"] if "cloud_fraction" in d], "b")
    others = [name for name in contest.goal if name not in contest.picked]
    colours = dict(zip(contest.picked, (c for c in COLOURS if c != BLUE), strict=False))
    for i, name in enumerate((*others, *contest.picked)):
        theirs, colour = np.array([row["curve"] for row in of[name]]), colours.get(name)
        label = name if colour else None if i else f"the {len(others)} other methods of the goal"
        style: dict[str, Any] = {"color": colour or PALE, "linewidth": 1.8 if colour else 0.9}
        curves.plot(GRID, theirs.mean(0), label=label, **style)
        lead.plot(GRID, (ours - theirs).mean(0) * 100, **style)
        if colour:
            beside = 0.008 * (list(colours).index(name) - len(colours) / 2)
            for d in less[(name,)]:
                lead.vlines(d["cloud_fraction"] + beside, d["low"] * 100, d["high"] * 100, color=colour, linewidth=1)
    curves.plot(GRID, ours.mean(0), color=BLUE, linewidth=2.8, label=contest.ours)
    curves.fill_between(GRID, ours.min(0), ours.max(0), color=BLUE, alpha=0.15, linewidth=0)
    lead.axhline(0, color=BLUE, linewidth=2.8)
    curves.set(xlabel="called", ylabel="right together", title="right, the cloud's answers included")
    lead.set(xlabel="called", ylabel="points", title=f"{contest.ours} less each (bars: 95% intervals)")
    handles, labels = curves.get_legend_handles_labels()
    curves.legend(handles[::-1], labels[::-1], fontsize=SMALL, loc="lower right")
    percent(curves, x=True, y=True)
    percent(lead, x=True)
    seeds = len(record["seeds"])
    figure.suptitle(f"{record['rows'][0]['problems']:,} held-out problems, greedy, {seeds} seed{'s' * (seeds > 1)}")
