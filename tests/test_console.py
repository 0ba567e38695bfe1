"""What is said on the console: brackets, control characters and colons are shown as they are, on any output."""

import unicodedata
from types import ModuleType

import pytest
from hypothesis import given
from hypothesis import strategies as st

import gapg.jsonl
from gapg.console import Display, printable, say, say_once, warn
from gapg_rollout.oracle import breaker, limits, openai


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
        for _ in range(3):
            display.advance()
    assert "quiet" not in capsys.readouterr().err


@pytest.mark.parametrize("module", [gapg.jsonl, breaker, limits, openai])
def test_modules_that_know_no_console_warn_like_all_others(
    module: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    """By the names that they log under; the words may be a server's."""
    logger = getattr(module, "logger", None) or module._log
    logger.warning("line 3 left out \x1b[2J")
    assert capsys.readouterr().err == "warning: line 3 left out \\x1b[2J\n"
