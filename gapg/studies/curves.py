"""Accuracy against calls and against money, for anything that ranks problems by how much they need the cloud.

RouteLLM's measures (arXiv 2406.18665, section 2.2): the share of the gap from local to cloud that a router recovers
at each call fraction, its mean over all fractions (APGR), and the calls needed for a given share of the gap (CPT).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from gapg.evaluation.evaluate import Result

FloatArray = npt.NDArray[np.float64]

GAP_SHARES = (0.2, 0.5, 0.8)
"""The shares of the gap at which RouteLLM counts calls: CPT(20%), CPT(50%), CPT(80%)."""


@dataclass(frozen=True)
class Routed:
    """One method on the same n problems.

    score: [n], the highest is called first; -inf where no threshold makes the method call (those are called last).
    local: [n] in [0, 1], how right the answer is when it is given locally.
    cloud: [n] in [0, 1], how right it is when the problem is called (the oracle's mean correctness).
    Raises ValueError where lengths differ, there are no problems, a score is NaN, or a correctness leaves [0, 1].
    """

    name: str
    score: FloatArray
    local: FloatArray
    cloud: FloatArray

    def __post_init__(self) -> None:
        for field in ("score", "local", "cloud"):
            object.__setattr__(self, field, np.asarray(getattr(self, field), dtype=np.float64))
        if not self.score.shape == self.local.shape == self.cloud.shape or self.score.ndim != 1 or not self.score.size:
            shapes = f"{self.score.shape}, {self.local.shape}, {self.cloud.shape}"
            raise ValueError(f"{self.name}: score, local and cloud must be as long as each other, not {shapes}")
        if np.isnan(self.score).any():
            raise ValueError(f"{self.name}: a score is NaN")
        for field in ("local", "cloud"):
            if not ((getattr(self, field) >= 0) & (getattr(self, field) <= 1)).all():
                raise ValueError(f"{self.name}: {field} must be in [0, 1]")


def shares_at(r: Routed, c: float) -> FloatArray:
    """[n] how much of each problem is called when exactly c * n calls are made, highest scores first.

    Problems of equal score share what is left evenly: the expectation over a random order of ties.
    Raises ValueError unless 0 <= c <= 1.
    """
    if not 0 <= c <= 1:
        raise ValueError(f"a call fraction is in [0, 1], not {c}")
    _, group, sizes = np.unique(-r.score, return_inverse=True, return_counts=True)
    before = np.cumsum(sizes) - sizes
    share = np.clip((c * r.score.size - before) / sizes, 0.0, 1.0)
    return np.asarray(share[group], dtype=np.float64)


def accuracies_at(r: Routed, c: float) -> FloatArray:
    """[n] the expected correctness of each problem at exactly c * n calls; for comparisons paired by problem."""
    share = shares_at(r, c)
    return share * r.cloud + (1 - share) * r.local


@dataclass(frozen=True)
class Curve:
    """`accuracy` [k] at the call fractions `called` [k], which rise from 0 to 1; straight in between."""

    called: FloatArray
    accuracy: FloatArray

    @property
    def local(self) -> float:
        return float(self.accuracy[0])

    @property
    def cloud(self) -> float:
        return float(self.accuracy[-1])

    def at(self, c: float) -> float:
        """The accuracy at call fraction c."""
        return float(np.interp(c, self.called, self.accuracy))


def curve(r: Routed) -> Curve:
    """The method's whole curve: a point a distinct score. Problems of equal score are one straight segment."""
    _, group, sizes = np.unique(-r.score, return_inverse=True, return_counts=True)
    gained = np.bincount(group, weights=r.cloud - r.local, minlength=sizes.size)
    called = np.concatenate([[0.0], np.cumsum(sizes) / r.score.size])
    accuracy = np.concatenate([[0.0], np.cumsum(gained) / r.score.size]) + r.local.mean()
    accuracy[-1] = r.cloud.mean()
    return Curve(called, accuracy)


def area(curve: Curve) -> float:
    """The area under the curve: its mean accuracy over all call fractions. Exact."""
    widths = np.diff(curve.called)
    return float(np.sum(widths * (curve.accuracy[1:] + curve.accuracy[:-1]) / 2))


def apgr(curve: Curve, local: float | None = None) -> float | None:
    """RouteLLM's average performance gap recovered: PGR integrated over the call fraction.

    PGR at a call fraction is (accuracy - local) / (cloud - local): 0.5 on average for random offloading, 1 at most
    where calls never hurt. RouteLLM averages ten points; this is the integral.
    local: the accuracy that counts as nothing recovered; by default the curve's own at no calls. Give the task-tuned
    model's to compare methods whose local answers differ. None where the cloud is no better than that.
    """
    start = curve.local if local is None else local
    return (area(curve) - start) / (curve.cloud - start) if curve.cloud > start else None


def calls_for_gap(curve: Curve, share: float, local: float | None = None) -> float | None:
    """RouteLLM's CPT: the smallest call fraction that recovers `share` of the gap, e.g. 0.5.

    `local` as in `apgr`. None where the cloud is no better than local, so that there is no gap. Raises
    ValueError unless 0 <= share <= 1.
    """
    if not 0 <= share <= 1:
        raise ValueError(f"a share of the gap is in [0, 1], not {share}")
    start = curve.local if local is None else local
    if curve.cloud <= start:
        return None
    # rounding must not put the whole gap out of reach
    target = min(start + share * (curve.cloud - start), curve.cloud)
    i = int(np.flatnonzero(curve.accuracy >= target)[0])
    if i == 0:
        return 0.0
    (c0, c1), (a0, a1) = curve.called[i - 1 : i + 1], curve.accuracy[i - 1 : i + 1]
    return float(c0 + (c1 - c0) * (target - a0) / (a1 - a0))


def measures(curve: Curve, local: float | None = None) -> dict[str, float | None]:
    """`area`, `apgr` and `calls_for_20`, `_50`, `_80` of the gap, ready for JSON. `local` as in `apgr`."""
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


def apply_threshold(r: Routed, threshold: float) -> Result:
    """The method with a threshold fixed beforehand: called where score > threshold; right at correctness >= 0.5."""
    called = r.score > threshold
    local = ~called & (r.local >= 0.5)
    correct = local | (called & (r.cloud >= 0.5))
    return Result(r.name, called.tolist(), correct.tolist(), local.tolist())


def cost_curve(
    r: Routed, local_price: float, cloud_price: float, *, answers_first: bool = True
) -> tuple[Curve, FloatArray]:
    """(curve, money a problem [k]): what each point of the method's curve costs, in the prices' currency.

    local_price: of a problem answered on the device (k samples cost k times as much). cloud_price: of a call.
    answers_first: the device works on every problem and calls after that; False for a router that decides by the
    prompt alone, which saves the device's work where it calls. Raises ValueError on a negative price.
    """
    if local_price < 0 or cloud_price < 0:
        raise ValueError("a price must not be negative")
    points = curve(r)
    local_share = np.ones_like(points.called) if answers_first else 1 - points.called
    return points, local_price * local_share + cloud_price * points.called
