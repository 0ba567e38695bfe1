"""JSON lines: one object a line, read and written alike everywhere."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def to_json(value: Any, indent: int | None = None) -> str:
    """JSON that every parser reads: a number that is not finite, for which JSON has no word, is null."""
    return json.dumps(_finite(value), indent=indent, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(inner) for key, inner in value.items()}
    return [_finite(inner) for inner in value] if isinstance(value, list | tuple) else value


def append_jsonl(path: Path, row: Mapping[str, Any]) -> None:
    with path.open("a") as file:
        file.write(to_json(row) + "\n")


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """The rows of a jsonl; a last line cut short by a kill is left out."""
    rows: list[dict[str, Any]] = []
    if path.exists():
        for line in path.read_text().splitlines():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError:
                break
    return rows
