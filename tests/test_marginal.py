"""The marginal method's formulas: integrals over prices by quadrature, slopes by autograd, and what float32 keeps."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise, product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.integrate import quad
from torch import Tensor

from gapg.config_sections import MarginalConfig, RewardConfig
from gapg.marginal import decision_slopes, log_expm1, log_hazard, softplus, worth

EPS = torch.finfo(torch.float32).eps
REWARD = RewardConfig(alpha_a=1.25, alpha_c=0.5)
CLOUDS = (1.0, 0.6, 0.0)
STAYS = (0.0, 1e-12, 0.03, 0.2, 0.35, 0.5, 0.8, 0.97, 1 - 1e-12, 1.0)
RANGES = ((0.0, 1.0), (0.2, 0.8), (0.0, 0.5), (0.6, 1.0))
LOG = MarginalConfig(score="log")
PRICE = MarginalConfig(score="price")
SCORES = (LOG, PRICE, *(MarginalConfig(score="brier", prices=prices) for prices in RANGES))


def brier(low: float = 0.0, high: float = 1.0, **settings: float) -> MarginalConfig:
    return MarginalConfig(score="brier", prices=(low, high), **settings)


def table(*columns: Sequence[float]) -> list[Tensor]:
    """All combinations, as one float64 tensor of each."""
    return list(torch.tensor(list(product(*columns)), dtype=torch.float64).unbind(1))


def over_prices(f: Callable[[float], float], low: float, high: float, kink: float) -> float:
    """The integral of f, smooth but at `kink`."""
    ends = [low, min(max(kink, low), high), high]
    return sum(quad(f, a, b, epsabs=1e-12, epsrel=1e-12)[0] for a, b in pairwise(ends) if a < b)


# --- what the scores are ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("low", "high"), RANGES)
def test_brier_is_the_mean_over_prices_of_what_a_threshold_earns(low: float, high: float) -> None:
    """At price a the policy answers where S >= a, for r, and else calls, for a c."""
    right, stays, cloud = table((0, 1), STAYS, CLOUDS)
    got = worth(right, -stays.log(), cloud, brier(low, high), REWARD)
    for r, s, c, value in zip(right.tolist(), stays.tolist(), cloud.tolist(), got.tolist(), strict=True):
        total = over_prices(lambda a, r=r, s=s, c=c: r if s >= a else a * c, low, high, kink=s)
        assert value == pytest.approx(REWARD.alpha_a * total / (high - low), abs=1e-10)


def test_with_a_perfect_cloud_and_all_prices_it_is_the_brier_score() -> None:
    right, stays = table((0, 1), STAYS)
    got = worth(right, -stays.log(), torch.tensor(1.0), brier(), RewardConfig())
    torch.testing.assert_close(got, 0.5 + right / 2 - (stays - right).square() / 2, atol=1e-15, rtol=0)


def test_the_log_score_is_the_regret_over_prices_of_density_1_by_a_1_minus_a() -> None:
    """Regret: what knowing r would have earned, less what the threshold did. Its slope is the decision's."""
    x = torch.tensor([1e-3, 0.1, 0.7, 1.5, 4.0], dtype=torch.float64)

    def score(r: float, stays: float) -> float:
        def regret(a: float) -> float:
            earned = r if stays >= a else a
            return (max(r, a) - earned) / (a * (1 - a))

        return -over_prices(regret, 0.0, 1.0, kink=stays)

    for r in (0.0, 1.0):
        size, sign = decision_slopes(torch.full_like(x, r), x.log(), torch.ones_like(x), LOG, RewardConfig())
        for i, hazard in enumerate(x.tolist()):
            stays = math.exp(-hazard)
            assert score(r, stays) == pytest.approx(math.log(stays if r else 1 - stays), abs=1e-9)
            step = 1e-4 * hazard
            slope = (score(r, math.exp(-hazard - step)) - score(r, math.exp(-hazard + step))) / (2 * step)
            assert (sign[i] * size[i].exp()).item() == pytest.approx(slope, rel=1e-6)


@pytest.mark.parametrize(("low", "high"), RANGES)
def test_the_brier_form_is_proper(low: float, high: float) -> None:
    """Of all S, the chance of a right answer earns the most, inside the range of prices: q / c, if the cloud is c."""
    grid = torch.linspace(0, 1, 10001, dtype=torch.float64)
    for q, c in ((0.3, 1.0), (0.7, 1.0), (0.3, 0.6)):
        right, wrong = (
            worth(torch.full_like(grid, r), -grid.log(), torch.tensor(c), brier(low, high), REWARD) for r in (1.0, 0.0)
        )
        best = grid[(q * right + (1 - q) * wrong).argmax()].item()
        assert best == pytest.approx(min(max(q / c, low), high), abs=1e-3) or not low < q / c < high


def test_a_traces_worth_is_a_u_plus_b_r() -> None:
    """By default a log-scored trace earns r - (S - r)^2 / 2, up to what all have."""
    right, stays, cloud = table((0, 1), STAYS, CLOUDS)
    for config in SCORES[1:]:
        u = worth(right, -stays.log(), cloud, config, REWARD)
        mixed = worth(right, -stays.log(), cloud, config.model_copy(update={"trace": (0.3, 2.0)}), REWARD)
        torch.testing.assert_close(mixed, 0.3 * u + 2.0 * REWARD.alpha_a * right)
    got = worth(right, -stays.log(), torch.ones_like(cloud), LOG, RewardConfig())
    torch.testing.assert_close(got, 0.5 + right - (stays - right).square() / 2)


def test_the_fixed_price_is_the_hierarchical_reward_of_a_sampled_decision() -> None:
    right, stays, cloud = table((0, 1), STAYS, CLOUDS)
    got = worth(right, -stays.log(), cloud, PRICE, REWARD)
    torch.testing.assert_close(got, stays * REWARD.alpha_a * right + (1 - stays) * REWARD.alpha_c * cloud)


# --- slopes ----------------------------------------------------------------------------------------------------------


def score_of(right: Tensor, x: Tensor, cloud: Tensor, config: MarginalConfig) -> Tensor:
    """What the decision is scored by, written plainly; for hazards that float64 has no trouble with."""
    if config.score == "log":
        return config.weight * REWARD.alpha_a * torch.where(right > 0, -x, torch.log(-torch.expm1(-x)))
    return config.weight * worth(right, x, cloud, config.model_copy(update={"trace": None}), REWARD)


@pytest.mark.parametrize("config", [c.model_copy(update={"weight": w}) for c in SCORES for w in (1.0, 0.3)])
def test_slopes_are_autograds_and_finite_differences(config: MarginalConfig) -> None:
    right, x, cloud = table((0, 1), (1e-9, 1e-4, 0.01, 0.3, 0.65, 1.0, 3.0, 9.0), CLOUDS)
    x.requires_grad_()
    (want,) = torch.autograd.grad(score_of(right, x, cloud, config).sum(), x)
    size, sign = decision_slopes(right, x.detach().log(), cloud, config, REWARD)
    torch.testing.assert_close(sign * size.exp(), want, atol=1e-14, rtol=1e-7)
    moved = [score_of(right, x.detach() * (1 + d), cloud, config) for d in (1e-5, -1e-5)]
    rough = (moved[0] - moved[1]) / (2e-5 * x.detach())
    seen = x.detach() > 1e-3
    torch.testing.assert_close((sign * size.exp())[seen], rough[seen], atol=1e-6, rtol=1e-5)


def test_outside_the_range_of_prices_the_decision_learns_nothing() -> None:
    right, stays = table((0, 1), (0.05, 0.3, 0.55, 0.9))
    size, sign = decision_slopes(right, (-stays.log()).log(), torch.ones_like(right), brier(0.2, 0.6), REWARD)
    slope = sign * size.exp()
    assert ((slope != 0) == ((stays > 0.2) & (stays < 0.6))).all()
    nothing, _ = decision_slopes(right, (-stays.log()).log(), torch.ones_like(right), brier(weight=0.0), REWARD)
    assert (nothing == -math.inf).all()


@given(st.lists(st.floats(-12, 12), min_size=1, max_size=6), st.sampled_from(SCORES), st.booleans(), st.floats(0, 1))
def test_the_pull_on_each_places_log_odds(odds: list[float], config: MarginalConfig, right: bool, c: float) -> None:
    """By way of the logarithms against autograd through S = prod (1 - p)."""
    z = torch.tensor(odds, dtype=torch.float64, requires_grad=True)
    r, cloud = torch.tensor(float(right)).double(), torch.tensor(c).double()
    x = -torch.nn.functional.logsigmoid(-z).sum()
    edge = min(abs(math.exp(-x.item()) - price) for price in config.prices)
    if config.score == "brier" and config.prices != (0.0, 1.0) and edge < 1e-9:
        return
    (want,) = torch.autograd.grad(score_of(r, x, cloud, config), z)
    with torch.no_grad():
        log_x = log_hazard(z).logsumexp(0)
        size, sign = decision_slopes(r, log_x, cloud, config, REWARD)
        torch.testing.assert_close(sign * (size + z - softplus(z)).exp(), want, atol=1e-13, rtol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_of_one_place_the_log_scores_pull_is_logistic_regressions(dtype: torch.dtype) -> None:
    """(1 - r) - p, to the last digits from p = 1e-12 to 1 - 1e-12 and far beyond."""
    eps = torch.finfo(dtype).eps
    z = torch.cat([torch.linspace(-27.7, 27.7, 301), torch.tensor([-100.0, -88.0, 0.0, 88.0, 100.0])]).to(dtype)
    for r in (0.0, 1.0):
        size, sign = decision_slopes(torch.full_like(z, r), log_hazard(z), torch.ones_like(z), LOG, RewardConfig())
        pull = (sign * (size + z - softplus(z)).exp()).double()
        wide = z.double()
        want = -(1 / (1 + (-wide).exp())) if r else 1 / (1 + wide.exp())
        assert pull.isfinite().all()
        # an exponent of size n carries n roundings
        assert ((pull - want).abs() <= 4 * eps * (1 + wide.abs()) * want.abs() + 1e-42).all()


# --- what float32 keeps ----------------------------------------------------------------------------------------------

HAZARDS = torch.logspace(-40, 3, 431, dtype=torch.float64)


@pytest.mark.parametrize("config", SCORES)
@pytest.mark.parametrize("r", [0.0, 1.0])
@pytest.mark.parametrize("c", CLOUDS)
def test_float32_keeps_what_float64_has(config: MarginalConfig, r: float, c: float) -> None:
    log_x = HAZARDS.log().float()  # these very numbers, in either
    x = log_x.exp()
    wide = log_x.double()
    # a hazard at the edge of the prices may be on either side of it; a float32 S is at 0 from x = 87 on
    edges = [((-wide.exp()).exp() - price).abs() < 1e-6 for price in config.prices if 0 < price < 1]
    inside = ~torch.stack([x > 87, *edges]).any(0) if config.score == "brier" else torch.ones_like(x, dtype=torch.bool)
    right, cloud = torch.full_like(x, r), torch.full_like(x, c)
    got = worth(right, x, cloud, config, REWARD)
    want = worth(right.double(), x.double(), cloud.double(), config, REWARD)
    spread = config.prices[1] - config.prices[0]
    assert got.isfinite().all() and ((got - want).abs() <= 4 * EPS * REWARD.alpha_a / spread).all()
    size, sign = decision_slopes(right, log_x, cloud, config, REWARD)
    want_size, want_sign = decision_slopes(right.double(), wide, cloud.double(), config, REWARD)
    assert torch.equal(sign[inside].double(), want_sign[inside]) and not size.isnan().any()
    live = inside & want_sign.bool()
    assert size[live].isfinite().all()
    assert ((size - want_size).abs()[live] <= 4 * EPS * (1 + want_size.abs()[live])).all()


def test_a_hazard_is_exact_however_small_or_certain_the_phrase() -> None:
    """Against sums of its series; 1 - p itself would be 1, or 0."""
    z = torch.cat([torch.linspace(-100, 100, 2001), torch.tensor([-27.631, 27.631, -1e4, 1e4])])
    exact = [
        v - math.exp(v) / 2 if v < -20 else math.log(max(v, 0.0) + math.log1p(math.exp(-abs(v)))) for v in z.tolist()
    ]
    want = torch.tensor(exact, dtype=torch.float64)
    for dtype in (torch.float32, torch.float64):
        eps = torch.finfo(dtype).eps
        got = log_hazard(z.to(dtype)).double()
        assert ((got - want).abs() <= 2 * eps * (1 + want.abs())).all()
    infinite = torch.tensor([-math.inf, math.inf])
    assert log_hazard(infinite).tolist() == infinite.tolist() and softplus(infinite).tolist() == [0.0, math.inf]


def test_log_expm1_on_both_sides_of_its_series() -> None:
    log_x = torch.linspace(-92, 6.9, 3001, dtype=torch.float64)
    x = log_x.exp()
    want = torch.where(x < 1e-5, log_x + x / 2 + x.square() / 24, x + torch.log1p(-(-x).exp()))
    torch.testing.assert_close(log_expm1(log_x), want, atol=1e-10, rtol=0)
    torch.testing.assert_close(
        log_expm1(log_x.float()).double(), log_expm1(log_x.float().double()), atol=EPS, rtol=4 * EPS
    )


@pytest.mark.parametrize("config", SCORES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_policy_that_never_or_always_calls_has_a_worth_and_a_slope(
    config: MarginalConfig, dtype: torch.dtype
) -> None:
    right, log_x, cloud = (x.to(dtype) for x in table((0, 1), (-math.inf, math.inf), CLOUDS))
    never = log_x < 0
    got = worth(right, log_x.exp(), cloud, config, REWARD)
    assert got.isfinite().all()
    if config is PRICE:
        torch.testing.assert_close(got, torch.where(never, REWARD.alpha_a * right, REWARD.alpha_c * cloud))
    size, sign = decision_slopes(right, log_x, cloud, config, REWARD)
    assert not size.isnan().any() and sign.isfinite().all()
    # beyond any float is only the log score's slope at a wrong answer that could never have been a call
    assert (size[~never | (right > 0) | torch.tensor(config.score != "log")] < math.inf).all()
