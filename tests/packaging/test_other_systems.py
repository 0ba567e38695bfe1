"""What only Linux has stops neither an import nor a run on a CPU."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.conftest import SMALL_RUN


def test_a_run_on_a_cpu_needs_nothing_that_only_linux_has(tmp_path: Path) -> None:
    settings = SMALL_RUN | {"warm_start.steps": "2", "steps": "1", "checkpoint_every": "1", "eval.every": "1"}
    options = [f"--{key}={value}" for key, value in settings.items()]
    script = Path(__file__).with_name("without_linux.py")
    command = [sys.executable, str(script), str(tmp_path), "train", "quickstart", *options]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert (tmp_path / "run" / "metrics.jsonl").read_text()
