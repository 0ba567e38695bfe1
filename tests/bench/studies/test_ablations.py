"""The studies of settings and of budgets on tables made by hand, whose answers are known."""

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from math import floor
from typing import Any

import numpy as np
import pandas as pd
import pytest
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from gapg.config import load_config
from gapg.evaluation.calibrate import fit_bias
from gapg.help_phrase import help_control
from gapg.tasks.base import HELP_PHRASE, STOP
from gapg.tasks.countdown import Countdown
from gapg_rollout.engines.transformers import TransformersEngine
from gapg_rollout.records import Completion, Sampling
from studies import arms, budgets
from studies.ablations import DEMONSTRATIONS, FILTER_CONTROLLER, GROUP_SIZE, KL, WRONG_RHO, group_arms, rho_arms
from studies.arms import Arm, Finished
from studies.budgets import BUDGETS, CALIBRATED, GREEDY, TRAINED, UNBIASED
from studies.gradient_variance import GRADIENT_VARIANCE, variance_rows
from studies.report import Record, Study
from studies.settings import AS_TRAINED, AT_EQUAL_CALLS
from studies.statistics import at_threshold, threshold_for

N = 100
Run = Callable[..., Finished]
Drawn = Callable[[Study, list[Finished]], Record]


@pytest.fixture
def run(finish: Run, predicted: Callable[..., dict[str, Any]]) -> Run:
    """A run on 100 problems: calls the first `called` of them as trained, is right alone on all from `wrong` on.

    shift: so much higher lie the margins of the calibration problems.
    """

    def make(
        arm: Arm, called: int = 30, *, wrong: int = 40, shift: float = 0, alpha_c: float = 0.4, steps: Any = None
    ) -> Finished:
        alone = ["local_wrong" if i < wrong else "local_correct" for i in range(N)]
        predictions = {
            "heldout-masked": [predicted(i, alone[i], 50.5 - i) for i in range(N)],
            "heldout-sampled": [predicted(i, "cloud_correct" if i < called else alone[i]) for i in range(N)],
            "train-masked": [predicted(i, alone[i], 50.5 - i + shift) for i in range(N)],
        }
        if GRADIENT_VARIANCE in arm.predictions:
            rng = np.random.default_rng(arm.seed)
            rewards, scores = rng.integers(0, 2, 2048).astype(float), rng.normal(size=(2048, 3))
            predictions["gradient_variance"] = [{"prompt": "p", **r} for r in variance_rows(rewards, scores, rng)]
        fractions = steps or [called / N] * 60
        metrics = [{"step": s + 1, "call_fraction": f, "alpha_c": alpha_c} for s, f in enumerate(fractions)]
        return finish(arm, predictions, metrics)

    return make


def of(record: Record, figure: str = AT_EQUAL_CALLS, key: str = "a") -> dict[str, dict[str, Any]]:
    return {d[key]: d for d in record["comparisons"] if d["figure"] == figure}


def lines(study: Study, record: Record, table: int = 0) -> dict[str, dict[str, str]]:
    """A table's lines by their first cell, each by its columns."""
    made = study.tables(record)[table]
    return {cells[0]: dict(zip(made.columns, cells, strict=True)) for cells in made.cells}


def test_a_penalty_that_costs_is_said_to(run: Run, drawn: Drawn) -> None:
    wrong = {"KL 0": 40, "KL 0.01": 40, "KL 0.1": 60}
    # the seeds differ by a problem, so that the interval is not a point
    runs = [
        run(arm, wrong=wrong[arm.label] + (seed == 21 and arm.label == "KL 0.1"))
        for seed in (20, 21, 22)
        for arm in KL.arms(seed)
    ]
    found = lines(KL, drawn(KL, runs))
    assert [found[label]["than KL 0"] for label in wrong] == ["", "same", "worse"]
    assert found["KL 0.1"]["greedy, 30% called"] == "69.7% (69.0 to 70.0%)"
    assert found["KL 0.1"]["greedy at 30% less KL 0, points"] == "-20.3 (-21.8 to -18.9)"


def test_group_sizes_share_the_number_of_responses_and_are_compared_by_problem(run: Run, drawn: Drawn) -> None:
    for arm in group_arms(20)[:-1]:
        rollout = arm.overrides
        assert int(rollout["rollout.samples_per_prompt"]) * int(rollout["rollout.prompts_per_step"]) == 256
    wrong = {"G = 2": 60, "G = 4": 50, "G = 8": 40, "G = 16": 40}
    runs = [run(arm, wrong=wrong.get(arm.label, 70) + seed - 20) for seed in (20, 21) for arm in group_arms(seed)]
    record = drawn(GROUP_SIZE, runs)
    less = of(record)
    assert less["G = 2"]["per_seed"] == pytest.approx([-0.2, -0.2]) and less["G = 16"]["mean"] == 0
    assert next(r for r in record["rows"] if r["label"] == "G = 4")["accuracy_at_c"] == pytest.approx(0.8)
    assert not any(row["label"] == "warm start" and "accuracy_at_c" in row for row in record["rows"])
    assert lines(GROUP_SIZE, record)["G = 2"]["greedy at 30% less G = 8, points"] == "-20.0 (-20.0 to -20.0)"
    assert len(GROUP_SIZE.tables(record)[1].cells) == 4


def test_calls_that_training_sampled_are_counted(run: Run, drawn: Drawn) -> None:
    rare = [0.0] * 9 + [2 / 256] + [0.0] * 10
    runs = [
        run(arm) if arm.label == "GAPG" else run(arm, 0, steps=rare)
        for seed in (20, 21)
        for arm in DEMONSTRATIONS.arms(seed)
    ]
    record = drawn(DEMONSTRATIONS, runs)
    without = [row for row in record["rows"] if row["label"] != "GAPG"]
    assert [(row["calls_sampled"], row["responses_sampled"], row["first_call"]) for row in without] == [
        (2, 5120, 10)
    ] * 2
    assert lines(DEMONSTRATIONS, record)["no help demonstrations"]["than GAPG"] == "same", "the margins are the same"
    assert DEMONSTRATIONS.tables(record)[1].cells[-1] == ["no help demonstrations", "21", "2", "5,120", "10"]


def test_wrong_rho_is_half_and_twice_three_sevenths() -> None:
    found = {arm.label: load_config("quickstart", arm.overrides).budget for arm in rho_arms(20)}
    assert len(found) == 6
    for label, budget in found.items():
        factor = {"half": 0.5, "right": 1, "twice": 2}[label.split()[0]]
        # of 14 solved prompts 3, 6 or 12: what rounding of rho must not lose
        assert floor(budget.exact_rho * 14) == round(6 * factor)
        assert budget.controller == ("controller" in label)
    assert found["right rho, controller"] == load_config("quickstart").budget


def test_wrong_rho_reports_how_far_it_moves_the_calls(run: Run, drawn: Drawn) -> None:
    called = {"half": (30, 20), "right": (30, 32), "twice": (31, 45)}
    runs = [run(arm, called[arm.label.split()[0]]["fixed" in arm.label]) for seed in (20, 21) for arm in rho_arms(seed)]
    record = drawn(WRONG_RHO, runs)
    moved, same = "called as trained, points (95%)", "+0.0 (+0.0 to +0.0)"
    pairs = lines(WRONG_RHO, record, 1)
    assert [pairs[f"{factor} rho, with controller"][moved] for factor in ("half", "twice")] == [
        same,
        "+1.0 (+1.0 to +1.0)",
    ]
    without = pairs["twice rho, without controller"]
    assert (without[moved], without["accuracy is"], without["its calls are"]) == (
        "+13.0 (+13.0 to +13.0)",
        "same",
        "worse",
    )
    assert lines(WRONG_RHO, record)["twice rho, fixed alpha_c"]["worst seed"] == "+15.0"
    assert len(record["rows"]) == 12 and record["rows"][0]["training_call_fraction"] == [0.3] * 10


def test_calls_that_differ_by_no_more_than_seeds_do_are_no_effect(run: Run, drawn: Drawn) -> None:
    """Half rho calls 1, 2 and 9 points fewer with the controller: 4 on average, and one seed says most of it."""
    fewer = {20: 1, 21: 2, 22: 9}
    runs = [
        run(arm, 30 - (fewer[seed] if arm.label == "half rho, controller" else 0))
        for seed in fewer
        for arm in rho_arms(seed)
    ]
    record = drawn(WRONG_RHO, runs)
    pair = lines(WRONG_RHO, record, 1)["half rho, with controller"]
    # a mean of -4, a standard deviation of sqrt(19) and t = 4.303 at two degrees of freedom
    assert pair["called as trained, points (95%)"] == "-4.0 (-14.8 to +6.8)" and pair["its calls are"] == "same"
    assert of(record, AS_TRAINED, "what")["half rho, with controller"]["wins"] == 0


def test_filter_and_controller_crossed(run: Run, drawn: Drawn) -> None:
    called = {"filter + controller": 30, "controller only": 31, "filter only": 40, "neither": 22}
    # the filter makes 5 problems more be solved alone; where 30 are called, 30 of those it does not solve are right
    runs = [
        run(arm, called[arm.label], wrong=35 if "filter" in arm.label else 40, alpha_c=0.4 + 0.01 * seed)
        for seed in (20, 21, 22)
        for arm in FILTER_CONTROLLER.arms(seed)
    ]
    record = drawn(FILTER_CONTROLLER, runs)
    by_what = of(record, key="what")
    assert by_what["the filter, with controller"]["mean"] == pytest.approx(0.05)
    assert by_what["the filter, with controller"]["wins"] == 3
    assert by_what["the controller, with filter"]["mean"] == pytest.approx(0.0)
    held = lines(FILTER_CONTROLLER, record)
    assert [held[label]["worst seed"] for label in ("filter only", "neither")] == ["+10.0", "-8.0"]
    verdicts = [
        (pair["accuracy is"], pair["nearer to 30% called, points (95%)"], pair["its calls are"])
        for pair in lines(FILTER_CONTROLLER, record, 1).values()
    ]
    assert verdicts[:3] == [
        ("better", "+1.0 (+1.0 to +1.0)", "better"),
        ("better", "-2.0 (-2.0 to -2.0)", "worse"),
        ("same", "+10.0 (+10.0 to +10.0)", "better"),
    ]
    assert np.mean([r["late_alpha_c"] for r in record["rows"] if r["seed"] == 21]) == pytest.approx(0.61)
    assert "the budget is 30%" in FILTER_CONTROLLER.tables(record)[0].title


def test_the_cells_are_the_runs_of_the_other_studies() -> None:
    cells: dict[str, Mapping[str, str]] = {arm.label: arm.overrides for arm in FILTER_CONTROLLER.arms(20)}
    assert cells["filter + controller"] == arms.gapg(20).overrides == {}
    assert cells["neither"] == arms.collaboration_aware(20).overrides
    kept = {label: load_config("quickstart", own).budget for label, own in cells.items()}
    assert {label: (b.filter, b.controller) for label, b in kept.items()} == {
        "filter + controller": (True, True), "controller only": (False, True), "filter only": (True, False),
        "neither": (False, False),
    }  # fmt: skip


# ---- budgets


def test_called_and_errors_are_those_of_the_tables(run: Run, drawn: Drawn) -> None:
    seeds = {20: (11, 30, 49), 21: (9, 33, 55)}
    runs = [run(arm, n) for seed, of_seed in seeds.items() for arm, n in zip(BUDGETS.arms(seed), of_seed, strict=True)]
    record = drawn(BUDGETS, runs)
    at = {(row["way"], row["target"], row["seed"]): row for row in record["rows"]}
    assert at[TRAINED, 0.5, 21]["called"] == 0.55
    # right on all 55 called, and on the other 45, which it solves
    assert at[TRAINED, 0.5, 21]["accuracy"] == 1.0
    assert at[TRAINED, 0.1, 20]["accuracy"] == pytest.approx(0.11 + 0.60)
    for way in (GREEDY, CALIBRATED):
        assert [at[way, c, seed]["called"] for c in budgets.TARGETS for seed in seeds] == [0.1, 0.1, 0.3, 0.3, 0.5, 0.5]
    # the phrase has the highest logit on problems 0 to 50
    assert {row["called"] for row in record["rows"] if row["way"] == UNBIASED} == {0.51}
    cells = BUDGETS.tables(record)[0].cells
    assert [row[-1] for row in cells if row[0] == TRAINED] == ["yes", "yes", "no"], "one seed is 5 points away from 50%"
    assert next(r for r in cells if r[:2] == [TRAINED, "50%"])[2:-1] == ["49.0", "55.0", "+2.0", "+5.0"]
    assert all(d["mean"] == 0 for d in record["comparisons"]), "all runs rank the problems alike"


def test_a_threshold_comes_from_the_calibration_problems(run: Run, drawn: Drawn) -> None:
    """Where these lie five ranks higher, five problems fewer of the held-out ones are called."""
    record = drawn(BUDGETS, [run(arm, shift=5) for arm in BUDGETS.arms(20)])
    greedy = [row for row in record["rows"] if row["way"] == GREEDY]
    assert [row["called"] for row in greedy] == [0.05, 0.25, 0.45]
    assert [row["error"] for row in greedy] == pytest.approx([-0.05] * 3)


def test_training_to_a_target_is_compared_at_exactly_that_target(run: Run, drawn: Drawn) -> None:
    """The 30% run is wrong alone on 40 problems, the others on 20."""
    wrong = {"GAPG, 30%": 40}
    record = drawn(BUDGETS, [run(a, wrong=wrong.get(a.label, 20)) for seed in (20, 21) for a in BUDGETS.arms(seed)])
    # 10 called: right are 10 + 80 against 10 + 60; 50 called: all right in both
    assert [d["mean"] for d in record["comparisons"]] == pytest.approx([0.2, 0.0])
    accuracy = BUDGETS.tables(record)[1]
    assert [row[-2:] for row in accuracy.cells] == [
        ["+20.0 (+20.0 to +20.0)", "better"], ["", ""], ["+0.0 (+0.0 to +0.0)", "same"],
    ]  # fmt: skip


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
    masked = pd.DataFrame({"score": margins, "local": 0.0, "cloud": 1.0})
    for c in (0.1, 0.3, 0.5):
        threshold = threshold_for(margins, c)
        biased, called = decode(-threshold), (margins > threshold).tolist()
        assert sum(called) == round(c * margins.size) == round(at_threshold(masked, threshold)[0] * margins.size)
        assert [HELP_PHRASE in b.text for b in biased] == called
        kept = [(b.token_ids, m.token_ids) for b, m, call in zip(biased, passed, called, strict=True) if not call]
        assert all(ours == theirs for ours, theirs in kept)
        assert sum(m > -fit_bias(margins.tolist(), c) for m in margins) == sum(called), "gapg calibrate's bias"
