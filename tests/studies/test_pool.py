"""Jobs in worker processes: their order, their failures, and who is left when one dies."""

import os
from functools import partial
from pathlib import Path

import pytest

from gapg.studies.pool import Job, run_jobs


def job(folder: Path, key: str, work: partial[object], after: str | None = None) -> Job:
    return Job(key, f"the {key}", folder / "logs" / f"{key}.txt", work, after)


def touch(path: Path) -> partial[object]:
    return partial(Path.touch, path)


def test_a_failure_takes_down_what_needs_it_and_nothing_else(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    jobs = [
        job(tmp_path, "base", partial(int, "x")),
        job(tmp_path, "built", touch(tmp_path / "built"), after="base"),
        job(tmp_path, "top", touch(tmp_path / "top"), after="built"),
        job(tmp_path, "dead", partial(os._exit, 7)),
        job(tmp_path, "folder", partial(Path.mkdir, tmp_path / "folder")),
        job(tmp_path, "inside", touch(tmp_path / "folder" / "inside"), after="folder"),
    ]
    failed = run_jobs(jobs, 1, "jobs", 8)
    assert failed.keys() == {"base", "built", "top", "dead"}
    assert "invalid literal" in failed["base"] and failed["base"] in failed["built"]
    assert failed["dead"] == "its process died (exit code 7)"
    assert (tmp_path / "folder" / "inside").exists(), "a new worker takes the place of the dead one"
    assert not (tmp_path / "built").exists()
    assert "Traceback" in (tmp_path / "logs" / "base.txt").read_text()
    said = capsys.readouterr().err
    assert "the base: ValueError" in said and str(tmp_path / "logs" / "base.txt") in said
    assert "jobs 2/8" in said, "two of eight were done before"


def test_no_job_starts_before_what_it_needs(tmp_path: Path) -> None:
    """Three workers and a chain: each link can only be made inside the one before."""
    paths = [tmp_path / "a", tmp_path / "a" / "b", tmp_path / "a" / "b" / "c"]
    links = [partial(Path.mkdir, path) for path in paths]
    jobs = [job(tmp_path, f"{i}", link, None if i == 0 else f"{i - 1}") for i, link in reversed(list(enumerate(links)))]
    assert run_jobs(jobs, 3, "jobs", 3) == {}
    assert paths[-1].is_dir()


def test_nothing_to_do() -> None:
    assert run_jobs([], 2, "jobs", 0) == {}
