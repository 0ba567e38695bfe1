"""The page of a card's results: from records made by hand, with stages that came back, failed or are missing."""

import json
from pathlib import Path
from typing import Any

import pytest

import gpu_report
import record
from gpu_goals import SHAPE, goals
from record import Row

TRAIN = f"{SHAPE} random"
H200 = {"device": "NVIDIA H200", "cpu": "x", "cores": 16, "driver": "580.1", "cuda": "13.0", "multiprocessors": 132}


def times(case: str, milliseconds: dict[str, float], **more: Any) -> list[Row]:
    rows = record.timing_rows(
        case, {impl: [ms / 1e3 * part for part in (0.9, 1, 1.1)] for impl, ms in milliseconds.items()}
    )
    return [row | more for row in rows]


def put(path: Path, rows: list[Row], machine: dict[str, Any] = H200) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    found = {
        "bench": path.stem,
        "revision": "0123456789abcdef+dirty",
        "machine": machine,
        "versions": {"torch": "2.11.0"},
    }
    path.write_text(json.dumps(found | {"rows": rows}))


def stage_a(folder: Path, ours: float = 44.0) -> None:
    rows = times(f"{TRAIN}, forward only", {"bare GEMMs": 13.0, "gapg linear_logprob": 14.0, "gapg control: x": 13.5})
    rows += times(TRAIN, {"bare GEMMs": 40.0, "gapg control: x": 41.0, "PyTorch eager": 120.0})
    rows += times(TRAIN, {"gapg fused_policy_loss": ours}, predicted_as="ours", shape=SHAPE)
    put(folder / "kernels" / "kernels-cuda.json", rows)
    errors: list[Row] = []
    for case, mine, theirs in (("4.0 nats", 2e-3, 6e-3), ("0.0 nats", 2e-3, 9e-1)):
        for impl, value in (("gapg fused_policy_loss", mine), ("PyTorch eager", theirs)):
            errors += record.timing_rows(case, {impl: [value]}, "dH_error", "1")
            errors += record.timing_rows(case, {impl: [value / 10]}, "logprob_error", "nats")
    put(folder / "kernels" / "errors-cuda.json", errors)
    put(
        folder / "tiles" / "tiles-cuda.json", times(f"{SHAPE}, forward", {"wide": 15.0, "pair": 14.0, "torch.mm": 13.0})
    )
    steps = [
        "step seconds limit verdict",
        "build 20 40 ok",
        "errors 60 60 stopped_at_its_limit",
        "memcheck 9 50 exit_code_7",
    ]
    lines = ("\t".join(line.split()).replace("_", " ") for line in steps)
    (folder / "steps-A.tsv").write_text("\n".join(lines) + "\n")


def stage_b(folder: Path) -> None:
    rows = times("1.5B", {"gapg, no saving": 12e3, "+ shared prompt": 2.5e3, "TRL 1.16": 10e3})
    put(
        folder / "update_step" / "cuda.json",
        [*rows, record.error_row("1.5B", "Liger fused GRPO loss", "out of memory")],
    )
    put(
        folder / "shared_prompt" / "cuda.json",
        record.timing_rows("4 x P=1024", {"shared": [3.1]}, "speedup", "x repeated"),
    )


def stage_c(folder: Path) -> None:
    rows = times(TRAIN, {"bare GEMMs": 40.0, "gapg fused_policy_loss": 45.0, "verl": 80.0, "cce": 63.0})
    put(folder / "peers" / "kernels-cuda.json", rows)
    rows = times(TRAIN, {"bare GEMMs": 41.0, "gapg fused_policy_loss": 50.0, "Liger": 69.0})
    rows += times(TRAIN, {"quack": 48.0}, computes="cross entropy")
    put(folder / "cutlass" / "kernels-cuda.json", rows)


def shown(folder: Path) -> dict[str, tuple[str, bool | None]]:
    return {goal.what: (goal.shown, goal.met) for goal in goals(gpu_report.load(folder).rows)}


def test_every_goal_is_judged_by_its_rows(tmp_path: Path) -> None:
    for stage in (stage_a, stage_b, stage_c):
        stage(tmp_path)
    assert shown(tmp_path) == {
        "forward beside one bare GEMM": ("1.08x (gapg linear_logprob)", True),  # not the control's 1.04
        "forward and backward beside three bare GEMMs": ("1.10x (gapg fused_policy_loss)", True),
        "the fastest other policy loss beside ours": ("1.38x (Liger)", True),  # 69 to 50 of its run, not 63 to 45
        "the fastest loss that only sums a cross entropy beside ours": ("0.96x (quack)", False),
        "worst error of a log-prob, in nats": ("2e-04", True),
        "error of dH beside eager's, where it compares worst": ("0.33x", True),
        "TRL's update beside ours": ("4.00x", True),
    }


def test_a_stage_that_did_not_come_back_is_missing_and_nothing_is_made_up(tmp_path: Path) -> None:
    stage_a(tmp_path, ours=50.0)
    found = shown(tmp_path)
    assert found["forward and backward beside three bare GEMMs"] == ("1.25x (gapg fused_policy_loss)", False)
    assert found["the fastest other policy loss beside ours"] == ("–", None)  # eager alone is no competition
    assert found["TRL's update beside ours"] == ("–", None)
    text = gpu_report.page(gpu_report.load(tmp_path))
    assert "## One update" not in text and "## The head's peers" not in text
    assert "| TRL's update beside ours | at least 3.00x | – | not measured |" in text
    assert "| 1.25x (gapg fused_policy_loss) | **not met** |" in text


def test_the_page_holds_ratios_the_roofline_the_winner_and_what_failed(tmp_path: Path) -> None:
    for stage in (stage_a, stage_b, stage_c):
        stage(tmp_path)
    (tmp_path / "tiles" / "tiles-cpu.json").write_text('{"rows": [')
    (tmp_path / "kernels" / "kernels-cuda.png").touch()
    gpu_report.main([str(tmp_path)])
    text = (tmp_path / "README.md").read_text()
    assert text.startswith("# NVIDIA H200\n")
    assert "- kernels: revision 0123456789ab+dirty, driver 580.1, CUDA 13.0, torch 2.11.0" in text
    lines = [line.split() for line in text.splitlines()]
    assert ["gapg", "fused_policy_loss", "44.00", "41.36", "46.64", "1.00"] in lines
    assert ["quack", "48.00", "45.12", "50.88", "0.96", "sums", "a", "cross", "entropy"] in lines
    assert "**pair** wins" in text
    for failed in (
        "- stage A, errors: stopped at its limit of 60 s",
        "- stage A, memcheck: exit code 7",
        "- tiles/tiles-cpu.json cannot be read",
        "- update, Liger fused GRPO loss (1 case): out of memory",
    ):
        assert failed in text
    assert "44.00" in text.split("## The roofline beside it")[1].split("##")[0]
    assert "![times beside those of the others](kernels/kernels-cuda.png)" in text and text.count("![") == 1


def test_the_readmes_line_is_drawn_between_its_markers(tmp_path: Path) -> None:
    folder = tmp_path / "bench" / "results" / "nvidia-h200"
    stage_a(folder)
    readme = tmp_path / "README.md"
    docs = tmp_path / "docs" / "benchmarks.md"
    docs.parent.mkdir()
    for page in (readme, docs):
        page.write_text("above\n{}\nnever measured\n{}\nbelow\n".format(*gpu_report.MARKERS))
    for _ in range(2):
        gpu_report.main([str(folder), "--readme", str(readme), str(docs)])
        assert "([report](../bench/results/nvidia-h200/README.md)," in docs.read_text()
        above, begin, line, end, below = readme.read_text().splitlines()
        assert (above, begin, end, below) == ("above", *gpu_report.MARKERS, "below")
        assert line.startswith(
            "**Measured on an NVIDIA H200** ([report](bench/results/nvidia-h200/README.md), revision "
        )
        assert "forward beside one bare GEMM: 1.08x (gapg linear_logprob), wanted at most 1.10x" in line
        assert "Not measured: TRL's update beside ours, the fastest other policy loss beside ours" in line
    for name in ("README.md", "docs/benchmarks.md"):
        assert (record.ROOT / name).read_text().count(gpu_report.MARKERS[0]) == 1


@pytest.mark.parametrize("text", ["", "{", "[]", '{"rows": []}'])
def test_what_is_no_record_is_named_and_the_rest_is_shown(tmp_path: Path, text: str) -> None:
    stage_a(tmp_path)
    (tmp_path / "kernels" / "errors-cuda.json").write_text(text)
    page = gpu_report.page(gpu_report.load(tmp_path))
    assert "- kernels/errors-cuda.json cannot be read" in page and "## The head\n" in page and "## Errors" not in page


def test_a_readme_without_markers_is_refused_in_a_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    card = tmp_path / "bench" / "results" / "card"
    stage_a(card)
    stage_a(tmp_path / "elsewhere")
    (tmp_path / "README.md").write_text("no markers\n")
    wrong = ((card, "README.md", "needs the markers"), (card, "none.md", "No such file"))
    for folder, name, why in (*wrong, (tmp_path / "elsewhere", "README.md", "is not in bench/results")):
        with pytest.raises(SystemExit, match="2"):
            gpu_report.main([str(folder), "--readme", str(tmp_path / name)])
        assert why in capsys.readouterr().err.splitlines()[-1]


def test_a_dry_run_is_no_measurement(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    put(
        tmp_path / "kernels" / "kernels-cpu.json",
        times("(64, 32, 500) random", {"bare GEMMs": 1.0, "gapg a": 2.0}),
        {"device": "cpu"},
    )
    readme = tmp_path / "README.md"
    readme.write_text("{}\nnever measured\n{}\n".format(*gpu_report.MARKERS))
    with pytest.raises(SystemExit):
        gpu_report.main([str(tmp_path), "--readme", str(readme)])
    assert "is a dry run on a CPU" in capsys.readouterr().err
    assert "never measured" in readme.read_text()
    text = gpu_report.page(gpu_report.load(tmp_path))
    assert text.startswith("# A dry run on a CPU: no measurement of any GPU\n") and "goal" not in text


def test_two_cards_are_two_folders(tmp_path: Path) -> None:
    stage_a(tmp_path)
    put(tmp_path / "peers" / "kernels-cuda.json", [], H200 | {"device": "NVIDIA H100 80GB HBM3"})
    with pytest.raises(ValueError, match="NVIDIA H100 80GB HBM3, NVIDIA H200: one folder a card"):
        gpu_report.load(tmp_path)
    with pytest.raises(ValueError, match="holds no record"):
        gpu_report.load(tmp_path / "tiles" / "nothing")
