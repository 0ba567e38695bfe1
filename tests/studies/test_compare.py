"""The quickstart's comparison, where a part of it cannot be had."""

import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from gapg.config import RunConfig
from gapg.files import partial_name
from gapg.jsonl import read_jsonl
from gapg.runs import stop
from gapg.runs.run import Run
from gapg.studies.compare import (
    BaselineFailed,
    _task_tuned,
    assess_before_training,
    assess_gapg,
    assess_task_tuned,
    check_alive,
    compare,
)
from gapg_rollout.records import Completion, Sampling


def test_a_policy_that_never_comes_near_the_phrase_is_compared_without_a_bias(
    start: Callable[..., Run], capsys: pytest.CaptureFixture[str]
) -> None:
    """Its training is done, and no row but one needs the bias."""
    run = start(eval__problems="4", eval__heldout="4")
    generate = run.engine.generate

    def far(ids: Sequence[Sequence[int]], n: int, sampling: Sampling) -> Iterator[tuple[int, list[Completion]]]:
        for i, completions in generate(ids, n, sampling):
            yield i, [replace(c, help_margin=None) for c in completions]

    run.engine.generate = far  # type: ignore[method-assign]
    assert assess_gapg(run) == 0.0
    assert "no response came near the help phrase" in capsys.readouterr().err
    greedy, calibrated = (
        [row["response"] for row in read_jsonl(run.folder / "predictions" / f"heldout-{name}-step-0.jsonl")]
        for name in ("greedy", "calibrated")
    )
    assert greedy == calibrated and len(greedy) == 4


def test_other_held_out_problems_are_answered_and_those_of_all_compared(start: Callable[..., Run]) -> None:
    run, tuned = start(eval__problems="4", eval__heldout="6"), start("run/task-tuned", eval__problems="4")
    kept = run.folder / "predictions" / "heldout-before-step-0.jsonl"
    kept.parent.mkdir()
    killed = partial_name(kept)
    killed.write_text("{")
    assess_before_training(run)
    assert not killed.exists()
    for heldout in ("3", "5"):
        for each in (run, tuned):
            each.config = each.config.model_copy(
                update={"eval": each.config.eval.model_copy(update={"heldout": int(heldout)})}
            )
        assess_gapg(run)
        assess_task_tuned(tuned)
        config = run.config.model_copy(update={"steps": 0})
        assert {row["n"] for row in compare(config, 0.0)["rows"]} == {int(heldout)}


def test_a_baseline_that_ended_with_the_run_has_not_failed(tmp_path: Path) -> None:
    baseline = multiprocessing.get_context("fork").Process(target=sys.exit, args=(1,))
    baseline.start()
    baseline.join()
    with pytest.raises(BaselineFailed):
        check_alive(baseline, tmp_path)
    with stop.listening(), pytest.raises(stop.Stopped), stop.between_steps():
        os.kill(os.getpid(), signal.SIGTERM)
        check_alive(baseline, tmp_path)


def test_what_a_baseline_is_refused_for_is_in_its_log(
    small_config: Callable[..., RunConfig], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "task-tuned/checkpoints/step-6").mkdir(parents=True)
    context = multiprocessing.get_context("fork")
    begun, begins = context.Pipe(duplex=False)
    baseline = context.Process(target=_task_tuned, args=(small_config(tmp_path / "task-tuned"), None, begins))
    baseline.start()
    baseline.join()
    assert begun.poll() and baseline.exitcode == 1 and capfd.readouterr().err == ""
    (line,) = (tmp_path / "task-tuned/log.txt").read_text().splitlines()
    assert line.startswith(f"gapg: output_dir={tmp_path}/task-tuned: holds checkpoints/step-6 and no config.yaml")
