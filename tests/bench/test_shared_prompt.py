"""The bench of shared prompts on a model small enough to run here: its two updates must be the same update."""

from pathlib import Path

import record
import shared_prompt
from gapg.model import attention


def test_both_updates_are_one_and_the_rows_fit_the_record(tmp_path: Path) -> None:
    attention.register()
    case = shared_prompt.Case(2, 9, 6, samples=3, varied=True, hidden=32, layers=2)
    rows = shared_prompt.measure("tiny", case.model("cpu"), case.groups(), rounds=2, seconds=0.0)
    record.write("shared_prompt", rows, tmp_path / "cpu.json")
    found = {(r["impl"], r["metric"]): r["median"] for r in record.read(tmp_path / "cpu.json")["rows"]}
    assert 0 < found["shared", "gradient distance"] < 1e-5
    assert found["repeated", "tokens"] - found["shared", "tokens"] == 2 * 2 * 9
    assert found["shared", "time"] > 0 and found["repeated", "time"] > 0
    assert {len(r["samples"]) for r in rows if r["metric"] == "time"} == {1}  # no second round after no seconds


def test_every_case_has_a_name_of_its_own() -> None:
    for cases in shared_prompt.CASES.values():
        assert len({case.key for case in cases}) == len(cases)
