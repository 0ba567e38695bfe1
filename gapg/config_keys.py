"""Dotted keys of settings: what each may hold, how options are read, and the one line for what does not fit."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping, Sequence
from datetime import date
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from gapg.errors import ConfigError

COMPARE = "`python bench/study.py quickstart` trains a task-tuned twin beside GAPG and compares them"

_PLAIN = (str, int, float, bool, Path, NoneType)


def kinds(annotation: Any) -> list[Any]:
    """The types that an annotation allows, its constraints left out: int and NoneType of `Annotated[int, …] | None`."""
    origin = get_origin(annotation)
    if origin is Annotated:
        return kinds(get_args(annotation)[0])
    if origin in (Union, UnionType):
        return [kind for inner in get_args(annotation) for kind in kinds(inner)]
    return [annotation]


def sections(annotation: Any) -> list[type[BaseModel]]:
    """The settings models among the kinds of an annotation."""
    return [kind for kind in kinds(annotation) if isinstance(kind, type) and issubclass(kind, BaseModel)]


def find(root: type[BaseModel], key: str) -> list[Any]:
    """The kinds of value that a dotted key may hold: Any in a free-form mapping, none where there is no such key."""
    annotation: Any = root
    for part in key.split("."):
        if any(kind is Any or get_origin(kind) is dict for kind in kinds(annotation)):
            return [Any]
        fields = [model.model_fields[part] for model in sections(annotation) if part in model.model_fields]
        if not fields:
            return []
        annotation = fields[0].annotation
    return kinds(annotation)


def keys(root: type[BaseModel], prefix: str = "") -> list[str]:
    found = []
    for name, field in root.model_fields.items():
        found.append(prefix + name)
        for section in sections(field.annotation):
            found += keys(section, f"{prefix}{name}.")
    return found


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """A tree of settings as dotted keys."""
    found: dict[str, Any] = {}
    for key, value in tree.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) and value else {f"{prefix}{key}": value}
    return found


# Ours and not tyro's: there an optional section (`warm_start`, `model.lora`) is a subcommand or cannot be set, a
# free-form mapping takes no `--task.args.train.path x`, and an error is a box of several lines.
def parse(
    args: Sequence[str], root: type[BaseModel], own: Mapping[str, Any] | None = None
) -> tuple[list[str], dict[str, str], dict[str, str]]:
    """(words, a command's own options, the dotted keys of `root`): options with their text, the last of two counts.

    `--name=TEXT`, `--name TEXT`, or a bare `--name`, which is true, where a truth value may stand and below a free-form
    mapping. What begins with two dashes is the next option, never a value; a negative number is one. own: the command's
    options and their annotations; one that is a plain switch takes a value after `=` only, for the next word may be the
    command's.
    Raises ConfigError: an unknown key, an option without its value, `-x`.
    """
    words, options, texts = list[str](), dict[str, str](), dict[str, str]()
    queue = list(args)
    while queue:
        option, equals, text = queue.pop(0).partition("=")
        if not option.startswith("-"):
            words.append(option + equals + text)
            continue
        key = option[2:].replace("-", "_")
        if not option.startswith("--") or not key:
            raise ConfigError(f"{option!r}: expected an option like --optim.lr 1e-4")
        mine = key in (own or {})
        found = kinds((own or {})[key]) if mine else find(root, key)
        if not found:
            raise ConfigError(unknown(root, key, own or ()))
        switch = mine and found == [bool]
        value = text if equals else queue.pop(0) if queue and not switch and not queue[0].startswith("--") else None
        if value is None and (bool in found or Any in found):
            value = "true"
        if value is None or (not value and (mine or (NoneType not in found and Any not in found))):
            raise ConfigError(
                f"{option}: needs a value, as in {option} VALUE, or {option}=VALUE where it begins with --"
            )
        into = options if mine else texts
        into.pop(key, None)  # the last counts after what stands between: a section may be emptied there
        into[key] = value
    return words, options, texts


def read(text: str, found: list[Any]) -> Any:
    """An option's text for a key of these kinds; none, null, ~ and no text are None where the key may be empty.

    A plain value stays text, which pydantic turns into a number where one is due: YAML would read the folder 0012 as
    ten and the step count 1:30 as ninety. Sections, lists (also without their brackets) and free-form values are YAML;
    what YAML cannot read or reads as nothing (`#### (.+)` is a comment to it) stays text there too.
    """
    plain = all(kind in _PLAIN or get_origin(kind) is Literal for kind in found)
    if not text or (NoneType in found and text.lower() in ("none", "null", "~")):
        return None
    if plain:
        return text
    if text in ("null", "~"):
        return None
    if any(get_origin(kind) is tuple for kind in found) and not text.startswith("["):
        text = f"[{text}]"
    try:
        value = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError):
        return text
    return text if value is None or isinstance(value, date) else value


def unknown(root: type[BaseModel], key: str, own: Collection[str] = ()) -> str:
    """One line that names the nearest key that there is."""
    if key == "compare":
        return f"compare: there is no such key any more; {COMPARE}"
    close = difflib.get_close_matches(key, [*own, *keys(root)], n=1, cutoff=0.6)
    hint = f"did you mean {close[0]}?" if close else "`gapg config show NAME` lists every key"
    return f"{key}: unknown key; {hint}"


def explain(root: type[BaseModel], error: ValidationError) -> str:
    """The first key's error in one line, and how many other keys are wrong; a wrong name comes before what it lacks.

    pydantic has several for one key where a value fits none of the kinds that it may hold.
    """
    found = [(_key(root, details["loc"]), details) for details in error.errors()]
    key, first = min(found, key=lambda one: one[1]["type"] != "extra_forbidden")
    others = len({other for other, _ in found}) - 1
    more = f" (and {others} more)" if others else ""
    if first["type"] == "extra_forbidden":
        return unknown(root, key) + more
    if first["type"] == "missing" and key[-1].isdigit():
        return f"{key.rpartition('.')[0]}: too few values; give a list, as in [0.1, 0.2]{more}"
    if first["type"] == "missing":
        return f"{key}: required, but not set; set it in the file, or by --{key.replace('_', '-')} VALUE{more}"
    said = dict.fromkeys(_message(details) for other, details in found if other == key)
    where = "" if first["type"] == "value_error" else f"{key}={first['input']!r:.100}: "
    return f"{where}{', or '.join(said)}{more}"


def _key(root: type[BaseModel], loc: tuple[int | str, ...]) -> str:
    """Where pydantic found an error, less its own name of the kind that it tried."""
    key = ""
    for part in loc:
        if key and isinstance(part, str) and bool in find(root, key):
            break
        key = f"{key}.{part}" if key else str(part)
    return key


_FORMS = {
    "float_parsing": "should be a number, as in 0.7",
    "tuple_type": "should be a list, as in [0.1, 0.2]",
    "model_type": "should be a section of keys, not one value",
    "dict_type": "should be a mapping of keys, not one value",
}
"""What to write, where pydantic speaks of Python's types."""


def _message(details: ErrorDetails) -> str:
    message = _FORMS.get(details["type"], details["msg"]).removeprefix("Value error, ")
    return message[:1].lower() + message[1:]
