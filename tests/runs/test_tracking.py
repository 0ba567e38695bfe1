"""What a run writes about itself, whatever a model writes: files cut by a kill, markup in transcripts, step counts."""

import logging
import math
import unicodedata
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gapg.files import write_whole
from gapg.jsonl import read_jsonl
from gapg.runs.tracking import Display, Phases, Tracker, printable, say, say_once, warn


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


BIDI = {"LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"}
UNSEEN = (
    *("\x1b]0;title\x07", "\x1b[2J\x1b[31m", "\x9b1A", "\r\x08 \x7f"),
    *("\u202egnp.exe", "a\u2066b\u2069", "\u200b\ufeff", "\ud800"),
)


@given(st.text(st.characters()))
def test_what_is_printed_steers_no_terminal(text: str) -> None:
    shown = printable(text)
    assert all(unicodedata.category(c) not in ("Cc", "Cs", "Zl", "Zp") or c in "\n\t" for c in shown)
    assert all(unicodedata.bidirectional(c) not in BIDI for c in shown)
    shown.encode()
    assert printable(shown) == shown
    assert len(shown) >= len(text), "nothing vanishes"


def test_plain_text_is_printed_as_it_is() -> None:
    text = "2 ≤ √2·x, ½ é \u0065\u0301 中文\u3000、 עברית عربي می\u200cخواهم 👩\u200d👩\u200d👧 \\x1b \n\tend"
    assert printable(text) == text
    assert printable("a\x1b[31m\r\u202e\U000e0041") == r"a\x1b[31m\r\u202e\U000e0041"


@pytest.mark.parametrize("text", UNSEEN)
def test_control_sequences_are_shown_everywhere(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    say(text)
    warn(text)
    say_once(text, about=f"test {text!a}")
    with Display(text, 1) as display:
        display.advance(text)
    err = capsys.readouterr().err
    assert err == printable(err)
    assert err.count(printable(text)) == 5


def test_colons_are_no_emoji(capsys: pytest.CaptureFixture[str]) -> None:
    say("a/:warning:/b")
    assert capsys.readouterr().err == "a/:warning:/b\n"


def test_the_display_on_no_terminal_prints_its_last_step(capsys: pytest.CaptureFixture[str]) -> None:
    with Display("gapg", 3) as display:
        for i in range(3):
            display.advance(f"loss {i}")
    lines = capsys.readouterr().err.splitlines()
    assert lines[-1] == "gapg 3/3  loss 2"
    with Display("quiet", 3, quiet=True) as display:
        display.advance(by=3)
    assert "quiet" not in capsys.readouterr().err


def test_modules_that_know_no_console_warn_like_all_others(capsys: pytest.CaptureFixture[str]) -> None:
    logging.getLogger("gapg.jsonl").warning("metrics.jsonl: line 3 left out \x1b[2J")
    assert capsys.readouterr().err == "warning: metrics.jsonl: line 3 left out \\x1b[2J\n"
