"""Holding the cloud budget: alpha_c, the price at which a call pays, follows the call fraction of training."""

from __future__ import annotations

from dataclasses import dataclass

EMA = 0.7
LOW, HIGH = 0.02, 0.98
"""alpha_c stays inside these parts of alpha_a: at 0 help has no gradient to come back by, at 1 nothing is local."""


@dataclass(slots=True)
class BudgetController:
    """A damped integrator on alpha_c.

    Without the filter the best policy calls exactly where P(local success) < alpha_c P(oracle right), so alpha_c is a
    threshold and the call fraction its quantile. With f the call fraction of all samples of a step, before filtering:

        ema <- 0.7 ema + 0.3 f          I <- I - gain (f - c)          alpha_c = I - damping (ema - c)

    both clipped to [0.02, 0.98] alpha_a. `ema` starts at the first f. The new alpha_c holds from the next step on.
    A longer memory in `ema` delays the damping, and the fraction swings with a period of some 50 steps.
    """

    cloud_fraction: float
    alpha_a: float
    integral: float
    gain: float
    damping: float
    alpha_c: float
    ema: float | None = None

    def observe(self, call_fraction: float) -> None:
        """Takes in one step's call fraction, in [0, 1]."""
        f, c = call_fraction, self.cloud_fraction
        self.ema = f if self.ema is None else EMA * self.ema + (1 - EMA) * f
        self.integral = self._clip(self.integral - self.gain * (f - c))
        self.alpha_c = self._clip(self.integral - self.damping * (self.ema - c))

    def _clip(self, value: float) -> float:
        return min(max(value, LOW * self.alpha_a), HIGH * self.alpha_a)
