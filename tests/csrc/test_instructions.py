"""The packer's instructions per length: no more than were recorded, and no more for many lengths than for few."""

import json
import shutil
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
RECORDED = ROOT / "bench/results/packing/instructions.json"

pytestmark = pytest.mark.skipif(
    shutil.which("valgrind") is None or shutil.which("g++") is None,
    reason="counting instructions needs valgrind and g++ (apt install valgrind g++)",
)


@pytest.fixture(scope="module")
def counted() -> dict[str, object]:
    script = [sys.executable, str(Path(__file__).with_name("instructions.py"))]
    return json.loads(subprocess.run(script, check=True, capture_output=True, text=True).stdout)


def per_length(record: dict[str, object]) -> dict[str, list[float]]:
    """By case, in order of the number of lengths."""
    found = defaultdict(list)
    for row in sorted(record["rows"], key=lambda row: row["n"]):
        found[row["case"]].append(row["per_length"])
    return dict(found)


def test_instructions_per_length_do_not_grow(counted: dict[str, object]) -> None:
    for case, counts in per_length(counted).items():
        assert max(counts[1:]) <= 1.05 * counts[0], f"{case}: {counts}"
        assert counts[-1] <= 1.05 * min(counts), f"{case}: {counts}"


def test_instructions_per_length_are_those_recorded(counted: dict[str, object]) -> None:
    """Within 3% for the same compiler, a quarter for another."""
    recorded = json.loads(RECORDED.read_text())
    slack = 1.03 if recorded["compiler"] == counted["compiler"] else 1.25
    now, before = per_length(counted), per_length(recorded)
    assert now.keys() == before.keys()
    for case in now:
        for new, old in zip(now[case], before[case], strict=True):
            assert new <= slack * old, f"{case}: {now[case]}, recorded {before[case]}: rerun tests/csrc/instructions.py"
