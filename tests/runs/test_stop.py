"""Signals: the step ends, the run is saved, and goes on with the same bits; a second signal ends it at once."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from gapg.runs import checkpoint, stop
from gapg.commands.cli import main
from gapg.jsonl import read_jsonl
from gapg.runs.run import Run
from gapg.train import train
from gapg.commands.train import PROCESSES
from gapg.evaluation.validate import validate

SMALL = [
    *("--task.args", "{max_number: 6, max_target: 24}", "--compare", "false", "--tensorboard", "false"),
    *("--model.llama", "{hidden_size: 32, num_layers: 1, num_heads: 1, intermediate_size: 32}", "--threads", "1"),
    *("--eval.every", "0", "--eval.heldout", "0", "--eval.problems", "4", "--checkpoint-every", "1000"),
    *("--rollout.prompts-per-step", "2", "--rollout.samples-per-prompt", "2"),
]


def weights(run: Path, step: int) -> dict[str, torch.Tensor]:
    return load_file(run / "checkpoints" / f"step-{step}" / "model" / "model.safetensors")


def signal_at(run: Run, step: int, signum: int) -> None:
    """Sends this process a signal while the run's row of that step is written."""
    log = run.tracker.log

    def logged(row: Any) -> None:
        if row["step"] == step:
            os.kill(os.getpid(), signum)
        log(row)

    run.tracker.log = logged  # type: ignore[method-assign]


@pytest.mark.parametrize("signum", stop.SIGNALS)
def test_the_step_ends_and_is_saved_and_the_run_goes_on_with_the_same_bits(
    start: Callable[..., Run], signum: signal.Signals, capfd: pytest.CaptureFixture[str]
) -> None:
    settings = {"steps": "4", "eval__every": "0", "checkpoint_every": "1000"}
    run = start("stopped", **settings)
    signal_at(run, 2, signum)
    handlers = [signal.getsignal(s) for s in stop.SIGNALS]
    with stop.listening(), pytest.raises(stop.Stopped, match=f"{signum.name}: step 2 of 4 is saved; go on"):
        train(run, validate)
    assert [signal.getsignal(s) for s in stop.SIGNALS] == handlers
    assert f"gapg: {signum.name}: this step ends and is saved" in capfd.readouterr().err
    assert checkpoint.steps(run.folder / "checkpoints") == [2]
    assert [row["step"] for row in read_jsonl(run.folder / "metrics.jsonl")] == [1, 2]
    run.close()
    train(start("stopped", **settings), validate)
    whole = start("whole", **settings)
    train(whole, validate)
    one, other = weights(run.folder, 4), weights(whole.folder, 4)
    assert all(torch.equal(one[name], other[name]) for name in other)


def test_outside_the_steps_it_ends_at_once() -> None:
    with stop.listening(), pytest.raises(stop.Stopped, match="SIGUSR1: stopped"):
        os.kill(os.getpid(), signal.SIGUSR1)
        time.sleep(5)


def test_a_signal_after_the_last_look_is_not_lost() -> None:
    with stop.listening(), pytest.raises(stop.Stopped, match="SIGTERM"), stop.between_steps():
        os.kill(os.getpid(), signal.SIGTERM)


def test_a_signal_that_a_library_lost_ends_the_run_before_its_next_step() -> None:
    with stop.listening(), pytest.raises(stop.Stopped, match="SIGTERM: stopped"):
        with contextlib.suppress(stop.Stopped):
            os.kill(os.getpid(), signal.SIGTERM)
        with stop.between_steps():
            pytest.fail("a step began")


def test_a_child_whose_parent_decides_bears_more_signals() -> None:
    with stop.listening(once=False), pytest.raises(stop.Stopped), stop.between_steps():
        for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGINT):
            os.kill(os.getpid(), signum)
        assert stop.requested() == "SIGINT"


STEP = """
import sys, time
from gapg.runs import stop
print("loading", flush=True)
time.sleep(float(sys.argv[1]))
try:
    with stop.listening(), stop.between_steps():
        print("in a step", flush=True)
        while not stop.requested():
            time.sleep(0.01)
        print("saved", file=sys.stderr, flush=True)
        print("saved", flush=True)
except stop.Stopped:
    sys.exit(4)
"""


def step_of_a_run(loading_s: float = 0.0) -> subprocess.Popen[str]:
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen([sys.executable, "-c", STEP, str(loading_s)], text=True, **pipes)


def reads(process: subprocess.Popen[str], line: str) -> None:
    assert process.stdout is not None and process.stdout.readline() == f"{line}\n"


def test_the_same_signal_from_a_launcher_too_is_no_second_one() -> None:
    process = step_of_a_run()
    reads(process, "loading")
    reads(process, "in a step")
    process.send_signal(signal.SIGTERM)
    time.sleep(stop.ECHO_S / 10)
    process.send_signal(signal.SIGTERM)
    reads(process, "saved")
    assert process.wait() == 4


def test_a_reader_of_its_output_that_is_gone_does_not_end_the_step() -> None:
    """Ctrl-C in `gapg train … 2>&1 | tee log` ends tee at once."""
    process = step_of_a_run()
    reads(process, "loading")
    reads(process, "in a step")
    assert process.stderr is not None
    process.stderr.close()
    process.send_signal(signal.SIGINT)
    reads(process, "saved")
    assert process.wait() == 4


def test_signals_that_are_held_back_are_not_lost() -> None:
    with stop.held_back():
        process = step_of_a_run(loading_s=0.3)
    reads(process, "loading")
    process.send_signal(signal.SIGINT)
    assert process.wait() == 4
    assert "Traceback" not in process.communicate()[1]
    with stop.listening(), pytest.raises(stop.Stopped, match="SIGUSR1"), stop.held_back():
        os.kill(os.getpid(), signal.SIGUSR1)


def test_minutes_between_checkpoints(start: Callable[..., Run]) -> None:
    run = start(steps="3", eval__every="0", checkpoint_every="1000", checkpoint_minutes="1e-9", keep_checkpoints="9")
    train(run, validate)
    assert checkpoint.steps(run.folder / "checkpoints") == [1, 2, 3]


def begin(folder: Path, *more: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "gapg", "train", "quickstart", *SMALL, "--output-dir", str(folder), *more]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True)


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    end = time.monotonic() + 90
    while not condition():
        assert process.poll() is None and time.monotonic() < end, process.communicate()[1]
        time.sleep(0.02)


def test_the_command_ends_with_its_own_code_in_the_warm_start(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    warm = ["--warm-start.steps", "100000", "--warm-start.checkpoint-every", "1"]
    process = begin(folder, *warm, "--steps", "1")
    wait_for(lambda: bool(checkpoint.steps(folder / "warm-start" / "checkpoints")), process)
    process.send_signal(signal.SIGTERM)
    said = process.communicate(timeout=60)[1].splitlines()
    assert process.returncode == 4
    assert said[-1].startswith("gapg: SIGTERM: step ") and said[-1].endswith("is saved; go on with --resume"), said
    step = int(said[-1].split("step ")[1].split()[0])
    assert checkpoint.steps(folder / "warm-start" / "checkpoints")[-1] == step


def test_a_second_signal_ends_it_at_once(tmp_path: Path) -> None:
    long_step = ("--rollout.prompts-per-step", "100", "--rollout.samples-per-prompt", "400")
    process = begin(tmp_path / "run", "--warm-start", "", "--steps", "100000", *long_step)
    wait_for((tmp_path / "run" / "metrics.jsonl").exists, process)
    time.sleep(0.5)
    process.send_signal(signal.SIGTERM)
    assert process.stderr is not None
    wait_for(lambda: "a second signal" in process.stderr.readline(), process)  # type: ignore[union-attr]
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGINT
    assert checkpoint.steps(tmp_path / "run" / "checkpoints") == []


@pytest.mark.parametrize(("size", "rank"), PROCESSES.items())
def test_a_launcher_of_many_processes_is_refused_once(
    size: str, rank: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    said = []
    for number in ("0", "1"):
        monkeypatch.setenv(size, "2")
        monkeypatch.setenv(rank, number)
        with pytest.raises(SystemExit) as left:
            main(["train", "quickstart", "--output-dir", str(tmp_path / "run")])
        assert left.value.code == 2
        said += capsys.readouterr().err.splitlines()
    assert len(said) == 1 and said[0].startswith(f"gapg: {size}=2: a run is one process"), said
    assert not (tmp_path / "run").exists()
