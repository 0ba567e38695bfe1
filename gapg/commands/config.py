"""`gapg config`: the names of the presets, or all keys of one."""

from __future__ import annotations

from collections.abc import Mapping

from gapg.commands.options import Config, usage
from gapg.config import dump_config, load_config, presets
from gapg.errors import ConfigError


def config_text(wanted: Config, overrides: Mapping[str, str]) -> str:
    """Raises ConfigError."""
    if wanted.action == "list":
        if wanted.name or overrides:
            raise ConfigError(
                "gapg config list takes nothing more; `gapg config show NAME` prints one with its options"
            )
        return "\n".join(presets())
    if not wanted.name:
        raise ConfigError(
            f"gapg config show NAME: give a preset (`gapg config list`) or a YAML file; {usage('config')}"
        )
    return dump_config(load_config(wanted.name, overrides)).removesuffix("\n")
