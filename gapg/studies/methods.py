"""Methods that decide who answers, built from the predictions of finished runs, and how their figures are worded."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from gapg.evaluation.evaluate import Result
from gapg.studies.curves import FloatArray, Routed, apply_threshold, threshold_for
from gapg.studies.paired import Difference
from gapg.studies.routers import help_margins
from gapg.studies.study import Finished

Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class Method:
    """One method of one seed on the held-out problems.

    routed: its whole curve. calibration: its scores on problems that are not held out, for a threshold; None: it has
    none. trained: what it does as trained, at the training temperature; None: it does not decide by itself.
    samples: responses of the device model a problem. answers_first: the device works before anyone decides.
    """

    name: str
    seed: int
    routed: Routed
    calibration: FloatArray | None = None
    trained: Result | None = None
    samples: int = 1
    answers_first: bool = True

    def at_threshold(self, cloud_fraction: float) -> Result | None:
        """The held-out problems with the threshold that gives `cloud_fraction` on the calibration problems."""
        if self.calibration is None:
            return None
        return apply_threshold(self.routed, threshold_for(self.calibration, cloud_fraction))


def by_label(finished: Iterable[Finished]) -> dict[str, list[Finished]]:
    """The runs of each label, in the order of their seeds."""
    groups: dict[str, list[Finished]] = {}
    for f in sorted(finished, key=lambda f: f.unit.seed):
        groups.setdefault(f.unit.label, []).append(f)
    return groups


def unanswered(tables: Iterable[Rows]) -> set[str]:
    """Problems on which the cloud failed in any table of masked predictions: left out of all, so that all stay paired.

    Raises ValueError where the tables are not of the same problems in the same order.
    """
    first: list[str] | None = None
    failed: set[str] = set()
    for rows in tables:
        ids = [row["id"] for row in rows]
        first = first or ids
        if ids != first:
            raise ValueError("the runs were measured on different held-out problems and cannot be compared")
        failed |= {row["id"] for row in rows if row["oracle_score"] is None}
    return failed


def without(rows: Rows, ids: set[str]) -> Rows:
    return [row for row in rows if row["id"] not in ids]


def routed(name: str, masked: Rows, score: FloatArray) -> Routed:
    """Masked predictions, each with what the cloud would have answered, ranked by `score` [n]."""
    local = np.array([row["outcome"] == "local_correct" for row in masked], dtype=np.float64)
    cloud = np.array([row["oracle_score"] for row in masked], dtype=np.float64)
    return Routed(name, score, local, cloud)


def as_trained(name: str, rows: Rows) -> Result:
    """Who answered, and whether rightly, in unmasked predictions.

    A call whose oracle failed is a call all the same; only `correct` leaves it out.
    """
    outcomes = [row["outcome"] for row in rows]
    return Result(
        name,
        called=[o.startswith("cloud") or o == "unknown" for o in outcomes],
        correct=[o in ("local_correct", "cloud_correct") for o in outcomes if o != "unknown"],
        local_correct=[o == "local_correct" for o in outcomes],
    )


def by_help_phrase(name: str, run: Finished, left_out: set[str]) -> Method:
    """A run's own decision: greedily by the margin of its help phrase, calibrated on all training problems."""
    masked = without(run.rows("heldout-masked"), left_out)
    return Method(
        name,
        run.unit.seed,
        routed(name, masked, help_margins(masked)),
        calibration=help_margins(run.rows("train-masked")),
        trained=as_trained(name, run.rows("heldout-sampled")),
    )


def called(result: Result) -> float:
    return sum(result.called) / len(result.called)


def accuracy(result: Result) -> float:
    return sum(result.correct) / len(result.correct)


@dataclass(frozen=True)
class Prices:
    """`local`: of one response of the device model, `call`: of one cloud call. `text` says where they come from."""

    local: float
    call: float
    text: str


def prices(runs: Sequence[Finished]) -> Prices:
    """The mean price of the calls that the runs made in training: their tokens at the config's token prices.

    Where the config names no price, or no tokens were counted, one call is the unit of money.
    """
    # the prices as they are now: a run may be older than they are, and is the same run at any price
    oracle, cost, requests = runs[0].config.oracle, 0.0, 0
    share = f"a response of the device model is taken to cost {oracle.local_share:g} of it"
    if oracle.price_per_million_prompt is not None and oracle.price_per_million_completion is not None:
        used = [run.info["oracle"] for run in runs]
        prompt, completion, requests = (
            sum(usage[key] for usage in used) for key in ("prompt_tokens", "completion_tokens", "requests")
        )
        cost = (prompt * oracle.price_per_million_prompt + completion * oracle.price_per_million_completion) / 1e6
    if not requests or not cost:
        return Prices(oracle.local_share, 1.0, f"money in cloud calls: one call is 1; {share}")
    call = cost / requests
    text = f"a call costs {call:.2g}, the mean of {requests:,} paid in training at the config's token prices; {share}"
    return Prices(oracle.local_share * call, call, text)


def percents(value: float) -> str:
    return f"{value * 100:.1f}%"


def points(value: float) -> str:
    """A difference of fractions, in points and signed; never a negative zero."""
    return f"{round(value * 100, 1) + 0.0:+.1f}"


def interval(d: Difference) -> str:
    """+5.1 (+4.0 to +6.2), in points."""
    return f"{points(d.mean)} ({points(d.low)} to {points(d.high)})"


def seeds_range(values: Sequence[float]) -> str:
    """The lowest and the highest seed, in percent."""
    low, high = percents(min(values)), percents(max(values))
    return low if len(values) == 1 else f"{low[:-1]} to {high}"


def listed(names: Sequence[str]) -> str:
    """a, b and c."""
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def sides(differences: Sequence[tuple[str, Difference]]) -> tuple[list[str], list[str], list[str]]:
    """(names that lose, that tie, that win): by whether the 95% interval of "ours less theirs" leaves 0 out."""
    lose = [name for name, d in differences if d.low > 0]
    win = [name for name, d in differences if d.high < 0]
    tie = [name for name, d in differences if d.low <= 0 <= d.high]
    return lose, tie, win
