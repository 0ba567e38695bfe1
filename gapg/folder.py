"""The output folder of a run: one run at a time, and a resumed run stays the run it was."""

from __future__ import annotations

import fcntl
import time
from typing import IO, Any

from gapg.config import ConfigError, RunConfig, dump_config, load_config
from gapg.files import write_whole

MAY_CHANGE = (
    "steps", "output_dir", "checkpoint_every", "keep_checkpoints", "threads", "tensorboard", "wandb", "eval.heldout",
    "oracle.", "update.", "rollout.max_rows", "rollout.vllm_args", "warm_start.checkpoint_every", "optim.lr",
    "optim.grad_clip", "loss.kl_coef", "warm_start.optim.lr", "reward.function", "rollout.engine", "model.dtype",
)  # fmt: skip
"""Keys of a run that a resume may set anew: how it runs and how far, and what a run that diverged has to change."""


def open_folder(config: RunConfig, *, resume: bool) -> IO[str]:
    """Creates or reopens the output folder and locks it; keep the returned file open. Raises ConfigError.

    Nothing but the lock is written: a check that fails afterwards leaves a folder that can be used.
    """
    folder = config.output_dir
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / ".lock").open("a")
    except OSError as error:
        raise ConfigError(f"output_dir={folder}: {error.strerror}; choose a folder you can write to") from None
    for attempt in range(20):
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except OSError:
            if attempt == 19:
                raise ConfigError(
                    f"output_dir={folder}: another run is writing there; choose another --output-dir"
                ) from None
            time.sleep(0.25)
    saved = folder / "config.yaml"
    if not saved.exists():
        return lock
    if not resume:
        raise ConfigError(f"output_dir={folder}: holds a run; go on with --resume, or choose another --output-dir")
    _check_same_run(load_config(str(saved)), config)
    return lock


def save_config(config: RunConfig) -> None:
    """From here on the folder holds a run."""
    write_whole(config.output_dir / "config.yaml", dump_config(config))


def _check_same_run(saved: RunConfig, now: RunConfig) -> None:
    before, after = _flat(saved.model_dump(mode="json")), _flat(now.model_dump(mode="json"))
    for key in sorted(before.keys() | after.keys()):
        if before.get(key) != after.get(key) and not key.startswith(MAY_CHANGE):
            raise ConfigError(
                f"{key}: the run has {before.get(key)!r}, not {after.get(key)!r}, and a resumed run stays the same; "
                "drop the option, or choose another --output-dir"
            )


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat
