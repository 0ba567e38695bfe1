"""The budget's studies on tables made by hand, whose call fractions and accuracies are known."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from math import floor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from gapg.config import load_config
from gapg.evaluation.calibrate import fit_bias, help_control
from gapg.studies import budgets, holding, units
from gapg.studies.curves import Routed, apply_threshold, threshold_for
from gapg.studies.study import Finished
from gapg.tasks.base import HELP_PHRASE, STOP
from gapg.tasks.countdown import Countdown
from gapg_rollout.records import Completion, Sampling
from gapg_rollout.transformers_engine import TransformersEngine

N = 100


@pytest.fixture
def run(finish: Callable[..., Finished], predicted: Callable[..., dict[str, Any]]) -> Callable[..., Finished]:
    """A run on 100 problems: calls problem i before problem i + 1, is right alone on all from `wrong` on."""

    def make(unit: Any, called: int, *, wrong: int = 40, shift: float = 0.0, alpha_c: float = 0.4) -> Finished:
        alone = ["local_wrong" if i < wrong else "local_correct" for i in range(N)]
        masked = [predicted(i, alone[i], 50.5 - i) for i in range(N)]
        sampled = [predicted(i, "cloud_correct" if i < called else alone[i]) for i in range(N)]
        # the calibration problems' margins lie higher by `shift` than those of the held-out ones
        train = [predicted(i, alone[i], 50.5 - i + shift) for i in range(N)]
        metrics = [{"step": s, "call_fraction": called / N, "alpha_c": alpha_c} for s in range(1, 61)]
        products = {"heldout-masked": masked, "heldout-sampled": sampled, "train-masked": train}
        return finish(unit, products, metrics)

    return make


def drawn(draw: Callable[[Figure], None], path: Path) -> int:
    figure = Figure(layout="constrained")
    draw(figure)
    figure.savefig(path)
    return path.stat().st_size


def test_called_and_errors_are_those_of_the_tables(run: Callable[..., Finished], tmp_path: Path) -> None:
    seeds = {20: (11, 30, 49), 21: (9, 33, 55)}
    finished = [
        run(unit, called)
        for seed, of_seed in seeds.items()
        for unit, called in zip(budgets.budget_units(seed), of_seed, strict=True)
    ]
    measured = budgets.measure(finished)
    at = {(h.way, h.target, h.seed): h for h in measured.held}
    assert at[budgets.TRAINED, 0.5, 21].called == 0.55
    # right on all 55 called, and on the other 45, which it solves
    assert at[budgets.TRAINED, 0.5, 21].accuracy == 1.0
    assert at[budgets.TRAINED, 0.1, 20].accuracy == pytest.approx(0.11 + 0.60)
    for way in (budgets.GREEDY, budgets.CALIBRATED):
        assert [h.called for c in budgets.TARGETS for h in measured.of(way, c)] == [0.1, 0.1, 0.3, 0.3, 0.5, 0.5]
    # the phrase has the highest logit on problems 0 to 50
    assert {h.called for h in measured.held if h.way == budgets.UNBIASED} == {0.51}
    held = {c: budgets.holds(measured.of(budgets.TRAINED, c)) for c in budgets.TARGETS}
    assert held == {0.1: True, 0.3: True, 0.5: False}, "one seed is 5 points away from 50%"
    report = budgets.analyse(finished)
    row = next(r for r in report.tables[0].cells if r[0] == budgets.TRAINED and r[1] == "50%")
    assert row[2:] == ["49.0", "55.0", "+2.0", "+5.0", "no"]
    assert "misses 50% (worst seed +5.0 points)" in report.conclusions[0]
    assert all(d["mean"] == 0 for d in report.comparisons), "all runs rank the problems alike"
    assert drawn(report.draw, tmp_path / "a.png") > 10_000


def test_a_threshold_comes_from_the_calibration_problems(run: Callable[..., Finished]) -> None:
    """Where these lie five ranks higher, five problems fewer of the held-out ones are called."""
    finished = [run(unit, 30, shift=5) for unit in budgets.budget_units(20)]
    measured = budgets.measure(finished)
    assert [h.called for h in measured.held if h.way == budgets.GREEDY] == [0.05, 0.25, 0.45]
    assert [h.error for h in measured.of(budgets.GREEDY, 0.3)] == pytest.approx([-0.05])


def test_training_to_a_target_is_compared_at_exactly_that_target(run: Callable[..., Finished]) -> None:
    """The 30% run is wrong alone on 40 problems, the others on 20."""
    finished = [
        run(unit, 30, wrong=40 if unit.label == "GAPG, 30%" else 20)
        for seed in (20, 21)
        for unit in budgets.budget_units(seed)
    ]
    measured = budgets.measure(finished)
    # 10 called: right are 10 + 80 against 10 + 60; 50 called: all right in both
    assert measured.differences[0.1].mean == pytest.approx(0.2)
    assert measured.differences[0.5].mean == pytest.approx(0.0)
    said = budgets.conclusions(measured)[1]
    assert "beats calibrating the 30% run to it at 10% called (+20.0 (+20.0 to +20.0) points)" in said
    assert "no gain over calibrating the 30% run to it at 50% called" in said


def test_problems_the_cloud_failed_are_left_out_of_all(run: Callable[..., Finished]) -> None:
    finished = [run(unit, 30) for unit in budgets.budget_units(20)]
    path = finished[1].folder / "products" / "heldout-masked.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows[7]["oracle_score"] = None
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    measured = budgets.measure(finished)
    assert {m.routed.score.size for methods in measured.methods.values() for m in methods} == {N - 1}
    path.write_text("".join(json.dumps(row) + "\n" for row in rows[1:]))
    with pytest.raises(ValueError, match="different held-out problems"):
        budgets.measure(finished)


def test_wrong_rho_is_half_and_twice_three_sevenths() -> None:
    found = {u.label: load_config("quickstart", u.overrides).budget for u in holding.rho_units(20)}
    assert len(found) == 6
    for label, budget in found.items():
        factor = {"half": 0.5, "right": 1, "twice": 2}[label.split()[0]]
        # of 14 solved prompts 3, 6 or 12: what rounding of rho must not lose
        assert floor(budget.exact_rho * 14) == round(6 * factor)
        assert budget.controller == ("controller" in label)
    assert found["right rho, controller"] == load_config("quickstart", units.gapg(20).overrides).budget


def test_wrong_rho_reports_how_far_it_moves_the_calls(run: Callable[..., Finished], tmp_path: Path) -> None:
    called = {"half": (30, 20), "right": (30, 32), "twice": (31, 45)}
    finished = [
        run(unit, called[unit.label.split()[0]]["fixed" in unit.label])
        for seed in (20, 21)
        for unit in holding.rho_units(seed)
    ]
    report = holding.analyse_rho(finished)
    first = report.conclusions[0]
    assert first.startswith(
        "On the calls as trained: more with twice rho, with controller (+1.0 (+1.0 to +1.0) points)"
    )
    assert "twice rho, without controller (+13.0 (+13.0 to +13.0) points); fewer with half rho, without" in first
    assert "no effect is shown of half rho, with controller (+0.0 (+0.0 to +0.0) points); the run" in first
    assert "is +1.0 points away with the controller and +15.0 without." in first
    assert {c["figure"] for c in report.comparisons} == {"accuracy at equal calls", "called as trained"}
    assert report.tables[1].cells[0][-1] == "+0.0 (+0.0 to +0.0)"
    assert "no effect is shown of" in report.conclusions[1]
    assert len(report.rows) == 12
    assert drawn(report.draw, tmp_path / "a.png") > 10_000


def test_calls_that_differ_by_no_more_than_seeds_do_are_no_effect(run: Callable[..., Finished]) -> None:
    """Half rho calls 1, 2 and 9 points fewer with the controller: 4 on average, and one seed says most of it."""
    fewer = {20: 1, 21: 2, 22: 9}
    finished = [
        run(unit, 30 - (fewer[seed] if unit.label == "half rho, controller" else 0))
        for seed in fewer
        for unit in holding.rho_units(seed)
    ]
    first = holding.analyse_rho(finished).conclusions[0]
    assert "fewer with" not in first
    # a mean of -4, a standard deviation of sqrt(19) and t = 4.303 at two degrees of freedom
    assert "no effect is shown of half rho, with controller (-4.0 (-14.8 to +6.8) points)" in first


def test_filter_and_controller_crossed(run: Callable[..., Finished], tmp_path: Path) -> None:
    called = {"filter + controller": 30, "controller only": 31, "filter only": 40, "neither": 22}
    # the filter makes 5 problems more be solved alone; where 30 are called, 30 of those it does not solve are right
    wrong = {"filter + controller": 35, "controller only": 40, "filter only": 35, "neither": 40}
    finished = [
        run(unit, called[unit.label], wrong=wrong[unit.label], alpha_c=0.4 + 0.01 * seed)
        for seed in (20, 21, 22)
        for unit in holding.cell_units(seed)
    ]
    report = holding.analyse_cells(finished)
    by_what = {c["what"]: c for c in report.comparisons if c["figure"] == "accuracy at equal calls"}
    assert by_what["the filter, with controller"]["mean"] == pytest.approx(0.05)
    assert by_what["the filter, with controller"]["wins"] == 3
    assert by_what["the controller, with filter"]["mean"] == pytest.approx(0.0)
    assert "filter only 10.0 (worst +10.0) and neither 8.0 (worst -8.0)" in report.conclusions[0]
    assert (
        "within 4 points on every seed: filter + controller and controller only. On the distance"
        in (report.conclusions[0])
    )
    assert (
        "nearer with the filter, with controller (-1.0 (-1.0 to -1.0) points), the controller, with filter (-10.0"
        in (report.conclusions[0])
    )
    assert "further away with the filter, with a fixed alpha_c (+2.0 (+2.0 to +2.0) points)" in report.conclusions[0]
    assert "a gain from the filter, with controller (+5.0 (+5.0 to +5.0) points)" in report.conclusions[1]
    assert "no effect is shown of the controller, with filter" in report.conclusions[1]
    assert np.mean([r["late_alpha_c"] for r in report.rows if r["seed"] == 21]) == pytest.approx(0.61)
    assert drawn(report.draw, tmp_path / "a.png") > 10_000


def test_the_cells_are_the_runs_of_the_other_studies() -> None:
    cells = {u.label: u.overrides for u in holding.cell_units(20)}
    assert cells["filter + controller"] == units.gapg(20).overrides == {}
    assert cells["neither"] == units.collaboration_aware(20).overrides
    for label, (keeps_filter, keeps_controller) in holding.CELLS.items():
        budget = load_config("quickstart", cells[label]).budget
        assert (budget.filter, budget.controller) == (keeps_filter, keeps_controller)


def test_the_threshold_calls_where_a_biased_decode_does(
    make_model: Callable[..., PreTrainedModel], tokenizer: PreTrainedTokenizerBase, countdown: Countdown
) -> None:
    """ "greedy, calibrated" of the tables decodes nothing with a bias; a real model with the bias calls the same."""
    engine = TransformersEngine(make_model(seed=21, initializer_range=0.3), tokenizer)
    prompts = [countdown.render(p, tokenizer) for p in countdown.prompts("heldout")[:150]]
    control = help_control(tokenizer)

    def decode(bias: float) -> list[Completion]:
        sampling = Sampling(16, temperature=0.0, stop=STOP, help=replace(control, bias=bias))
        return [c for _, (c,) in sorted(engine.generate(prompts, 1, sampling), key=lambda pair: pair[0])]

    passed = decode(-math.inf)
    margins = np.array([c.help_margin for c in passed], dtype=np.float64)
    method = Routed("masked", margins, np.zeros(margins.size), np.ones(margins.size))
    for c in (0.1, 0.3, 0.5):
        threshold = threshold_for(margins, c)
        biased = decode(-threshold)
        called = apply_threshold(method, threshold).called
        assert sum(called) == round(c * margins.size)
        assert [HELP_PHRASE in b.text for b in biased] == called
        kept = [(b.token_ids, m.token_ids) for b, m, call in zip(biased, passed, called, strict=True) if not call]
        assert all(ours == theirs for ours, theirs in kept)
        assert sum(m > -fit_bias(margins.tolist(), c) for m in margins) == sum(called), "gapg calibrate's bias"
