"""The loop on a real task with a tiny model: it learns, says what it did, survives any kill, and stops in time."""

import json
import math
import shutil
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from gapg.config import load_config
from gapg.evaluation.validate import validate
from gapg.jsonl import read_jsonl
from gapg.judge import Judge
from gapg.runs import checkpoint, tracking
from gapg.runs.health import COLLAPSED_AFTER, warn_if_collapsed
from gapg.runs.outage import LOST_STEPS, OracleDown
from gapg.runs.run import Run
from gapg.runs.state import TrainState
from gapg.train import train, train_step
from gapg_rollout.records import OracleAnswer, OracleQuestion, OracleUsage

KEYS = {
    *("step", "accuracy", "local_accuracy", "call_fraction", "alpha_c", "lr", "grad_norm", "clipped", "logprob_gap"),
    *("skipped", "bad_steps", "rollout_lost", "groups/with_gradient", "policy/rollout_nan_fraction"),
    *(
        "outcome/local_correct",
        "outcome/local_wrong",
        "outcome/cloud_correct",
        "outcome/cloud_wrong",
        "outcome/unknown",
    ),
    *("both_endings", "verifier_limits", "response_tokens", "tokens_sampled", "empty_steps"),
    *("sharing/on", "sharing/predicted_speedup", "tokens/given", "tokens/computed", "tokens/head"),
    *("tokens/saved_zero_advantage", "tokens/saved_shared_prompts", "tokens/saved_padding"),
    *("groups/d1", "groups/d2", "groups/d2_kept", "groups/unsolved", "groups/unknown", "groups/trained"),
    *("oracle/requests", "oracle/cache_hits", "oracle/failures", "oracle/tokens", "oracle/cost"),
    *("policy/loss", "policy/ratio_min", "policy/ratio_max", "policy/ess"),
    *("seconds/rollout", "seconds/oracle", "seconds/update", "seconds/sync"),
}
EVAL = {"eval/accuracy", "eval/local_accuracy", "eval/call_fraction", "eval/unknown"}


def test_three_steps_end_to_end(start: Callable[..., Run]) -> None:
    run = start()
    before = {k: v.clone() for k, v in run.model.state_dict().items()}
    train(run, validate)
    rows = read_jsonl(run.folder / "metrics.jsonl")
    assert [r["step"] for r in rows] == [0, 1, 2, 3]
    assert set(rows[0]) == {"step", *EVAL}
    assert set(rows[1]) == KEYS
    assert set(rows[2]) == set(rows[3]) == KEYS | EVAL | {"seconds/evaluate"}, "every second step, and the last"
    for row in rows[1:]:
        assert all(isinstance(v, int | float) and math.isfinite(v) for v in row.values())
        assert sum(row[k] for k in row if k.startswith("outcome/")) == pytest.approx(1)
        assert sum(row[f"groups/{k}"] for k in ("d1", "d2", "unsolved", "unknown")) == 8
        assert row["groups/trained"] == row["groups/d1"] + row["groups/d2_kept"]
        assert row["accuracy"] == pytest.approx(row["local_accuracy"] + row["outcome/cloud_correct"])
        assert row["logprob_gap"] < 1e-4, "the engine's log-probs are the trainer's"
        assert row["alpha_c"] > 0
    assert rows[3]["oracle/requests"] + rows[3]["oracle/cache_hits"] >= rows[1]["oracle/requests"] > 0
    assert any(not torch.equal(before[k], v) for k, v in run.model.state_dict().items())
    assert checkpoint.latest(run.folder / "checkpoints") == run.folder / "checkpoints" / "step-3"
    assert run.queue.cursor == 24


def test_options_of_the_loss_reach_the_step(start: Callable[..., Run]) -> None:
    """GRPO's family in one run: another advantage, two epochs with a clip, truncated weights, a KL penalty."""
    run = start(
        steps="3", eval__every="0", optim__lr="5e-3", loss__advantage="grpo", loss__aggregation="token_mean",
        loss__epochs="2", loss__clip="[0.1, 0.2]", loss__tis_cap="2", loss__kl_coef="0.5", loss__entropy="true",
    )  # fmt: skip
    train(run, validate)
    rows = read_jsonl(run.folder / "metrics.jsonl")
    shown = {"policy/kl", "policy/entropy", "policy/clip_fraction", "policy/tis_fraction"}
    assert all(set(row) == KEYS | shown for row in rows)
    assert all(math.isfinite(v) for row in rows for v in row.values())
    assert all(row["policy/kl"] > 0 for row in rows), "from the second epoch on the policy has left the reference"
    assert any(row["policy/clip_fraction"] > 0 for row in rows)
    assert all(0 < row["policy/entropy"] < math.log(114) for row in rows)
    assert run.reference is not None
    saved = {n: p.clone() for n, p in run.reference.named_parameters()}
    again = start(steps="3", eval__every="0", loss__kl_coef="0.5")  # from its last checkpoint
    assert again.state.step == 3 and again.reference is not None
    for name, parameter in again.reference.named_parameters():
        assert torch.equal(parameter, saved[name]) and not parameter.requires_grad


def test_under_a_kl_penalty_every_response_counts(start: Callable[..., Run]) -> None:
    rows = []
    for coef in ("0", "0.1"):
        run = start(steps="1", loss__kl_coef=coef, budget__filter="false")  # groups of equal rewards are kept
        rows.append(train_step(run))
    assert rows[0]["tokens_sampled"] == rows[1]["tokens_sampled"]
    assert rows[1]["groups/trained"] > 0 and rows[0]["tokens/computed"] < rows[1]["tokens/computed"]


def test_a_second_epoch_is_the_same_gradient_at_another_policy(start: Callable[..., Run]) -> None:
    """With a learning rate of nothing, two epochs see the same loss: a ratio of 1 and the gradient of one epoch."""
    norms = []
    for epochs in ("1", "2"):
        run = start(steps="1", optim__lr="1e-12", loss__epochs=epochs)
        norms.append(train_step(run)["grad_norm"])
    assert norms[0] == pytest.approx(norms[1], rel=1e-5) and norms[0] > 0


def test_it_learns(start: Callable[..., Run]) -> None:
    """A weak model whose calls pay 0.4: it learns that calling is better than what it can do, and says so sharply."""
    run = start(
        steps="25",
        optim__lr="2e-3",
        reward__alpha_c="0.4",
        rollout__prompts_per_step="16",
        rollout__samples_per_prompt="8",
        budget__controller="false",
        budget__filter="false",
        eval__every="0",
        checkpoint_every="1000",
    )
    train(run, validate)
    rows = read_jsonl(run.folder / "metrics.jsonl")

    def mean(key: str, part: slice) -> float:
        return sum(r[key] for r in rows[part]) / len(rows[part])

    first, last = slice(0, 5), slice(-5, None)
    # 640 samples each: two standard errors of a difference are about 0.055
    assert mean("accuracy", last) > mean("accuracy", first) + 0.12

    def reward(part: slice) -> float:
        return mean("local_accuracy", part) + 0.4 * mean("outcome/cloud_correct", part)

    assert reward(last) > reward(first) + 0.02


def test_a_step_without_a_kept_group_changes_nothing(start: Callable[..., Run]) -> None:
    """|D| = 0: no optimizer step, counted, and the row still has every key."""
    run = start(oracle__accuracy="0")
    run.engine.sync({k: torch.zeros_like(v) for k, v in run.model.state_dict().items()})  # uniform: solves nothing
    before = {k: v.clone() for k, v in run.model.state_dict().items()}
    row = train_step(run)
    assert row["groups/trained"] == 0
    assert row["empty_steps"] == run.state.empty_steps == 1
    assert all(torch.equal(before[k], v) for k, v in run.model.state_dict().items())
    assert not run.optimizer.state
    assert set(row) == {k for k in KEYS if k != "step" and not k.startswith("seconds/")}


class Down:
    """An oracle of the protocol whose server is gone."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def ask(self, question: OracleQuestion) -> Future[list[OracleAnswer]]:
        self.asked.append(question.id)
        future: Future[list[OracleAnswer]] = Future()
        future.set_result([OracleAnswer(None, error="connection refused")])
        return future

    @property
    def usage(self) -> OracleUsage:
        return OracleUsage(requests=len(self.asked), failures=len(self.asked))

    def restore(self, usage: OracleUsage) -> None:
        raise NotImplementedError

    def close(self) -> None: ...


def cut_off(run: Run) -> Down:
    """Takes the oracle away, and the model's wits too, so that every group needs it."""
    down = Down()
    run.oracle, run.judge = down, Judge(run.task, down)
    run.engine.sync({k: torch.zeros_like(v) for k, v in run.model.state_dict().items()})
    run.engine.sync = lambda _: None  # type: ignore[method-assign]
    return down


def test_an_oracle_that_stays_away_stops_the_run_without_harm(start: Callable[..., Run], capsys: Any) -> None:
    run = start(steps="50", eval__every="0", checkpoint_every="1000")
    before = {k: v.clone() for k, v in run.model.state_dict().items()}
    down = cut_off(run)
    with pytest.raises(OracleDown, match="--resume"):
        train(run, validate)
    assert run.state.step == LOST_STEPS == 3
    rows = read_jsonl(run.folder / "metrics.jsonl")
    assert [r["groups/unknown"] for r in rows] == [8, 8, 8]
    assert [r["groups/trained"] + r["groups/d1"] + r["groups/d2"] for r in rows] == [0, 0, 0]
    assert all(torch.equal(before[k], v) for k, v in run.model.state_dict().items())
    # its prompts came first in the next step, and wait in the queue still
    assert set(down.asked[:8]) == set(down.asked[8:16]) == set(down.asked[16:]) == set(run.queue.returned)
    assert len(run.queue.returned) == 8
    saved = checkpoint.latest(run.folder / "checkpoints")
    assert saved == run.folder / "checkpoints" / "step-3"
    assert json.loads((saved / "state.json").read_text())["queue"]["returned"] == run.queue.returned
    run.close()

    mended = start(steps="4", eval__every="0", checkpoint_every="1000")  # the config's own oracle again
    assert mended.state.step == 3
    train(mended, validate)
    assert mended.queue.returned == []
    assert mended.queue.cursor == 8, "the same prompts, no new ones"
    assert mended.state.lost_steps == 0


def test_one_failed_answer_is_no_reason_to_stop(start: Callable[..., Run]) -> None:
    run = start(steps="2", eval__every="0")
    real = run.oracle

    class Flaky(Down):
        def ask(self, question: OracleQuestion) -> Future[list[OracleAnswer]]:
            failed = super().ask(question)
            return failed if len(self.asked) % 3 == 0 else real.ask(question)

    run.judge = Judge(run.task, Flaky())
    train(run, validate)
    rows = read_jsonl(run.folder / "metrics.jsonl")
    assert any(0 < r["groups/unknown"] < 8 for r in rows)
    assert run.state.lost_steps == 0


def test_validation_without_an_oracle_does_not_end_in_a_traceback(start: Callable[..., Run]) -> None:
    """Nothing could be judged: the run goes on until OracleDown says so."""
    run = start(steps="50", eval__every="1", checkpoint_every="1000")
    cut_off(run)
    with pytest.raises(OracleDown):
        train(run, validate)


# --- kills -----------------------------------------------------------------------------------------------------------


class Killed(BaseException):
    """Stands in for SIGKILL between two writes: nothing of ours may catch it."""


class Moments:
    """Dies at the n-th moment, the moments being just before and just after every line and every checkpoint."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, die_at: int | None) -> None:
        self.count, self.die_at = 0, die_at
        for module, name in ((tracking, "append_jsonl"), (checkpoint, "save")):
            monkeypatch.setattr(module, name, self._around(getattr(module, name)))

    def _around(self, write: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            self._tick()
            result = write(*args, **kwargs)
            self._tick()
            return result

        return wrapped

    def _tick(self) -> None:
        self.count += 1
        if self.count == self.die_at:
            raise Killed


def improving() -> Callable[[Run], dict[str, float]]:
    """A validation whose score is a function of the step alone, best at step 3: the best is saved on the way."""

    def score(run: Run) -> dict[str, float]:
        value = {0: 0.1, 1: 0.2, 2: 0.1, 3: 0.5}.get(run.state.step, 0.3)
        return {"eval/accuracy": value, "eval/local_accuracy": value, "eval/call_fraction": 0.0}

    return score


def finished(run: Run) -> tuple[Any, ...]:
    """Everything that a run leaves, apart from how long it took."""
    rows = read_jsonl(run.folder / "metrics.jsonl")
    rows = [{k: v for k, v in r.items() if not k.startswith("seconds/")} for r in rows]
    root = run.folder / "checkpoints"
    last = checkpoint.latest(root)
    assert last
    files = [(last / name).read_bytes() for name in ("state.json", "optimizer.safetensors", "model/model.safetensors")]
    # an older checkpoint may be left when the very last deletion was cut off
    best_and_last = [n for n in checkpoint.steps(root) if n in (3, run.config.steps)]
    return [r["step"] for r in rows], rows, best_and_last, files


def test_a_kill_between_any_two_writes_changes_nothing(
    start: Callable[..., Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"steps": "4", "eval__every": "1", "checkpoint_every": "2", "rollout__prompts_per_step": "2"}
    failures, expected, moment, total = {}, None, 0, 1
    while moment <= total:
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        with monkeypatch.context() as patch:
            moments = Moments(patch, moment or None)
            run = start(**settings)
            with suppress(Killed):
                train(run, improving())
        if moment:
            run = start(**settings)  # resumes
            train(run, improving())
            left = finished(run)
            if left != expected:
                names = ("steps in metrics.jsonl", "values", "best and last", "bits")
                failures[moment] = [n for n, a, b in zip(names, left, expected, strict=True) if a != b] + [left[0]]
        else:
            expected, total = finished(run), moments.count
            assert total >= 16
            assert expected[0] == [0, 1, 2, 3, 4]
        moment += 1
    assert not failures, f"killed at moment: {failures}"


GAPG, MARGINAL = load_config("quickstart"), load_config("quickstart", {"method": "marginal"})


# --- warnings --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("fraction", "what"), [(0.0, "never called"), (1.0, "always called")])
def test_a_collapsed_policy_is_said_loudly_and_once(
    capsys: pytest.CaptureFixture[str], fraction: float, what: str
) -> None:
    state = TrainState()
    for _ in range(COLLAPSED_AFTER - 1):
        warn_if_collapsed(GAPG, state, {"call_fraction": fraction, "alpha_c": 0.3})
    assert "collapsed" not in capsys.readouterr().err
    for _ in range(30):
        warn_if_collapsed(GAPG, state, {"call_fraction": fraction, "alpha_c": 0.3})
    error = capsys.readouterr().err
    assert error.count(f"policy collapsed: it {what} the cloud for 20 steps") == 1
    warn_if_collapsed(GAPG, state, {"call_fraction": 0.3, "alpha_c": 0.3})
    for _ in range(COLLAPSED_AFTER):
        warn_if_collapsed(GAPG, state, {"call_fraction": fraction, "alpha_c": 0.3})
    assert "policy collapsed" in capsys.readouterr().err, "and again after it had recovered"


@pytest.mark.parametrize(("fraction", "what"), [(1e-3, "never called"), (0.999, "always called")])
def test_chances_that_make_up_no_call_are_a_collapse_too(
    capsys: pytest.CaptureFixture[str], fraction: float, what: str
) -> None:
    """A mean of chances is never quite 0 or 1: of 256 responses these make up a quarter of a call, or of an answer."""
    for settings, named in ({}, False), ({"marginal.score": "price"}, True):
        config, state = load_config("quickstart", {"method": "marginal", **settings}), TrainState()
        for _ in range(COLLAPSED_AFTER):
            warn_if_collapsed(config, state, {"call_fraction": fraction, "alpha_c": 0.3})
        error = capsys.readouterr().err
        assert f"{what} the cloud" in error and "lengthen the warm start" in error
        assert ("reward.alpha_c" in error) == named, "a forecast has no price"
    state = TrainState()
    for _ in range(COLLAPSED_AFTER):
        warn_if_collapsed(MARGINAL, state, {"call_fraction": 0.01, "alpha_c": 0.3})
    assert "collapsed" not in capsys.readouterr().err, "two or three calls a step"


def answers(state: TrainState, rights: Iterable[float]) -> None:
    for right in rights:
        state.step += 1
        warn_if_collapsed(MARGINAL, state, {"call_fraction": 0.3, "alpha_c": 0.3, "marginal/right": right})


def test_answers_that_a_run_loses_are_said_once(capsys: pytest.CaptureFixture[str]) -> None:
    state = TrainState()
    answers(state, [0.7] * 60)
    assert "collapsed" not in capsys.readouterr().err
    answers(state, [math.nan, *[0.3] * 100])
    (line,) = capsys.readouterr().err.splitlines()
    assert "are right by now, and 70% were; train with a lower optim.lr or marginal.weight" in line
    answers(state, [0.7] * 60 + [0.1] * 60)
    assert "policy collapsed" in capsys.readouterr().err, "and again after they had come back"


@pytest.mark.parametrize("right", [0.02, 0.2, 0.5, 0.9])
def test_answers_that_are_right_by_chance_are_not_lost(right: float, capsys: pytest.CaptureFixture[str]) -> None:
    """A batch of 64 responses, in prompts of eight that are right or wrong together."""
    rng = np.random.default_rng(0)
    answers(TrainState(), (rng.binomial(8, right, size=1000) / 8).tolist())
    assert "collapsed" not in capsys.readouterr().err


def test_task_tuning_may_never_call(capsys: pytest.CaptureFixture[str]) -> None:
    unpriced = load_config("quickstart", {"method": "marginal", "marginal.weight": "0"})
    for config, alpha_c in ((GAPG, 0.0), (unpriced, 0.3)):
        state = TrainState()
        for _ in range(30):
            warn_if_collapsed(config, state, {"call_fraction": 0.0, "alpha_c": alpha_c})
    assert "collapsed" not in capsys.readouterr().err
