"""The preset or YAML file that a run began with, kept in its folder: a resumed run is given no other by mistake."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from gapg.config import ConfigError, RunConfig, load_config, load_tree
from gapg.config_keys import flat
from gapg.files import write_whole
from gapg.folder import MAY_CHANGE

FILE = "preset.yaml"


def resolve(name: str, overrides: Mapping[str, str], *, resume: bool) -> RunConfig:
    """The config `name` with overrides; on a resume that which the run was started with, so that its options need not
    be given again.

    What was changed in `name` since then holds where a resume may change it. Raises ConfigError for any other change,
    and so for another preset than the run's.
    """
    config = load_config(name, overrides)
    saved = config.output_dir / "config.yaml"
    if not (resume and saved.exists()):
        return config
    return load_config(str(saved), _changes(name, config.output_dir, saved) | dict(overrides))


def remember(name: str, folder: Path) -> None:
    """Keeps the settings of `name` as they are now."""
    write_whole(folder / FILE, yaml.safe_dump({"name": name, "settings": load_tree(name)}, sort_keys=False))


def _changes(name: str, folder: Path, saved: Path) -> dict[str, str]:
    """What `name` says otherwise than the run's preset did and than the run has it (`saved`), as overrides."""
    path = folder / FILE
    if not path.exists():
        return {}
    try:
        began = yaml.safe_load(path.read_text(encoding="utf-8"))
        before = _settings(began["settings"])
    except (OSError, ValueError, LookupError, TypeError, AttributeError, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: cannot be read ({type(error).__name__}); delete it to resume without it") from None
    now, run = _settings(load_tree(name)), _settings(load_tree(str(saved)))
    different = [key for key in sorted(before.keys() | now.keys()) if before.get(key) != now.get(key)]
    different = [key for key in different if key not in now or now[key] != run.get(key)]
    if fixed := [key for key in different if not key.startswith(MAY_CHANGE)]:
        key = fixed[0]
        raise ConfigError(
            f"{name}: the run in {folder} began with {began['name']}, where {key} is {_shown(before, key)}; here it is "
            f"{_shown(now, key)}; resume with the config that it began with, or choose another --output-dir"
        )
    return {key: _as_option(now[key]) for key in different if key in now}


def _settings(tree: Mapping[str, Any]) -> dict[str, Any]:
    return flat({**tree, "task": {"name": tree["task"]}} if isinstance(tree.get("task"), str) else tree)


def _shown(tree: dict[str, Any], key: str) -> str:
    return repr(tree[key]) if key in tree else "not set"


def _as_option(value: Any) -> str:
    return "" if value is None else value if isinstance(value, str) else json.dumps(value)
