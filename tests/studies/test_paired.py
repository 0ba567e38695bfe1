"""Spreads and intervals: against published values, worked tables, and how often an interval holds the truth."""

import math
import statistics

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gapg.studies.paired import bootstrap_interval, paired_difference, seed_difference, spread, t_interval


def test_a_spread_by_hand() -> None:
    made = spread([0.4, 0.2, 0.9])
    assert (made.mean, made.low, made.high, made.values) == (pytest.approx(0.5), 0.2, 0.9, (0.4, 0.2, 0.9))
    one = spread([0.1])
    assert (one.mean, one.low, one.high) == (0.1, 0.1, 0.1)
    with pytest.raises(ValueError):
        spread([])


@given(st.lists(st.floats(-1, 1), min_size=1, max_size=9))
def test_a_spread_holds_its_mean(values: list[float]) -> None:
    made = spread(values)
    assert made.low <= made.mean <= made.high


@pytest.mark.parametrize(
    ("df", "published"),
    [(1, 12.706), (2, 4.303), (3, 3.182), (4, 2.776), (5, 2.571), (9, 2.262), (29, 2.045), (30, 2.042), (120, 1.980)],
)
def test_an_interval_is_students_by_the_published_table(df: int, published: float) -> None:
    """Values -1 and 1 in turn, and 0 where they are odd in number: the half width is t s / sqrt(n)."""
    values = [float((-1) ** i) for i in range(df + 1 - (df + 1) % 2)] + [0.0] * ((df + 1) % 2)
    error = statistics.stdev(values) / math.sqrt(len(values))
    low, high = t_interval(values)
    assert (low, high) == (pytest.approx(-published * error, rel=3e-4), pytest.approx(published * error, rel=3e-4))


def test_an_interval_needs_two_values() -> None:
    with pytest.raises(ValueError):
        t_interval([1.0])


def test_a_paired_difference_by_hand() -> None:
    """Two seeds, four problems: differences of .25 and .75, mean .5, deviation .3536, error .25, t 12.706."""
    a = np.array([[1, 1, 0, 1], [1, 1, 1, 1]])
    b = np.array([[1, 0, 0, 1], [0, 0, 0, 1]])
    made = paired_difference(a, b)
    assert made.per_seed == (0.25, 0.75)
    assert made.mean == 0.5
    assert (made.low, made.high) == (pytest.approx(0.5 - 3.1765, abs=1e-3), pytest.approx(0.5 + 3.1765, abs=1e-3))
    assert made.wins == 2


def test_five_seeds_by_hand() -> None:
    """Differences .02 .04 .06 .08 -.05: mean .03, deviation .05, error .0223607, t 2.77645: half .0620830."""
    a = [np.full(3, 0.5 + d) for d in (0.02, 0.04, 0.06, 0.08, -0.05)]
    made = paired_difference(a, [np.full(3, 0.5)] * 5)
    assert made.mean == pytest.approx(0.03)
    assert made.low == pytest.approx(0.03 - 0.062083, abs=1e-6)
    assert made.high == pytest.approx(0.03 + 0.062083, abs=1e-6)
    assert made.wins == 4


def test_one_seed_takes_its_interval_from_the_problems() -> None:
    """100 of 400 gained and 20 lost: mean .2, error sqrt((.3 - .04) / 400) = .0255, and 1.96 of them .04997."""
    a = np.array([1] * 100 + [0] * 20 + [1] * 280)
    b = np.array([0] * 100 + [1] * 20 + [1] * 280)
    made = paired_difference([a], [b])
    assert (made.mean, made.per_seed, made.wins) == (0.2, (0.2,), 1)
    assert made.low == pytest.approx(0.2 - 0.04997, abs=0.004)
    assert made.high == pytest.approx(0.2 + 0.04997, abs=0.004)
    again = np.random.default_rng(3).permutation(400)
    assert paired_difference([a[again]], [b[again]]) == made


def test_the_same_answers_have_no_difference() -> None:
    a = np.array([1.0, 0.0, 1.0])
    for seeds in (1, 3):
        made = paired_difference([a] * seeds, [a] * seeds)
        assert (made.mean, made.low, made.high, made.wins) == (0, 0, 0, 0)


@given(st.lists(st.lists(st.integers(0, 3).map(lambda k: k / 3), min_size=5, max_size=5), min_size=2, max_size=6))
def test_a_difference_turned_round_is_its_mirror(rows: list[list[float]]) -> None:
    a, b = np.array(rows), np.array(rows[::-1])[:, ::-1]
    made, mirrored = paired_difference(a, b), paired_difference(b, a)
    assert made.mean == pytest.approx(-mirrored.mean)
    assert made.low == pytest.approx(-mirrored.high)
    assert made.low <= made.mean <= made.high
    assert made.wins + mirrored.wins <= len(rows)


@pytest.mark.parametrize(
    ("a", "b"),
    [([], []), ([[1, 0]], [[1]]), ([[1, 0]], [[1, 0], [1, 0]]), ([[]], [[]]), ([1, 0], [1, 0])],
)
def test_what_is_not_paired_is_refused(a: list, b: list) -> None:  # type: ignore[type-arg]
    with pytest.raises(ValueError):
        paired_difference([np.array(x) for x in a], [np.array(x) for x in b])


def test_intervals_hold_the_truth_as_often_as_they_say() -> None:
    rng = np.random.default_rng(0)
    t = [t_interval(x.tolist()) for x in rng.normal(1.0, 2.0, size=(4000, 5))]
    assert np.mean([low <= 1.0 <= high for low, high in t]) == pytest.approx(0.95, abs=0.012)
    # differences of -1, 0, 1 over 500 problems, with mean .1
    draws = rng.choice([-1.0, 0.0, 1.0], p=[0.1, 0.7, 0.2], size=(400, 500))
    held = [bootstrap_interval(x) for x in draws]
    assert np.mean([low <= 0.1 <= high for low, high in held]) == pytest.approx(0.95, abs=0.03)
    assert all(math.isfinite(low) and low < high for low, high in held)


def test_a_figure_a_seed_is_compared_over_seeds() -> None:
    """The call fractions of half a rho and the right one: -0.017 on average, and nothing shown of it."""
    d = seed_difference([0.269, 0.285, 0.290], [0.274, 0.320, 0.300])
    assert d.per_seed == pytest.approx((-0.005, -0.035, -0.010))
    assert (d.low, d.high) == pytest.approx(t_interval(d.per_seed))
    assert d.low < 0 < d.high and d.wins == 0
    one = seed_difference([0.5], [0.1])
    assert (one.mean, one.low, one.high) == (pytest.approx(0.4), -1, 1), "of other seeds it says nothing"
    for a, b in (([0.1], [0.1, 0.2]), ([], [])):
        with pytest.raises(ValueError):
            seed_difference(a, b)
