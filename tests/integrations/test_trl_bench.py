"""The bench of TRL's trainer on a model small enough to run here: all of its trainers must take the same step."""

from dataclasses import replace
from pathlib import Path

import record
import trl_step


def test_all_trainers_take_one_step_and_the_rows_fit_the_record(tmp_path: Path) -> None:
    case = replace(trl_step.CASES["cpu"][1], rows=8, prompt=8, completion=12, vocab=256, hidden=32, inner=64)
    record.write("trl_step", trl_step.measure(case, "cpu", rounds=1), tmp_path / "cpu.json")
    found = record.medians(record.read(tmp_path / "cpu.json")["rows"])
    plain, packed, skipping = trl_step.SWITCHES
    for name in trl_step.SWITCHES:
        assert 0 < found[str(case), name, "gradient distance"] < 1e-5
        assert found[str(case), name, "time"] > 0 and found[str(case), name, "peak memory"] > 0
    tokens = [found[str(case), name, "tokens"] for name in (trl_step.STOCK, plain, packed, skipping)]
    assert tokens[0] == tokens[1] == 8 * 20 > tokens[2] > tokens[3] > 0


def test_every_case_has_a_name_of_its_own() -> None:
    for cases in trl_step.CASES.values():
        assert len({case.key for case in cases}) == len(cases)
