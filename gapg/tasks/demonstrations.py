"""Warm-start demonstrations from a file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gapg.jsonl import check_text, kind, read_data
from gapg.tasks.base import HELP_PHRASE, STOP, Demonstration, Prompt, Task


def load_demonstrations(path: str | Path, task: Task) -> list[Demonstration]:
    """Warm-start pairs from a jsonl: `prompt` or `id` (a training problem's) and `response`, one object a line.

    An `id` of the file's own is passed over where `prompt` names the problem.

    Raises ValueError naming the file and the line: what `read_data` refuses, missing keys, a prompt that is no training
    problem of `task` (the held-out ones must not be trained on), a response that ends in neither an answer block nor
    the help phrase.
    """
    known: dict[str, Prompt] = {}
    for prompt in task.prompts("train"):
        known.setdefault(prompt.id, prompt)
        known.setdefault(prompt.text.strip(), prompt)
    try:
        rows = read_data(Path(path).expanduser())
    except (ValueError, RuntimeError) as error:  # the second where the user of a ~user is unknown
        raise ValueError(f"demonstrations: {error}") from None
    if not rows:
        raise ValueError(f"demonstrations: {path} is empty")
    return [_demonstration(row, known, f"demonstrations: {path}:{n}") for n, row in rows]


def _demonstration(row: Mapping[str, Any], known: Mapping[str, Prompt], where: str) -> Demonstration:
    # a number is a str of its own kind
    asked = [row[key].strip() for key in ("id", "prompt") if type(row.get(key)) is str]
    response = row.get("response")
    if not asked or type(response) is not str:
        present = ", ".join(f"{key} ({kind(value)})" for key, value in row.items()) or "nothing"
        raise ValueError(f"{where}: needs the texts 'prompt' (or 'id') and 'response', has {present}")
    prompts, response = {known[name].id: known[name] for name in asked if name in known}, response.rstrip()
    if len(prompts) != 1:
        which = "two training problems, id and prompt differ" if prompts else "no training problem"
        raise ValueError(f"{where}: {' / '.join(repr(name[:60]) for name in asked)} is the id or text of {which}")
    if not response.endswith((STOP[0], HELP_PHRASE)):
        raise ValueError(f"{where}: the response must end in {STOP[0]} or {HELP_PHRASE!r}")
    try:
        check_text(response)
    except ValueError as error:
        raise ValueError(f"{where}: the response holds {error}") from None
    return Demonstration(next(iter(prompts.values())), response)
