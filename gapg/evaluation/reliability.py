"""How good a forecast of a right answer a policy's decision is: calibrated, and telling right from wrong.

A score is the chance S that the policy answers instead of calling; right is 1 where the answer is. All arrays are 1-D,
of one length n; figures are NaN where they are undefined (nothing to count, one class only, or a score that is NaN).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import brentq
from scipy.special import ndtri
from scipy.stats import rankdata

from gapg.config import RunConfig
from gapg.evaluation.statistics import wilson

FloatArray = NDArray[np.float64]

Z = float(ndtri(0.975))
"""Of a two-sided 95% interval."""

BINS = 15

EDGE = 1e-9
"""How near to 0 and 1 an AUROC is taken for one, whose variance would be 0."""

LEAST = -100.0
"""A log score of one problem below which it is taken for this: one that is impossible by S would be -inf."""


@dataclass(frozen=True, slots=True)
class Bin:
    """n problems of neighbouring scores: their mean score, the part that is right, and its 95% Wilson interval."""

    n: int
    score: float
    right: float
    low: float
    high: float


def brier(score: FloatArray, right: FloatArray) -> float:
    """Mean of (score - right)^2: 0 is perfect; a constant score of a half earns 1/4."""
    return float(np.square(score - right).mean()) if len(score) else math.nan


def auroc(score: FloatArray, right: FloatArray) -> float:
    """The chance that a right answer has a higher score than a wrong one; ties count half. Scores may be infinite."""
    rights = int((right > 0).sum())
    wrongs = len(right) - rights
    if not rights or not wrongs:
        return math.nan
    ranks = rankdata(score)  # of ties the middle one: the Mann-Whitney statistic
    return (float(ranks[right > 0].sum()) - rights * (rights + 1) / 2) / (rights * wrongs)


def auroc_interval(area: float, rights: int, wrongs: int) -> tuple[float, float]:
    """95% interval of an AUROC: the areas from which this one is no further than chance would have it.

    The score interval of Newcombe (2006), method 5, with the variance of Hanley and McNeil (1982). Like Wilson's for a
    proportion it never leaves [0, 1], and says something of an area of 1.
    """
    if math.isnan(area):
        return (math.nan, math.nan)

    def excess(a: float) -> float:
        spread = 1 + ((rights + wrongs) / 2 - 1) * ((1 - a) / (2 - a) + a / (1 + a))
        return (a - area) ** 2 - Z**2 * a * (1 - a) * spread / (rights * wrongs)

    low = brentq(excess, 0.0, min(area, 1 - EDGE)) if area > 0 else 0.0
    high = brentq(excess, max(area, EDGE), 1.0) if area < 1 else 1.0
    return (float(low), float(high))


def ece(score: FloatArray, right: FloatArray, bins: int = BINS) -> float:
    """Expected calibration error: the mean over problems of |mean score - part right| of the problem's bin.

    The bins hold equally many problems. Never negative, so a calibrated policy has one above 0 too: `ece_by_chance`.
    """
    of_N = _bins(score, bins)
    return float(np.abs(np.bincount(of_N, score - right)).sum()) / len(score) if len(of_N) else math.nan


def ece_by_chance(score: FloatArray, bins: int = BINS) -> float:
    """What `ece` is on average where every score is the true chance of a right answer (to normal approximation)."""
    of_N = _bins(score, bins)
    if not len(of_N):
        return math.nan
    return float(np.sqrt(2 / math.pi * np.bincount(of_N, score * (1 - score))).sum()) / len(score)


def bin_scores(score: FloatArray, right: FloatArray, bins: int = BINS) -> list[Bin]:
    """Bins of equally many problems by ascending score; equal scores share one, so there may be fewer."""
    of_N, made = _bins(score, bins), []
    for b in np.unique(of_N):
        s, r = score[of_N == b], right[of_N == b]
        made.append(Bin(len(s), float(s.mean()), float(r.mean()), *wilson(int(r.sum()), len(s))))
    return made


def _bins(score: FloatArray, bins: int) -> NDArray[np.int64]:
    """[n] each problem's bin; empty where there are none. Equal scores have one rank, and so one bin."""
    if not len(score) or np.isnan(score).any():
        return np.zeros(0, np.int64)
    return ((rankdata(score) - 0.5) / len(score) * bins).astype(np.int64)


def log_score(hazard: FloatArray, right: FloatArray) -> float:
    """Mean of log S where right and log(1 - S) where wrong, S = exp(-hazard): 0 is perfect, in nats.

    Of the hazard, because 1 - S loses its digits where the policy all but always answers.
    """
    if not len(hazard):
        return math.nan
    with np.errstate(divide="ignore"):
        each = np.where(right > 0, -hazard, np.log(-np.expm1(-hazard)))
    return float(each.clip(min=LEAST).mean())


def no_forecast(config: RunConfig, model: Path) -> str | None:
    """Why S was not trained to be the chance of a right answer: the setting, or that the run's model in this folder is
    from before its first step. None where a proper score made it that, and where nobody knows how a model was trained.
    """
    score, temperature = config.marginal.score, config.rollout.temperature
    if config.method != "marginal":
        return f"method={config.method}"
    if score == "price" or config.marginal.weight == 0:
        return "marginal.score=price" if score == "price" else "marginal.weight=0"
    above = [folder.name for folder in model.resolve().parents[:3]]
    if above[:1] == ["step-0"] or above[1:] == ["checkpoints", "warm-start"]:
        return "the model is from before the first step"
    return None if temperature == 1 else f"rollout.temperature={temperature:g}, and greedy decoding records S at 1"


def forecast(config: RunConfig, model: Path) -> str:
    """What S of the model in this folder was trained to be, in words."""
    if why := no_forecast(config, model):
        return f"not trained to be that of a right answer ({why})"
    over = "" if config.marginal.cloud == "ignore" else " over that of a right answer of the cloud"
    low, high = config.marginal.prices
    between = "" if (low, high) == (0, 1) else f", where that is between {low:g} and {high:g}"
    return f"with method=marginal trained to be that of a right answer{over}{between}"


def reliability(hazard: FloatArray, margin: FloatArray, right: FloatArray) -> dict[str, Any]:
    """The figures of `summary.json`, with 95% intervals as `_low` and `_high`.

    hazard: S = exp(-hazard). margin: how near the response came to calling, whose AUROC is `margin_auroc`.
    """
    score, n, rights = np.exp(-hazard), len(right), int(right.sum())
    half = Z * float(np.square(score - right).std()) / math.sqrt(n) if n else math.nan
    figures: dict[str, Any] = {"n": n, "right": rights / n if n else math.nan, "brier": brier(score, right)}
    figures["right_low"], figures["right_high"] = wilson(rights, n)
    figures["brier_low"], figures["brier_high"] = max(0.0, figures["brier"] - half), figures["brier"] + half
    for name, value in (("auroc", score), ("margin_auroc", -margin)):
        figures[name] = auroc(value, right)
        figures[f"{name}_low"], figures[f"{name}_high"] = auroc_interval(figures[name], rights, n - rights)
    figures |= {"ece": ece(score, right), "ece_by_chance": ece_by_chance(score)}
    return figures | {"log_score": log_score(hazard, right)}
