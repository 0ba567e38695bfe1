"""The controller on a simulated policy whose calls follow alpha_c; its clips, and its state through JSON."""

import json
import math
import random
from dataclasses import asdict, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gapg.budget import APPROACH, HIGH, LOW, MEMORY, BudgetController
from gapg.config_sections import BudgetConfig


def controller(c: float, alpha_a: float = 1.0, start: float = 0.3) -> BudgetController:
    budget = BudgetConfig(cloud_fraction=c)
    return BudgetController(c, alpha_a, start, budget.gain, budget.damping)


@pytest.mark.parametrize("c", [0.1, 0.3, 0.5])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_it_finds_the_budget(c: float, seed: int) -> None:
    """A policy that moves, each step, a part of the way to the calls its alpha_c is worth, which shrinks to nothing.

    Its calls at a price alpha are those of problems with P(local success) < alpha, here normal in the logit; the
    others are right nine times in ten. 256 noisy samples a step.
    """
    rng, control, calls = random.Random(seed), controller(c), 0.15
    seen = []
    for step in range(400):
        pace = 1 - step / 400
        wanted = 0.5 * math.erfc(-(math.log(control.alpha_c / (1 - control.alpha_c)) + 0.4) / 1.2 / math.sqrt(2))
        calls += (wanted - calls) * pace / 12
        f = sum(rng.random() < calls for _ in range(256)) / 256
        control.observe(f, 0.9 * (1 - f), pace)
        seen.append(calls)
    assert max(abs(s - c) for s in seen[200:]) < 0.06
    assert seen[-1] == pytest.approx(c, abs=0.02)


@given(
    st.floats(0.05, 0.95),
    st.floats(0.1, 10),
    st.lists(st.floats(0, 1), min_size=1, max_size=60),
)
def test_alpha_c_stays_inside_alpha_a(c: float, alpha_a: float, fractions: list[float]) -> None:
    control = controller(c, alpha_a, 0.3 * alpha_a)
    for f in fractions:
        control.observe(f, 0.8 * (1 - f), 1.0)
        assert LOW * alpha_a <= control.alpha_c <= HIGH * alpha_a < alpha_a
        assert control.integral is not None and LOW <= control.integral <= HIGH


def test_it_goes_to_the_clip_and_comes_back() -> None:
    """However long it was away: nothing may wind up behind the clip."""
    control = controller(0.3)
    for _ in range(200):
        control.observe(1.0, 0.0, 1.0)
    assert control.alpha_c == control.integral == LOW
    for _ in range(200):
        control.observe(0.0, 1.0, 1.0)
    assert control.alpha_c == control.integral == HIGH


def test_the_law() -> None:
    """By hand: two steps from alpha_c = .4 with alpha_a = 2."""
    control = BudgetController(0.3, 2.0, 0.4, gain=0.1, damping=0.5)
    control.observe(0.2, 0.4, 1.0)  # half of what was answered is right
    reference = 0.2 + 0.1 / APPROACH
    integral = 0.4 / (2 * 0.5) + 0.1 * 0.005
    assert control.reference == pytest.approx(reference) and control.integral == pytest.approx(integral)
    assert control.alpha_c == pytest.approx(2 * 0.5 * (integral + 0.5 * 0.005))
    control.observe(0.4, 0.45, 0.5)  # three quarters
    q = MEMORY * 0.5 + (1 - MEMORY) * 0.75
    reference += (0.3 - reference) / APPROACH
    integral -= 0.1 * (0.4 - reference)
    assert control.answered_right == pytest.approx(q) and control.integral == pytest.approx(integral)
    # at half of the learning rate the damping counts twice
    assert control.alpha_c == pytest.approx(2 * q * (integral - 2 * 0.5 * (0.4 - reference)))


@pytest.mark.parametrize("right", [0.0, 0.02, 0.05])
def test_a_price_does_not_fall_while_nobody_calls_and_nothing_is_right(right: float) -> None:
    """It stays about where the run began, and falls as ever once too many call."""
    control = controller(0.3, start=0.25)
    for step in range(300):
        control.observe(0.0, right, 1 - step / 300)
        assert control.alpha_c > 0.245
    for _ in range(20):
        control.observe(0.9, 0.1 * right, 1.0)
    assert control.alpha_c == LOW


@pytest.mark.parametrize("c", [0.3, 0.5])
def test_a_weak_model_finds_the_budget_too(c: float) -> None:
    """Its P(local success) is about .08, far below what a call pays at first: it calls too often, then as it may."""
    rng, control, calls = random.Random(0), controller(c, start=0.25), 0.0
    chances = sorted(1 / (1 + math.exp(-rng.gauss(-2.4, 1.2))) for _ in range(1000))
    for step in range(400):
        pace = 1 - step / 400
        calls += (sum(p < control.alpha_c for p in chances) / 1000 - calls) * pace / 12
        answered = chances[int(1000 * calls) :]
        f = sum(rng.random() < calls for _ in range(256)) / 256
        control.observe(f, sum(answered) / len(answered) * (1 - f), pace)
    assert calls == pytest.approx(c, abs=0.03)


@given(st.lists(st.tuples(st.floats(0, 1), st.floats(0.3, 1), st.floats(0, 1)), min_size=1, max_size=30))
def test_the_price_at_the_start_counts_only_where_answers_are_worth_less(steps: list[tuple[float, ...]]) -> None:
    """While answers are right at least as often as alpha_c / alpha_a at the start, not a bit depends on it."""
    control, without = controller(0.3, start=0.3), replace(controller(0.3, start=0.3), start=0.0)
    control.observe(0.2, 0.4, 1.0)
    without.observe(0.2, 0.4, 1.0)
    for f, right, pace in steps:
        for one in (control, without):
            one.observe(f, right * (1 - f), pace)
        if control.answered_right is not None and control.answered_right >= 0.3:
            assert control.alpha_c == without.alpha_c and control.integral == without.integral


def test_calls_on_the_budget_change_nothing() -> None:
    control = controller(0.25, start=0.4)
    for _ in range(10):
        control.observe(0.25, 0.6, 1.0)
    assert control.alpha_c == pytest.approx(0.4)


def test_a_step_in_which_everything_calls_says_nothing_of_the_answers() -> None:
    control = controller(0.3)
    control.observe(0.5, 0.4, 1.0)
    control.observe(1.0, 0.0, 1.0)
    assert control.answered_right == pytest.approx(0.8)


@given(st.lists(st.floats(0, 1), max_size=20), st.lists(st.floats(0, 1), min_size=1, max_size=20))
def test_its_state_survives_json_bit_for_bit(before: list[float], after: list[float]) -> None:
    control = controller(0.3)
    for f in before:
        control.observe(f, 0.7 * (1 - f), 1.0)
    again = BudgetController(**json.loads(json.dumps(asdict(control))))
    assert again == control
    for f in after:
        control.observe(f, 0.7 * (1 - f), 1.0)
        again.observe(f, 0.7 * (1 - f), 1.0)
    assert again == control
