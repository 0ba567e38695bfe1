"""Rejection training: what a problem is taught, and a real policy that learns to refuse what it fails on."""

from collections.abc import Callable

import numpy as np
import pytest
import torch

from gapg.judge import Group, Outcome
from gapg.runs.run import Run
from gapg.tasks.base import HELP_PHRASE, Prompt
from gapg_rollout.records import Completion
from studies import arms, predictions, rejection
from studies.rejection import sampled, targets
from studies.stacked import features

LC, LW = Outcome.LOCAL_CORRECT, Outcome.LOCAL_WRONG


def group(*outcomes: Outcome, cut: bool = False) -> Group:
    """Responses `t0 <answer> 0 </answer>`, …; those that are cut have no answer."""
    texts = [f"t{i}" if cut else f"t{i} <answer> {i} </answer>" for i in range(len(outcomes))]
    completions = tuple(Completion((1,), (-1.0,), text, "stop") for text in texts)
    return Group(Prompt("p", "", "", ""), completions, outcomes, (True,) * len(outcomes))


def test_what_a_problem_is_taught() -> None:
    right, refused = ["t1 <answer> 1 </answer>"], [f"t0 {HELP_PHRASE}"]
    assert targets(group(LW, LC), 0.5) == right, "as often right as the threshold says"
    assert targets(group(LW, LC), 0.51) == refused
    assert targets(group(LC, LC), 1.0) == ["t0 <answer> 0 </answer>", *right]
    assert targets(group(LW, LW, cut=True), 0.5) == [], "a response that was cut off has no trace"


@pytest.fixture
def run(start: Callable[..., Run]) -> Run:
    """A run of three steps, not trained: its warm start fails on many problems."""
    own = {key.replace(".", "__"): value for key, value in arms.MASKED.items()}
    return start("run", **own, optim__lr="6e-3", optim__warmup_steps="1")


def test_a_real_policy_learns_to_refuse(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rejection, "THRESHOLD", 1.01)  # every problem is refused that was ever failed on
    before = {name: value.clone() for name, value in run.model.state_dict().items()}
    plain = predictions.greedy_masked(run, "before", predictions.heldout(run))
    rows = rejection.REJECTION.make(run)
    heldout = [row for row in rows if row["split"] == "heldout"]
    assert [row["id"] for row in heldout] == [p.id for p in predictions.heldout(run)]
    assert [row["id"] for row in rows if row["split"] == "validation"] == [p.id for p in run.validation]
    margins = np.array([row["help_margin"] for row in plain])
    assert np.mean([row["score"] for row in heldout]) > margins.mean() + 1, "the phrase was taught"
    # what a stacked score reads is of the model that refuses, not of the run's
    assert all(row["score"] == row["help_margin"] for row in heldout)
    of_run = features(plain)
    assert (features(heldout)[:, 1] != of_run[:, 1]).mean() > 0.9, "the log-probs of its own answers"
    assert all(torch.equal(value, before[name]) for name, value in run.model.state_dict().items())
    again = predictions.greedy_masked(run, "before", predictions.heldout(run))
    assert again == plain, "whatever is measured next is of the run's own model"


def test_the_same_run_gives_the_same_rows_and_asks_no_cloud(start: Callable[..., Run], run: Run) -> None:
    first = rejection.REJECTION.make(run)
    assert rejection.REJECTION.make(run) == first
    assert {row["local"] for row in first} == {0, 1}
    groups = sampled(run)
    assert [g.prompt for g in groups] == list(run.queue.prompts) and all(len(g.outcomes) == 4 for g in groups)
    assert run.oracle.usage.requests == 0 and not any(g.oracle_asked for g in groups)
    assert not any(HELP_PHRASE in c.text for g in groups for c in g.completions)
