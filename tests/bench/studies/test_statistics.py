"""Accuracy at equal calls and intervals: on tables small enough to work out by hand, and their properties."""

import itertools
import math
import statistics
from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from gapg.jsonl import to_json
from studies.arms import Arm, Finished, predictions_path
from studies.statistics import (
    Curve,
    apgr,
    area,
    at_calls,
    at_threshold,
    bootstrap_interval,
    bootstrap_of_kinds,
    calls_for_gap,
    compare,
    compare_seeds,
    curve,
    holm,
    measures,
    p_value,
    problems,
    shares_at,
    t_interval,
    threshold_for,
)

Floats = list[float]


def table(score: Floats, local: Floats, cloud: Floats, arm: str = "x", seed: int = 0) -> pd.DataFrame:
    ids = [f"p{i}" for i in range(len(score))]
    return pd.DataFrame({"arm": arm, "seed": seed, "id": ids, "score": score, "local": local, "cloud": cloud})


# Four problems, called in the order b, d, a, c. Local: a and c right. Cloud: all right but a.
# Calls 0..4 give right answers 2 (a c), 3 (a b c), 4 (all), 3 (a lost), 3.
HAND = table([0.2, 0.9, 0.1, 0.5], [1, 0, 1, 0], [0, 1, 1, 1])


def test_a_curve_by_hand() -> None:
    made = curve(HAND)
    assert made.called.tolist() == [0, 0.25, 0.5, 0.75, 1]
    assert made.accuracy.tolist() == [0.5, 0.75, 1, 0.75, 0.75]
    # a quarter each of (.5+.75)/2, (.75+1)/2, (1+.75)/2, (.75+.75)/2
    assert area(made) == pytest.approx((0.625 + 0.875 + 0.875 + 0.75) / 4)  # 0.78125
    assert apgr(made, 0.5) == pytest.approx((0.78125 - 0.5) / 0.25)  # 1.125: better than the cloud on average
    # gap 0.25: 20% is accuracy .55, reached a fifth into the first call; 50% is .625, half; 80% is .70, four fifths
    assert [calls_for_gap(made, share, 0.5) for share in (0, 0.2, 0.5, 0.8)] == pytest.approx([0, 0.05, 0.125, 0.2])
    # against another model's local accuracy of .25: gap .5, half of it is had without a call, 80% is .65
    assert [calls_for_gap(made, share, 0.25) for share in (0.5, 0.8)] == pytest.approx([0, 0.15])
    assert apgr(made, 0.25) == pytest.approx((0.78125 - 0.25) / 0.5)
    assert measures(made, 0.5).keys() == {"area", "apgr", "calls_for_20", "calls_for_50", "calls_for_80"}
    assert measures(made, 0.75) | {"area": 0} == dict.fromkeys(measures(made, 0.75)) | {"area": 0}, "no gap, no share"


def test_a_curve_that_takes_long_to_recover() -> None:
    """Five problems called worst first: two right ones lost, then three gained. Accuracy .4 .2 0 .2 .4 .6."""
    made = curve(table([5, 4, 3, 2, 1], [1, 1, 0, 0, 0], [0, 0, 1, 1, 1]))
    assert made.accuracy.tolist() == pytest.approx([0.4, 0.2, 0, 0.2, 0.4, 0.6])
    assert apgr(made, 0.4) == pytest.approx((0.26 - 0.4) / 0.2), "trapezoids of width .2: .3 .1 .1 .3 .5"
    assert calls_for_gap(made, 0.5, 0.4) == pytest.approx(0.9)  # accuracy .5, between the fourth call and the fifth
    assert calls_for_gap(made, 1, 0.4) == pytest.approx(1.0)


def test_ties_share_their_calls_by_hand() -> None:
    """One problem above, three equal, one out of reach. At 50% of 5 problems: 1 + 1.5 shared by three + none."""
    r = table([2, 1, 1, 1, -math.inf], [0, 0, 1, 0, 0], [1, 1, 0, 1, 1])
    assert at_calls(r, 0.5).tolist() == [1, 0.5, 0.5, 0.5, 0]
    assert shares_at(r["score"].to_numpy(), 0.1).tolist() == [0.5, 0, 0, 0, 0]
    assert shares_at(r["score"].to_numpy(), 0.9).tolist() == pytest.approx([1, 1, 1, 1, 0.5])
    assert curve(r).called.tolist() == pytest.approx([0, 0.2, 0.8, 1])
    assert curve(r).accuracy.tolist() == pytest.approx([0.2, 0.4, 0.6, 0.8])


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
        ([math.nextafter(1.0, 2.0), 1.0], 0.5, 1.0, 1),
    ],
)
def test_a_threshold_by_hand(scores: Floats, c: float, threshold: float, calls: int) -> None:
    assert threshold_for(scores, c) == threshold_for(scores[::-1], c) == threshold
    n = len(scores)
    assert at_threshold(table(scores, [0] * n, [1] * n), threshold) == (calls / n, calls / n)


def test_what_is_no_fraction_is_refused() -> None:
    for c in (-0.1, 1.1, math.nan):
        with pytest.raises(ValueError):
            at_calls(HAND, c)
        with pytest.raises(ValueError):
            threshold_for([1.0], c)
    for scores in ([], [math.nan]):
        with pytest.raises(ValueError):
            threshold_for(scores, 0.5)


SCORES = st.one_of(st.integers(0, 4).map(float), st.just(-math.inf), st.floats(-5, 5))
PROBLEMS = st.lists(
    st.tuples(SCORES, st.integers(0, 1), st.sampled_from([0.0, 0.25, 0.5, 1.0])), min_size=1, max_size=30
).map(lambda rows: table(*map(list, zip(*rows, strict=True))))
FRACTIONS = st.floats(0, 1)


@given(PROBLEMS, FRACTIONS)
def test_a_curve_goes_from_local_to_cloud_and_is_the_mean_at_every_fraction(r: pd.DataFrame, c: float) -> None:
    made = curve(r)
    assert (made.called[0], made.called[-1]) == (0, 1)
    assert (np.diff(made.called) > 0).all()
    assert (made.accuracy[0], made.accuracy[-1]) == (r["local"].to_numpy().mean(), r["cloud"].to_numpy().mean())
    assert shares_at(r["score"].to_numpy(), c).mean() == pytest.approx(c)
    assert at_calls(r, c).mean() == pytest.approx(made.at(c))
    grid = (np.arange(20_000) + 0.5) / 20_000
    assert area(made) == pytest.approx(made.at(grid).mean(), abs=1e-4)
    shuffled = r.sample(frac=1, random_state=0)
    assert at_calls(shuffled, c).sort_index().tolist() == at_calls(r, c).tolist()


@given(PROBLEMS, FRACTIONS)
def test_nothing_beats_calling_where_it_gains_most(r: pd.DataFrame, c: float) -> None:
    perfect, mine = curve(r.assign(score=r["cloud"] - r["local"])), curve(r)
    assert perfect.at(c) >= mine.at(c) - 1e-9
    start = float(mine.accuracy[0])
    if mine.accuracy[-1] > start:
        found, best = calls_for_gap(mine, 0.5, start), calls_for_gap(perfect, 0.5, start)
        assert found is not None and best is not None and best <= found + 1e-9
        assert mine.at(found) == pytest.approx((start + mine.accuracy[-1]) / 2)
        assert apgr(curve(r.assign(score=0.0)), start) == pytest.approx(0.5), "random offloading"


@given(PROBLEMS, FRACTIONS)
def test_a_threshold_calls_as_near_to_the_fraction_as_any_and_lies_on_the_curve(r: pd.DataFrame, c: float) -> None:
    called, accuracy = at_threshold(r, threshold_for(r["score"].to_numpy(), c))
    possible = [float((r["score"] > t).mean()) for t in (*r["score"], -math.inf, math.inf)]
    assert abs(called - c) == pytest.approx(min(abs(k - c) for k in possible))
    assert accuracy == pytest.approx(curve(r).at(called))


def test_a_curve_can_be_given_as_points() -> None:
    assert Curve(np.array([0.0, 1.0]), np.array([0.4, 0.8])).at(0.25) == pytest.approx(0.5)


# ---- intervals


@pytest.mark.parametrize(
    ("df", "published"), [(1, 12.706), (2, 4.303), (3, 3.182), (4, 2.776), (9, 2.262), (30, 2.042), (120, 1.980)]
)
def test_an_interval_is_students_by_the_published_table(df: int, published: float) -> None:
    """Values -1 and 1 in turn, and 0 where they are odd in number: the half width is t s / sqrt(n)."""
    values = [float((-1) ** i) for i in range(df + 1 - (df + 1) % 2)] + [0.0] * ((df + 1) % 2)
    error = statistics.stdev(values) / math.sqrt(len(values))
    assert t_interval(values) == pytest.approx((-published * error, published * error), rel=3e-4)


def two_arms(a: list[Floats], b: list[Floats]) -> pd.DataFrame:
    """Arms a and b with these values, [seeds][problems]."""
    rows = [
        (arm, seed, f"p{i}", v)
        for arm, of in (("a", a), ("b", b))
        for seed, x in enumerate(of)
        for i, v in enumerate(x)
    ]
    return pd.DataFrame(rows, columns=["arm", "seed", "id", "right"])


def test_a_paired_difference_by_hand() -> None:
    """Two seeds, four problems: differences of .25 and .75, mean .5, deviation .3536, error .25, t 12.706."""
    both = two_arms([[1, 1, 0, 1], [1, 1, 1, 1]], [[1, 0, 0, 1], [0, 0, 0, 1]])
    made = compare(both, "right", "a", "b")
    assert (made["per_seed"], made["mean"], made["wins"]) == ([0.25, 0.75], 0.5, 2)
    assert (made["low"], made["high"]) == pytest.approx((0.5 - 3.1765, 0.5 + 3.1765), abs=1e-3)
    assert compare(both.iloc[::-1], "right", "a", "b") == made, "in any order"
    mirrored = compare(both, "right", "b", "a")
    assert (mirrored["mean"], mirrored["low"], mirrored["wins"]) == (-made["mean"], -made["high"], 0)


def test_five_seeds_by_hand() -> None:
    """Differences .02 .04 .06 .08 -.05: mean .03, deviation .05, error .0223607, t 2.77645: half .0620830."""
    made = compare(
        two_arms([[0.5 + d] * 3 for d in (0.02, 0.04, 0.06, 0.08, -0.05)], [[0.5] * 3] * 5), "right", "a", "b"
    )
    assert (made["mean"], made["low"], made["high"]) == pytest.approx(
        (0.03, 0.03 - 0.062083, 0.03 + 0.062083), abs=1e-6
    )
    assert made["wins"] == 4


def test_one_seed_takes_its_interval_from_the_problems() -> None:
    """100 of 400 gained and 20 lost: mean .2, error sqrt((.3 - .04) / 400) = .0255, and 1.96 of them .04997."""
    a, b = [1.0] * 100 + [0.0] * 20 + [1.0] * 280, [0.0] * 100 + [1.0] * 20 + [1.0] * 280
    made = compare(two_arms([a], [b]), "right", "a", "b")
    assert (made["mean"], made["per_seed"], made["wins"]) == (0.2, [0.2], 1)
    assert (made["low"], made["high"]) == pytest.approx((0.2 - 0.04997, 0.2 + 0.04997), abs=0.004)
    assert compare(two_arms([a[::-1]], [b[::-1]]), "right", "a", "b") == made


def test_the_same_answers_have_no_difference() -> None:
    for seeds in (1, 3):
        made = compare(two_arms([[1, 0, 1]] * seeds, [[1, 0, 1]] * seeds), "right", "a", "b")
        assert (made["mean"], made["low"], made["high"], made["wins"]) == (0, 0, 0, 0)


@pytest.mark.parametrize(("a", "b"), [([], []), ([[1, 0]], [[1]]), ([[1, 0]], [[1, 0], [1, 0]])])
def test_what_is_not_paired_is_refused(a: list[Floats], b: list[Floats]) -> None:
    with pytest.raises(ValueError):
        compare(two_arms(a, b), "right", "a", "b")


def test_intervals_hold_the_truth_as_often_as_they_say() -> None:
    rng = np.random.default_rng(0)
    t = [t_interval(x.tolist()) for x in rng.normal(1.0, 2.0, size=(4000, 5))]
    assert np.mean([low <= 1.0 <= high for low, high in t]) == pytest.approx(0.95, abs=0.012)
    # differences of -1, 0, 1 over 500 problems, with mean .1
    held = [bootstrap_interval(x) for x in rng.choice([-1.0, 0.0, 1.0], p=[0.1, 0.7, 0.2], size=(400, 500))]
    assert np.mean([low <= 0.1 <= high for low, high in held]) == pytest.approx(0.95, abs=0.03)


def test_problems_of_a_kind_that_go_together_tell_as_much_as_one() -> None:
    a, b = [1.0] * 100 + [0.0] * 20 + [1.0] * 280, [0.0] * 100 + [1.0] * 20 + [1.0] * 280
    both = two_arms([a], [b])
    alone, grouped = (
        compare(both.assign(kind=both["id"].str[1:].astype(int).floordiv(size).astype(str)), "right", "a", "b")
        for size in (1, 20)
    )
    # of each kind all are gained, lost or the same: 20 kinds in place of 400 problems, in steps of .05
    assert (alone["low"], alone["high"]) == pytest.approx((0.2 - 0.04997, 0.2 + 0.04997), abs=0.004)
    assert (grouped["low"], grouped["high"]) == pytest.approx((0.2 - 0.2235, 0.2 + 0.2235), abs=0.03)
    assert alone["mean"] == grouped["mean"] == 0.2


def test_intervals_over_kinds_hold_the_truth_where_those_over_problems_do_not() -> None:
    rng, kinds = np.random.default_rng(0), np.repeat([f"k{i}" for i in range(40)], 10).tolist()
    drawn = [np.repeat(rng.normal(0.1, 0.3, 40), 10) + rng.normal(0, 0.3, 400) for _ in range(300)]
    within = {
        name: np.mean([low <= 0.1 <= high for low, high in map(interval, drawn)])
        for name, interval in (("kinds", lambda x: bootstrap_of_kinds(x, kinds)), ("problems", bootstrap_interval))
    }
    assert within["kinds"] == pytest.approx(0.94, abs=0.03) and within["problems"] < 0.75


def test_a_figure_a_seed_is_compared_over_seeds() -> None:
    """The call fractions of half a rho and the right one: -0.017 on average, and nothing shown of it."""
    d = compare_seeds([0.269, 0.285, 0.290], [0.274, 0.320, 0.300])
    assert d["per_seed"] == pytest.approx([-0.005, -0.035, -0.010])
    assert d["low"] < 0 < d["high"] and d["wins"] == 0
    one = compare_seeds([0.5], [0.1])
    assert (one["mean"], one["low"], one["high"]) == (pytest.approx(0.4), -1, 1), "of other seeds it says nothing"
    for a, b in (([0.1], [0.1, 0.2]), ([], [])):
        with pytest.raises(ValueError):
            compare_seeds(a, b)


def test_a_p_value_is_that_of_the_interval() -> None:
    """Below 0.05 exactly where the 95% interval leaves 0 out; by scipy's own test; and by hand at t = 2.776, df 4."""
    rng = np.random.default_rng(1)
    for per_seed in rng.normal(0.8, 1.0, size=(200, 5)).tolist():
        low, high = t_interval(per_seed)
        assert (p_value(per_seed) < 0.05) == (low > 0 or high < 0)
        assert p_value(per_seed) == pytest.approx(stats.ttest_1samp(per_seed, 0).pvalue)
    assert (p_value([0.1]), p_value([0.0, 0.0]), p_value([0.1, 0.1])) == (1.0, 1.0, 0.0)


@given(st.lists(st.sampled_from([0.0, 1e-4, 0.01, 0.011, 0.02, 0.3, 1.0]), max_size=7))
def test_holms_correction_is_bonferronis_of_every_set_that_a_comparison_is_in(p: Floats) -> None:
    """The closed test: the largest of |S| min(S) over all sets S of the comparisons with this one among them."""
    sets = [s for n in range(1, len(p) + 1) for s in itertools.combinations(range(len(p)), n)]
    want = [min(1.0, max(len(s) * min(p[j] for j in s) for s in sets if i in s)) for i in range(len(p))]
    assert holm(p) == pytest.approx(want)


def test_holms_correction_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])


# ---- the table of finished runs


def test_problems_the_cloud_failed_are_left_out_of_all(
    finish: Callable[..., Finished], predicted: Callable[..., dict[str, Any]]
) -> None:
    masked = [predicted(i, "local_correct" if i % 2 else "local_wrong", float(i) if i else None) for i in range(6)]
    sampled = [
        predicted(i, outcome)
        for i, outcome in enumerate(
            ("cloud_correct", "cloud_wrong", "local_correct", "local_wrong", "unknown", "local_wrong")
        )
    ]
    sampled[1]["oracle_score"] = 0.0
    runs = [finish(Arm(a, {}, 0), {"heldout-masked": masked, "heldout-sampled": sampled}) for a in ("a", "b")]
    second = predictions_path(runs[1].folder, "heldout-masked")
    second.write_text("".join(to_json(row) + "\n" for row in [*masked[:5], masked[5] | {"oracle_score": None}]))
    found = problems(runs)
    assert found["id"].tolist() == ["p0", "p1", "p2", "p3"] * 2, "one has no answer as trained, one failed in b"
    mine = found[found["arm"] == "a"]
    assert mine["called"].tolist() == [1, 1, 0, 0] and mine["correct"].tolist() == [1, 0, 1, 0]
    assert mine["score"].tolist() == [-math.inf, 1, 2, 3] and mine["local"].tolist() == [0, 1, 0, 1]
    second.write_text("".join(to_json(row) + "\n" for row in masked[1:]))
    with pytest.raises(ValueError, match="different held-out problems"):
        problems(runs)
