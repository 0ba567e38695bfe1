"""bench/gpu.sh without a GPU: it refuses; and, with stand-ins for the tools it starts, what it starts and reports."""

import os
import subprocess
from pathlib import Path

import pytest

from bench import record

SCRIPT = record.ROOT / "bench" / "gpu.sh"


def executable(path: Path, text: str) -> None:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


def run(folder: Path, python: str) -> tuple[subprocess.CompletedProcess[str], list[str]]:
    """With an nvidia-smi and a compute-sanitizer that say little, and a Python that notes how it is called."""
    tools, calls = folder / "tools", folder / "calls"
    tools.mkdir()
    executable(tools / "nvidia-smi", 'echo "NVIDIA H100 80GB HBM3"')
    executable(tools / "compute-sanitizer", 'shift 4; exec "$@"')
    executable(tools / "python", f'echo "$*" >> {calls}\n{python}')
    environment = os.environ | {"PATH": f"{tools}:{os.environ['PATH']}", "PYTHON": str(tools / "python")}
    done = subprocess.run([SCRIPT, folder / "out"], capture_output=True, text=True, env=environment, timeout=60)
    return done, calls.read_text().splitlines()


def test_its_syntax_is_right() -> None:
    subprocess.run(["bash", "-n", SCRIPT], check=True)


@pytest.mark.skipif(Path("/usr/bin/nvidia-smi").exists(), reason="this machine has a GPU")
def test_without_a_gpu_it_says_so() -> None:
    done = subprocess.run([SCRIPT], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (1, "bench/gpu.sh: nvidia-smi finds no GPU on this machine\n")


def test_every_stage_runs_and_a_failure_stops_none(tmp_path: Path) -> None:
    fail = 'case "$*" in *only-errors*) echo "no such peer"; exit 3;; *kernels.py*) touch {0}/kernels-cuda.json;; esac'
    done, calls = run(tmp_path, fail.format(tmp_path / "out"))
    assert done.returncode == 1
    assert [call.split(" --")[0] for call in calls] == [
        "setup.py build_ext",
        "-m pytest tests/gpu -m gpu",
        "-m pytest tests/gpu",
        "bench/kernels.py",
        "bench/kernels.py",
        "bench/roofline.py",
    ]
    verdicts = {line.split()[0]: line for line in done.stdout.rpartition("results in")[2].splitlines()[1:]}
    assert verdicts.keys() == {"build", "tests", "memcheck", "errors", "times", "compare"}
    assert verdicts["errors"].endswith("exit code 3") and "no such peer" in done.stdout
    assert all(line.endswith("ok") for name, line in verdicts.items() if name != "errors")
    assert (record.ROOT / "gapg" / "kernels").is_symlink()


def test_with_nothing_measured_there_is_nothing_to_compare(tmp_path: Path) -> None:
    done, calls = run(tmp_path, "exit 0")
    assert done.returncode == 0 and not any("roofline" in call for call in calls)
    assert "NVIDIA H100 80GB HBM3, results in" in done.stdout
