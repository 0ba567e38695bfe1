"""The evaluation in a run of `method: marginal`: no decision is sampled, so what a budget would do is worked out."""

import math
from collections.abc import Callable

import numpy as np
import pytest

from gapg.evaluation.validate import masked_figures, validate
from gapg.judge import Group, Outcome
from gapg.runs.run import Run
from gapg.tasks.base import Prompt
from gapg.train import train
from gapg_rollout.records import Completion, OracleAnswer
from tests.runs.test_marginal_cloud import settings

RIGHT, WRONG = Outcome.LOCAL_CORRECT, Outcome.LOCAL_WRONG


def group(right: bool, *chances: float, cloud: float | None = None, unknown: bool = False) -> Group:
    """A response along which the phrase could begin with these chances."""
    odds = tuple(math.log(p) - math.log1p(-p) for p in chances)
    done = Completion((1,), (0.0,), "x", "stop", help_log_odds=odds)
    asked = () if cloud is None and not unknown else (OracleAnswer("x"),)
    return Group(Prompt("a", "a", "1", "toy"), (done,), (RIGHT if right else WRONG,), (True,), cloud, asked, unknown)


def test_the_figures_by_hand() -> None:
    """S: 1, .4, .72, .05, .99, and .5 of a group that nobody knows."""
    groups = [
        group(True),
        group(False, 0.6),
        group(True, 0.1, 0.2),
        group(False, 0.95, cloud=0.25),
        group(False, 0.01),
        group(True, 0.5, unknown=True),
    ]
    figures = masked_figures(groups, 0.4)
    assert figures["local_accuracy"] == pytest.approx(3 / 6), "whatever the cloud failed"
    assert figures["call_fraction"] == pytest.approx(2 / 5)
    assert figures["accuracy"] == pytest.approx((1 + 1 + 0.25 + 1 + 0) / 5), "of the called one counts as right"
    assert figures["brier"] == pytest.approx((0 + 0.4**2 + 0.28**2 + 0.05**2 + 0.99**2 + 0.5**2) / 6)
    assert figures["auroc"] == pytest.approx((3 + 2 + 2) / 9)
    assert masked_figures(groups, 0.2)["accuracy"] == pytest.approx(2.25 / 5), "the least S alone"


@pytest.mark.parametrize(("fraction", "n", "calls"), [(0.3, 10, 3), (0.29, 100, 29), (0.3, 12, 3), (0.3, 3, 0)])
def test_never_more_calls_than_the_budget(fraction: float, n: int, calls: int) -> None:
    """Exactly as many where that is a whole number, which floats would miss."""
    figures = masked_figures([group(False, 0.5)] * n, fraction)
    assert figures["call_fraction"] == pytest.approx(calls / n) and figures["accuracy"] == pytest.approx(calls / n)
    assert math.isnan(figures["auroc"])


def test_of_no_problems_nothing_is_known() -> None:
    assert all(map(math.isnan, masked_figures([], 0.3).values()))
    figures = masked_figures([group(True, unknown=True)], 0.3)
    assert {key for key, x in figures.items() if math.isnan(x)} == {"accuracy", "call_fraction", "auroc"}


def test_a_phrase_that_is_all_but_certain_or_impossible() -> None:
    odds = (np.float64(800.0), np.float64(-800.0))
    done = [Completion((1,), (0.0,), "x", "stop", help_log_odds=(o,)) for o in odds]
    groups = [
        Group(Prompt("a", "a", "1", "toy"), (d,), (o,), (True,)) for d, o in zip(done, (WRONG, RIGHT), strict=True)
    ]
    figures = masked_figures(groups, 0.5)
    assert figures == {"accuracy": 1.0, "local_accuracy": 0.5, "call_fraction": 0.5, "brier": 0.0, "auroc": 1.0}


def test_a_run_is_validated_without_a_call(start: Callable[..., Run], capsys: pytest.CaptureFixture[str]) -> None:
    """And its best step is chosen by that, at the run's budget."""
    run = start(method="marginal", eval__every="1", steps="2", eval__problems="15", budget__cloud_fraction="0.2")
    figures = validate(run)
    lines = capsys.readouterr().err.splitlines()
    keys = ("accuracy", "auroc", "brier", "call_fraction", "local_accuracy", "unknown")
    assert sorted(figures) == [f"eval/{key}" for key in keys]
    assert figures["eval/call_fraction"] == pytest.approx(3 / 15) and figures["eval/unknown"] == 0
    assert figures["eval/local_accuracy"] <= figures["eval/accuracy"] <= figures["eval/local_accuracy"] + 0.201
    assert 0 < figures["eval/brier"] < 1 and 0 <= figures["eval/auroc"] <= 1
    said = next(line for line in lines if line.startswith("step 0: "))
    assert f"right alone {figures['eval/local_accuracy']:.3f} of 15 validation problems" in said
    assert {line.split()[0] for line in lines[-2:]} == {"local_correct", "local_wrong"}, "a transcript of each"
    assert figures == validate(run), "the step's seed, no other"
    train(run, validate)
    assert run.state.best_step in (1, 2) and run.state.best_score is not None


def test_known_answers_of_the_cloud_count(start: Callable[..., Run], capsys: pytest.CaptureFixture[str]) -> None:
    """The solver, always wrong, makes a call worth nothing; `ignore` takes it for right."""
    wrong = settings("https://cloud.invalid/v1", "cached") | {"oracle__kind": "solver", "oracle__accuracy": "0"}
    run = start(**wrong)
    figures = validate(run)
    assert figures["eval/accuracy"] <= figures["eval/local_accuracy"]
    assert run.oracle.usage.requests == 0 and run.oracle.usage.cache_hits == 12
    assert "where none of its answers is kept, the cloud counts as right" in capsys.readouterr().err
    trusted = validate(start("ignore", **wrong | {"marginal__cloud": "ignore"}))
    assert "the cloud, which nobody asks, counts as right" in capsys.readouterr().err
    assert trusted["eval/local_accuracy"] == figures["eval/local_accuracy"]
    assert trusted["eval/accuracy"] - figures["eval/accuracy"] == pytest.approx(figures["eval/call_fraction"])
