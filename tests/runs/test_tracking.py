"""What a run writes about itself: files cut by a kill, lines that are damaged, step counts."""

import math
from pathlib import Path

import pytest

from gapg.files import write_whole
from gapg.jsonl import read_jsonl
from gapg.runs.tracking import Phases, Tracker


def tracker(folder: Path, step: int = 0) -> Tracker:
    return Tracker(folder, step, tensorboard=False, wandb=False)


def test_a_row_of_metrics_may_hold_what_is_no_number(tmp_path: Path) -> None:
    log = tracker(tmp_path)
    log.log({"step": 1, "grad_norm": math.nan, "loss": -math.inf, "lr": 0.5})
    log.close()
    tracker(tmp_path, step=1).close()  # which writes the rows again
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1, "grad_norm": null, "loss": null, "lr": 0.5}\n'


def test_steps_that_will_run_again_are_taken_out(tmp_path: Path) -> None:
    first = tracker(tmp_path)
    for step in range(6):
        first.log({"step": step})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "val')  # killed here
    first.close()
    again = tracker(tmp_path, step=4)
    again.log({"step": 5, "again": True})
    assert [r["step"] for r in read_jsonl(tmp_path / "metrics.jsonl")] == [0, 1, 2, 3, 4, 5]
    assert read_jsonl(tmp_path / "metrics.jsonl")[-1]["again"]


def test_a_bad_line_costs_that_line(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    """Not the steps after it, nor the run; the file is whole again afterwards."""
    lines = [b'{"step": 0}', b"\0\0\0\0", b'{"step": 1}', b'{"st\xff', b"[2]", b'{"note": 3}', b'{"step": 4}', b'{"ste']
    (tmp_path / "metrics.jsonl").write_bytes(b"\n".join(lines))
    tracker(tmp_path, step=4).close()
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 0}\n{"step": 1}\n{"step": 4}\n'
    assert [f"line {n}: " in caplog.text for n in range(1, 9)] == [n in (2, 4, 5) for n in range(1, 9)]
    assert "for want of a step: 1 of its lines" in capsys.readouterr().err


def test_tensorboard_gets_the_same_scalars(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    both = Tracker(tmp_path, 0, tensorboard=True, wandb=False)
    both.log({"step": 3, "accuracy": 0.5, "label": "text"})
    both.text("transcripts/local_wrong", "1 + 1 = 3", 3)
    both.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert events.Tags()["scalars"] == ["accuracy"]
    ((event),) = events.Scalars("accuracy")
    assert (event.step, event.value) == (3, 0.5)
    assert events.Tags()["tensors"] == ["transcripts/local_wrong/text_summary"]


def test_a_file_is_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "summary.json"
    write_whole(path, "old")
    write_whole(path, "new")
    assert path.read_text() == "new"
    assert [p.name for p in tmp_path.iterdir()] == ["summary.json"]


def test_phases_add_up_and_start_afresh() -> None:
    phases = Phases()
    for _ in range(2):
        with phases("rollout"):
            pass
    with pytest.raises(KeyError), phases("update"):
        raise KeyError
    taken = phases.take()
    assert set(taken) == {"rollout", "update"}
    assert all(s >= 0 for s in taken.values())
    assert phases.take() == {}
