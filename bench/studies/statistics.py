"""The one table that studies are made of, accuracy at equal calls, and how sure a difference is.

A row of the table is a problem under an arm and a seed:

    arm, seed, id
    called, correct    as trained, sampled at the training temperature; a call is as right as the oracle is on average
    score              who is called first, greedily: the highest; for a policy the margin of its help phrase
    local, cloud       how right the greedy answer is without a call, and how right a call is; both in [0, 1]

A router outside the model is more rows of the same kind, with a name, a `score` and `local` answers of its own.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
from scipy import stats

from gapg.seeding import derive
from studies.arms import Finished

FloatArray = npt.NDArray[np.float64]
Difference = dict[str, Any]
"""a less b: `mean`, its 95% interval `low` to `high`, `per_seed`, and on how many seeds a is better (`wins`)."""

GAP_SHARES = (0.2, 0.5, 0.8)
"""The shares of the gap at which RouteLLM counts calls: CPT(20%), CPT(50%), CPT(80%)."""


DIFFERENT = "the runs were measured on different held-out problems and cannot be compared"


def problems(runs: Sequence[Finished]) -> pd.DataFrame:
    """The table of finished runs. Problems on which the cloud failed in any of them are left out of all.

    Raises ValueError where the runs were measured on different problems.
    """
    table = pd.concat([of_run(run) for run in runs], ignore_index=True)
    seen = [tuple(ids) for _, ids in table.groupby(["arm", "seed"], sort=False)["id"]]
    if any(ids != seen[0] for ids in seen):
        raise ValueError(DIFFERENT)
    failed = table.loc[table["cloud"].isna() | table["correct"].isna(), "id"]
    return table[~table["id"].isin(failed)].reset_index(drop=True)


def of_run(run: Finished) -> pd.DataFrame:
    """The table of one run. Raises ValueError where its predictions are of different problems."""
    masked, sampled = run.rows("heldout-masked"), pd.DataFrame(run.rows("heldout-sampled"))
    alone = of_answers(masked)
    if alone["id"].tolist() != sampled["id"].tolist():
        raise ValueError(DIFFERENT)
    outcome = sampled["outcome"]
    called = outcome.str.startswith("cloud") | (outcome == "unknown")
    right = np.where(called, sampled["oracle_score"].astype(float), outcome == "local_correct")
    about = {"arm": run.arm.label, "seed": run.arm.seed}
    trained = {"called": called.astype(float), "correct": np.where(outcome == "unknown", np.nan, right)}
    return alone.assign(**about, **trained)


def of_answers(masked: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """id, score, local and cloud of predictions decoded greedily with help masked."""
    rows = pd.DataFrame(masked)
    return pd.DataFrame(
        {
            "id": rows["id"],
            "score": help_margins(masked),
            "local": (rows["outcome"] == "local_correct").astype(float),
            "cloud": rows["oracle_score"].astype(float),
        }
    )


def help_margins(rows: Iterable[Mapping[str, Any]]) -> FloatArray:
    """[n] the model's own decision: how near the response came to calling; -inf where it never could."""
    margins = [row["help_margin"] for row in rows]
    return np.array([-math.inf if m is None or m != m else m for m in margins], dtype=np.float64)


# ---- accuracy against calls


def shares_at(score: FloatArray, c: float) -> FloatArray:
    """[n] how much of each problem is called when exactly c * n calls are made, highest scores first.

    Problems of equal score share what is left evenly: the expectation over a random order of ties.
    Raises ValueError unless 0 <= c <= 1.
    """
    if not 0 <= c <= 1:
        raise ValueError(f"a call fraction is in [0, 1], not {c}")
    _, group, sizes = np.unique(-score, return_inverse=True, return_counts=True)
    before = np.cumsum(sizes) - sizes
    share = np.clip((c * score.size - before) / sizes, 0.0, 1.0)
    return np.asarray(share[group], dtype=np.float64)


def at_calls(table: pd.DataFrame, c: float) -> pd.Series:
    """How right each row is, in expectation, when exactly c of the problems of its arm and seed are called."""
    share = table.groupby(["arm", "seed"])["score"].transform(lambda score: shares_at(score.to_numpy(), c))
    return share * table["cloud"] + (1 - share) * table["local"]


def mean_by_seed(table: pd.DataFrame, values: pd.Series, arm: str) -> list[float]:
    """The mean over problems for each seed of the arm, in the order of the seeds."""
    mine = table["arm"] == arm
    return [float(of_seed.to_numpy().mean()) for _, of_seed in values[mine].groupby(table.loc[mine, "seed"])]


@dataclass(frozen=True)
class Curve:
    """`accuracy` [k] at the call fractions `called` [k], which rise from 0 to 1; straight in between."""

    called: FloatArray
    accuracy: FloatArray

    def at(self, c: Any) -> Any:
        """The accuracy at call fraction c, or at each of several."""
        return np.interp(c, self.called, self.accuracy)


def curve(table: pd.DataFrame) -> Curve:
    """The whole curve of one arm and seed, a point a distinct score; problems of equal score are one segment."""
    score, local, cloud = (table[key].to_numpy() for key in ("score", "local", "cloud"))
    _, group, sizes = np.unique(-score, return_inverse=True, return_counts=True)
    gained = np.bincount(group, weights=cloud - local, minlength=sizes.size)
    called = np.concatenate([[0.0], np.cumsum(sizes) / score.size])
    accuracy = np.concatenate([[0.0], np.cumsum(gained) / score.size]) + local.mean()
    accuracy[-1] = cloud.mean()
    return Curve(called, accuracy)


def area(curve: Curve) -> float:
    """The area under the curve: its mean accuracy over all call fractions. Exact."""
    return float(np.trapezoid(curve.accuracy, curve.called))


def apgr(curve: Curve, local: float) -> float | None:
    """RouteLLM's average performance gap recovered (arXiv 2406.18665): 0.5 for random offloading, at most about 1.

    The gap is from the accuracy `local`, which counts as nothing recovered, to the cloud's. RouteLLM averages ten
    points; this is the integral. None where the cloud is no better than `local`.
    """
    gap = float(curve.accuracy[-1]) - local
    return (area(curve) - local) / gap if gap > 0 else None


def calls_for_gap(curve: Curve, share: float, local: float) -> float | None:
    """RouteLLM's CPT: the smallest call fraction that recovers `share` of the gap. None where there is no gap."""
    cloud = float(curve.accuracy[-1])
    if cloud <= local:
        return None
    # rounding must not put the whole gap out of reach
    target = min(local + share * (cloud - local), cloud)
    i = int(np.flatnonzero(curve.accuracy >= target)[0])
    if i == 0:
        return 0.0
    (c0, c1), (a0, a1) = curve.called[i - 1 : i + 1], curve.accuracy[i - 1 : i + 1]
    return float(c0 + (c1 - c0) * (target - a0) / (a1 - a0))


def measures(curve: Curve, local: float) -> dict[str, float | None]:
    """`area`, `apgr` and `calls_for_20`, `_50`, `_80` of the gap from `local` to the cloud."""
    calls = {f"calls_for_{share * 100:.0f}": calls_for_gap(curve, share, local) for share in GAP_SHARES}
    return {"area": area(curve), "apgr": apgr(curve, local), **calls}


def threshold_for(scores: Sequence[float] | FloatArray, c: float) -> float:
    """The threshold that makes a calibration set call nearest to a fraction c of its problems: call where score > it.

    Halfway between two scores. Where ties leave no exact one, the nearest number of calls, the smaller of two equally
    near. inf calls nothing; -inf calls everything that can be called (scores above -inf), which may be less than c.
    Raises ValueError on no scores, NaN, or c outside [0, 1].
    """
    ranked = np.sort(np.asarray(scores, dtype=np.float64))[::-1]
    if not ranked.size or np.isnan(ranked).any():
        raise ValueError("a threshold needs scores, none of them NaN")
    if not 0 <= c <= 1:
        raise ValueError(f"a call fraction is in [0, 1], not {c}")
    reachable = ranked[ranked > -math.inf]
    # calls that a threshold can make: every place where the score drops
    cuts = [0, *(np.flatnonzero(reachable[:-1] > reachable[1:]) + 1).tolist(), reachable.size]
    calls = min(cuts, key=lambda cut: (abs(cut - c * ranked.size), cut))
    if calls == 0:
        return math.inf
    if calls == reachable.size:
        return -math.inf
    high, low = float(reachable[calls - 1]), float(reachable[calls])
    middle = low + (high - low) / 2
    # of neighbouring floats, or where high is inf, the middle is no number between them
    return middle if low <= middle < high else low


def at_threshold(table: pd.DataFrame, threshold: float) -> tuple[float, float]:
    """(called, accuracy) of these rows when the threshold was fixed beforehand: called where score > threshold."""
    called = (table["score"] > threshold).to_numpy()
    return float(called.mean()), float(np.where(called, table["cloud"], table["local"]).mean())


# ---- how sure a difference is


def compare(table: pd.DataFrame, values: str | pd.Series, a: str, b: str) -> Difference:
    """Arm a less arm b, paired by seed and problem; `values`: a column, or a series with the table's rows.

    With two seeds or more the interval is Student's t over the per-seed mean differences: what another seed would give
    on these problems. With one seed it is the bootstrap over problems: what other problems would give that model; over
    kinds of problems where the table has a column `kind`.
    Raises ValueError where seeds or problems of a and b differ.
    """
    column = table[values] if isinstance(values, str) else values
    keyed = column.set_axis(pd.MultiIndex.from_frame(table[["seed", "id"]]))
    x, y = (keyed[(table["arm"] == arm).to_numpy()].sort_index(level="seed", sort_remaining=False) for arm in (a, b))
    if x.empty or not x.index.equals(y.index):
        raise ValueError(f"{a} and {b} have different seeds or problems, and cannot be paired")
    by_seed = [of_seed.to_numpy() for _, of_seed in (x - y).groupby(level="seed", sort=False)]
    per_seed = [float(differences.mean()) for differences in by_seed]
    if len(per_seed) > 1:
        return _difference(per_seed, t_interval(per_seed))
    if "kind" not in table:
        return _difference(per_seed, bootstrap_interval(by_seed[0]))
    kind_of = dict(zip(table["id"], table["kind"], strict=True))
    kinds = [kind_of[i] for i in x.index.get_level_values("id")]
    return _difference(per_seed, bootstrap_of_kinds(by_seed[0], kinds))


def compare_seeds(a: Sequence[float], b: Sequence[float]) -> Difference:
    """a - b, one figure in [0, 1] a seed that is no mean over problems; with Student's 95% interval over seeds.

    One seed says nothing of another: its interval is -1 to 1, all that they could differ by.
    Raises ValueError where the seeds of a and b differ in number, or there are none.
    """
    per_seed = [float(x) - float(y) for x, y in zip(a, b, strict=True)]
    if not per_seed:
        raise ValueError("a paired difference needs at least one seed")
    return _difference(per_seed, t_interval(per_seed) if len(per_seed) > 1 else (-1.0, 1.0))


def _difference(per_seed: list[float], interval: tuple[float, float]) -> Difference:
    low, high = interval
    wins = sum(d > 0 for d in per_seed)
    return {"mean": fmean(per_seed), "low": low, "high": high, "per_seed": per_seed, "wins": wins}


def t_interval(values: Sequence[float]) -> tuple[float, float]:
    """Student's 95% interval of the mean of two values or more.

    Not `ttest_1samp(...).confidence_interval()`, which is NaN where all seeds agree.
    """
    half = float(stats.t.ppf(0.975, len(values) - 1) * stats.sem(values))
    return fmean(values) - half, fmean(values) + half


def p_value(per_seed: Sequence[float]) -> float:
    """Of Student's two-sided test that the mean is 0. 1 of one seed, which says nothing of another."""
    if len(per_seed) < 2:
        return 1.0
    if len(set(per_seed)) == 1:
        return float(per_seed[0] == 0)
    return float(2 * stats.t.sf(abs(fmean(per_seed)) / stats.sem(per_seed), len(per_seed) - 1))


def holm(p: Sequence[float]) -> list[float]:
    """p-values as corrected for being several (Holm 1979): in at most one study of 20 is one below 0.05 by
    chance alone.

    The k-th smallest of m is multiplied by m - k + 1, and is no smaller than those before it.
    """
    values = np.asarray(p, dtype=np.float64)
    order = np.argsort(values, kind="stable")
    rising = np.maximum.accumulate(values[order] * np.arange(values.size, 0, -1))
    corrected = np.empty_like(values)
    corrected[order] = np.minimum(rising, 1.0)
    return [float(value) for value in corrected]


def bootstrap_interval(differences: FloatArray) -> tuple[float, float]:
    """The percentile bootstrap's 95% interval of the mean, from 10,000 resamples by a fixed generator.

    Not `scipy.stats.bootstrap`, whose interval depends on the order of the problems.
    """
    values, counts = np.unique(np.asarray(differences, dtype=np.float64), return_counts=True)
    n = int(counts.sum())
    # resampling problems with replacement is a multinomial draw of how often each distinct difference comes
    rng = np.random.default_rng(derive(0, "bootstrap over problems"))
    means = rng.multinomial(n, counts / n, size=10_000) @ values / n
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)


def bootstrap_of_kinds(values: FloatArray, kinds: Sequence[str]) -> tuple[float, float]:
    """As `bootstrap_interval`, from resamples of kinds of problems, each with all of its problems: problems of a kind
    (one template, say) are right and wrong together, and as so many of their own they would tell too much.
    """
    of_kind = pd.Series(np.asarray(values, dtype=np.float64)).groupby(list(kinds)).agg(["sum", "size"]).to_numpy()
    k = len(of_kind)
    rng = np.random.default_rng(derive(0, "bootstrap over kinds"))
    sums, sizes = (rng.multinomial(k, np.full(k, 1 / k), size=10_000) @ of_kind).T
    low, high = np.quantile(sums / sizes, [0.025, 0.975])
    return float(low), float(high)


def smoothed(values: Sequence[float], window: int) -> FloatArray:
    """[n - window + 1] the mean of the last `window` values; of all of them where there are fewer."""
    window = min(window, len(values))
    return np.convolve(np.asarray(values, dtype=np.float64), np.full(window, 1 / window), mode="valid")
