"""The bench of served clouds: its figures and its table; and that a server which does not start says why."""

import subprocess
import sys
from pathlib import Path

import pytest

import served_clouds
from served_clouds import call_right, table

ROW = {"cloud": "random weights", "name": "greedy", "accuracy": 0.5, "accuracy_low": 0.4, "accuracy_high": 0.6}
ROW |= {"local_accuracy": 0.45, "call_fraction": 0.25, "unknown": 3}
ROW |= {"outcomes": {"local_correct": 45, "local_wrong": 30, "cloud_correct": 5, "cloud_wrong": 15, "unknown": 5}}


def test_how_often_a_call_is_right() -> None:
    assert call_right(ROW) == pytest.approx(0.25), "of those that were answered"
    assert call_right(ROW | {"outcomes": {"cloud_correct": 2}}) == 1.0
    assert call_right(ROW | {"outcomes": {"local_correct": 9, "unknown": 3}}) is None


def test_the_table_has_a_line_a_decoding() -> None:
    never = ROW | {"call_fraction": 0.0, "call_right": None}
    lines = table([ROW | {"call_right": call_right(ROW)}, never]).splitlines()
    assert lines[2] == "| random weights | greedy | 50.0% (40.0% to 60.0%) | 45.0% | 25.0% | 25.0% | 3 |"
    assert len(lines) == 4 and lines[3].endswith("| 0.0% | – | 3 |")


def test_a_server_that_does_not_start_says_why(tmp_path: Path) -> None:
    log = tmp_path / "server.txt"
    with log.open("w") as out:
        command = [sys.executable, "-c", "import sys; sys.exit('no such model')"]
        server = subprocess.Popen(command, stdout=out, stderr=out)
        with pytest.raises(RuntimeError, match="did not start: no such model"):
            served_clouds._wait(server, "http://127.0.0.1:9/health", log)
