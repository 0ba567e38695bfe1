"""Signals: the step ends, the run is saved, and goes on with the same bits; a second signal ends it at once."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from gapg.commands.cli import main
from gapg.commands.train import PROCESSES
from gapg.evaluation.evaluate import respond
from gapg.evaluation.validate import validate
from gapg.jsonl import read_jsonl
from gapg.runs import checkpoint, stop
from gapg.runs.outage import check_cloud
from gapg.runs.run import Run
from gapg.tasks.countdown import Countdown
from gapg.train import train
from gapg_rollout.records import OracleAnswer, OracleQuestion
from tests.runs.small import SMALL


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


def test_outside_the_steps_it_ends_where_somebody_looks(capfd: pytest.CaptureFixture[str]) -> None:
    """Nothing is raised into what runs: C++ code may be on the stack."""
    done = []
    with stop.listening(), pytest.raises(stop.Stopped, match="SIGUSR1: stopped; what was saved stays"):
        os.kill(os.getpid(), signal.SIGUSR1)
        done.append("not torn apart")
        stop.look()
    assert done and "gapg: SIGUSR1: the run ends after what it does just now" in capfd.readouterr().err
    stop.look()  # nobody asked again


def test_a_signal_after_the_last_look_is_not_lost() -> None:
    with stop.listening(), pytest.raises(stop.Stopped, match="SIGTERM"), stop.between_steps():
        os.kill(os.getpid(), signal.SIGTERM)
        stop.look()  # as the evaluation of a step does


def test_a_signal_before_the_steps_ends_the_run_before_its_first() -> None:
    with stop.listening(), pytest.raises(stop.Stopped, match="SIGTERM: stopped"):
        os.kill(os.getpid(), signal.SIGTERM)
        with stop.between_steps():
            pytest.fail("a step began")


def test_an_evaluation_ends_after_a_response(start: Callable[..., Run]) -> None:
    run = start()
    run.engine.generate = interrupted(run.engine.generate)  # type: ignore[method-assign]
    prompts = run.task.prompts("heldout")[:20]
    with stop.listening(), pytest.raises(stop.Stopped, match="SIGINT: stopped"):
        respond(run.engine, run.task, run.tokenizer, run.judge, prompts, run.sampling("x"))


def interrupted(generate: Callable[..., Iterator[Any]]) -> Callable[..., Iterator[Any]]:
    """An engine's `generate`, with a signal before its second response, which must be its last."""

    def generating(*args: Any) -> Iterator[Any]:
        responses = generate(*args)
        yield next(responses)
        os.kill(os.getpid(), signal.SIGINT)
        yield next(responses)
        pytest.fail("another response was asked for")

    return generating


def test_a_cloud_that_hangs_does_not_hold_a_signal_up() -> None:
    class Hanging:
        def ask(self, question: OracleQuestion) -> Future[list[OracleAnswer]]:
            os.kill(os.getpid(), signal.SIGTERM)
            return Future()

    with stop.listening(), pytest.raises(stop.Stopped, match="SIGTERM: stopped"):
        check_cloud(Hanging(), Countdown(max_number=4, max_target=12))  # type: ignore[arg-type]


STEP = """
import sys, time
from gapg.runs import stop
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


def step_of_a_run() -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-c", STEP], text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def reads(process: subprocess.Popen[str], line: str) -> None:
    assert process.stdout is not None and process.stdout.readline() == f"{line}\n"


def test_the_same_signal_from_a_launcher_too_is_no_second_one() -> None:
    process = step_of_a_run()
    reads(process, "in a step")
    process.send_signal(signal.SIGTERM)
    time.sleep(stop.ECHO_S / 10)
    process.send_signal(signal.SIGTERM)
    reads(process, "saved")
    assert process.wait() == 4


def test_a_reader_of_its_output_that_is_gone_does_not_end_the_step() -> None:
    """Ctrl-C in `gapg train … 2>&1 | tee log` ends tee at once."""
    process = step_of_a_run()
    reads(process, "in a step")
    assert process.stderr is not None
    process.stderr.close()
    process.send_signal(signal.SIGINT)
    reads(process, "saved")
    assert process.wait() == 4


def test_minutes_between_checkpoints(start: Callable[..., Run]) -> None:
    run = start(steps="3", eval__every="0", checkpoint_every="1000", checkpoint_minutes="1e-9", keep_checkpoints="9")
    train(run, validate)
    assert checkpoint.steps(run.folder / "checkpoints") == [1, 2, 3]


def begin(folder: Path, *more: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "gapg", *SMALL, "--checkpoint-every", "1000", "--output-dir", str(folder), *more]
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
