"""The decision integrated out ("marginal GAPG"): what a response is worth before anybody has decided to call.

Responses are sampled with help forbidden, so each ends in an answer, right (r = 1) or not (r = 0). With p_t the
policy's chance of beginning the help phrase at token t and log pi~ its log-probs among the other tokens,

    x = -sum_t log(1 - p_t)        the hazard            S = exp(-x)    the chance that the policy answers
    U                              the worth, by the score; c is how right the cloud is on the prompt:
        price                      alpha_a r S + alpha_c c (1 - S)       the expected hierarchical reward, exactly
        brier                      alpha_a (r S + c (1 - S^2) / 2)       its mean over prices from 0 to 1, where the
                                   policy answers if S is above the price: for c = 1 that is 1/2 + r/2 - (S - r)^2 / 2
        log                        no worth of its own: Brier's for the trace, for the decision r log S + (1-r) log(1-S)

    J = E_pi~[U]        grad J = E_pi~[(U - b) grad log pi~(y) + grad U]

The first term's baseline b is the mean of the group's others, so it is a sum over G - 1, the second over G. There is no
sampling noise of the decision in either. All functions work elementwise, in float32 or float64, and are
finite for every hazard from 0 to infinity.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gapg.config_sections import MarginalConfig, RewardConfig

SMALL = -18.0
"""The log of an x below which log(1 + x) is x - x^2 / 2, and exp(x) - 1 is x + x^2 / 2, to a float64's last bits."""


def log_hazard(log_odds: Tensor) -> Tensor:
    """log(-log(1 - p)) of a p given by its log-odds; exact where p is too small for a float32 1 - p, or near 1."""
    small = log_odds < SMALL
    return torch.where(small, log_odds - log_odds.clamp(max=SMALL).exp() / 2, softplus(log_odds).log())


def softplus(z: Tensor) -> Tensor:
    """log(1 + exp(z)) to the last bits; torch.nn.functional's own is z above 20."""
    return torch.logaddexp(z, torch.zeros_like(z))


def worth(right: Tensor, hazard: Tensor, cloud: Tensor, config: MarginalConfig, reward: RewardConfig) -> Tensor:
    """a U + b r of each response: what its trace earns.

    Args:
        right: r in {0, 1}.
        hazard: x of the response, 0 to inf, of the same shape.
        cloud: c in [0, 1], a shape that broadcasts to it.
    """
    by_score, by_right = config.trace_worth
    stays = (-hazard).exp()
    if config.score == "price":
        utility = reward.alpha_a * right * stays - reward.alpha_c * cloud * torch.expm1(-hazard)
    else:
        low, high = config.prices
        s = stays.clamp(low, high)
        utility = reward.alpha_a * (right * (s - low) + cloud * (high**2 - s**2) / 2) / (high - low)
    return by_score * utility + by_right * reward.alpha_a * right


def decision_slopes(
    right: Tensor, log_x: Tensor, cloud: Tensor, config: MarginalConfig, reward: RewardConfig
) -> tuple[Tensor, Tensor]:
    """d(score) / dx of each response, as (log of its size, sign); `weight` is in it.

    As a logarithm, because the log score's slope at a wrong answer, 1 / (exp(x) - 1), is beyond any float where the
    phrase is all but impossible, while its product with dx / d(log-odds) is at most 1. log_x: the log of the hazard.
    """
    x = log_x.exp()
    if config.score == "log":
        slope = torch.where(right > 0, -1.0, 1.0).to(x.dtype)
        size = torch.where(right > 0, torch.zeros_like(x), -log_expm1(log_x))
        scale = torch.full_like(x, config.weight * reward.alpha_a)
    elif config.score == "price":
        slope = reward.alpha_c * cloud - reward.alpha_a * right
        size, scale = -x, slope.abs() * config.weight
    else:
        stays, (low, high) = (-x).exp(), config.prices
        slope = torch.where(right > 0, cloud * torch.expm1(-x) - (1 - cloud), cloud * stays)  # c S - r, exact near 0
        slope = torch.where((stays > low) & (stays <= high), slope, 0.0)
        size, scale = -x, slope.abs() * (config.weight * reward.alpha_a / (high - low))
    return size + scale.log(), slope.sign()


def log_expm1(log_x: Tensor) -> Tensor:
    """log(exp(x) - 1) of an x given by its logarithm."""
    x = log_x.exp()
    return torch.where(log_x < SMALL, log_x + x / 2, x + torch.log(-torch.expm1(-x)))
