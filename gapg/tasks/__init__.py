"""Tasks by name or by import path, and warm-start demonstrations from a file."""

from __future__ import annotations

import importlib
import inspect
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from gapg.tasks.base import HELP_PHRASE, STOP, Demonstration, Prompt, Task

__all__ = ["NAMES", "find_object", "load_demonstrations", "load_task"]

NAMES = {"countdown": "gapg.tasks.countdown:Countdown", "maths": "gapg.tasks.maths:Maths"}
_MEMBERS = ("prompts", "render", "verify", "question")


def load_task(name: str, args: Mapping[str, Any] | None = None) -> Task:
    """A task of ours by name, or anyone's by import path (`mypkg.mytask:MyTask`), made with `args`.

    Raises ValueError, one line that names what is wrong: an unknown name, a module or attribute that is not there,
    arguments the task does not take, members of `Task` it lacks; and whatever ValueError the task raises itself.
    """
    factory = find_object(NAMES.get(name, name), "task.name")
    try:
        inspect.signature(factory).bind(**(args or {}))
    except TypeError as error:
        raise ValueError(
            f"task.args: {name} does not take them: {error}; it takes {inspect.signature(factory)}"
        ) from None
    task = factory(**(args or {}))
    missing = [m for m in _MEMBERS if not callable(getattr(task, m, None))]
    if not isinstance(getattr(task, "name", None), str):
        missing.insert(0, "name")
    if missing:
        raise ValueError(f"task.name: {name} is no task, it lacks {', '.join(missing)} (see gapg.tasks.base.Task)")
    return cast(Task, task)


def find_object(path: str, key: str) -> Any:
    """The callable an import path (`mypkg.mymodule:name`) names. Raises ValueError naming `key` and the fix."""
    module_name, colon, attribute = path.partition(":")
    if not (module_name and colon and attribute):
        raise ValueError(
            f"{key}: {path!r} is neither {', '.join(NAMES)} nor an import path like mypkg.mytask:MyTask"
            if key == "task.name"
            else f"{key}: {path!r} is no import path like mypkg.mymodule:name"
        )
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise ValueError(
            f"{key}: cannot import {module_name!r}: no module {error.name!r}; is it installed or on PYTHONPATH?"
        ) from None
    except Exception as error:
        raise ValueError(f"{key}: importing {module_name!r} failed: {type(error).__name__}: {error}") from None
    if not callable(found := getattr(module, attribute, None)):
        raise ValueError(f"{key}: module {module_name!r} has no class or function {attribute!r}")
    return found


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
