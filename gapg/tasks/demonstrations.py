"""Warm-start demonstrations from a file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from gapg.tasks.base import HELP_PHRASE, STOP, Demonstration, Prompt, Task


def load_demonstrations(path: str | Path, task: Task) -> list[Demonstration]:
    """Warm-start pairs from a jsonl: `prompt` or `id` (a training problem's) and `response`, one object a line.

    Raises ValueError naming the line: bad JSON, missing keys, a prompt that is no training problem of `task` (the
    held-out ones must not be trained on), a response that ends in neither an answer block nor the help phrase.
    """
    known: dict[str, Prompt] = {}
    for prompt in task.prompts("train"):
        known.setdefault(prompt.id, prompt)
        known.setdefault(prompt.text.strip(), prompt)
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise ValueError(f"demonstrations: cannot read {path}: {error.strerror}") from None
    found = [_demonstration(line, known, f"{path}:{n}") for n, line in enumerate(lines, 1) if line.strip()]
    if not found:
        raise ValueError(f"demonstrations: {path} is empty")
    return found


def _demonstration(line: str, known: Mapping[str, Prompt], where: str) -> Demonstration:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"demonstrations: {where}: not JSON: {error.msg}") from None
    asked = row.get("id", row.get("prompt")) if isinstance(row, dict) else None
    if not isinstance(asked, str) or not isinstance(row.get("response"), str):
        present = ", ".join(row) if isinstance(row, dict) else type(row).__name__
        raise ValueError(f"demonstrations: {where}: needs strings 'prompt' (or 'id') and 'response', has {present}")
    prompt, response = known.get(asked.strip()), row["response"].rstrip()
    if prompt is None:
        raise ValueError(f"demonstrations: {where}: {asked[:60]!r} is the id or text of no training problem")
    if not response.endswith((STOP[0], HELP_PHRASE)):
        raise ValueError(f"demonstrations: {where}: the response must end in {STOP[0]} or {HELP_PHRASE!r}")
    return Demonstration(prompt, response)
