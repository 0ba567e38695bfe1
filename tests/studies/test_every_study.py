"""Every study, end to end through the command line at a tiny size: killed halfway, gone on with, written."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from gapg.studies.catalog import STUDIES

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def order(tiny: str, folder: Path) -> list[str]:
    return [
        sys.executable, "-m", "gapg", "experiment", "all", "--config", tiny, "--seeds", "0", "--jobs", "2",
        "--work-dir", str(folder / "work"), "--results-dir", str(folder / "results"),
    ]  # fmt: skip


def finished(folder: Path) -> dict[Path, int]:
    """When each finished run was written."""
    return {path: path.stat().st_mtime_ns for path in folder.glob("work/runs/*/done.json")}


@pytest.mark.slow
def test_every_study_is_killed_halfway_and_gone_on_with(tiny: str, tmp_path: Path) -> None:
    process = subprocess.Popen(order(tiny, tmp_path), env=ENVIRONMENT, start_new_session=True)
    while len(finished(tmp_path)) < 8:
        assert process.poll() is None, "it ended before it could be killed"
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    before = finished(tmp_path)
    assert not list(tmp_path.glob("results/*"))

    subprocess.run(order(tiny, tmp_path), env=ENVIRONMENT, check=True)
    after = finished(tmp_path)
    kept = [path for path, when in before.items() if after[path] == when]
    assert len(kept) >= len(before) - 2 and len(after) > len(before), "but for what two workers were writing"

    readme = (tmp_path / "results" / "README.md").read_text()
    for name, study in STUDIES.items():
        record = json.loads((tmp_path / "results" / f"{name}.json").read_text())
        assert record["question"] == study.question and record["rows"] and record["tables"]
        assert len(record["conclusions"]) >= 2 and all(text.strip().endswith(".") for text in record["conclusions"])
        text = (tmp_path / "results" / f"{name}.md").read_text()
        for part in (study.question, *record["conclusions"]):
            assert part in text and part in readme
        assert (tmp_path / "results" / f"{name}.png").stat().st_size > 10_000
