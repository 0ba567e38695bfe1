"""Work in other processes: failures, and who is left when one dies."""

import os
from functools import partial
from pathlib import Path

import pytest

from studies.pool import do_all


def test_a_failure_takes_down_nothing_else(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    work = {
        "wrong": partial(int, "x"),
        "dead": partial(os._exit, 7),
        "folder": partial(Path.mkdir, tmp_path / "folder"),
        "inside": partial(Path.touch, tmp_path / "folder" / "inside"),
    }
    failed = do_all({name: (tmp_path / "logs" / f"{name}.txt", do) for name, do in work.items()}, 1, "jobs", 6)
    assert failed.keys() == {"wrong", "dead"}
    assert failed["wrong"].startswith("ValueError: invalid literal")
    assert failed["dead"] == "its process died (exit code 7)"
    assert (tmp_path / "folder" / "inside").exists(), "in their order, one at a time"
    assert "Traceback" in (tmp_path / "logs" / "wrong.txt").read_text()
    said = capsys.readouterr().err
    assert "wrong: ValueError" in said and str(tmp_path / "logs" / "wrong.txt") in said
    assert "jobs 2/6" in said and "jobs 6/6" in said, "two of six were done before"
