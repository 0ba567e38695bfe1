"""The bench of attentions where only one of them runs: it is measured, the others are rows with their reasons."""

from pathlib import Path

from torch.nn.attention import current_flash_attention_impl

import attention
import record


def test_what_runs_is_measured_and_what_does_not_says_why(tmp_path: Path) -> None:
    rows = [row for case in attention.CASES["cpu"] for row in attention.measure(case, "cpu", rounds=2, seconds=0.0)]
    record.write("attention", rows, tmp_path / "cpu.json")
    for case in attention.CASES["cpu"]:
        of_case = [row for row in record.read(tmp_path / "cpu.json")["rows"] if row["case"] == str(case)]
        errors = {row["impl"]: row["error"] for row in of_case if "error" in row}
        found = {row["metric"]: row["median"] for row in of_case if "median" in row and row["impl"] == "FA2"}
        assert errors.keys() == {"FA3", "FA4", "cuDNN"} and "not installed" in errors["FA3"]
        assert ("has no window" in errors["cuDNN"]) == (case.window is not None)
        assert 0 < found["distance from float32"] < 1e-2 and found["time"] > 0 and found["rate"] > 0
    assert current_flash_attention_impl() is None


def test_flops_are_those_of_the_pairs_that_attend() -> None:
    case = attention.Case("two", 2, 8, 3, 1, 16, window=4)
    pairs = sum(min(i + 1, 4) for n in case.lengths() for i in range(n))
    assert case.flops == 14 * 3 * 16 * pairs
    assert len({str(c) for cases in attention.CASES.values() for c in cases}) == 6
