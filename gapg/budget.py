"""Holding the cloud budget: alpha_c, the price at which a call pays, follows the call fraction of training."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

MEMORY = 0.9
"""Of the answers' accuracy, in which nothing happens from one step to the next that calls could follow."""
APPROACH = 20
"""Steps in which the reference goes most of the way from the first call fraction to the budget."""
SLOWEST = 0.2
"""Part of the full learning rate below which `damping` grows no further: the noise of f grows with it."""
LOW, HIGH = 0.02, 0.98
"""alpha_c stays inside these parts of alpha_a: at 0 help has no gradient to come back by, at 1 nothing is local."""


class Controller(Protocol):
    """A law for alpha_c; a dataclass, so that its fields are its state."""

    __dataclass_fields__: ClassVar[dict[str, Any]]
    alpha_c: float

    def observe(self, call_fraction: float, local_accuracy: float, pace: float) -> None:
        """Takes in one step: parts of all its samples that called, and that were answered and right, in [0, 1].

        pace: the step's learning rate as a part of the full one.
        """


@dataclass(slots=True)
class BudgetController:
    """A damped integrator on what a call pays, in units of what an answer pays on average.

    Without the filter the best policy calls exactly where P(local success) < alpha_c P(oracle right), so alpha_c is a
    threshold and the call fraction its quantile. Responses that are answered succeed with probability q, most of them
    nearly alike: close to alpha_a q a small change of alpha_c moves many calls, far below it hardly any. Hence the
    controller moves alpha_c / (alpha_a q). With f the call fraction of all samples of a step, before filtering, and r
    a reference that starts at the first f and approaches the budget c:

        q <- .9 q + .1 (right / answered)     r <- r + (c - r) / 20     I <- I - gain (f - r)
        alpha_c = alpha_a q (I - damping (f - r) / pace)

    q counts as at least `start`, the part of alpha_a that a call paid when the run began: where hardly any answer is
    right yet, a price that followed q would fall to nothing before anybody calls. It stays where it was set until the
    calls are over the reference.

    The policy follows alpha_c at the pace of its learning rate; damping that grows as that falls (fivefold at most)
    keeps correcting until the last step, where the policy would else end at whatever f it had when it grew slow.
    I and alpha_c / alpha_a are clipped to [0.02, 0.98]. The new alpha_c holds from the next step on.
    """

    cloud_fraction: float
    alpha_a: float
    alpha_c: float
    gain: float
    damping: float
    integral: float | None = None
    reference: float | None = None
    answered_right: float | None = None
    start: float | None = None

    def __post_init__(self) -> None:
        if self.start is None:
            self.start = self.alpha_c / self.alpha_a

    def observe(self, call_fraction: float, local_accuracy: float, pace: float) -> None:
        f = call_fraction
        if f < 1:
            right = local_accuracy / (1 - f)
            q = right if self.answered_right is None else MEMORY * self.answered_right + (1 - MEMORY) * right
            self.answered_right = q
        q = max(self.answered_right or 0.0, self.start or 0.0, LOW)
        if self.integral is None or self.reference is None:
            self.integral, self.reference = _clip(self.alpha_c / (self.alpha_a * q)), f
        self.reference += (self.cloud_fraction - self.reference) / APPROACH
        error = f - self.reference
        self.integral = _clip(self.integral - self.gain * error)
        self.alpha_c = self.alpha_a * _clip(q * (self.integral - self.damping * error / max(pace, SLOWEST)))


def _clip(value: float) -> float:
    return min(max(value, LOW), HIGH)
