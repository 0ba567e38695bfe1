"""A cloud that errs, at random or always on one kind of problem: what asking it in training buys."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from gapg.config import RunConfig
from gapg.errors import ConfigError
from gapg.tasks.base import ANSWER_CLOSE, ANSWER_OPEN
from gapg.tasks.countdown import Countdown
from gapg_rollout.oracle.solver import SolverOracle
from studies import arms
from studies.arms import Arm, Finished, Rows
from studies.drawing import COLOURS, SMALL, panels, percent
from studies.report import (
    Column,
    Record,
    Study,
    Table,
    covered,
    grouped,
    interval,
    mean_of,
    seeds_of,
    table_of,
    verdict,
)
from studies.shift import ways
from studies.statistics import Difference, at_calls, compare, curve, problems, shares_at

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

LARGE = 35
"""Targets over this are large: a quarter of the default problems."""
HARD: dict[str, Callable[[str, int], bool]] = {
    "large targets": lambda problem, max_value: int(problem.rpartition(" = ")[2]) > LARGE,
    "one way": lambda problem, max_value: ways(problem, max_value) == 1,
}
"""The kinds of problems that a cloud may fail on, by (problem, the largest value on the way): those with a large
target, and those, two fifths of all and the hardest for the device model, whose target is reached in a single way."""


class CountdownWithBlindCloud(Countdown):
    """Countdown whose solver, and so the stand-in for a cloud, is wrong on every problem of one kind.

    blind: the kind, of `HARD`. The other arguments, and the problems, are Countdown's. Raises ValueError.
    """

    def __init__(self, blind: str, **args: Any) -> None:
        super().__init__(**args)
        if blind not in HARD:
            raise ValueError(f"blind: must be one of {', '.join(HARD)}, not {blind!r}")
        self.blind = blind

    def solve(self, question_id: str) -> str:
        """An answer block; a wrong one for the kind. Raises ValueError where there is no solution."""
        right = super().solve(question_id)
        return f"{ANSWER_OPEN} 0 {ANSWER_CLOSE}" if HARD[self.blind](question_id, self.max_value) else right


@dataclass(frozen=True)
class Cloud:
    """How right a cloud is: at random by `accuracy`, and never on the kind `blind`."""

    name: str
    accuracy: float
    blind: str | None = None

    @property
    def overrides(self) -> dict[str, str]:
        found = {"oracle.accuracy": f"{self.accuracy:g}"}
        if self.blind:
            found |= {"task.name": "studies.weak_cloud:CountdownWithBlindCloud", "task.args.blind": self.blind}
        return found

    def scores(self, ids: Iterable[str], max_value: int) -> dict[str, float]:
        """How right it is on each problem, as a run's own oracle would be."""
        oracle = SolverOracle(str, self.accuracy, wrong="0")
        return {i: oracle.score(i) * (self.blind is None or not HARD[self.blind](i, max_value)) for i in ids}


ACCURACIES = (1.0, 0.8, 0.6, 0.4)
KIND_ACCURACY = 0.95
"""How often a blind cloud is right on the other problems."""
CLOUDS = (
    *(Cloud(f"right on {a:.0%}", a) for a in ACCURACIES),
    *(Cloud(f"blind to {kind}", KIND_ACCURACY, kind) for kind in HARD),
)
FRACTIONS, CALLED = (0.1, 0.2, 0.3, 0.5), 0.3
ASK, IGNORE, LOG, OURS = "marginal, asked", "marginal, Brier", "marginal", "GAPG"
METHODS = (OURS, LOG, IGNORE, ASK)
BRIER = {"method": "marginal", "marginal.score": "brier", "marginal.weight": "4"}
"""The score that has a place for how right the cloud is, with the weight that its first trials had."""
PAIRS = ((ASK, IGNORE), (ASK, LOG), (ASK, OURS), (LOG, OURS))


def weak_arms(seed: int) -> list[Arm]:
    """A run a cloud for what learns from it; of the others, which ask no cloud, one run for all clouds."""
    own = [(label, given) for label, given in ((OURS, {}), (ASK, {**BRIER, "marginal.cloud": "ask"}))]
    return [
        *(
            Arm(f"{label}, {cloud.name}", {**given, **cloud.overrides}, seed)
            for label, given in own
            for cloud in CLOUDS
        ),
        arms.marginal(seed),
        Arm(IGNORE, BRIER, seed),
    ]


def check(config: RunConfig) -> None:
    """Raises ConfigError: another task, or a cloud whose accuracy nobody sets."""
    if not config.task.name.endswith(("countdown", ":CountdownWithBlindCloud")):
        raise ConfigError("study weak-cloud makes kinds of Countdown problems: it needs task.name=countdown")
    if config.oracle.kind != "solver":
        raise ConfigError("study weak-cloud sets how often the cloud is right: it needs --oracle.kind solver")


def measure(finished: list[Finished]) -> tuple[Rows, list[Difference]]:
    """A row a method, cloud and seed; the pairs of `PAIRS` with each cloud, at equal calls. Greedy."""
    table = problems(finished)
    max_value = int(finished[0].config.task.args.get("max_value", 100))
    asked = {(run.arm.label, run.arm.seed): run.info["oracle"]["requests"] for run in finished}
    rows: Rows = []
    comparisons: list[Difference] = []
    for cloud in CLOUDS:
        labels = {f"{method}, {cloud.name}" if method in (OURS, ASK) else method: method for method in METHODS}
        part = with_cloud(table[table["arm"].isin(labels)].reset_index(drop=True), cloud, max_value)
        for (label, seed), of_run in part.groupby(["arm", "seed"], sort=False):
            line = curve(of_run)
            rows.append(
                {"cloud": cloud.name, "method": labels[label], "seed": int(seed), "requests": asked[label, seed]}
                | {"local_alone": line.at(0.0), "cloud_alone": line.at(1.0)}
                | {f"at_{c:g}": line.at(c) for c in FRACTIONS}
                | {"in_vain": in_vain(of_run)}
            )
        part = part.assign(arm=part["arm"].map(labels))
        for c in FRACTIONS:
            right = at_calls(part, c)
            comparisons += [
                {"a": a, "b": b, "cloud": cloud.name, "cloud_fraction": c, **compare(part, right, a, b)}
                for a, b in PAIRS
            ]
    return rows, comparisons


def with_cloud(table: pd.DataFrame, cloud: Cloud, max_value: int) -> pd.DataFrame:
    """The table with its problems put to this cloud; what a run was trained with does not matter."""
    scores = cloud.scores(table["id"].unique(), max_value)
    return table.assign(cloud=table["id"].map(scores))


def in_vain(of_run: pd.DataFrame) -> float:
    """The part of the calls that the cloud gets wrong, where 30% are called."""
    share = shares_at(of_run["score"].to_numpy(), CALLED)
    return float((share * (1 - of_run["cloud"].to_numpy())).sum() / share.sum())


# ---- on paper


def tables(record: Record) -> list[Table]:
    groups = grouped(record["rows"], "cloud", "method")
    columns: list[Column] = [
        ("cloud", lambda rows: str(rows[0]["cloud"])),
        ("method", lambda rows: str(rows[0]["method"])),
        ("local alone", mean_of("local_alone")),
        *((f"{c:.0%} called", seeds_of(f"at_{c:g}")) for c in FRACTIONS),
        ("cloud alone", mean_of("cloud_alone")),
        (f"calls in vain, of {CALLED:.0%}", mean_of("in_vain")),
        ("requests in training", mean_of("requests", "{:,.0f}".format)),
    ]
    ordered = [groups[cloud.name, method] for cloud in CLOUDS for method in METHODS]
    first = table_of("Right together at equal calls, greedy, by what the cloud gets wrong", ordered, columns)
    return [first, _pairs_table(record)]


def _pairs_table(record: Record) -> Table:
    pairs = grouped(record["comparisons"], "cloud", "a", "b").values()

    def at(i: int) -> Callable[[list[dict[str, Any]]], str]:
        return lambda of_pair: f"{interval(of_pair[i])} {verdict(of_pair[i])}"

    columns: list[Column] = [
        ("cloud", lambda of_pair: str(of_pair[0]["cloud"])),
        ("method", lambda of_pair: str(of_pair[0]["a"])),
        ("less", lambda of_pair: str(of_pair[0]["b"])),
        *((f"{c:.0%} called", at(i)) for i, c in enumerate(FRACTIONS)),
    ]
    return table_of(f"Differences in points (95%), paired; {covered(len(record['seeds']))}", pairs, columns)


def draw(figure: Figure, record: Record) -> None:
    """Accuracy at 30% called by cloud, and the calls that the cloud gets wrong."""
    names: Sequence[str] = [cloud.name for cloud in CLOUDS]
    for axis, key, title in zip(
        panels(figure, 2, width=7.2),
        (f"at_{CALLED:g}", "in_vain"),
        (f"right together, {CALLED:.0%} called, greedy", "calls that the cloud gets wrong"),
        strict=True,
    ):
        for i, (method, colour) in enumerate(zip(METHODS, COLOURS, strict=False)):
            rows = [row for row in record["rows"] if row["method"] == method]
            x = [names.index(row["cloud"]) + (i - 1.5) * 0.15 for row in rows]
            axis.plot(x, [row[key] for row in rows], "o", color=colour, markersize=5, alpha=0.7, label=method)
        axis.set_xticks(np.arange(len(names)), names, fontsize=SMALL, rotation=20)
        axis.set_title(title)
        axis.legend(fontsize=SMALL)
        percent(axis, y=True)


WEAK_CLOUD = Study(
    "weak-cloud",
    "With a cloud that is right on 40 to 100%, or never on one kind of problem, what does asking it in training buy?",
    arms.SEEDS,
    weak_arms,
    measure,
    tables,
    draw,
    check,
    notes="GAPG and the marginal method with `marginal.cloud: ask` are trained with the cloud of the line; the others"
    " ask none in training, and one run of theirs stands in all lines. A cloud that errs at random, by a hash of the"
    " problem, errs on nothing that a model could learn of; one that is blind to a kind does.",
)
