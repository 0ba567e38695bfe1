"""How sure a comparison is: the spread of a figure over seeds, and intervals of paired differences."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from gapg.seeding import derive
from gapg.studies.curves import FloatArray

_RESAMPLES = 10_000


@dataclass(frozen=True)
class Spread:
    """A figure over seeds: its mean, its smallest and largest value, its values in the order of the seeds."""

    mean: float
    low: float
    high: float
    values: tuple[float, ...]


def spread(values: Sequence[float]) -> Spread:
    """Raises ValueError on no values."""
    if not len(values):
        raise ValueError("a spread needs at least one value")
    known = tuple(float(v) for v in values)
    # rounding must not put the mean of equal values outside of them
    mean = min(max(math.fsum(known) / len(known), min(known)), max(known))
    return Spread(mean, min(known), max(known), known)


@dataclass(frozen=True)
class Difference:
    """a - b on the same problems, with a 95% interval.

    per_seed: the mean difference of each seed. wins: the seeds on which a is better.
    """

    mean: float
    low: float
    high: float
    per_seed: tuple[float, ...]
    wins: int


def paired_difference(a: Sequence[FloatArray] | FloatArray, b: Sequence[FloatArray] | FloatArray) -> Difference:
    """The mean over seeds of the mean difference a - b over problems; a, b: [seeds][problems].

    With two seeds or more the interval is Student's t over the per-seed mean differences: what another seed would
    give on these problems. With one seed it is the percentile bootstrap over problems (10,000 resamples, a fixed
    generator): what other problems would give that model.
    Raises ValueError where seeds or problems of a and b differ in number, or there are none.
    """
    by_seed = [_differences(x, y) for x, y in zip(a, b, strict=True)]
    if not by_seed:
        raise ValueError("a paired difference needs at least one seed")
    per_seed = tuple(float(d.mean()) for d in by_seed)
    low, high = t_interval(per_seed) if len(per_seed) > 1 else bootstrap_interval(by_seed[0])
    return Difference(math.fsum(per_seed) / len(per_seed), low, high, per_seed, sum(d > 0 for d in per_seed))


def seed_difference(a: Sequence[float], b: Sequence[float]) -> Difference:
    """The mean over seeds of a - b, one figure a seed that is no mean over problems; with Student's 95% interval.

    a, b: figures in [0, 1]. One seed says nothing of another: its interval is -1 to 1, all that they could differ by.
    Raises ValueError where the seeds of a and b differ in number, or there are none.
    """
    per_seed = tuple(float(x) - float(y) for x, y in zip(a, b, strict=True))
    if not per_seed:
        raise ValueError("a paired difference needs at least one seed")
    low, high = t_interval(per_seed) if len(per_seed) > 1 else (-1.0, 1.0)
    return Difference(math.fsum(per_seed) / len(per_seed), low, high, per_seed, sum(d > 0 for d in per_seed))


def _differences(x: FloatArray, y: FloatArray) -> FloatArray:
    if np.shape(x) != np.shape(y) or np.ndim(x) != 1 or not np.size(x):
        raise ValueError(f"a pair needs the same problems, one figure each, not {np.shape(x)} and {np.shape(y)}")
    return np.asarray(x, dtype=np.float64) - np.asarray(y, dtype=np.float64)


def covered(seeds: int) -> str:
    """What the intervals of a table say something about, for its title."""
    if seeds == 1:
        return "intervals: other problems for this one seed"
    return f"intervals: over {seeds} seeds (Student's t), the held-out problems are the same in all"


def t_interval(values: Sequence[float]) -> tuple[float, float]:
    """Student's 95% interval of the mean. Raises ValueError on fewer than two values."""
    if len(values) < 2:
        raise ValueError("an interval over seeds needs at least two of them")
    x = np.asarray(values, dtype=np.float64)
    half = float(stats.t.ppf(0.975, x.size - 1) * x.std(ddof=1)) / math.sqrt(x.size)
    return float(x.mean()) - half, float(x.mean()) + half


def bootstrap_interval(differences: FloatArray) -> tuple[float, float]:
    """The percentile bootstrap's 95% interval of the mean; the same figures give the same interval, in any order."""
    x = np.asarray(differences, dtype=np.float64)
    values, counts = np.unique(x, return_counts=True)
    # resampling problems with replacement is a multinomial draw of how often each distinct difference comes
    rng = np.random.default_rng(derive(0, "bootstrap over problems"))
    means = rng.multinomial(x.size, counts / x.size, size=_RESAMPLES) @ values / x.size
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)
