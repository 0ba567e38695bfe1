"""JSON lines: what is one line, what a user is told of a file that cannot be read, and what a run saves of its own."""

import gzip
import json
import math
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gapg.errors import ConfigError
from gapg.jsonl import Number, append_jsonl, check_text, read_data, read_jsonl, to_json

NO_LINE_ENDS = "\u2028\u2029\x85\x0b\x0c\x1c\x1d\x1e\r\t"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "rows.jsonl"


def line(row: Any) -> bytes:
    return json.dumps(row, ensure_ascii=False).encode() + b"\n"


def test_a_line_ends_at_its_newline_and_nowhere_else(path: Path) -> None:
    """Escaped as writers must, or raw as some do."""
    rows = [{"text": f"a{c}b"} for c in NO_LINE_ENDS]
    path.write_bytes(b"".join(map(line, rows)))
    assert [row for _, row in read_data(path)] == rows == read_jsonl(path)
    path.write_bytes("".join(f'{{"text": "a{c}b"}}\n' for c in NO_LINE_ENDS).encode())
    assert [row for _, row in read_data(path)] == rows


@pytest.mark.parametrize("packed", [False, True])
def test_marks_windows_line_ends_blank_lines_and_gzip(path: Path, packed: bool) -> None:
    """Compression is known by the content, whatever the name; the numbers are those an editor shows."""
    data = b'\xef\xbb\xbf{"n": 1}\r\n\r\n  \n\xef\xbb\xbf{"n": 2}\n{"n": 3}'
    path.write_bytes(gzip.compress(data[:20], mtime=0) + gzip.compress(data[20:], mtime=0) if packed else data)
    assert read_data(path) == [(1, {"n": "1"}), (4, {"n": "2"}), (5, {"n": "3"})]
    assert read_jsonl(path) == [{"n": 1}, {"n": 2}, {"n": 3}]


@pytest.mark.parametrize("digits", ["0.00005", "1e22", "1.50", "-0", "1E+5", "1e999", "9" * 5000, "0.1" + "0" * 400])
def test_numbers_of_data_keep_their_digits(path: Path, digits: str) -> None:
    path.write_text(f'{{"a": {digits}, "b": [{{"c": {digits}}}], "d": "1"}}')
    ((_, row),) = read_data(path)
    assert row == {"a": digits, "b": [{"c": digits}], "d": "1"}
    assert type(row["a"]) is Number and type(row["d"]) is str  # still told from a text


def test_what_no_json_number_is_stays_for_the_column_to_refuse(path: Path) -> None:
    path.write_text('{"unused": [NaN, -Infinity, true, null], "answer": 1}')
    ((_, row),) = read_data(path)
    assert math.isnan(row["unused"][0]) and row["unused"][1:] == [-math.inf, True, None]


BAD_LINES = {
    b'{"a": }': "not JSON: Expecting value (character 7)",
    b'{"a": 1} {"a": 2}': "not JSON: Extra data",
    b'{"a": "cut': "not JSON: Unterminated string",
    b"a,b,c": "not JSON",
    b'{"a": "\xff"}': "not UTF-8: byte 8 of the line is 0xff",
    b'{"a": "\xed\xa0\x80"}': "not UTF-8",  # half a surrogate pair, written as bytes
    b'{"a": 1, "b": 2, "a": 3}': "an object has the key 'a' twice",
    b'{"a": "x\0\0\0"}': "NUL bytes",
    b'{"a": ' + b"[" * 100_000: "nested too deeply",
    b"[1, 2]": "expected an object, got a list",
    b'"text"': "expected an object, got a text",
    b"1e5": "expected an object, got a number",
    b"9" * 5000: "expected an object, got a number",
    b"null": "expected an object, got null",
    b"true": "expected an object, got true",
    b"-Infinity": "expected an object, got -Infinity",
}


@pytest.mark.parametrize("bad", BAD_LINES, ids=lambda bad: bad[:20].decode(errors="backslashreplace"))
def test_a_bad_line_of_data_is_named(path: Path, bad: bytes) -> None:
    path.write_bytes(b'{"a": 1}\n\n' + bad + b'\n{"a": 2}\n')
    with pytest.raises(ConfigError) as caught:
        read_data(path)
    assert str(caught.value).startswith(f"{path}:3: ") and BAD_LINES[bad] in str(caught.value)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


BAD_FILES = {
    b'[{"a": 1},\n {"a": 2}]': ":1: expected an object, got a list; write one object a line",
    b'\xef\xbb\xbf \n[\n{"a": 1}\n]': ":1: expected an object, got a list",
    b'{\n  "a": 1\n}\n': ":1: not JSON: .*one whole object a line",
    b'{"a": 1}\r{"a": 2}\r': ":1: not JSON: Extra data",
    b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 1\n": ": is a git-lfs pointer.*git lfs pull",
    b"PAR1\x15\x04": ": is a Parquet file",
    b"PK\x03\x04\x14": ": is a zip file",
    b"\x28\xb5\x2f\xfd\x04": ": is a zstandard file",
    '{"a": 1}\n'.encode("utf-16"): ": is UTF-16 text",
    '{"a": 1}\n'.encode("utf-16-le"): ":1: not text, it holds NUL bytes",
    gzip.compress(b'{"a": 1}\n' * 500, mtime=0)[:-9]: ": damaged or cut short gzip.*end-of-stream",
    gzip.compress(b'{"a": 1}\n', mtime=0)[:-8] + b"\0" * 8: ": damaged or cut short gzip.*CRC",
    gzip.compress(b'{"a": 1}\n', mtime=0)[:12] + b"\xff" * 20: ": damaged or cut short gzip",
}


@pytest.mark.parametrize("content", BAD_FILES, ids=lambda content: content[:12].decode(errors="backslashreplace"))
def test_a_file_of_another_kind_is_named(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=f"^{path}{BAD_FILES[content]}") as caught:
        read_data(path)
    assert "\n" not in str(caught.value)


def test_a_file_that_cannot_be_opened_is_named(path: Path) -> None:
    with pytest.raises(ConfigError, match=f"cannot read {path}: No such file"):
        read_data(path)
    path.mkdir()
    with pytest.raises(ConfigError, match=f"cannot read {path}: Is a directory"):
        read_data(path)
    path.rmdir()
    path.write_text("{}\n")
    path.chmod(0)
    if not os.access(path, os.R_OK):  # root reads all
        with pytest.raises(ConfigError, match=f"cannot read {path}: Permission denied"):
            read_data(path)


def test_an_empty_file_has_no_rows(path: Path) -> None:
    for content in (b"", b"\n \r\n", b"\xef\xbb\xbf", gzip.compress(b"", mtime=0)):
        path.write_bytes(content)
        assert read_data(path) == read_jsonl(path) == []


@given(st.binary(max_size=40), st.booleans())
def test_no_bytes_do_anything_but_read_or_be_refused(tmp_path_factory: Any, content: bytes, packed: bool) -> None:
    path = tmp_path_factory.getbasetemp() / "fuzz.jsonl"
    path.write_bytes(b"\x1f\x8b" * packed + content)
    for read in (read_data, read_jsonl):
        try:
            read(path)
        except ConfigError as error:
            assert str(path) in str(error) and "\n" not in str(error)


def test_half_of_a_character_is_no_text() -> None:
    check_text("\U0001f600 é")
    with pytest.raises(ValueError, match=r"half of a surrogate pair \(\\ud83d\)"):
        check_text("x\ud83d")


def test_a_line_cut_short_is_left_out(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for step in (1, 2, 3):
        append_jsonl(path, {"step": step, "value": step / 3})
    content = path.read_bytes()
    rows = [json.loads(line) for line in content.splitlines()]
    for cut in range(len(content) + 1):
        path.write_bytes(content[:cut])
        found = read_jsonl(path)
        assert found == rows[: len(found)]
        # a line is whole once its closing brace is there
        assert len(found) == content[:cut].count(b"}")
    path.write_bytes(content + b"\0" * 100)  # a power cut
    assert read_jsonl(path) == rows
    assert not caplog.records  # nothing is wrong with any of these
    assert read_jsonl(path.with_name("missing.jsonl")) == []


@pytest.mark.parametrize("bad", BAD_LINES, ids=lambda bad: bad[:20].decode(errors="backslashreplace"))
def test_a_bad_line_of_a_run_costs_that_line(path: Path, bad: bytes, caplog: pytest.LogCaptureFixture) -> None:
    path.write_bytes(b'{"a": 1}\n' + bad + b'\n{"a": 2}\n{"a": 3}\n')
    kept = [{"a": 1}, {"a": 2}, {"a": 3}]
    if b"twice" in BAD_LINES[bad].encode():  # no run writes that
        kept.insert(1, {"a": 3, "b": 2})
    assert read_jsonl(path) == kept
    assert ("line 2: " in caplog.text) == (len(kept) == 3)


def test_where_every_row_is_needed_a_damaged_file_counts_as_missing(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path.write_bytes(b'{"a": 1}\n{"a": 2}\n')
    assert read_jsonl(path, whole=True) == [{"a": 1}, {"a": 2}]
    for content in (b'{"a": 1}\n{"a": 2', b'{"a" 1}\n{"a": 2}\n', b'{"a": 1}\n\0\0\0'):
        path.write_bytes(content)
        assert read_jsonl(path, whole=True) == []
    assert len(caplog.records) == 3 and "counts as missing" in caplog.text


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


@pytest.mark.parametrize("text", ["a\u2028b", "\ud83d half", "whole \U0001f600", "\x1b[31m\x00", "é", "\ufeff"])
def test_other_readers_read_what_is_written(path: Path, text: str) -> None:
    """Arrow's, which `datasets` uses, takes no half characters; nobody's may see a line end in a text."""
    import pyarrow.json

    append_jsonl(path, {"text": text, "list": [text]})
    append_jsonl(path, {"text": "next", "list": []})
    readable = text.replace("\ud83d half", "\ufffd half")
    assert [row["text"] for row in read_jsonl(path)] == [readable, "next"]
    assert pyarrow.json.read_json(path).to_pylist()[0] == {"text": readable, "list": [readable]}
