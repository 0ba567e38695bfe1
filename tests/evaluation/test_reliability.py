"""How good a forecast a decision is: each figure against its definition, and on policies calibrated by construction."""

import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gapg.config import load_config
from gapg.evaluation.reliability import (
    FloatArray,
    auroc,
    auroc_interval,
    bin_scores,
    brier,
    ece,
    ece_by_chance,
    forecast,
    log_score,
    no_forecast,
    reliability,
)
from gapg.evaluation.reliability_diagram import draw
from gapg.evaluation.report import print_reliability
from gapg.evaluation.statistics import wilson

PAIRS = st.lists(
    st.tuples(st.sampled_from([-math.inf, -1.0, 0.0, 0.25, 0.5, 3.0, math.inf]), st.booleans()), max_size=30
)


def columns(pairs: list[tuple[float, bool]]) -> tuple[FloatArray, FloatArray]:
    return np.array([s for s, _ in pairs], dtype=float), np.array([r for _, r in pairs], dtype=float)


def forecaster(rng: np.random.Generator, n: int, power: float = 1.0) -> tuple[FloatArray, FloatArray]:
    """(S, right) of a policy whose S is the chance of a right answer; of another power one that is not calibrated."""
    chance = rng.beta(2, 1, n)
    return chance**power, (rng.random(n) < chance).astype(float)


@given(PAIRS)
def test_auroc_counts_pairs(pairs: list[tuple[float, bool]]) -> None:
    score, right = columns(pairs)
    rights, wrongs = ([s for s, r in pairs if r == which] for which in (True, False))
    wins = [1.0 if a > b else 0.5 if a == b else 0.0 for a in rights for b in wrongs]
    assert auroc(score, right) == pytest.approx(sum(wins) / len(wins) if wins else math.nan, nan_ok=True)


@given(st.integers(0, 40).flatmap(lambda n: st.tuples(st.floats(0, 1), st.integers(1, 40), st.just(n + 1))))
def test_an_area_s_interval_holds_it_and_has_two_sides(case: tuple[float, int, int]) -> None:
    area, rights, wrongs = case
    low, high = auroc_interval(area, rights, wrongs)
    assert 0 <= low <= area <= high <= 1
    assert high - low > 0.05 / math.sqrt(rights * wrongs), "also of an area of 1"
    assert auroc_interval(1 - area, rights, wrongs) == (
        pytest.approx(1 - high, abs=1e-7),
        pytest.approx(1 - low, abs=1e-7),
    )
    assert auroc_interval(area, wrongs, rights) == (low, high)


def test_an_area_s_interval_against_simulation() -> None:
    rng, inside, truth = np.random.default_rng(0), 0, 0.5 * math.erfc(-1.0 / 2)
    right = np.array([1.0] * 60 + [0.0] * 40)
    for _ in range(400):
        low, high = auroc_interval(auroc(rng.normal(size=100) + right, right), 60, 40)
        inside += low <= truth <= high
    assert 0.92 <= inside / 400 <= 0.98


def test_a_calibrated_policy_and_one_that_is_not() -> None:
    score, right = forecaster(np.random.default_rng(1), 30_000)
    assert brier(score, right) == pytest.approx(np.mean(score * (1 - score)), abs=0.004)
    assert ece(score, right, 15) < 0.01
    odd, right = forecaster(np.random.default_rng(1), 30_000, power=3.0)
    assert ece(odd, right, 15) == pytest.approx(np.mean(score - odd), abs=0.01) and np.mean(score - odd) > 0.2
    assert auroc(odd, right) == auroc(score, right), "which it ranks alike"


def test_the_error_that_chance_makes() -> None:
    rng = np.random.default_rng(2)
    found = np.array([(ece(s, r), ece_by_chance(s)) for s, r in (forecaster(rng, 600) for _ in range(400))])
    assert found[:, 0].mean() == pytest.approx(found[:, 1].mean(), rel=0.05)


@settings(max_examples=30)
@given(st.lists(st.tuples(st.floats(0, 1), st.booleans()), min_size=30, max_size=30, unique_by=lambda x: x[0]))
def test_bins_hold_as_many_each_and_any_order_gives_the_same(pairs: list[tuple[float, bool]]) -> None:
    score, right = columns(pairs)
    order = np.argsort(score)
    halves = [(score[part].mean(), right[part].mean()) for part in np.split(order, 5)]
    assert [(b.score, b.right) for b in bin_scores(score, right, 5)] == [pytest.approx(h) for h in halves]
    assert ece(score, right, 5) == pytest.approx(np.mean([abs(s - r) for s, r in halves]))
    assert ece(score[order], right[order], 5) == pytest.approx(ece(score, right, 5))
    assert [b.n for b in bin_scores(score, right, 5)] == [6] * 5
    for b in bin_scores(score, right, 5):
        assert (b.low, b.high) == wilson(round(6 * b.right), 6)


def test_equal_scores_share_a_bin() -> None:
    right = np.array([1.0, 0.0, 0.0, 1.0, 1.0, 0.0])
    (one,) = bin_scores(np.full(6, 0.7), right)
    assert (one.n, one.right) == (6, 0.5) and ece(np.full(6, 0.7), right) == pytest.approx(0.2)


def test_the_log_score_keeps_its_digits_near_certainty() -> None:
    one, zero = np.ones(1), np.zeros(1)
    for hazard in (1e-30, 1e-12, 0.5, 40.0):
        assert log_score(np.array([hazard]), one) == -hazard
        exact = math.log(-math.expm1(-hazard))
        assert log_score(np.array([hazard]), zero) == pytest.approx(exact, rel=1e-12)
    assert log_score(np.array([1e-30]), zero) == pytest.approx(-69.07755, abs=1e-4)
    assert log_score(np.array([math.inf]), zero) == 0.0
    assert log_score(np.array([math.inf]), one) == log_score(zero, zero) == -100.0, "impossible, as it says"


@pytest.mark.parametrize(
    ("hazard", "right", "undefined"),
    [
        ([], [], {"right", "brier", "auroc", "margin_auroc", "ece", "ece_by_chance", "log_score"}),
        ([0.1, 2.0], [1, 1], {"auroc", "margin_auroc"}),
        ([0.1, math.nan], [1, 0], {"brier", "auroc", "ece", "ece_by_chance", "log_score"}),
    ],
)
def test_what_is_undefined_is_not_a_number(
    hazard: list[float], right: list[float], undefined: set[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """And is drawn and printed all the same."""
    x, r = np.array(hazard), np.array(right, dtype=float)
    figures = reliability(x, np.array([-1.0, 2.0])[: len(x)], r)
    assert {key for key, value in figures.items() if math.isnan(value)} - {
        f"{key}_{end}" for key in figures for end in ("low", "high")
    } == undefined
    print_reliability(figures, "trained to be nothing")
    assert "AUROC" in capsys.readouterr().out
    draw(bin_scores(np.exp(-x), r), np.exp(-x), r, "a $\\bad$ name", tmp_path / "reliability.png")
    assert (tmp_path / "reliability.png").stat().st_size > 1000


def test_brier_s_interval_against_simulation() -> None:
    rng, inside = np.random.default_rng(3), 0
    for _ in range(400):
        score, right = forecaster(rng, 200)
        figures = reliability(-np.log(score), -score, right)
        inside += figures["brier_low"] <= 1 / 6 <= figures["brier_high"]
    assert 0.92 <= inside / 400 <= 0.98


@pytest.mark.parametrize(
    ("changed", "why"),
    [
        ({}, "method=gapg"),
        ({"method": "marginal"}, None),
        ({"method": "marginal", "marginal.score": "brier", "marginal.cloud": "ask"}, None),
        ({"method": "marginal", "marginal.score": "price"}, "marginal.score=price"),
        ({"method": "marginal", "marginal.weight": "0"}, "marginal.weight=0"),
        ({"method": "marginal", "rollout.temperature": "0.7"}, "rollout.temperature=0.7, and greedy decoding records"),
    ],
)
def test_whose_decision_is_a_forecast(changed: dict[str, str], why: str | None) -> None:
    found = no_forecast(load_config("quickstart", changed), Path("run/checkpoints/step-3/model"))
    assert found is None if why is None else (found or "").startswith(why)


@pytest.mark.parametrize(
    ("folder", "known"),
    [
        ("run/checkpoints/step-10/model", False),
        ("warm-start/run/checkpoints/step-3/model", False),
        ("a/hub/model", False),
        ("run/checkpoints/step-0/model", True),
        ("run/warm-start/checkpoints/step-250/model", True),
    ],
)
def test_a_model_from_before_the_first_step_is_no_forecast(folder: str, known: bool) -> None:
    config = load_config("quickstart", {"method": "marginal"})
    assert (no_forecast(config, Path(folder)) is not None) == known
    assert ("(the model is from before the first step" in forecast(config, Path(folder))) == known


@pytest.mark.parametrize(
    ("changed", "end"),
    [
        ({}, "a right answer"),
        ({"marginal.cloud": "ask"}, "over that of a right answer of the cloud"),
        ({"marginal.prices": "[0.1, 0.5]"}, "a right answer, where that is between 0.1 and 0.5"),
    ],
)
def test_what_s_was_trained_to_be(changed: dict[str, str], end: str) -> None:
    config = load_config("quickstart", {"method": "marginal", "marginal.score": "brier"} | changed)
    assert forecast(config, Path("m")).startswith("with method=marginal trained to be that of a right answer")
    assert forecast(config, Path("m")).endswith(end)
