"""What every key of the config is, for --help and for docs/configuration.md, from the config's own fields.

python -m gapg.commands.reference > docs/configuration.md
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from inspect import cleandoc
from pathlib import Path
from textwrap import wrap
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from gapg.commands.options import COMMANDS, usage
from gapg.config import RunConfig, presets
from gapg.config_keys import sections

WIDTH = 100
NAMES = {int: "whole number", float: "number", str: "text", Path: "path", bool: "true or false"}
BOUNDS = {"gt": ">", "ge": "≥", "lt": "<", "le": "≤"}


@dataclass(frozen=True)
class Key:
    name: str
    value: str
    """What it may hold, in words."""
    default: str
    meaning: str


@dataclass(frozen=True)
class Group:
    """A section of a settings model, with the keys right in it."""

    name: str
    meaning: str
    keys: list[Key]


def groups(model: type[BaseModel], name: str = "", meaning: str = "", given: BaseModel | None = None) -> list[Group]:
    """A section and those below it. given: what it is where nobody sets it, if that is not what its fields say."""
    keys, below = [], list[Group]()
    for part, field in model.model_fields.items():
        key = f"{name}.{part}" if name else part
        default = field.default if given is None else getattr(given, part)
        said = " ".join((field.description or "").split())
        if not (inner := sections(field.annotation)):
            keys.append(Key(key, _value(field.annotation, field.metadata), _default(default), said))
            continue
        said = said or " ".join((inner[0].__doc__ or "").split())
        said += " Off unless one of its keys is set." if default is None else ""
        below += groups(inner[0], key, said, default if isinstance(default, BaseModel) else None)
    return [Group(name, meaning, keys), *below]


def _value(annotation: Any, bounds: Sequence[Any] = ()) -> str:
    origin, args = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _value(args[0], next(arg for arg in args[1:] if isinstance(arg, FieldInfo)).metadata)
    if origin in (Union, UnionType):
        return " or ".join("empty" if arg is NoneType else _value(arg, bounds) for arg in args)
    if origin is Literal:
        return " or ".join(f"`{arg}`" for arg in args)
    if origin is tuple:
        return f"list of {_value(args[0])}" if args[-1] is ... else f"list: {'; '.join(map(_value, args))}"
    if origin is dict:
        return "any keys"
    limits = [(sign, getattr(bound, name)) for bound in bounds for name, sign in BOUNDS.items() if hasattr(bound, name)]
    # what 32 and 64 bits can hold is no news
    shown = ", ".join(f"{sign} {limit:g}" for sign, limit in limits if limit < 1e18)
    return f"{NAMES[annotation]} {shown}".strip()


def _default(value: Any) -> str:
    if value is PydanticUndefined:
        return "required"
    if value in (None, "", {}):
        return "empty"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return ",".join(map(_default, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def option(key: str) -> str:
    return f"--{key.replace('_', '-')}"


def help_text(command: str | None) -> str:
    """`gapg --help`, or that of a command."""
    if command is None:
        about = [f"  gapg {name:<10} {(model.__doc__ or '').splitlines()[0]}" for name, model in COMMANDS.items()]
        return "\n".join(["usage: gapg COMMAND …", "", *about, "", "gapg COMMAND --help says more; gapg --version"])
    model = COMMANDS[command]
    lines = [usage(command), "", cleandoc(model.__doc__ or ""), ""]
    for key in groups(model)[0].keys:
        lines += _entry(key, key.name.upper() if key.name in model.words else option(key.name))
    if command != "train":
        return "\n".join([*lines, "", "Every key of the config is an option too: gapg train --help lists them."])
    lines += [
        "",
        "Every key of the config is an option too, with its default; `gapg config show NAME` prints a preset's.",
    ]
    for group in groups(RunConfig):
        lines += ["", *wrap(f"{group.name or 'run'}: {group.meaning}".removesuffix(": "), WIDTH)]
        for key in group.keys:
            lines += _entry(key, option(key.name))
    return "\n".join(lines)


def _entry(key: Key, name: str) -> list[str]:
    default = "" if key.default == "required" else f" [{key.default}]"
    value = "" if key.value == NAMES[bool] and key.default == "false" else f"  {key.value.replace('`', '')}{default}"
    return [f"  {name}{value}", *wrap(key.meaning, WIDTH, initial_indent=" " * 6, subsequent_indent=" " * 6)]


HEAD = """# Configuration

Every key of a run's config. `python -m gapg.commands.reference` makes this page from the config itself.

A config is a preset or a YAML file, and options of the command line change it: `gapg train NAME --optim.lr 1e-4` sets
`lr` of the section `optim`. `gapg config show NAME` prints a config with all its keys and what your options change.
The presets are {presets}.

- An option may have `-` where its key has `_`: `--output-dir` is `output_dir`.
- A key that is true or false may stand alone for true: `--loss.entropy`.
- A list is written with or without its brackets: `--optim.betas 0.9,0.95`.
- `none` empties a key that may be empty, and turns off a section that may be off: `--warm-start none`. In YAML: `null`.
- `task.args` and `rollout.vllm_args` take any keys: `--task.args.numbers "[3, 4]"`.
- Where an option is given twice, the last one counts.
"""


def markdown() -> str:
    """docs/configuration.md."""
    lines = [HEAD.format(presets=", ".join(f"`{name}`" for name in presets()))]
    for group in groups(RunConfig):
        lines += [f"## `{group.name}`" if group.name else "## The run", ""]
        lines += [group.meaning, ""] if group.meaning else []
        lines += ["| key | value | default | meaning |", "|---|---|---|---|"]
        for key in group.keys:
            default = key.default if key.default in ("required", "empty") else f"`{key.default}`"
            lines.append(f"| `{key.name}` | {key.value} | {default} | {key.meaning.replace('|', '&#124;')} |")
        lines.append("")
    return "\n".join(lines)


if __name__ == "__main__":
    print(markdown(), end="")
