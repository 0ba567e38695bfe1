"""A run killed with SIGKILL at random moments and resumed ends with the same bits as one that was never killed."""

import hashlib
import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from gapg.jsonl import read_jsonl
from gapg.runs import checkpoint

ARGS = [
    *("train", "quickstart", "--threads", "1", "--tensorboard", "false"),
    *("--eval.heldout", "16"),
    *("--task.args", "{max_number: 6, max_target: 24}"),
    *("--model.llama", "{hidden_size: 48, num_layers: 2, num_heads: 2, intermediate_size: 96}"),
    *("--warm-start.steps", "40", "--warm-start.batch-size", "8", "--warm-start.checkpoint-every", "4"),
    *("--steps", "24", "--rollout.prompts-per-step", "8", "--rollout.samples-per-prompt", "4"),
    *("--checkpoint-every", "2", "--eval.every", "4", "--eval.problems", "24", "--seed", "5"),
]


def start(folder: Path, *more: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "gapg", *ARGS, "--output-dir", str(folder), *more]
    return subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)


def progress(folder: Path) -> int:
    """Checkpoints' steps so far: of the warm start, then of the run."""
    warm = checkpoint.steps(folder / "warm-start" / "checkpoints")
    steps = checkpoint.steps(folder / "checkpoints")
    return max([0, *warm]) + max([0, *steps])


def kill_after(process: subprocess.Popen[str], folder: Path, goal: int, pause: float) -> bool:
    """SIGKILL, `pause` seconds after the progress has reached `goal`; False if the run ended before."""
    while progress(folder) < goal and process.poll() is None:
        time.sleep(0.005)
    time.sleep(pause)
    ended = process.poll() is not None
    process.kill()
    process.wait()
    return not ended


def digest(folder: Path) -> dict[str, str]:
    newest = checkpoint.latest(folder / "checkpoints")
    assert newest
    names = ("model/model.safetensors", "optimizer.safetensors", "state.json")
    return {name: hashlib.sha256((newest / name).read_bytes()).hexdigest() for name in names}


def rows(folder: Path) -> list[dict[str, float]]:
    return [
        {k: v for k, v in row.items() if not k.startswith("seconds/")} for row in read_jsonl(folder / "metrics.jsonl")
    ]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, list[str]]:
    """(never killed, killed and resumed, what the resumed ones said)."""
    root = tmp_path_factory.mktemp("resume")
    whole, killed = root / "whole", root / "killed"
    rng = random.Random(7)
    undisturbed = start(whole)
    said: list[str] = []
    # once in the warm start, and twice in the run; and each time at a moment of its own within a step or a save
    for i, goal in enumerate((rng.randint(1, 30), 40 + rng.randint(1, 10), 40 + rng.randint(12, 20))):
        process = start(killed, *(["--resume"] if i else []))
        assert kill_after(process, killed, goal, rng.uniform(0.0, 0.25)), process.communicate()[1]
        said.append(process.communicate()[1] if process.stderr else "")
    last = start(killed, "--resume")
    said.append(last.communicate(timeout=400)[1])
    assert last.returncode == 0, said[-1]
    error = undisturbed.communicate(timeout=400)[1]
    assert undisturbed.returncode == 0, error
    return whole, killed, said


def test_the_same_bits(folders: tuple[Path, Path, list[str]]) -> None:
    whole, killed, _ = folders
    assert checkpoint.steps(killed / "checkpoints") == checkpoint.steps(whole / "checkpoints")
    ours, theirs = digest(killed), digest(whole)
    assert ours["model/model.safetensors"] == theirs["model/model.safetensors"]
    assert ours["optimizer.safetensors"] == theirs["optimizer.safetensors"]


def test_the_same_state(folders: tuple[Path, Path, list[str]]) -> None:
    """Counters, queue, controller, and what the oracle has cost."""
    states = []
    for folder in folders[:2]:
        newest = checkpoint.latest(folder / "checkpoints")
        assert newest
        states.append(json.loads((newest / "state.json").read_text()))
    whole, killed = states
    assert killed == whole
    assert digest(folders[1])["state.json"] == digest(folders[0])["state.json"]


def test_every_step_once_with_the_same_values(folders: tuple[Path, Path, list[str]]) -> None:
    whole, killed = rows(folders[0]), rows(folders[1])
    assert [r["step"] for r in whole] == list(range(25))
    assert [r["step"] for r in killed] == [r["step"] for r in whole]
    for a, b in zip(killed, whole, strict=True):
        assert a == b


def test_it_says_where_it_goes_on(folders: tuple[Path, Path, list[str]]) -> None:
    said = folders[2]
    assert "resuming" not in said[0]
    assert "resuming the warm start from step" in said[1]
    for text in said[2:]:
        assert "resuming from step" in text


def test_nothing_half_written_is_left(folders: tuple[Path, Path, list[str]]) -> None:
    for folder in folders[:2]:
        assert not list(folder.rglob("*.partial"))


def test_a_running_run_keeps_others_out(tmp_path: Path) -> None:
    first = start(tmp_path / "run", "--warm-start.steps", "1000000")
    try:
        while not (tmp_path / "run" / "config.yaml").exists():
            assert first.poll() is None
            time.sleep(0.05)
        first.send_signal(signal.SIGSTOP)  # it keeps its lock, and leaves the processor to the other
        second = start(tmp_path / "run", "--resume")
        _, error = second.communicate(timeout=240)
        assert second.returncode == 2
        assert "another run is writing there" in error
        assert error.count("\n") == 1
    finally:
        first.kill()
        first.wait()
