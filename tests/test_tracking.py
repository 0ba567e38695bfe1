"""What a run writes about itself, whatever a model writes: files cut by a kill, markup in transcripts, step counts."""

import json
import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gapg.files import write_whole
from gapg.jsonl import append_jsonl, read_jsonl, to_json
from gapg.tracking import Display, Phases, Tracker, say, warn


def tracker(folder: Path, step: int = 0) -> Tracker:
    return Tracker(folder, step, tensorboard=False, wandb=False)


def test_a_line_cut_short_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    for step in (1, 2, 3):
        append_jsonl(path, {"step": step, "value": step / 3})
    whole = path.read_bytes()
    rows = [json.loads(line) for line in whole.splitlines()]
    for cut in range(len(whole) + 1):
        path.write_bytes(whole[:cut])
        found = read_jsonl(path)
        assert found == rows[: len(found)]
        # a line is whole once its closing brace is there
        assert len(found) == whole[:cut].count(b"}")
    assert read_jsonl(tmp_path / "missing.jsonl") == []


JSON = st.recursive(
    st.floats() | st.integers() | st.text(max_size=5) | st.booleans() | st.none(),
    lambda inner: st.lists(inner) | st.tuples(inner, inner) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=20,
)


@given(JSON, st.sampled_from([None, 1]))
def test_json_has_no_words_for_what_is_no_number(value: object, indent: int | None) -> None:
    """Everything else comes back as it was, and what is not finite as null."""

    def same(was: object, now: object) -> bool:
        if isinstance(was, dict):
            return isinstance(now, dict) and was.keys() == now.keys() and all(same(was[k], now[k]) for k in was)
        if isinstance(was, list | tuple):
            return isinstance(now, list) and len(was) == len(now) and all(map(same, was, now))
        return now is None if isinstance(was, float) and not math.isfinite(was) else now == was

    text = to_json(value, indent)
    assert same(value, json.loads(text, parse_constant=lambda word: pytest.fail(word)))


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


@pytest.mark.parametrize(
    "text", ["[/INST]", "[1, 2] and [bold]", r"\[ x = 1 \]", "[/b] [red", "plain", "[link=x]y[/link]"]
)
@pytest.mark.parametrize("write", [say, warn])
def test_brackets_are_printed_as_they_are(write, text: str, capsys: pytest.CaptureFixture[str]) -> None:  # type: ignore[no-untyped-def]
    """A model may write anything, and so may a path: it must neither crash a run nor vanish from a transcript."""
    write(text)
    assert text in capsys.readouterr().err


@given(st.text(max_size=60))
def test_no_text_can_crash_the_output(text: str) -> None:
    say(text)


def test_the_display_on_no_terminal_prints_its_last_step(capsys: pytest.CaptureFixture[str]) -> None:
    with Display("gapg", 3) as display:
        for i in range(3):
            display.advance(f"loss {i}")
    lines = capsys.readouterr().err.splitlines()
    assert lines[-1] == "gapg 3/3  loss 2"
    with Display("quiet", 3, quiet=True) as display:
        display.advance(by=3)
    assert "quiet" not in capsys.readouterr().err
