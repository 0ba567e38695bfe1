"""Tasks by name or by import path."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Mapping
from typing import Any, cast

from gapg.tasks.base import Task
from gapg.tasks.demonstrations import load_demonstrations

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
