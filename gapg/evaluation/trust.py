"""What a config that came along with a folder may not bring: code that is not this package's, and files elsewhere.

A run's folder may be anyone's, and its config.yaml names a task, and so code. What the user writes (a config named on
the command line, an option) is not looked at here.
"""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Collection, Iterator, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

from gapg.config import RunConfig
from gapg.errors import ConfigError
from gapg.tasks import is_import_path

OWN = "gapg."
VLLM_ARGS = {
    "cpu_cache_gib", "dtype", "enforce_eager", "gpu_memory_utilization", "max_model_len", "max_num_seqs", "seed",
}  # fmt: skip
"""Settings of vLLM that load nothing: no code, no other files."""


def check_code(config: RunConfig, file: Path, given: Collection[str]) -> None:
    """Raises ConfigError where the config of `file`, which came with the model, names code that is not this package's.

    given: the keys that the user set on the command line; they are the user's own.
    """
    for key, what in _named(config):
        if not _is_given(key, given):
            raise ConfigError(
                f"{key}: {file} names {what}, which is not gapg's: add --trust-code if you trust whoever wrote it, or "
                "name a config of your own with --config"
            )


def check_cache(config: RunConfig, file: Path, given: Collection[str]) -> None:
    """Raises ConfigError where the answers of the cloud would be kept in a new file outside the folder of `file`.

    A cache that is there already may be used: runs of the same user share one.
    """
    folder = file.parent
    named = config.oracle.cache if config.oracle.cache and not _is_given("oracle.cache", given) else None
    if config.oracle.kind == "solver" or (config.oracle.cache and named is None):
        return
    path = Path(named or folder / "oracle.sqlite").resolve()
    files = [Path(f"{path}{end}").resolve() for end in ("", "-journal", "-wal", "-shm")]
    if not all(f.is_relative_to(folder.resolve()) for f in files) and not _is_cache(path):
        raise ConfigError(
            f"oracle.cache: {file} keeps answers in {path}, outside its folder, where no cache is: name one with "
            "--oracle.cache FILE, or add --trust-code if you trust whoever wrote it"
        )


def where_questions_go(config: RunConfig, file: Path, given: Collection[str]) -> str | None:
    """One line to be said before anything is asked; None where the user chose the server, or none is asked."""
    oracle = config.oracle
    key = bool(os.environ.get(oracle.api_key_env))
    chosen = ("oracle.base_url", "oracle.api_key_env") if key else ("oracle.base_url",)
    theirs = [name for name in chosen if not _is_given(name, given)]
    if oracle.kind == "solver" or not theirs:
        return None
    opens = f", with the key in {oracle.api_key_env}" if key else ""
    return f"oracle: questions go to {oracle.base_url}{opens} ({' and '.join(theirs)} from {file})"


def _named(config: RunConfig) -> Iterator[tuple[str, str]]:
    """(key, what it names) of everything in a config that loads code or files, but data."""
    for key, path in (("task.name", config.task.name), ("reward.function", config.reward.function)):
        if is_import_path(path) and not path.startswith(OWN):
            yield key, f"the code {path!r}"
    for key, text in _texts("task.args", config.task.args):
        if is_import_path(text):  # a function of this package is no source of data either
            yield key, f"the code {text!r}"
    for key, value in config.rollout.vllm_args.items():
        if key not in VLLM_ARGS:
            yield f"rollout.vllm_args.{key}", f"a setting of vLLM that may load code or files, {value!r:.80}"


def _texts(key: str, value: Any) -> Iterator[tuple[str, str]]:
    """(dotted key, text) of every string below a value; those of a list have the list's key."""
    if isinstance(value, str):
        yield key, value
    elif isinstance(value, Mapping):
        for name, inner in value.items():
            yield from _texts(f"{key}.{name}", inner)
    elif isinstance(value, list | tuple | set):
        for inner in value:
            yield from _texts(key, inner)


def _is_given(key: str, given: Collection[str]) -> bool:
    return any(key == own or key.startswith(f"{own}.") for own in given)


def _is_cache(path: Path) -> bool:
    try:
        with closing(sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True)) as db:
            tables = db.execute("SELECT 1 FROM sqlite_master WHERE type = 'table' AND name = 'answers'")
            return tables.fetchone() is not None
    except sqlite3.Error:
        return False
