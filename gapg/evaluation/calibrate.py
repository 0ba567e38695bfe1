"""A logit bias on the help phrase that gives a wanted call fraction for one decoding (greedy calls less than T=1), or
calls where a right answer is less likely than wanted.

One pass with help forbidden tells what any bias would do. A biased response is the masked one up to where it calls, so
a problem calls greedily iff its `help_margin` exceeds -bias. Sampled, a masked path y has the probability of its steps
among the other tokens, whatever the bias, and the chance that a biased response follows it to its end is
prod_t (1 - p_t(bias)), with p_t the chance of a deciding token at position t. Its mean over masked paths is exactly the
part of the problems that do not call: no bisection over samples, and smooth in the bias.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
from filelock import FileLock
from numpy.typing import NDArray
from pydantic import Field, FiniteFloat, TypeAdapter, ValidationError
from scipy.special import ndtri

from gapg.errors import ConfigError
from gapg.evaluation.statistics import wilson
from gapg.files import write_whole, writing
from gapg.jsonl import to_json
from gapg_rollout.records import HelpSpelling

FILE = "help_calibration.json"
"""Beside a model's weights."""

LIMIT = 1000.0
"""A bias beyond which nothing changes."""

NOWHERE = "no response came near the help phrase: no bias makes it call"

FloatArray = NDArray[np.float64]


def fit_bias(margins: Sequence[float], cloud_fraction: float) -> float:
    """The bias at which greedy decoding calls on `cloud_fraction` of these problems.

    margins: for each problem, decoded greedily with help masked, `help_margin`; infinite where it calls all the same.
    With bias b a problem calls exactly where its margin exceeds -b: one pass, exact on these problems.
    Where fewer problems can be made to call (the phrase's prefix never came up in the others), all of those do.
    Raises ValueError when there are none.
    """
    highest = max((m for m in margins if math.isfinite(m)), default=None)
    if highest is None:
        raise ValueError(NOWHERE)
    reachable = sorted((min(m, highest + 2.0) for m in margins if m > -math.inf), reverse=True)
    return _bias_below(reachable, min(round(cloud_fraction * len(margins)), len(reachable)))


def _bias_below(margins: Sequence[float], calls: int) -> float:
    """The bias that calls on the first so many of these descending margins."""
    if calls == 0:
        return -margins[0] - 1.0
    if calls == len(margins):
        return -margins[-1] + 1.0
    return -(margins[calls - 1] + margins[calls]) / 2


@dataclass(frozen=True, slots=True)
class MaskedPass:
    """N problems decoded once with help masked, and so everything that a bias would change about them.

    margin_N: `help_margin`; inf where the response called all the same, in a spelling that is not steered.
    log_odds_NP: `help_log_odds`, filled up with -inf; greedily those at temperature 1.
    local_N: 1 where the masked answer is right. cloud_N: the cloud's score in [0, 1], nan where it failed, or None when
    it was not asked.
    """

    temperature: float
    margin_N: FloatArray
    log_odds_NP: FloatArray
    local_N: FloatArray
    cloud_N: FloatArray | None = None

    def chances(self, bias: float) -> FloatArray:
        """[N] the chance that each problem calls under this bias; greedily 0 or 1."""
        if self.temperature == 0:
            return (self.margin_N + bias > 0).astype(np.float64)
        return -np.expm1(-self.hazard(bias))

    def hazard(self, bias: float = 0.0) -> FloatArray:
        """[N] x: exp(-x) is the chance that a policy with this bias goes all along the masked response."""
        passed_N = np.logaddexp(0.0, self.log_odds_NP + bias / (self.temperature or 1.0)).sum(1)
        return np.where(np.isposinf(self.margin_N), np.inf, passed_N)

    @property
    def stays(self) -> FloatArray:
        """[N] S, the policy's own chance that it answers."""
        return np.exp(-self.hazard())

    @property
    def reachable(self) -> float:
        """The part of the problems that some bias can make call."""
        return float(np.mean(self.margin_N > -np.inf))

    def fit(self, cloud_fraction: float) -> float:
        """The bias with this call fraction on these problems. Raises ValueError when none came near the phrase."""
        greedy = fit_bias(self.margin_N.tolist(), cloud_fraction)
        if self.temperature == 0:
            return greedy
        low, high = -LIMIT, LIMIT
        # not by brentq: where no bias calls so much, this ends at the limit
        for _ in range(45):  # the chance of a call grows with the bias
            middle = (low + high) / 2
            low, high = (middle, high) if self.chances(middle).mean() < cloud_fraction else (low, middle)
        return high

    def fit_below(self, chance: float) -> tuple[float, float]:
        """(the bias whose greedy calls agree best with S < chance, the part of the problems on which they do).

        Both rank problems, by the margin of one token and by the chances of all, and not quite alike. Of biases that
        agree as well those that call least, and of these the chance's own log-odds where they are among them: what it
        is for a response that could call at one place. Raises ValueError when no problem came near the phrase.
        """
        below_N, near_N = self.stays < chance, np.isfinite(self.margin_N)
        if not near_N.any():
            raise ValueError(NOWHERE)
        margin_U, of_N = np.unique(-self.margin_N[near_N], return_inverse=True)
        gain_U = np.bincount(of_N, weights=np.where(below_N[near_N], 1.0, -1.0))
        calls = int(np.argmax(np.concatenate([[0.0], gain_U.cumsum()])))
        low, high = np.concatenate([[-np.inf], margin_U, [np.inf]])[calls : calls + 2]
        own = math.log(chance / (1.0 - chance))
        bias = own if low < own <= high else _bias_below((-margin_U).tolist(), calls)
        return bias, float(np.mean(below_N == (self.chances(bias) > 0)))

    def right_among(self, bias: float) -> tuple[float, float]:
        """How many of the masked answers are right, of the problems (answered, called) with this bias; NaN of none."""
        of = np.stack([1.0 - self.chances(bias), self.chances(bias)])
        with np.errstate(invalid="ignore"):
            answered, called = (of @ self.local_N / of.sum(1)).tolist()
        return answered, called

    def accuracy(self, bias: float) -> tuple[float, float | None]:
        """(answered locally and right, right together or None without the cloud), of the problems; sampled: expected.

        Problems on which the cloud failed are left out of the second.
        """
        calls = self.chances(bias)
        local = (1.0 - calls) * self.local_N
        if self.cloud_N is None:
            return float(local.mean()), None
        known = ~np.isnan(self.cloud_N)
        return float(local.mean()), float((local + calls * self.cloud_N)[known].mean()) if known.any() else None

    def interval(self, bias: float, new: int) -> tuple[float, float]:
        """95% interval of the call fraction on `new` other problems of the same kind: of this set, and of those.

        The normal one; Wilson's of as many problems as have the same variance where none calls, or all.
        """
        calls = self.chances(bias)
        c = float(calls.mean())
        if c in (0.0, 1.0):  # the normal interval would be a point
            n = len(calls) * new // (len(calls) + new)
            return wilson(n * int(c), n)
        half = float(ndtri(0.975)) * math.sqrt(float(calls.var()) / len(calls) + c * (1.0 - c) / new)
        return max(0.0, c - half), min(1.0, c + half)


@dataclass(frozen=True, slots=True)
class Calibration:
    """One entry of `help_calibration.json`: decode at `temperature` with `bias` to call on `cloud_fraction`, or where
    the chance of a right answer is below `call_below`. One of the two is None.

    spellings, blocks: those of the `HelpControl` that it was fitted with.
    called: the part of the n calibration problems that calls. interval: 95%, of the call fraction on `new` others.
    agreement: the part of them on which that is what the chance says; None of a fraction.
    """

    temperature: Annotated[FiniteFloat, Field(ge=0)]
    cloud_fraction: FiniteFloat | None
    bias: FiniteFloat
    called: float
    calibrated_on: str
    n: int
    interval: tuple[float, float]
    new: int
    spellings: tuple[HelpSpelling, ...]
    call_below: FiniteFloat | None = None
    agreement: FiniteFloat | None = None
    blocks: tuple[tuple[int, int], ...] = ()

    def __post_init__(self) -> None:
        if (self.cloud_fraction is None) == (self.call_below is None):
            raise ValueError("cloud_fraction or call_below must be given, and not both")

    @property
    def key(self) -> tuple[float, bool, float]:
        """What tells entries apart, in the order of the file."""
        if self.call_below is not None:
            return self.temperature, True, self.call_below
        return self.temperature, False, self.cloud_fraction or 0.0

    @property
    def label(self) -> str:
        how = "greedy" if self.temperature == 0 else f"sampled, T={self.temperature:g}"
        _, below, wanted = self.key
        return f"{how}, {'calls below' if below else 'calibrated to'} {100 * wanted:.4g}%"


_ENTRIES = TypeAdapter(list[Calibration])


def load_calibration(model_folder: Path) -> list[Calibration]:
    """The calibrations of the model in this folder; none when there is no file. Raises ConfigError for a broken one."""
    path = model_folder / FILE
    try:
        return _ENTRIES.validate_json(path.read_bytes()) if path.exists() else []
    except ValidationError as error:
        first = error.errors()[0]
        why = f"{'.'.join(map(str, first['loc']))}: {first['msg']}".removeprefix(": ")
    except OSError as error:
        why = str(error.strerror)
    raise ConfigError(f"{path}: no calibration ({why}); delete it and run gapg calibrate again")


def check_saves(model_folder: Path) -> None:
    """Raises ConfigError where `save_calibration` would."""
    if not os.access(model_folder, os.W_OK):
        raise ConfigError(f"{model_folder / FILE} cannot be written; copy the model to a folder of yours")
    with _alone(model_folder):
        load_calibration(model_folder)


def save_calibration(model_folder: Path, entry: Calibration) -> Path:
    """Adds an entry to the model's file, in the place of an older one for the same.

    Raises DiskFull, and ConfigError where the folder cannot be written or its file is broken.
    """
    path = model_folder / FILE
    with _alone(model_folder):
        kept = [e for e in load_calibration(model_folder) if e.key != entry.key]
        entries = sorted([*kept, entry], key=lambda e: e.key)
        write_whole(path, to_json([asdict(e) for e in entries], indent=1) + "\n")
    return path


@contextmanager
def _alone(model_folder: Path) -> Iterator[None]:
    """Two calibrations at once must not lose one. Raises ConfigError: a link in the lock's place is not followed."""
    lock = model_folder / f".{FILE}.lock"
    with writing(lock), FileLock(lock):
        yield
