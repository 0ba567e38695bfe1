"""Tasks by name or by import path."""

from __future__ import annotations

import importlib
import inspect
import re
import traceback
from collections.abc import Mapping
from functools import partial
from types import SimpleNamespace
from typing import Any, cast, get_type_hints

from gapg.errors import ConfigError
from gapg.tasks.base import Task

NAMES = {
    "countdown": "gapg.tasks.countdown:Countdown",
    "maths": "gapg.tasks.maths:Maths",
    "word-problems": "gapg.tasks.word_problems:WordProblems",
}
_MEMBERS = ("prompts", "render", "verify", "question")
_IMPORT_PATH = re.compile(r"[^\W\d][\w-]*(\.[^\W\d][\w-]*)*:[^\W\d]\w*")


def load_task(name: str, args: Mapping[str, Any] | None = None) -> Task:
    """A task of ours by name, or anyone's by import path (`mypkg.mytask:MyTask`), made with `args`.

    The path names a class with the methods of `Task`, or a function annotated to return one; nothing else is called.
    Raises ValueError, one line that names what is wrong: an unknown name, a module or attribute that is not there,
    arguments the task does not take, members of `Task` it lacks; and whatever ValueError the task raises itself.
    """
    factory = find_object(NAMES.get(name, name), "task.name")
    _check_factory(factory, name)
    try:
        inspect.signature(factory).bind(**(args or {}))
    except TypeError as error:
        raise ValueError(
            f"task.args: {name} does not take them: {error}; it takes {inspect.signature(factory)}"
        ) from None
    try:
        task = factory(**(args or {}))
    except (ValueError, OSError):
        raise
    except (Exception, SystemExit) as error:
        raise ValueError(f"task.name: making {name} failed: {_raised(error)}") from error
    if missing := _missing(task):
        raise _no_task(name, missing)
    return cast(Task, task)


def _check_factory(factory: Any, name: str) -> None:
    """Raises ValueError for what is known, without a call, to make no task: `subprocess:Popen`, `builtins:eval`."""
    while isinstance(factory, partial):
        factory = factory.func
    made = factory if isinstance(factory, type) else _returned(factory)
    if not isinstance(made, type):
        raise ValueError(
            f"task.name: {name} is not called, as nothing says that it makes a task: name a class with the methods "
            f"{', '.join(_MEMBERS)}, or annotate the function with one that it returns, `-> MyTask`"
        )
    if (missing := _missing(made)) not in ([], ["name"]):  # a class may name its tasks one by one
        raise _no_task(name if made is factory else f"what {name} returns, {made.__name__},", missing)


def call_member(task: Any, member: str, *args: Any) -> Any:
    """What a task's own code returns. Raises ConfigError, one line, for whatever it raises."""
    try:
        return getattr(task, member)(*args)
    except (Exception, SystemExit) as error:
        said = " ".join(str(error).split())
        named = said.startswith("task.")  # bad data, which name the key
        raise ConfigError(said if named else f"task {task.name!r}: {member}() failed: {_raised(error)}") from error


def _raised(error: BaseException) -> str:
    """The error and the line that raised it."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {' '.join(str(error).split())} ({last.filename}:{last.lineno})"


def _no_task(what: str, missing: list[str]) -> ValueError:
    return ValueError(f"task.name: {what} is no task, it lacks {', '.join(missing)} (see gapg.tasks.base.Task)")


def _missing(task: Any) -> list[str]:
    named = isinstance(getattr(task, "name", None), str)
    return ["name"] * (not named) + [m for m in _MEMBERS if not callable(getattr(task, m, None))]


def _returned(function: Any) -> Any:
    """A function's annotation of what it returns; None without one, or where it cannot be read."""
    try:
        function = inspect.unwrap(function)
        annotation = inspect.signature(function).return_annotation
        # alone, because those of the arguments may name what only a type checker imports
        alone = SimpleNamespace(__annotations__={"return": annotation})
        scope = function if hasattr(function, "__globals__") else function.__call__
        found = get_type_hints(alone, getattr(scope, "__globals__", {}))["return"]
        return None if found is inspect.Signature.empty else found
    except Exception:  # a builtin without a signature, an annotation that names nothing
        return None


def is_import_path(text: str) -> bool:
    """Whether `find_object` would import something for this text."""
    return _IMPORT_PATH.fullmatch(text) is not None


def find_object(path: str, key: str) -> Any:
    """The callable an import path (`mypkg.mymodule:name`) names. Raises ValueError naming `key` and the fix."""
    if not is_import_path(path):
        raise ValueError(
            f"{key}: {path!r} is neither {', '.join(NAMES)} nor an import path like mypkg.mytask:MyTask"
            if key == "task.name"
            else f"{key}: {path!r} is no import path like mypkg.mymodule:name"
        )
    module_name, _, attribute = path.partition(":")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise ValueError(
            f"{key}: cannot import {module_name!r}: no module {error.name!r}; is it installed or on PYTHONPATH?"
        ) from None
    except (Exception, SystemExit) as error:
        raise ValueError(f"{key}: importing {module_name!r} failed: {type(error).__name__}: {error}") from None
    if not callable(found := getattr(module, attribute, None)):
        raise ValueError(f"{key}: module {module_name!r} has no class or function {attribute!r}")
    return found
