"""Curves and RouteLLM's measures, on tables small enough to work out by hand, and their properties."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gapg.studies.curves import (
    Curve,
    Routed,
    accuracies_at,
    apgr,
    apply_threshold,
    area,
    calls_for_gap,
    cost_curve,
    curve,
    measures,
    shares_at,
    threshold_for,
)


def routed(score: list[float], local: list[float], cloud: list[float]) -> Routed:
    return Routed("x", np.array(score), np.array(local), np.array(cloud))


# Four problems, called in the order b, d, a, c. Local: a and c right. Cloud: all right but a.
# Calls 0..4 give right answers 2 (a c), 3 (a b c), 4 (all), 3 (a lost), 3.
HAND = routed([0.2, 0.9, 0.1, 0.5], [1, 0, 1, 0], [0, 1, 1, 1])


def test_a_curve_by_hand() -> None:
    made = curve(HAND)
    assert made.called.tolist() == [0, 0.25, 0.5, 0.75, 1]
    assert made.accuracy.tolist() == [0.5, 0.75, 1, 0.75, 0.75]
    assert (made.local, made.cloud) == (0.5, 0.75)
    # a quarter each of (.5+.75)/2, (.75+1)/2, (1+.75)/2, (.75+.75)/2
    assert area(made) == pytest.approx((0.625 + 0.875 + 0.875 + 0.75) / 4)  # 0.78125
    assert apgr(made) == pytest.approx((0.78125 - 0.5) / 0.25)  # 1.125: better than the cloud on average
    # gap 0.25: 20% is accuracy .55, reached a fifth into the first call; 50% is .625, half; 80% is .70, four fifths
    assert calls_for_gap(made, 0.2) == pytest.approx(0.05)
    assert calls_for_gap(made, 0.5) == pytest.approx(0.125)
    assert calls_for_gap(made, 0.8) == pytest.approx(0.2)
    assert calls_for_gap(made, 0) == 0
    # against another model's local accuracy of .25: gap .5, half of it is had without a call, 80% is .65
    assert calls_for_gap(made, 0.5, local=0.25) == 0
    assert calls_for_gap(made, 0.8, local=0.25) == pytest.approx(0.15)
    assert apgr(made, local=0.25) == pytest.approx((0.78125 - 0.25) / 0.5)
    assert set(measures(made)) == {"area", "apgr", "calls_for_20", "calls_for_50", "calls_for_80"}
    assert measures(made)["calls_for_80"] == pytest.approx(0.2)


def test_a_curve_that_takes_long_to_recover() -> None:
    """Five problems called worst first: two right ones lost, then three gained. Accuracy .4 .2 0 .2 .4 .6."""
    made = curve(routed([5, 4, 3, 2, 1], [1, 1, 0, 0, 0], [0, 0, 1, 1, 1]))
    assert made.accuracy.tolist() == pytest.approx([0.4, 0.2, 0, 0.2, 0.4, 0.6])
    # trapezoids of width .2: .3 .1 .1 .3 .5
    assert area(made) == pytest.approx(0.26)
    assert apgr(made) == pytest.approx((0.26 - 0.4) / 0.2)  # -0.7
    assert calls_for_gap(made, 0.5) == pytest.approx(0.9)  # accuracy .5, between the fourth call and the fifth
    assert calls_for_gap(made, 1) == pytest.approx(1.0)


def test_ties_share_their_calls_by_hand() -> None:
    """One problem above, three equal, one out of reach. At 50% of 5 problems: 1 + 1.5 shared by three + none."""
    r = routed([2, 1, 1, 1, -math.inf], [0, 0, 1, 0, 0], [1, 1, 0, 1, 1])
    assert shares_at(r, 0.5).tolist() == [1, 0.5, 0.5, 0.5, 0]
    assert accuracies_at(r, 0.5).tolist() == [1, 0.5, 0.5, 0.5, 0]
    assert shares_at(r, 0.1).tolist() == [0.5, 0, 0, 0, 0]
    assert shares_at(r, 0.9).tolist() == pytest.approx([1, 1, 1, 1, 0.5])
    made = curve(r)
    assert made.called.tolist() == pytest.approx([0, 0.2, 0.8, 1])
    assert made.accuracy.tolist() == pytest.approx([0.2, 0.4, 0.6, 0.8])


def test_no_gap_has_no_share() -> None:
    made = curve(routed([1, 2], [1, 0], [0, 1]))
    assert (made.local, made.cloud) == (0.5, 0.5)
    assert apgr(made) is None
    assert calls_for_gap(made, 0.5) is None
    assert measures(made)["area"] == pytest.approx(0.75)


@pytest.mark.parametrize(
    ("scores", "c", "threshold", "calls"),
    [
        ([4, 3, 2, 1], 0.5, 2.5, 2),
        ([1, 4, 2, 3], 0.25, 3.5, 1),
        ([4, 3, 2, 1], 0.0, math.inf, 0),
        ([4, 3, 2, 1], 1.0, -math.inf, 4),
        ([4, 3, 2, 1], 0.6, 2.5, 2),  # 2.4 calls wanted
        ([4, 2, 2, 2, 1], 0.4, 3.0, 1),  # 2 wanted, 1 or 4 possible
        ([4, 2, 2, 2, 1], 0.6, 1.5, 4),  # 3 wanted
        ([2, 2, 1, 1], 0.25, math.inf, 0),  # 1 wanted, none or 2 possible: the cheaper
        ([3, -math.inf, -math.inf, -math.inf], 0.75, -math.inf, 1),
        ([-math.inf, -math.inf], 0.5, math.inf, 0),
        ([math.inf, 1, 0], 0.4, 1.0, 1),
    ],
)
def test_a_threshold_by_hand(scores: list[float], c: float, threshold: float, calls: int) -> None:
    assert threshold_for(scores, c) == threshold
    n = len(scores)
    result = apply_threshold(routed(scores, [0] * n, [1] * n), threshold)
    assert sum(result.called) == sum(result.correct) == calls
    assert threshold_for(scores[::-1], c) == threshold


def test_neighbouring_floats_are_still_told_apart() -> None:
    low = 1.0
    high = math.nextafter(low, 2.0)
    assert low <= threshold_for([high, low], 0.5) < high


def test_a_threshold_on_other_problems() -> None:
    """Set on calibration scores 1..4 for half the calls (2.5), it calls where it falls on others."""
    result = apply_threshold(
        routed([2.6, 2.5, 9, -math.inf], [1, 1, 0, 0], [0.5, 1, 0.4, 1]), threshold_for([1, 2, 3, 4], 0.5)
    )
    assert result.called == [True, False, True, False]
    assert result.correct == [True, True, False, False]
    assert result.local_correct == [False, True, False, False]


def test_money_by_hand() -> None:
    made, money = cost_curve(HAND, local_price=0.1, cloud_price=2.0)
    assert made.called.tolist() == [0, 0.25, 0.5, 0.75, 1]
    assert money.tolist() == pytest.approx([0.1, 0.6, 1.1, 1.6, 2.1])
    _, by_prompt = cost_curve(HAND, local_price=0.1, cloud_price=2.0, answers_first=False)
    assert by_prompt.tolist() == pytest.approx([0.1, 0.575, 1.05, 1.525, 2.0])
    with pytest.raises(ValueError):
        cost_curve(HAND, local_price=-0.1, cloud_price=2.0)


@pytest.mark.parametrize(
    ("score", "local", "cloud"),
    [([1], [1, 0], [1, 1]), ([], [], []), ([math.nan], [1], [1]), ([1], [2], [1]), ([1], [0], [math.nan])],
)
def test_what_is_no_method_is_refused(score: list[float], local: list[float], cloud: list[float]) -> None:
    with pytest.raises(ValueError):
        routed(score, local, cloud)


def test_what_is_no_fraction_is_refused() -> None:
    for c in (-0.1, 1.1, math.nan):
        with pytest.raises(ValueError):
            shares_at(HAND, c)
        with pytest.raises(ValueError):
            threshold_for([1.0], c)
        with pytest.raises(ValueError):
            calls_for_gap(curve(HAND), c)
    with pytest.raises(ValueError):
        threshold_for([], 0.5)
    with pytest.raises(ValueError):
        threshold_for([math.nan], 0.5)


SCORES = st.one_of(st.integers(0, 4).map(float), st.just(-math.inf), st.floats(-5, 5))
PROBLEMS = st.lists(
    st.tuples(SCORES, st.integers(0, 1), st.sampled_from([0.0, 0.25, 0.5, 1.0])), min_size=1, max_size=30
)
FRACTIONS = st.floats(0, 1)


def method(problems: list[tuple[float, int, float]]) -> Routed:
    score, local, cloud = zip(*problems, strict=True)
    return routed(list(score), list(local), list(cloud))


@given(PROBLEMS, FRACTIONS)
def test_a_curve_goes_from_local_to_cloud_and_is_the_mean_at_every_fraction(
    problems: list[tuple[float, int, float]], c: float
) -> None:
    r = method(problems)
    made = curve(r)
    assert made.called[0] == 0
    assert made.called[-1] == 1
    assert (np.diff(made.called) > 0).all()
    assert made.local == r.local.mean()
    assert made.cloud == r.cloud.mean()
    assert shares_at(r, c).mean() == pytest.approx(c)
    assert accuracies_at(r, c).mean() == pytest.approx(made.at(c))
    assert accuracies_at(r, 0).tolist() == r.local.tolist()
    assert accuracies_at(r, 1).tolist() == r.cloud.tolist()


@given(PROBLEMS, FRACTIONS, st.randoms(use_true_random=False))
def test_the_order_of_problems_does_not_matter(problems: list[tuple[float, int, float]], c: float, rng) -> None:  # type: ignore[no-untyped-def]
    order = list(range(len(problems)))
    rng.shuffle(order)
    r, other = method(problems), method([problems[i] for i in order])
    assert accuracies_at(other, c).tolist() == accuracies_at(r, c)[order].tolist()
    assert curve(other).accuracy == pytest.approx(curve(r).accuracy)


@given(PROBLEMS, FRACTIONS)
def test_ties_are_the_mean_over_orders(problems: list[tuple[float, int, float]], c: float) -> None:
    """Breaking ties one way and the other way round averages to sharing, where all scores are equal."""
    r = method([(0.0, local, cloud) for _, local, cloud in problems])
    n = len(problems)
    rolled = [accuracies_at(Routed("x", np.roll(np.arange(n, dtype=float), k), r.local, r.cloud), c) for k in range(n)]
    assert np.mean(rolled, axis=0) == pytest.approx(accuracies_at(r, c))


@given(PROBLEMS, FRACTIONS)
def test_nothing_beats_calling_where_it_gains_most(problems: list[tuple[float, int, float]], c: float) -> None:
    r = method(problems)
    perfect = curve(Routed("perfect", r.cloud - r.local, r.local, r.cloud))
    assert perfect.at(c) >= curve(r).at(c) - 1e-9
    assert area(perfect) >= area(curve(r)) - 1e-9
    if perfect.cloud > perfect.local:
        for share in (0.2, 0.5, 0.8):
            mine, best = calls_for_gap(curve(r), share), calls_for_gap(perfect, share)
            assert mine is not None
            assert best is not None
            assert best <= mine + 1e-9
            assert curve(r).at(mine) == pytest.approx(perfect.local + share * (perfect.cloud - perfect.local))


@given(PROBLEMS)
def test_random_offloading_recovers_half(problems: list[tuple[float, int, float]]) -> None:
    made = curve(method([(0.0, local, cloud) for _, local, cloud in problems]))
    assert made.called.tolist() == [0, 1]
    if made.cloud > made.local:
        assert apgr(made) == pytest.approx(0.5)
        assert calls_for_gap(made, 0.2) == pytest.approx(0.2)


@given(PROBLEMS)
def test_the_area_is_the_mean_over_fractions(problems: list[tuple[float, int, float]]) -> None:
    r = method(problems)
    made = curve(r)
    grid = (np.arange(20_000) + 0.5) / 20_000
    assert area(made) == pytest.approx(np.interp(grid, made.called, made.accuracy).mean(), abs=1e-4)


@given(st.lists(SCORES, min_size=1, max_size=30), FRACTIONS)
def test_no_threshold_calls_nearer_to_the_fraction(scores: list[float], c: float) -> None:
    x = np.array(scores)
    made = int((x > threshold_for(scores, c)).sum())
    possible = [int((x > t).sum()) for t in (*scores, -math.inf, math.inf)]
    assert abs(made - c * len(scores)) == min(abs(k - c * len(scores)) for k in possible)


@given(PROBLEMS, FRACTIONS)
def test_a_threshold_lies_on_the_curve(problems: list[tuple[float, int, float]], c: float) -> None:
    """Applied where it was set, its call fraction and accuracy are a point of the curve (whole right or wrong)."""
    r = method([(score, local, float(cloud >= 0.5)) for score, local, cloud in problems])
    row = apply_threshold(r, threshold_for(r.score, c)).row()
    assert row["accuracy"] == pytest.approx(curve(r).at(row["call_fraction"]))


def test_a_curve_can_be_given_as_points() -> None:
    assert Curve(np.array([0.0, 1.0]), np.array([0.4, 0.8])).at(0.25) == pytest.approx(0.5)
