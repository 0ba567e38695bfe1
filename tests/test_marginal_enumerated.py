"""The marginal estimator on a policy whose every response, price and group of samples can be enumerated, in float64.

Four tokens: two to write, the end, and one that calls. A response ends with the end, with the call, or after three
tokens; a table gives the four logits after every beginning. Whether an answer is right is a table too.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from gapg import marginal
from gapg.config_sections import MarginalConfig, RewardConfig
from gapg_kernels.policy_loss import group_advantages

WRITE, END, CALL, LONGEST = (0, 1), 2, 3, 3
BEGINNINGS = [b for n in range(LONGEST) for b in product(WRITE, repeat=n)]
ANSWERS = [(*b, END) for b in BEGINNINGS] + list(product(WRITE, repeat=LONGEST))
CALLS = [(*b, CALL) for b in BEGINNINGS]
AT = {b: i for i, b in enumerate(BEGINNINGS)}
REWARD = RewardConfig(alpha_a=1.2, alpha_c=0.4)
CLOUDS = (1.0, 0.6, 0.0)
PRICE, LOG = MarginalConfig(score="price"), MarginalConfig(score="log")
BRIER = [MarginalConfig(score="brier", prices=prices) for prices in ((0.0, 1.0), (0.1, 0.7))]
ONE_J = [PRICE, *BRIER]
"""Whose estimator is the gradient of one J."""

RIGHT = torch.tensor([float(r) for r in (np.random.default_rng(3).random(len(ANSWERS)) < 0.5)], dtype=torch.float64)


def policy(seed: int = 0) -> Tensor:
    """[beginnings, 4] logits; it calls now and then."""
    generator = torch.Generator().manual_seed(seed)
    theta = torch.randn(len(BEGINNINGS), 4, generator=generator, dtype=torch.float64)
    theta[:, CALL] -= 0.5
    return theta


def logprobs(theta: Tensor, responses: list[tuple[int, ...]]) -> Tensor:
    """log pi of each response under the policy itself."""
    each = theta.log_softmax(1)
    return torch.stack([sum((each[AT[y[:t]], y[t]] for t in range(len(y))), each.new_zeros(())) for y in responses])


class Masked(NamedTuple):
    logprob: Tensor
    """[n] log pi~ of the answers, the call forbidden"""
    hazard: Tensor
    """[n]"""


def with_call_forbidden(theta: Tensor) -> Masked:
    each, called = theta[:, :CALL].log_softmax(1), theta.log_softmax(1)[:, CALL]
    kept = torch.log(-torch.expm1(called))
    chains = [[(AT[y[:t]], y[t]) for t in range(len(y))] for y in ANSWERS]
    return Masked(
        torch.stack([torch.stack([each[at] for at in chain]).sum() for chain in chains]),
        -torch.stack([torch.stack([kept[b] for b, _ in chain]).sum() for chain in chains]),
    )


def jacobian(f: Callable[[Tensor], Tensor], theta: Tensor) -> Tensor:
    """[n, parameters] of f's n values."""
    values: Tensor = torch.autograd.functional.jacobian(f, theta)
    return values.flatten(1)


class Terms(NamedTuple):
    """Of each of the answers, all that the estimator is made of, by the functions that the trainer uses."""

    chance: Tensor
    worth: Tensor
    score: Tensor
    """grad log pi~"""
    pull: Tensor
    """the decision's gradient, by way of each place's log-odds"""


def terms(theta: Tensor, config: MarginalConfig, cloud: float) -> Terms:
    def log_odds(theta: Tensor) -> Tensor:
        return theta[:, CALL] - theta[:, :CALL].logsumexp(1)

    z, by_z = log_odds(theta), jacobian(log_odds, theta)
    places = torch.tensor([[y[:t] == b for b in BEGINNINGS for t in [len(b)]] for y in ANSWERS])
    places &= torch.tensor([[len(y) > len(b) for b in BEGINNINGS] for y in ANSWERS])
    log_x = torch.where(places, marginal.log_hazard(z), -torch.inf).logsumexp(1)
    c = torch.full_like(RIGHT, cloud)
    size, sign = marginal.decision_slopes(RIGHT, log_x, c, config, REWARD)
    by_place = sign[:, None] * (size[:, None] + z - marginal.softplus(z)).exp() * places
    chance = with_call_forbidden(theta).logprob.exp()
    score = jacobian(lambda t: with_call_forbidden(t).logprob, theta)
    return Terms(chance, marginal.worth(RIGHT, log_x.exp(), c, config, REWARD), score, by_place @ by_z)


def estimates(of: Terms, G: int) -> tuple[Tensor, Tensor]:
    """(the chance of each G-tuple of answers, the trainer's estimate from it): sums over G - 1 and over G."""
    tuples = torch.tensor(list(product(range(len(of.chance)), repeat=G)))
    advantage = group_advantages(of.worth[tuples])
    estimate = sum(advantage[:, i, None] * of.score[tuples[:, i]] + of.pull[tuples[:, i]] for i in range(G)) / G
    assert isinstance(estimate, Tensor)
    return of.chance[tuples].prod(1), estimate


def moments(chance: Tensor, estimate: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance of each parameter's estimate."""
    mean = chance @ estimate
    return mean, chance @ (estimate - mean).square()


# --- J ---------------------------------------------------------------------------------------------------------------


def sampled_decisions(cloud: float) -> tuple[list[tuple[int, ...]], Tensor]:
    """Every response of the policy itself, and its hierarchical reward."""
    called = torch.full((len(CALLS),), REWARD.alpha_c * cloud, dtype=torch.float64)
    return ANSWERS + CALLS, torch.cat([REWARD.alpha_a * RIGHT, called])


def expected_at_thresholds(theta: Tensor, config: MarginalConfig, cloud: float) -> Tensor:
    """The mean over prices a of what "answer where S >= a, else call for a c" earns: two smooth pieces, each exact by
    two Gauss points, which move with S."""
    masked = with_call_forbidden(theta)
    nodes, weights = (torch.tensor(x) for x in np.polynomial.legendre.leggauss(2))
    low, high = config.prices
    s = (-masked.hazard).exp().clamp(low, high)[:, None]

    def integral(f: Callable[[Tensor], Tensor], a: Tensor, b: Tensor) -> Tensor:
        return ((b - a) / 2 * weights * f((a + b) / 2 + (b - a) / 2 * nodes)).sum(1)

    answers = integral(lambda a: RIGHT[:, None].expand_as(a), torch.full_like(s, low), s)
    calls = integral(lambda a: cloud * a, s, torch.full_like(s, high))
    return (masked.logprob.exp() * REWARD.alpha_a * (answers + calls)).sum() / (high - low)


def value(theta: Tensor, config: MarginalConfig, cloud: float) -> Tensor:
    """J without any of the method's formulas, differentiable."""
    if config.score == "brier":
        return expected_at_thresholds(theta, config, cloud)
    responses, reward = sampled_decisions(cloud)
    return (logprobs(theta, responses).exp() * reward).sum()


def test_the_enumeration_is_of_everything() -> None:
    theta = policy()
    assert logprobs(theta, ANSWERS + CALLS).exp().sum().item() == pytest.approx(1, abs=1e-14)
    masked = with_call_forbidden(theta)
    assert masked.logprob.exp().sum().item() == pytest.approx(1, abs=1e-14)
    assert 0.2 < RIGHT.mean() < 0.8
    stays = (masked.logprob - masked.hazard).exp()  # pi~ times S is pi
    torch.testing.assert_close(stays, logprobs(theta, ANSWERS).exp(), atol=1e-14, rtol=1e-12)


@pytest.mark.parametrize("config", ONE_J)
@pytest.mark.parametrize("cloud", CLOUDS)
def test_j_is_the_expectation_over_sampled_decisions(config: MarginalConfig, cloud: float) -> None:
    theta = policy()
    of = terms(theta, config, cloud)
    assert (of.chance @ of.worth).item() == pytest.approx(value(theta, config, cloud).item(), abs=1e-12)


@pytest.mark.parametrize("cloud", CLOUDS)
def test_its_gradient_is_the_score_function_gradient_of_the_policy_itself(cloud: float) -> None:
    """sum over everything that the policy can say, calls too, of pi R grad log pi: no masking, no hazards."""
    theta, (responses, reward) = policy(), sampled_decisions(cloud)
    want = (logprobs(theta, responses).exp() * reward) @ jacobian(lambda t: logprobs(t, responses), theta)
    of = terms(theta, PRICE, cloud)
    torch.testing.assert_close(of.chance @ (of.worth[:, None] * of.score + of.pull), want, atol=1e-12, rtol=0)


@pytest.mark.parametrize("config", ONE_J)
@pytest.mark.parametrize("cloud", CLOUDS)
@pytest.mark.parametrize("G", [2, 3])
def test_the_estimator_is_unbiased(config: MarginalConfig, cloud: float, G: int) -> None:
    theta = policy()
    (want,) = jacobian(lambda t: value(t, config, cloud)[None], theta)
    mean, _ = moments(*estimates(terms(theta, config, cloud), G))
    assert want.abs().max() > 1e-2
    torch.testing.assert_close(mean, want, atol=1e-10, rtol=0)


def test_other_divisors_would_be_seen() -> None:
    """G for both sums, or G - 1 for both, the two commonest slips."""
    theta, G = policy(), 3
    of = terms(theta, PRICE, 1.0)
    (want,) = jacobian(lambda t: value(t, PRICE, 1.0)[None], theta)
    decision, trace = of.chance @ of.pull, of.chance @ (of.worth[:, None] * of.score)
    torch.testing.assert_close(decision + trace, want, atol=1e-12, rtol=0)
    for wrong in (decision + trace * (G - 1) / G, decision * G / (G - 1) + trace):
        assert (wrong - want).abs().max() > 1e-3


# --- the log score is a mixture --------------------------------------------------------------------------------------


def expected_update(theta: Tensor, config: MarginalConfig) -> Tensor:
    of = terms(theta, config, 1.0)
    return of.chance @ (of.worth[:, None] * of.score + of.pull)


@pytest.mark.parametrize("G", [2, 3])
@pytest.mark.parametrize(("trace", "weight"), [(None, 1.0), ((0.0, 1.0), 1.0), ((2.0, 0.25), 4.0)])
def test_log_moves_traces_by_brier_and_the_decision_by_the_log_score(
    trace: tuple[float, float] | None, weight: float, G: int
) -> None:
    """In expectation: a gradient by the traces' chances alone, and one by S alone, each by autograd."""
    config, theta = LOG.model_copy(update={"trace": trace, "weight": weight}), policy()
    a, b = trace or (1.0, 0.5)
    fixed = with_call_forbidden(theta)
    stays = (-fixed.hazard).exp()
    brier = 0.5 + RIGHT / 2 - (stays - RIGHT).square() / 2

    def mixture(theta: Tensor) -> Tensor:
        moving = with_call_forbidden(theta)
        log_score = torch.where(RIGHT > 0, -moving.hazard, torch.log(-torch.expm1(-moving.hazard)))
        by_trace = moving.logprob.exp() * (a * brier + b * RIGHT)
        return REWARD.alpha_a * (by_trace + weight * fixed.logprob.exp() * log_score).sum()[None]

    (want,) = jacobian(mixture, theta)
    mean, _ = moments(*estimates(terms(theta, config, 1.0), G))
    torch.testing.assert_close(mean, want, atol=1e-10, rtol=0)


@pytest.mark.parametrize(("config", "has_one"), [(PRICE, True), *((c, True) for c in BRIER), (LOG, False)])
def test_of_no_single_j(config: MarginalConfig, has_one: bool) -> None:
    """A gradient's Jacobian is symmetric: along one direction, its change along another."""
    theta, step, generator = policy(), 1e-5, torch.Generator().manual_seed(1)
    directions = torch.randn(3, theta.numel(), generator=generator, dtype=torch.float64)
    changes = []
    for d in directions:
        up, down = (expected_update(theta + sign * step * d.view_as(theta), config) for sign in (1, -1))
        changes.append((up - down) / (2 * step))
    along = directions @ torch.stack(changes).T
    twist = (along - along.T).abs().max()
    assert twist < 1e-7 if has_one else twist > 1e-2


# --- variance --------------------------------------------------------------------------------------------------------


def paper_terms(theta: Tensor, cloud: float) -> Terms:
    """Of the paper's estimator, which samples its decisions."""
    responses, reward = sampled_decisions(cloud)
    score = jacobian(lambda t: logprobs(t, responses), theta)
    return Terms(logprobs(theta, responses).exp(), reward, score, torch.zeros_like(score))


def variance_by_formula(of: Terms, G: int) -> Tensor:
    """It is a U-statistic of h = (U1 - U2)(s1 - s2) / 2 + (g1 + g2) / 2, with s the score and g the pull:
    Var = [4 (G - 2) zeta_1 + 2 zeta_2] / (G (G - 1)), zeta_1 = Var((U - E U) s + g) / 4, zeta_2 = Var h."""
    mu = of.chance @ of.worth
    _, one = moments(of.chance, (of.worth - mu)[:, None] * of.score + of.pull)
    h = (of.worth[:, None] - of.worth)[..., None] * (of.score[:, None] - of.score) / 2 + (
        of.pull[:, None] + of.pull
    ) / 2
    _, two = moments((of.chance[:, None] * of.chance).flatten(), h.flatten(0, 1))
    return (4 * (G - 2) * one / 4 + 2 * two) / (G * (G - 1))


@pytest.mark.parametrize("config", [*ONE_J, LOG])
@pytest.mark.parametrize("G", [2, 3])
def test_its_variance_is_that_of_a_u_statistic(config: MarginalConfig, G: int) -> None:
    of = terms(policy(), config, 0.6)
    _, variance = moments(*estimates(of, G))
    torch.testing.assert_close(variance, variance_by_formula(of, G), atol=1e-10, rtol=0)


@pytest.mark.parametrize("cloud", CLOUDS)
def test_it_is_below_that_of_sampled_decisions(cloud: float) -> None:
    """The same J, the same number of samples, and the same expectation, enumerated and by the formula."""
    theta = policy()
    ours, papers = terms(theta, PRICE, cloud), paper_terms(theta, cloud)
    (our_mean, our_variance), (their_mean, their_variance) = (moments(*estimates(of, 2)) for of in (ours, papers))
    torch.testing.assert_close(our_mean, their_mean, atol=1e-12, rtol=0)
    for G in (2, 3, 8):
        ratio = (variance_by_formula(ours, G).sum() / variance_by_formula(papers, G).sum()).item()
        assert ratio < 0.8
    assert ratio == pytest.approx(0.28, abs=0.01), "of eight samples, as docs/method.md says"
    torch.testing.assert_close(variance_by_formula(papers, 2), their_variance, atol=1e-10, rtol=0)
    assert our_variance.sum() < 0.8 * their_variance.sum()


def test_and_so_it_is_when_measured() -> None:
    theta, G, groups = policy(), 8, 20_000
    rng = np.random.default_rng(0)
    measured = []
    for of in (terms(theta, PRICE, 1.0), paper_terms(theta, 1.0)):
        drawn = torch.tensor(rng.choice(len(of.chance), size=(groups, G), p=of.chance.numpy() / of.chance.sum().item()))
        advantage = group_advantages(of.worth[drawn])
        estimate = (advantage[..., None] * of.score[drawn] + of.pull[drawn]).mean(1)
        exact = variance_by_formula(of, G).sum().item()
        measured.append(estimate.var(0).sum().item())
        assert measured[-1] == pytest.approx(exact, rel=0.03)
    assert measured[0] < 0.8 * measured[1]
