"""A run with `method: marginal`: what it logs, that it asks no cloud, survives a kill, and stays what it was."""

import math
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from gapg.config import RunConfig
from gapg.errors import ConfigError
from gapg.evaluation.validate import validate
from gapg.jsonl import read_jsonl
from gapg.runs import run_identity
from gapg.runs.run import Run
from gapg.runs.run_dir import open_folder, save_config
from gapg.tasks.countdown import Countdown
from gapg.train import train, train_step
from tests.test_train import EVAL, KEYS, finished

OWN = {"hazard_gap", "marginal/right", "marginal/brier", "marginal/log_score", "tokens/saved_equal_responses"}


def test_three_steps_end_to_end(start: Callable[..., Run]) -> None:
    run = start(method="marginal")
    before = {k: v.clone() for k, v in run.model.state_dict().items()}
    train(run, validate)
    rows = read_jsonl(run.folder / "metrics.jsonl")
    keys = {k for k in KEYS - {"tokens/saved_zero_advantage"} if not k.startswith("policy/")} | OWN
    assert set(rows[1]) == keys
    for row in rows[2:]:
        assert {k for k in row if not k.startswith("eval/")} == keys | {"seconds/evaluate"} and set(row) > EVAL
    for row in rows[1:]:
        assert all(isinstance(row[k], int | float) and math.isfinite(row[k]) for k in keys)
        assert row["groups/trained"] == row["groups/with_gradient"] == 8, "no group is left out"
        assert row["logprob_gap"] < 1e-4 and row["hazard_gap"] < 1e-4, "the engine's are the trainer's"
        # nobody has decided: fractions are expectations over the policy's own decision, with a cloud that is right
        assert row["outcome/local_correct"] + row["outcome/local_wrong"] == 1
        assert row["marginal/right"] == pytest.approx(row["outcome/local_correct"])
        assert 0 < row["call_fraction"] < 1 and row["local_accuracy"] <= row["marginal/right"]
        assert row["accuracy"] == pytest.approx(row["local_accuracy"] + row["call_fraction"])
        assert 0 <= row["marginal/brier"] <= 1 and row["marginal/log_score"] < 0
        assert row["oracle/requests"] == row["oracle/cache_hits"] == 0
    assert any(not torch.equal(before[k], v) for k, v in run.model.state_dict().items())


@pytest.mark.parametrize("settings", [{"rollout__temperature": "0.7"}, {"marginal__score": "brier"}])
def test_the_engines_hazards_are_the_trainers(start: Callable[..., Run], settings: dict[str, str]) -> None:
    row = train_step(start(method="marginal", **settings))
    assert row["logprob_gap"] < 1e-4 and row["hazard_gap"] < 1e-4
    assert row["grad_norm"] > 0


def test_think_blocks_are_said(start: Callable[..., Run], nothing_said: None, capsys: Any) -> None:
    """A call does not count in one, but a hazard does."""
    run = start(method="marginal")
    train_step(run)
    assert "think block" not in capsys.readouterr().err
    run.judge.thinking = True  # as with a chat template that opens one, which no response closes
    train_step(run)
    train_step(run)
    said = capsys.readouterr().err
    assert said.count("responses reason in a think block") == 1
    assert said.count("most responses end while they think, without an answer: raise rollout.max_new_tokens") == 1


def test_a_run_that_was_killed_goes_on_with_the_same_bits(start: Callable[..., Run]) -> None:
    """SIGKILL between a step and its row, of a process that had saved the step before last."""
    settings = {"method": "marginal", "steps": "4", "eval__every": "0", "checkpoint_every": "1"}
    child = os.fork()
    if child == 0:
        try:
            train(dying(start("killed", **settings), 3), validate)
        finally:
            os._exit(1)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
    resumed = start("killed", **settings)
    assert resumed.state.step == 2
    assert [row["step"] for row in read_jsonl(resumed.folder / "metrics.jsonl")] == [1, 2]
    train(resumed, validate)
    whole = start("whole", **settings)
    train(whole, validate)
    assert finished(resumed) == finished(whole)
    assert [row["step"] for row in finished(whole)[1]] == [1, 2, 3, 4]


def dying(run: Run, step: int) -> Run:
    """The run, whose process dies before it logs that step."""
    log = run.tracker.log

    def logged(row: Any) -> None:
        if row["step"] == step:
            os.kill(os.getpid(), signal.SIGKILL)
        log(row)

    run.tracker.log = logged  # type: ignore[method-assign]
    return run


OTHERS = {
    "method": {"method": "gapg"},
    "marginal.weight": {"marginal__weight": "2"},
    "marginal.trace": {"marginal__trace": "[1, 1]"},
    "marginal.score": {"marginal__score": "price"},
    "marginal.prices": {"marginal__prices": "[0.1, 0.9]"},
    "marginal.cloud": {"marginal__cloud": "ask"},
}


@pytest.mark.parametrize("key", OTHERS)
def test_a_resume_changes_nothing_of_the_method(
    small_config: Callable[..., RunConfig], countdown: Countdown, tmp_path: Path, key: str
) -> None:
    began = {"method": "marginal", "task__args": "{max_number: 8, max_target: 30}"}
    began |= {} if key == "method" else {"marginal__score": "brier"}
    config = small_config(tmp_path / "run", **began)
    with open_folder(config, resume=False):
        run_identity.begin(tmp_path / "run", config, countdown, countdown.tokenizer())
        save_config(config)
    with open_folder(config, resume=True):
        pass
    other = small_config(tmp_path / "run", **began | OTHERS[key])
    with pytest.raises(ConfigError, match=rf"^{key}: the run began with"), open_folder(other, resume=True):
        pass
