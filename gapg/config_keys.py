"""Dotted keys of a settings model: what each may hold, how an option's text becomes that, and what is said if not."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from datetime import date
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

_PLAIN = (str, int, float, bool, Path, NoneType)


def kinds(annotation: Any) -> list[Any]:
    """The types that an annotation allows, its constraints left out: int and NoneType of `Annotated[int, …] | None`."""
    origin = get_origin(annotation)
    if origin is Annotated:
        return kinds(get_args(annotation)[0])
    if origin in (Union, UnionType):
        return [kind for inner in get_args(annotation) for kind in kinds(inner)]
    return [annotation]


def find(root: type[BaseModel], key: str) -> list[Any]:
    """The kinds of value that a dotted key may hold: Any in a free-form mapping, none where there is no such key."""
    found: list[Any] = [root]
    for part in key.split("."):
        if Any in found or any(get_origin(kind) is dict for kind in found):
            return [Any]
        fields = [kind.model_fields[part] for kind in _models(found) if part in kind.model_fields]
        if not fields:
            return []
        found = kinds(fields[0].annotation)
    return found


def read(text: str, found: list[Any]) -> Any:
    """An option's text for a key of these kinds; no text is None, and so is `null` where the key may be None.

    A plain value stays text, which pydantic turns into a number where one is due: YAML would read the folder 0012 as
    ten and the step count 1:30 as ninety. Sections, lists and free-form values are YAML; what YAML cannot read or reads
    as nothing (`#### (.+)` is a comment to it) stays text there too.
    """
    plain = all(kind in _PLAIN or get_origin(kind) is Literal for kind in found)
    if not text or (text in ("null", "~") and (NoneType in found or not plain)):
        return None
    if plain:
        return text
    try:
        value = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError):
        return text
    return text if value is None or isinstance(value, date) else value


def parse(root: type[BaseModel], args: Sequence[str]) -> dict[str, str]:
    """Command-line options as dotted keys with their text, in the order in which they count.

    Raises ValueError: a word that is no option, an unknown key, an option without its value.
    """
    texts: dict[str, str] = {}
    queue = list(args)
    while queue:
        option, text = take_option(queue)
        key = option[2:].replace("-", "_")
        if not option.startswith("--") or not key:
            raise ValueError(f"{option!r}: expected an option like --optim.lr 1e-4")
        if not (found := find(root, key)):
            raise ValueError(unknown(root, key))
        if text is None and (bool in found or Any in found):
            text = "true"
        if text is None or (not text and NoneType not in found and Any not in found):
            raise ValueError(needs_value(option))
        texts.pop(key, None)  # the last of two counts, and after what stands between: a section may be emptied there
        texts[key] = text
    return texts


def take_option(queue: list[str]) -> tuple[str, str | None]:
    """Takes `--name=TEXT`, `--name TEXT` or a bare `--name` off the front: (name, its text or None).

    What begins with two dashes is the next option, never a value; a negative number has one.
    """
    option, equals, text = queue.pop(0).partition("=")
    if equals:
        return option, text
    return option, queue.pop(0) if queue and not queue[0].startswith("--") else None


def needs_value(option: str) -> str:
    """One line; with the form for a value that would itself be taken for an option."""
    return f"{option}: needs a value, as in {option} VALUE, or {option}=VALUE where it begins with --"


def unknown(root: type[BaseModel], key: str) -> str:
    """One line that names the nearest key that there is."""
    close = difflib.get_close_matches(key, keys(root), n=1, cutoff=0.6)
    hint = f"did you mean {close[0]}?" if close else "`gapg config show NAME` lists every key"
    return f"{key}: unknown key; {hint}"


def explain(root: type[BaseModel], error: ValidationError) -> str:
    """The first key's error in one line, and how many other keys are wrong.

    pydantic has several for one key where a value fits none of the kinds that it may hold.
    """
    found = [(_key(root, details["loc"]), details) for details in error.errors()]
    key, first = found[0]
    others = len({other for other, _ in found}) - 1
    more = f" (and {others} more)" if others else ""
    if first["type"] == "extra_forbidden":
        return unknown(root, key) + more
    if first["type"] == "missing":
        return f"{key}: required, but not set{more}"
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


def _message(details: ErrorDetails) -> str:
    message = details["msg"].removeprefix("Value error, ")
    return message[:1].lower() + message[1:]


def keys(root: type[BaseModel], prefix: str = "") -> list[str]:
    found = []
    for name, field in root.model_fields.items():
        found.append(prefix + name)
        for section in _models(kinds(field.annotation)):
            found += keys(section, f"{prefix}{name}.")
    return found


def _models(found: list[Any]) -> list[type[BaseModel]]:
    return [kind for kind in found if isinstance(kind, type) and issubclass(kind, BaseModel)]


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """A tree of settings as dotted keys."""
    found: dict[str, Any] = {}
    for key, value in tree.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) and value else {f"{prefix}{key}": value}
    return found
