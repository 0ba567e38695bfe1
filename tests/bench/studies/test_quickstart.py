"""The quickstart: killed halfway, it goes on to the figures of an unbroken one; and where a part cannot be had."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gapg.config import RunConfig
from gapg.files import partial_name
from gapg.help_phrase import help_control
from gapg.jsonl import read_jsonl
from gapg.runs import stop
from gapg.runs.run import Run
from gapg_rollout.records import Completion, Sampling
from studies.arms import Predictions
from studies.pool import Process, WorkFailed
from studies.predictions import make_predictions
from studies.quickstart import (
    assess,
    assess_gapg,
    assess_twin,
    at_random,
    check_twin,
    compare,
    logprob_threshold,
    offload,
    train_twin,
)  # fmt: skip
from study import main

STUDY = Path(__file__).parents[3] / "bench" / "study.py"


def order(tiny: str, folder: Path) -> list[str]:
    config = ["--config", tiny, "--steps", "6", "--checkpoint-every", "2", "--eval.every", "2", "--threads", "1"]
    return ["quickstart", *config, "--output-dir", str(folder)]


@pytest.mark.slow
def test_killed_it_goes_on_by_the_same_command_to_the_same_figures(
    tiny: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    main(order(tiny, tmp_path / "whole"))
    table = capfd.readouterr().out
    assert "GAPG, greedy, calibrated bias" in table and "cloud only" in table
    killed = subprocess.Popen([sys.executable, str(STUDY), *order(tiny, tmp_path / "killed")], start_new_session=True)
    while not list(tmp_path.glob("killed/checkpoints/step-2/manifest.json")):
        assert killed.poll() is None, "it ended before it could be killed"
        time.sleep(0.05)
    killed.kill()
    killed.wait()
    main(order(tiny, tmp_path / "killed"))
    assert capfd.readouterr().out == table
    whole, again = (json.loads((tmp_path / name / "summary.json").read_text()) for name in ("whole", "killed"))
    assert whole == again and len(whole["rows"]) == 11 and len(whole["paired_tests"]) == 4
    assert (tmp_path / "killed" / "summary.png").stat().st_size > 50_000
    main(order(tiny, tmp_path / "whole"))
    assert capfd.readouterr().out == table, "finished, it says the same again"


def test_a_run_that_was_begun_without_a_twin_is_refused(
    tiny: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from gapg.commands.cli import main as gapg

    argv = [tiny, "--steps", "1", "--eval.heldout", "0", "--output-dir", str(tmp_path / "run")]
    gapg(["train", *argv])
    capsys.readouterr()
    with pytest.raises(SystemExit) as left:
        main(["quickstart", "--config", *argv, "--eval.heldout", "9"])
    assert left.value.code == 2
    assert "holds a run without a twin; choose another --output-dir" in capsys.readouterr().err.splitlines()[-1]


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
    assess(run, "heldout-before", 1.0, help_control(run.tokenizer))
    assert not killed.exists()
    for heldout in (3, 5):
        for each in (run, tuned):
            changed = each.config.eval.model_copy(update={"heldout": heldout})
            each.config = each.config.model_copy(update={"eval": changed})
        assess_gapg(run)
        assess_twin(tuned)
        config = run.config.model_copy(update={"steps": 0})
        assert {row["n"] for row in compare(config, 0.0)["rows"]} == {heldout}


def test_a_twin_that_ended_with_the_run_has_not_failed(tmp_path: Path) -> None:
    twin = Process((tmp_path / "log.txt", partial(int, "x")))
    twin.process.join()
    with pytest.raises(WorkFailed, match=r"twin failed: ValueError: .*; see .*log\.txt, mend it, then run the same"):
        check_twin(twin)
    with pytest.raises(stop.Stopped), stop.listening(), stop.between_steps():
        os.kill(os.getpid(), signal.SIGTERM)
        check_twin(twin)


def test_what_a_twin_is_refused_for_is_in_its_log(
    small_config: Callable[..., RunConfig], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "task-tuned/checkpoints/step-6").mkdir(parents=True)
    work = partial(train_twin, small_config(tmp_path / "task-tuned"), None)
    twin = Process((tmp_path / "task-tuned/log.txt", work))
    twin.process.join()
    assert twin.process.exitcode == 1 and capfd.readouterr().err == ""
    refusal = f"ConfigError: output_dir={tmp_path}/task-tuned: holds checkpoints/step-6 and no config.yaml"
    assert twin.said().startswith(refusal)


def test_damaged_predictions_are_made_again(start: Callable[..., Run]) -> None:
    run = start()
    rows = [{"id": f"p{n}", "oracle_score": 1.0} for n in range(3)]
    wanted = Predictions("x", lambda _: rows)
    assert make_predictions(run, wanted) == (0, True) and make_predictions(run, wanted) == (0, False)
    lines = wanted.path(run.folder).read_text().splitlines()
    wanted.path(run.folder).write_text(
        f"{lines[0]}\n{lines[1][:9]}\n{lines[2]}\n"
    )  # two would stand for other problems
    assert make_predictions(run, wanted) == (0, True) and read_jsonl(wanted.path(run.folder)) == rows


PREDICTIONS = st.lists(
    st.fixed_dictionaries(
        {
            "outcome": st.sampled_from(["local_correct", "local_wrong"]),
            "oracle_score": st.sampled_from([0.0, 1.0]),
            "logprob_mean": st.floats(-5, 0),
        }
    ),
    min_size=1,
    max_size=60,
)


@given(PREDICTIONS, st.floats(0, 1), st.integers(0, 1000))
def test_random_offloading_sends_exactly_its_part(rows: list[dict[str, Any]], c: float, seed: int) -> None:
    to_cloud = at_random(len(rows), c, seed)
    assert sum(to_cloud) == round(c * len(rows))
    result = offload("x", rows, to_cloud)
    assert result.called == to_cloud
    for row, cloud, right, local in zip(rows, to_cloud, result.correct, result.local_correct, strict=True):
        assert right == (row["oracle_score"] == 1.0 if cloud else row["outcome"] == "local_correct")
        assert local == (right and not cloud)


@given(PREDICTIONS, st.floats(0, 0.99))
def test_the_logprob_router_calls_at_most_its_part_of_the_calibration_set(rows: list[dict[str, Any]], c: float) -> None:
    logprobs = [row["logprob_mean"] for row in rows]
    called = sum(logprob < logprob_threshold(rows, c) for logprob in logprobs)
    assert called <= round(c * len(rows))
    if len(set(logprobs)) == len(rows) and round(c * len(rows)) < len(rows):
        assert called == round(c * len(rows))
