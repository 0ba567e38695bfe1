"""JSON lines: one object a line, read and written alike everywhere.

A file is cut into lines at the byte `\\n` and nowhere else: U+2028, U+0085 and their like are text. It may begin with a
byte order mark, end its lines with `\\r\\n`, hold blank lines, and be compressed with gzip.
"""

from __future__ import annotations

import codecs
import gzip
import json
import logging
import math
import zlib
from collections.abc import Callable, Iterator, Mapping
from numbers import Rational, Real
from pathlib import Path
from typing import Any

from gapg.errors import ConfigError
from gapg.files import writing

_log = logging.getLogger(__name__)

_NO_JSONL = {
    b"version https://git-lfs": "a git-lfs pointer, not the file itself: run `git lfs pull`",
    b"PAR1": "a Parquet file",
    b"ARROW1": "an Arrow file",
    b"PK\x03\x04": "a zip file",
    b"BZh": "a bzip2 file",
    b"\xfd7zXZ\0": "an xz file",
    b"\x28\xb5\x2f\xfd": "a zstandard file",
    b"\xff\xfe": "UTF-16 text",
    b"\xfe\xff": "UTF-16 text",
}
"""How a file begins that was given for a jsonl, and what it is."""
_LIST = "expected an object, got a list; write one object a line (`jq -c '.[]'` makes that of a list)"


def to_json(value: Any, indent: int | None = None) -> str:
    """ASCII JSON that every parser reads: what no parser has a word for is replaced.

    A number that is not finite is null, half of a surrogate pair U+FFFD.
    """
    return json.dumps(_plain(value), indent=indent, allow_nan=False)


def _plain(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, str):
        return value if value.isascii() else value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    if isinstance(value, Mapping):
        return {key: _plain(inner) for key, inner in value.items()}
    return [_plain(inner) for inner in value] if isinstance(value, list | tuple) else value


def append_jsonl(path: Path, row: Mapping[str, Any]) -> None:
    """Writes one line more. Raises as `files.writing` does."""
    with writing(path), path.open("a", encoding="utf-8") as file:
        file.write(to_json(row) + "\n")


def read_jsonl(path: Path, *, whole: bool = False) -> list[dict[str, Any]]:
    """The rows of a jsonl that a run wrote; none where there is no file.

    A last line without its end, cut by a kill, is left out. Any other line that cannot be read costs that row and a
    warning that gives its number. `whole`: such a file counts as missing, for callers that need every row.
    Raises ConfigError naming the path: the file cannot be opened.
    """
    if not path.exists():
        return []
    lines = _content(path).split(b"\n")
    rows: list[dict[str, Any]] = []
    lost: list[str] = []
    for n, line in enumerate(lines, 1):
        try:
            rows += _objects(line, _OWN)
        except ValueError as error:
            if n < len(lines) or whole:
                lost.append(f"line {n}: {error}")
    if lost:
        kept = "the file counts as missing" if whole else f"{len(lost)} of its lines left out"
        _log.warning("%s: %s: %s", path, kept, "; ".join(lost[:3]))
    return [] if whole and lost else rows


class Number(str):
    """A JSON number by its digits, as the file has them: 1.50, 0.00005 and 1e22 are no longer these as floats."""


def read_data(path: Path) -> list[tuple[int, dict[str, Any]]]:
    """The rows of a jsonl that a user gives, each with its line's number (from 1, blank lines counted).

    Numbers are `Number`s; NaN and Infinity, which are no JSON but common, are floats.
    Raises ConfigError naming the path, the line and what is wrong with it: no JSON, no object, a key twice, no UTF-8;
    or the path alone: no such file, a folder, no permission, damaged gzip, a file of another kind.
    """
    content = _content(path)
    if content.removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"["):
        raise ConfigError(f"{path}:1: {_LIST}")
    rows: list[tuple[int, dict[str, Any]]] = []
    for n, line in enumerate(content.split(b"\n"), 1):
        try:
            rows += [(n, row) for row in _objects(line, _DATA)]
        except ValueError as error:
            raise ConfigError(f"{path}:{n}: {error}") from None
    return rows


def kind(value: Any) -> str:
    """What a value is, in JSON's words and for messages."""
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    if isinstance(value, str):
        return "a number" if isinstance(value, Number) else "a text"
    if isinstance(value, Mapping):
        return "an object"
    if isinstance(value, list | tuple):
        return "a list"
    if isinstance(value, Real) and not isinstance(value, Rational) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if float(value) > 0 else "-Infinity"
    return "a number" if isinstance(value, Real) else f"a {type(value).__name__}"


def check_text(text: str) -> None:
    r"""Raises ValueError on half of a surrogate pair, which JSON can hold (`"\ud83d"`) and no tokenizer reads."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = ascii(text[error.start])[1:-1]
        raise ValueError(f"half of a surrogate pair ({half}), which is no character: write the whole one") from None


def _content(path: Path) -> bytes:
    """A file's bytes, decompressed. Raises ConfigError naming the path."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror or error}") from None
    if data.startswith(b"\x1f\x8b"):
        try:
            data = gzip.decompress(data)
        except (EOFError, OSError, zlib.error) as error:
            raise ConfigError(f"{path}: damaged or cut short gzip, copy or make it again: {error}") from None
    for start, what in _NO_JSONL.items():
        if data.startswith(start):
            raise ConfigError(f"{path}: is {what}; needed is JSON in UTF-8, one object a line")
    return data


def _objects(line: bytes, decode: Callable[[str], Any]) -> Iterator[dict[str, Any]]:
    """The line's object; nothing where it is blank. Raises ValueError: what the line is instead."""
    if b"\0" in line:
        raise ValueError("not text, it holds NUL bytes: the file is damaged or not in UTF-8")
    try:
        # a mark also stands where files that begin with one were joined
        text = line.decode("utf-8-sig").strip()
        if not text:
            return
        value = decode(text)
    except UnicodeDecodeError as error:
        raise ValueError(
            f"not UTF-8: byte {error.start + 1} of the line is 0x{error.object[error.start]:02x}"
        ) from None
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error.msg} (character {error.pos + 1}); write one whole object a line") from None
    except RecursionError:
        raise ValueError("nested too deeply to be read") from None
    if not isinstance(value, dict):
        raise ValueError(_LIST if isinstance(value, list) else f"expected an object, got {kind(value)}")
    yield value


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"ambiguous: an object has the key {next(k for k in keys if keys.count(k) > 1)!r} twice")
    return made


_OWN = json.JSONDecoder().decode
# not strict: a raw tab in a text has one reading only
_DATA = json.JSONDecoder(parse_float=Number, parse_int=Number, object_pairs_hook=_distinct, strict=False).decode
