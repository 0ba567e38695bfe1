"""Studies, end to end through the command line at a tiny size: killed halfway, gone on with, written.

Two that share a run, of a file each. Of the others the parts are tested beside this: their runs would cost minutes.
"""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from studies.catalog import STUDIES
from study import main

MADE = {name: STUDIES[name] for name in ("budgets", "demonstrations")}
STUDY = Path(__file__).parents[3] / "bench" / "study.py"


def finished(folder: Path) -> dict[Path, int]:
    """When each finished run was written."""
    return {path: path.stat().st_mtime_ns for path in folder.glob("work/runs/*/done.json")}


@pytest.mark.slow
def test_studies_are_killed_halfway_and_gone_on_with(tiny: str, tmp_path: Path) -> None:
    options = {"config": tiny, "seeds": "0", "jobs": "2", "work-dir": tmp_path / "work", "output": tmp_path / "results"}
    order = [*MADE, *(f"--{key}={value}" for key, value in options.items())]
    process = subprocess.Popen([sys.executable, str(STUDY), *order], start_new_session=True)
    while len(finished(tmp_path)) < 2:
        assert process.poll() is None, "it ended before it could be killed"
        time.sleep(0.1)
    process.kill()
    process.wait()
    before = finished(tmp_path)
    assert not list(tmp_path.glob("results/*"))

    main(order)
    after = finished(tmp_path)
    kept = [path for path, when in before.items() if after[path] == when]
    assert len(kept) >= len(before) - 2 and len(after) > len(before), "but for what two processes were writing"

    readme = (tmp_path / "results" / "README.md").read_text()
    for name, study in MADE.items():
        record = json.loads((tmp_path / "results" / f"{name}.json").read_text())
        assert record["question"] == study.question and record["rows"] and record["tables"]
        text = (tmp_path / "results" / f"{name}.md").read_text()
        assert study.question in text and text.partition("\n\n")[2] in readme
        assert (tmp_path / "results" / f"{name}.png").stat().st_size > 10_000

    main(["--redraw", f"--output={tmp_path / 'results'}"])
    assert (tmp_path / "results" / "README.md").read_text() == readme
