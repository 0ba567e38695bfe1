"""Collapse, group size, demonstrations and KL on tables made by hand, whose answers are known."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.figure import Figure

from gapg.studies import ablations, collapse
from gapg.studies.collapse import Fate, fate
from gapg.studies.gradient_variance import PRODUCT, Sampled, variance_rows
from gapg.studies.study import Finished, Report, Unit

N = 100


@pytest.fixture
def run(finish: Callable[..., Finished], predicted: Callable[..., dict[str, Any]]) -> Callable[..., Finished]:
    """A run on 100 problems that calls the first `called` of them and is right alone on all from `wrong` on."""

    def make(
        unit: Unit, called: int, *, wrong: int = 40, fractions: Sequence[float] = (), cloud: float = 1.0
    ) -> Finished:
        alone = ["local_wrong" if i < wrong else "local_correct" for i in range(N)]
        products = {
            "heldout-masked": [predicted(i, alone[i], 50.5 - i, oracle_score=cloud) for i in range(N)],
            "heldout-sampled": [
                predicted(i, "cloud_correct" if i < called else alone[i], oracle_score=cloud) for i in range(N)
            ],
        }
        fractions = fractions or [called / N] * 60
        metrics = [{"step": s + 1, "call_fraction": f, "alpha_c": 0.4} for s, f in enumerate(fractions)]
        if PRODUCT in unit.products:
            rng = np.random.default_rng(unit.seed)
            sampled = Sampled(rng.integers(0, 2, 2048).astype(float), rng.normal(size=(2048, 3)))
            products[PRODUCT] = [{"prompt": "p", **row} for row in variance_rows(sampled, rng)]
        return finish(unit, products, metrics)

    return make


def drawn(report: Report, path: Path) -> int:
    figure = Figure(layout="constrained")
    report.draw(figure)
    figure.savefig(path)
    return path.stat().st_size


def check(report: Report, path: Path) -> None:
    """What holds for every study."""
    assert len(report.conclusions) == 2
    assert all(len(row) == len(table.columns) for table in report.tables for row in table.cells)
    assert drawn(report, path / "a.png") > 10_000


def test_a_run_that_stops_calling_died_at_the_step_after_which_it_never_came_back() -> None:
    # a dip at steps 21 to 40 that is recovered from, and the end of calling at step 60
    fractions = [0.3] * 20 + [0.0] * 20 + [0.3] * 20 + [0.0] * 40
    found = fate(fractions)
    # the mean of steps 61 to 80 is the first of zeros; with one step of 0.3 it is 0.015, under 2%
    assert found == Fate("never calls", 79, 0.0, pytest.approx(0.3))
    assert fate(fractions[:60]).state == "healthy"
    assert fate([1 - f for f in fractions]).state == "always calls"
    assert fate([0.0] * 30) == Fate("never calls", 20, 0.0, 0.0)
    assert fate([0.0, 0.0, 0.0]).step == 3, "fewer steps than the window are one mean"


@given(st.lists(st.floats(0, 1), min_size=1, max_size=80))
def test_a_collapse_lasts_to_the_end_and_begins_no_later_than_it_must(fractions: list[float]) -> None:
    found = fate(fractions)
    window = min(20, len(fractions))

    def mean_at(step: int) -> float:
        return float(np.mean(fractions[step - window : step]))

    if found.step is None:
        assert 0.02 - 1e-9 <= mean_at(len(fractions)) <= 0.98 + 1e-9
        return
    few = found.state == "never calls"
    beyond = [m < 0.02 + 1e-9 if few else m > 0.98 - 1e-9 for m in map(mean_at, range(found.step, len(fractions) + 1))]
    assert all(beyond)
    if found.step > window:
        before = mean_at(found.step - 1)
        assert before >= 0.02 - 1e-9 if few else before <= 0.98 + 1e-9


def test_a_doubled_price_asks_for_fewer_calls(run: Callable[..., Finished], tmp_path: Path) -> None:
    """It is wrong alone on 40; a call at 0.25 pays on those, one at 0.5 too, but calling on 100 pays at neither."""
    called = {0.1: 0, 0.3: 20, 0.5: 40, 0.7: 70, 0.9: 100}
    finished = [
        run(unit, called[alpha]) for alpha, unit in zip(collapse.ALPHAS, collapse.collapse_units(20), strict=True)
    ]
    report = collapse.analyse_collapse(finished)
    check(report, tmp_path)
    at = {row["label"]: row for row in report.rows}
    assert [at[f"alpha_c {a}"]["state"] for a in collapse.ALPHAS] == ["never calls", *["healthy"] * 3, "always calls"]
    assert at["alpha_c 0.5"]["utility_0.25"] == pytest.approx(1.0 - 0.25 * 0.4)
    assert at["alpha_c 0.1"]["utility_0.5"] == pytest.approx(0.6)
    assert "never calls at 0.1 (from step 20)" in report.conclusions[0]
    assert "alpha_c 0.5 is worth most, and at twice the price it still is" in report.conclusions[1]
    assert "asks for 0.75 and 0.50" in report.conclusions[1], "the oracle is always right"


def test_the_best_price_changes_where_the_cloud_is_half_right(run: Callable[..., Finished]) -> None:
    finished = [
        run(unit, n, cloud=0.5, wrong=100)
        for n, unit in zip((0, 10, 20, 30, 40), collapse.collapse_units(20), strict=True)
    ]
    report = collapse.analyse_collapse(finished)
    # a call gains half an answer: worth 0.25 at the first price, nothing at the second
    assert report.rows[4]["utility_0.25"] == pytest.approx(0.1)
    assert [row["utility_0.5"] for row in report.rows] == pytest.approx([0.0] * 5)
    assert all(c["mean"] > 0 for c in report.comparisons if c["what"] == "utility at 0.25 a call")
    sampled = {
        "few": [[{"outcome": "local_wrong", "oracle_score": 0.4}]],
        "all": [[{"outcome": "cloud_wrong", "oracle_score": 0.4}]],
    }
    assert [collapse.best_at(sampled, price)[0] for price in (0.25, 0.5)] == ["all", "few"]


def test_group_sizes_share_the_number_of_responses_and_are_compared_by_problem(
    run: Callable[..., Finished], tmp_path: Path
) -> None:
    for unit in ablations.group_units(20)[:-1]:
        rollout = unit.overrides
        assert int(rollout["rollout.samples_per_prompt"]) * int(rollout["rollout.prompts_per_step"]) == 256
    # alone wrong on more problems, the smaller the group: 30 of them are called
    wrong = {"G = 2": 60, "G = 4": 50, "G = 8": 40, "G = 16": 40}
    finished = [
        run(unit, 30, wrong=wrong.get(unit.label, 70) + seed - 20)
        for seed in (20, 21)
        for unit in ablations.group_units(seed)
    ]
    report = ablations.analyse_groups(finished)
    check(report, tmp_path)
    less = {row["a"]: row for row in report.comparisons}
    assert less["G = 2"]["mean"] == pytest.approx(-0.2)
    assert less["G = 2"]["per_seed"] == pytest.approx((-0.2, -0.2))
    assert less["G = 16"]["mean"] == 0
    assert next(r for r in report.rows if r["label"] == "G = 4")["accuracy_at_c"] == pytest.approx(0.8)
    assert not any(row["label"] == "warm start" and "accuracy_at_c" in row for row in report.rows)
    assert report.tables[0].cells[0][-1] == "-20.0 (-20.0 to -20.0)"


def test_calls_that_training_sampled_are_counted(run: Callable[..., Finished], tmp_path: Path) -> None:
    fractions = [0.0] * 9 + [2 / 256] + [0.0] * 10
    finished = [
        run(unit, 30 if unit.label == "GAPG" else 0, fractions=() if unit.label == "GAPG" else fractions)
        for seed in (20, 21)
        for unit in ablations.demonstration_units(seed)
    ]
    report = ablations.analyse_demonstrations(finished)
    check(report, tmp_path)
    without = [row for row in report.rows if row["label"] == ablations.WITHOUT_HELP]
    assert [(row["calls_sampled"], row["responses_sampled"], row["first_call"]) for row in without] == [
        (2, 5120, 10)
    ] * 2
    assert "4 of 10,240 responses" in report.conclusions[0]
    assert "not told apart from GAPG's" in report.conclusions[1], "the margins, and so the curves, are the same"


def test_a_penalty_that_costs_is_said_to(run: Callable[..., Finished], tmp_path: Path) -> None:
    wrong = {"KL 0": 40, "KL 0.01": 40, "KL 0.1": 60}
    # the seeds differ by a problem, so that the interval is not a point
    finished = [
        run(unit, 30, wrong=wrong[unit.label] + (seed == 21 and unit.label == "KL 0.1"))
        for seed in (20, 21, 22)
        for unit in ablations.kl_units(seed)
    ]
    report = ablations.analyse_kl(finished)
    check(report, tmp_path)
    assert "KL 0.01 is not told apart from none and KL 0.1 is worse than none" in report.conclusions[0]
