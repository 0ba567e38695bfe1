"""The output folder of a run: one run at a time, and a resumed run stays the run it was."""

from __future__ import annotations

import fcntl
import time
from pathlib import Path
from typing import IO

from pydantic import ValidationError

from gapg.runs import run_identity
from gapg.config import ConfigError, RunConfig, dump_config, load_config
from gapg.config_keys import flat
from gapg.files import remove_partials, write_whole

MAY_CHANGE = (
    # how far it runs, and what it keeps and tells
    "steps", "output_dir", "checkpoint_every", "checkpoint_minutes", "keep_checkpoints", "warm_start.checkpoint_every",
    "tensorboard", "wandb", "eval.every", "eval.heldout", "loss.entropy",
    # how it computes the same
    "threads", "token_cap", "update.", "rollout.max_rows", "rollout.vllm_args", "model.gradient_checkpointing",
    "model.liger",
    # where things lie: their contents are compared
    "model.path", "warm_start.demonstrations",
    # how the same cloud is reached, and what it may cost
    "oracle.base_url", "oracle.api_key_env", "oracle.max_tokens_field", "oracle.concurrency", "oracle.timeout_s",
    "oracle.deadline_s", "oracle.max_retries", "oracle.requests_per_minute", "oracle.tokens_per_minute",
    "oracle.spending_cap", "oracle.price_per_million_", "oracle.local_share", "oracle.cache", "oracle.account",
    # what a run that diverged has to change
    "optim.lr", "optim.grad_clip", "loss.kl_coef", "warm_start.optim.lr", "reward.function", "rollout.engine",
    "model.dtype",
)  # fmt: skip
"""How the keys of a run begin that a resume may set anew."""


def open_folder(config: RunConfig, *, resume: bool) -> IO[str]:
    """Creates or reopens the output folder and locks it; keep the returned file open. Raises ConfigError.

    Nothing but the lock is written: a check that fails afterwards leaves a folder that can be used.
    """
    folder = config.output_dir
    saved = folder / "config.yaml"
    if resume and not saved.exists():
        _refuse_checkpoints(folder)
        raise ConfigError(f"output_dir={folder}: holds no run to go on with; drop --resume to begin one")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / ".lock").open("a")
    except OSError as error:
        raise ConfigError(f"output_dir={folder}: {error.strerror}; choose a folder you can write to") from None
    _lock(lock, folder)
    if saved.exists():
        if not resume:
            raise ConfigError(f"output_dir={folder}: holds a run; go on with --resume, or choose another --output-dir")
        _check_same_run(_began_with(folder), config)
    else:
        _refuse_checkpoints(folder)
        (folder / run_identity.FILE).unlink(missing_ok=True)  # of a run that was killed while it began
    remove_partials(folder)
    return lock


def save_config(config: RunConfig) -> None:
    """From here on the folder holds a run."""
    write_whole(config.output_dir / "config.yaml", dump_config(config))


def _lock(lock: IO[str], folder: Path) -> None:
    for attempt in range(20):
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if attempt == 19:
                raise ConfigError(
                    f"output_dir={folder}: another run is writing there; choose another --output-dir"
                ) from None
            time.sleep(0.25)
        except OSError as error:
            raise ConfigError(
                f"output_dir={folder}: cannot be locked ({error.strerror}); choose an --output-dir elsewhere"
            ) from None


def _refuse_checkpoints(folder: Path) -> None:
    """Nobody knows what was trained in a folder with checkpoints and no config. Raises ConfigError."""
    if found := run_identity.saved_steps(folder):
        raise ConfigError(
            f"output_dir={folder}: holds {found[0].relative_to(folder)} and no config.yaml: put that back (each "
            "checkpoint's manifest.json has it, as `config`), or choose another --output-dir"
        )


def _began_with(folder: Path) -> RunConfig:
    """The settings that the run began with: config.yaml may have been edited since. Raises ConfigError."""
    path = folder / run_identity.FILE
    if not path.exists():  # which `run_identity.begin` refuses if anything was trained
        return load_config(str(folder / "config.yaml"))
    try:
        return RunConfig.model_validate(run_identity.read(folder)["config"])
    except (ValidationError, LookupError):
        raise ConfigError(f"{path}: not as it was written; put it back as it was") from None


def _check_same_run(began: RunConfig, now: RunConfig) -> None:
    trees = (flat(config.model_dump(mode="json")) for config in (began, now))
    before, after = ({key: value for key, value in tree.items() if value != {}} for tree in trees)
    for key in sorted(before.keys() | after.keys()):
        if before.get(key) != after.get(key) and not key.startswith(MAY_CHANGE):
            raise ConfigError(
                f"{key}: the run began with {before.get(key)!r}, not {after.get(key)!r}, and a resumed run stays the "
                "same; drop the option or put the file back, or choose another --output-dir"
            )
