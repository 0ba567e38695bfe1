"""The record's schema, its quantiles and the order in which implementations are timed."""

import argparse
import itertools
import json
import os
import statistics
import subprocess
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import record


def test_calls_go_round_robin_after_one_untimed_round() -> None:
    calls: list[str] = []
    impls = {name: (lambda name=name: calls.append(name)) for name in "abc"}
    samples = record.interleaved(impls, rounds=4, before=lambda: calls.append("-"))
    assert calls == list("abc") + list("-a-b-c") * 4
    assert {name: len(values) for name, values in samples.items()} == {"a": 4, "b": 4, "c": 4}


def test_rounds_end_with_the_seconds_given_and_the_first_is_always_made() -> None:
    calls: list[int] = []
    impls = {"slow": lambda: calls.append(1) or time.sleep(0.02)}
    assert len(record.interleaved(impls, rounds=1000, seconds=0.05, warm=False)["slow"]) in (1, 2, 3)
    assert len(calls) <= 3  # no untimed call
    assert len(record.interleaved(impls, rounds=5, seconds=0.0, warm=False)["slow"]) == 1
    assert len(record.interleaved(impls, rounds=2, seconds=60.0)["slow"]) == 2


def test_who_fails_is_left_out_with_its_reason_and_the_others_are_timed() -> None:
    calls = [None, None]  # the third raises
    impls = {"a": lambda: None, "b": calls.pop}
    failed: dict[str, Exception] = {}
    samples = record.interleaved(impls, rounds=3, failed=failed)
    assert {name: len(values) for name, values in samples.items()} == {"a": 3}
    assert isinstance(failed["b"], IndexError)
    with pytest.raises(IndexError):
        record.interleaved(impls, rounds=3)


def test_the_clocks_measure_what_they_say() -> None:
    def work() -> None:
        end = time.process_time() + 0.02
        while time.process_time() < end:
            pass

    impls = {"sleep": lambda: time.sleep(0.05), "work": work}
    wall = record.interleaved(impls, rounds=3)
    cpu = record.interleaved(impls, rounds=3, clock="cpu")
    # two clocks of one machine may tick 1% apart
    assert min(wall["sleep"]) >= 0.049 and min(wall["work"]) >= 0.019
    assert min(cpu["sleep"]) < 0.019 <= min(cpu["work"])  # sleeping costs no processor time


@given(st.lists(st.floats(1e-9, 1e3), min_size=1, max_size=30))
def test_quantiles_are_ordered_and_inside(values: list[float]) -> None:
    found = record.quantiles(values)
    ladder = [min(values), found["p20"], found["median"], found["p80"], max(values)]
    assert all(low <= high * (1 + 1e-12) for low, high in itertools.pairwise(ladder))
    assert found["median"] == statistics.median(values)


def test_quantiles_of_known_values() -> None:
    assert record.quantiles([5.0, 1.0, 2.0, 4.0, 3.0, 0.0]) == {"median": 2.5, "p20": 1.0, "p80": 4.0}
    with pytest.raises(ValueError, match="no samples"):
        record.quantiles([])


def test_a_record_comes_back_with_what_it_was_measured_on(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "timing.json"
    failed = record.error_row("small", "theirs", RuntimeError("0 active drivers\nmore"))
    rows = [*record.timing_rows("small", {"ours": [3.0, 1.0, 2.0]}), failed]
    record.write("timing", rows, path)
    found = record.read(path)
    assert found["bench"] == "timing" and found["rows"][1]["error"] == "RuntimeError: 0 active drivers"
    ours = found["rows"][0]
    assert ours["samples"] == [3.0, 1.0, 2.0] and ours["median"] == 2.0
    assert {"case", "impl", "metric", "unit", "median", "p20", "p80", "samples"} == ours.keys()
    assert {"device", "cpu", "cores"} <= found["machine"].keys() and found["machine"]["cores"] >= 1
    assert found["versions"]["torch"].startswith("2.")
    assert list(path.parent.iterdir()) == [path]  # no scratch file is left


def test_a_bad_row_leaves_the_old_record(tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    record.write("x", [record.error_row("a", "b", "no")], path)
    before = path.read_text()
    for row in ({"case": "a", "impl": "b"}, {"case": "a", "impl": "b", "median": float("nan")}, {"impl": "b"}):
        with pytest.raises(ValueError):
            record.write("x", [row], path)
    assert path.read_text() == before
    json.loads(before)


def test_an_errors_text_is_one_short_line() -> None:
    assert record.error_row("c", "i", "\n  long " + "x" * 500)["error"].startswith("long xx")
    assert len(record.error_row("c", "i", "x" * 500)["error"]) == 200


def test_a_missing_package_is_named_with_what_installs_it() -> None:
    for module, command in (
        ("trl.trainer", "pip install 'gapg[bench]'"), ("quack", "pip install quack-kernels"),
        ("verl", "pip install --no-deps verl"), ("numba", "pip install numba"),
    ):  # fmt: skip
        error = record.error_row("c", "i", ModuleNotFoundError("No module named x", name=module))["error"]
        assert error == f"{module.partition('.')[0]} is not installed: {command}"


def test_results_go_to_a_scratch_folder_unless_somebody_asks() -> None:
    parser = record.parser("what it does", "kernels")
    assert parser.parse_args([]).output == record.ROOT / "runs" / "bench" / "kernels"
    assert parser.parse_args(["--output", "bench/results/kernels"]).output == Path("bench/results/kernels")


@pytest.mark.parametrize("below", ["", "deeper"])
def test_a_folder_that_cannot_be_one_is_refused_before_anything_is_measured(
    tmp_path: Path, below: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit, match="2"):
        record.parser("what it does", "kernels").parse_args(["--output", str(tmp_path / "file" / below)])
    assert "is a file: give a folder" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"rows": []}', '{"rows": [', "\x00"])
def test_what_is_no_record_is_refused_in_a_line(tmp_path: Path, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "cut.json").write_text(text)
    for name, why in (("cut.json", "is no record of a bench, or was cut off"), ("none.json", "No such file")):
        with pytest.raises(SystemExit, match="2"), record.refusing(argparse.ArgumentParser()):
            record.read(tmp_path / name)
        assert why in capsys.readouterr().err.splitlines()[-1]


def test_parts_of_names_choose_in_the_order_of_the_names_and_none_is_refused() -> None:
    pick = record.pick(["gapg", "gapg fused", "TRL"])
    assert pick("trl,fused") == ["gapg fused", "TRL"] and pick("gapg") == ["gapg"]
    for wrong, why in (("", "names none"), (",", "names none"), ("trl,nobody", "no 'nobody'")):
        with pytest.raises(argparse.ArgumentTypeError, match=f"{why}: choose of gapg, gapg fused, TRL"):
            pick(wrong)


def test_a_number_of_rounds_is_one_or_more() -> None:
    assert record.positive("12") == 12
    for wrong in ("0", "-1", "1.5", "", "two"):
        with pytest.raises(argparse.ArgumentTypeError, match="give a whole number, 1 or more"):
            record.positive(wrong)


def test_a_table_is_markdown() -> None:
    text = record.markdown(("", "ms"), [("ours", "1.0"), ("theirs", "2.0")], right=(1,))
    assert text == "|  | ms |\n|---|---:|\n| ours | 1.0 |\n| theirs | 2.0 |"


def test_a_table_is_drawn_between_its_markers_again_and_again(tmp_path: Path) -> None:
    page, markers = tmp_path / "page.md", ("<!-- begin -->", "<!-- end -->")
    page.write_text("above\n<!-- begin -->\nold\n<!-- end -->\nbelow\n")
    for _ in range(2):
        record.draw_between(page, markers, "| a\\b |")
        assert page.read_text() == "above\n<!-- begin -->\n| a\\b |\n<!-- end -->\nbelow\n"
    page.write_text("no markers\n")
    with pytest.raises(ValueError, match="needs the markers"):
        record.draw_between(page, markers, "text")
    assert page.read_text() == "no markers\n"


def test_the_cores_are_known_where_the_system_tells_no_affinity(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on macOS."""
    monkeypatch.delattr(os, "sched_getaffinity")
    assert record.cores() == os.cpu_count()


def test_the_revision_is_the_checkouts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GAPG_REVISION", raising=False)
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=record.ROOT, capture_output=True, text=True, check=False
    ).stdout.strip()
    assert record.revision().removesuffix("+dirty") == (commit or "unknown")


def test_a_copy_without_a_repository_is_told_its_revision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(record, "ROOT", tmp_path)
    monkeypatch.delenv("GAPG_REVISION", raising=False)
    assert record.revision() == "unknown"
    monkeypatch.setenv("GAPG_REVISION", "0123abc")
    assert record.revision() == "0123abc"
