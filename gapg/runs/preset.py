"""The preset or YAML file that a run began with, kept in its folder: a resumed run is given no other by mistake."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from gapg.config import RunConfig, load_config, load_tree
from gapg.config_keys import flat
from gapg.errors import ConfigError
from gapg.files import write_whole
from gapg.runs.run_dir import MAY_CHANGE, holds_run

FILE = "preset.yaml"


def resolve(name: str, overrides: Mapping[str, str], *, resume: bool) -> RunConfig:
    """The config `name` with overrides; on a resume that which the run was started with, so that its options need not
    be given again.

    What was changed in `name` since then holds where a resume may change it. Raises ConfigError for any other change,
    and so for another preset than the run's.
    """
    if not resume:
        return load_config(name, overrides)
    try:
        folder = load_config(name, overrides).output_dir
    except ConfigError:
        # what `name` lacks the run may have: it was given as an option
        given = overrides.get("output_dir") or load_tree(name).get("output_dir")
        folder = Path(str(given))
        if not given or not holds_run(folder):
            raise
    if not holds_run(folder):
        return load_config(name, overrides)
    saved = folder / "config.yaml"
    return load_config(str(saved), _changes(name, saved) | dict(overrides))


def remember(name: str, folder: Path) -> None:
    """Keeps what `name` sets; on a resume only what that may change, beside what the run began with."""
    path, saved = folder / FILE, folder / "config.yaml"
    if Path(name).resolve() == saved.resolve():
        return
    settings = _sets(name)
    if saved.exists() and path.exists():
        name, began = _read(path)
        settings = {key: value for key, value in settings.items() if key.startswith(MAY_CHANGE)}
        settings |= {key: value for key, value in began.items() if not key.startswith(MAY_CHANGE)}
    write_whole(path, yaml.safe_dump({"name": name, "settings": settings}, sort_keys=False))


def _changes(name: str, saved: Path) -> dict[str, str]:
    """What `name` sets otherwise than the run's preset did and than the run has it (`saved`), as overrides."""
    path = saved.with_name(FILE)
    if not path.exists():
        return {}
    first, before = _read(path)
    sets, here, run = _sets(name), _flat(name), _flat(str(saved))
    different = [key for key in sorted(before | sets) if here.get(key) not in (before.get(key), run.get(key))]
    if fixed := [key for key in different if not key.startswith(MAY_CHANGE)]:
        key = fixed[0]
        raise ConfigError(
            f"{name}: the run in {saved.parent} began with {first}, and has {key}={run.get(key)!r}; here it is "
            f"{here.get(key)!r}; resume with {saved}, or choose another --output-dir"
        )
    return {key: _as_option(here[key]) for key in different if key in sets}


def _read(path: Path) -> tuple[str, dict[str, Any]]:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
        return str(content["name"]), dict(content["settings"])
    except (OSError, ValueError, LookupError, TypeError, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: cannot be read ({type(error).__name__}); delete it to resume without it") from None


def _sets(name: str) -> dict[str, Any]:
    """What `name` itself sets, as dotted keys."""
    said = tuple(f"{key}." for key in flat(load_tree(name)))
    return {key: value for key, value in _flat(name).items() if f"{key}.".startswith(said)}


def _flat(name: str) -> dict[str, Any]:
    """All settings of `name`, its defaults included; as they are written where it needs options to be complete."""
    try:
        return flat(load_config(name).model_dump(mode="json"))
    except ConfigError:
        return flat(load_tree(name))


def _as_option(value: Any) -> str:
    return "" if value is None else value if isinstance(value, str) else json.dumps(value)
