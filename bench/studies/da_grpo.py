"""DA-GRPO (arXiv 2602.00166): a Lagrange multiplier on the calls, in the advantage instead of in the reward.

Two advantages a response, one of being right and one of calling, A = A_acc - lambda A_call, and the multiplier climbs
while the policy calls more than it may. With the group-mean baseline of this project (no std scaling) an advantage is
linear in what it is taken of:

    A_acc - lambda A_call = [correct - mean(correct)] - lambda [called - mean(called)] = A(correct - lambda called)

so it is exactly GAPG's advantage of the reward `correct - lambda called`. Where the cloud is right a call is worth
alpha_a - lambda, which stands where GAPG has alpha_c; where it is wrong a call costs lambda, where GAPG gives 0.

One choice is this project's: lambda starts not at 0 but at alpha_a - alpha_c of the config, so that a call pays what it
pays at GAPG's first step: `reward.alpha_c` is where it starts, 0.4 for a lambda of 0.6. From 0 a right call would be
worth a right answer, and the first hundred steps would teach to call always.
"""

from __future__ import annotations

from dataclasses import dataclass

from gapg.config import RunConfig
from gapg.judge import Group, Outcome
from gapg.judge import rewards as hierarchical_rewards

RATE = 0.01
"""How fast the multiplier follows the calls over the budget, per step."""


def rewards(group: Group, alpha_a: float, alpha_c: float, alpha_f: float = 0.0) -> list[float]:
    """`correct - lambda called` for each response, with lambda = alpha_a - alpha_c; alpha_a is what right is worth.

    A call to an oracle of several samples is right as often as they are. Raises ValueError on an unknown group.
    """
    right = hierarchical_rewards(group, alpha_a, alpha_a, alpha_f)
    called = [o in (Outcome.CLOUD_CORRECT, Outcome.CLOUD_WRONG) for o in group.outcomes]
    return [r - (alpha_a - alpha_c) * c for r, c in zip(right, called, strict=True)]


@dataclass(slots=True)
class Multiplier:
    """lambda <- max(0, lambda + 0.01 (f - c)), with f the call fraction of all samples of a step.

    Kept as alpha_c = alpha_a - lambda, what a call to a right cloud is worth, which the run passes to `rewards`.
    """

    cloud_fraction: float
    alpha_a: float
    alpha_c: float

    def observe(self, call_fraction: float, local_accuracy: float, pace: float) -> None:
        """Takes in one step's call fraction, in [0, 1]; how often the policy is right alone does not matter to it."""
        multiplier = self.alpha_a - self.alpha_c + RATE * (call_fraction - self.cloud_fraction)
        self.alpha_c = self.alpha_a - max(0.0, multiplier)


def make_multiplier(config: RunConfig) -> Multiplier:
    return Multiplier(config.budget.cloud_fraction, config.reward.alpha_a, config.reward.alpha_c)
