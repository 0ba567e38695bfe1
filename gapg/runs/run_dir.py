"""The output folder of a run: one run at a time, and a resumed run stays the run it was."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from gapg.config import RunConfig, dump_config
from gapg.config_keys import flat
from gapg.errors import ConfigError
from gapg.files import remove_partials, write_whole
from gapg.runs import run_identity, stop

MAY_CHANGE = (
    # how far it runs, and what it keeps and tells
    "steps", "output_dir", "checkpoint_every", "checkpoint_minutes", "keep_checkpoints", "warm_start.checkpoint_every",
    "tensorboard", "wandb", "eval.every", "eval.heldout", "loss.entropy",
    # how it computes the same
    "threads", "deterministic", "token_cap", "update.", "rollout.max_rows", "rollout.vllm_args",
    "model.gradient_checkpointing", "model.liger", "model.parameters", "model.compile", "optim.offload",
    "warm_start.optim.offload",
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

CHOOSES_CACHED = ("oracle.base_url", "oracle.max_tokens_field", "oracle.cache")
"""Of these, the keys that choose which answers `marginal.cloud: cached` finds."""


@contextmanager
def open_folder(config: RunConfig, *, resume: bool) -> Iterator[None]:
    """Creates or reopens the output folder, which is this process's until it is left. Raises ConfigError and Stopped.

    Nothing but the lock is written: a check that fails afterwards leaves a folder that can be used.
    """
    stop.look()
    folder = config.output_dir
    begun = holds_run(folder)
    # nobody knows what was trained in a folder with checkpoints and no config
    if not begun and (found := run_identity.saved_steps(folder)):
        raise ConfigError(
            f"output_dir={folder}: holds {found[0].relative_to(folder)} and no config.yaml: put that back (each "
            "checkpoint's manifest.json has it, as `config`), or choose another --output-dir"
        )
    if resume and not begun:
        raise ConfigError(f"output_dir={folder}: holds no run to go on with; drop --resume to begin one")
    with _lock(folder):
        if not holds_run(folder):
            (folder / run_identity.FILE).unlink(missing_ok=True)  # of a run that was killed while it began
        elif not resume:
            raise ConfigError(f"output_dir={folder}: holds a run; go on with --resume, or choose another --output-dir")
        elif began := run_identity.began_config(folder):
            _check_same_settings(began, config)
        remove_partials(folder)
        yield


def holds_run(folder: Path) -> bool:
    """Raises ConfigError for a folder that the system does not look into: a name too long, somebody else's."""
    try:
        return (folder / "config.yaml").exists()
    except OSError as error:
        raise ConfigError(f"output_dir={folder}: {error.strerror}; choose a folder you can write to") from None


def save_config(config: RunConfig) -> None:
    """From here on the folder holds a run."""
    write_whole(config.output_dir / "config.yaml", dump_config(config))


def _lock(folder: Path) -> AbstractContextManager[object]:
    """The system frees the lock of a process that ends, however it ends. Raises ConfigError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return FileLock(folder / ".lock").acquire(timeout=5, poll_interval=0.25)
    except Timeout:
        why = "another run is writing there"
    except (OSError, NotImplementedError) as error:  # the latter where a file system has no locks
        why = f"cannot be made or locked ({getattr(error, 'strerror', None) or error})"
    raise ConfigError(f"output_dir={folder}: {why}; choose another --output-dir")


def _check_same_settings(began: RunConfig, now: RunConfig) -> None:
    before, after = (
        {key: value for key, value in flat(config.model_dump(mode="json")).items() if value != {}}
        for config in (began, now)
    )
    kept = CHOOSES_CACHED if began.method == "marginal" and began.marginal.cloud == "cached" else ()
    for key in sorted(before.keys() | after.keys()):
        if before.get(key) != after.get(key) and (key in kept or not key.startswith(MAY_CHANGE)):
            raise ConfigError(
                f"{key}: the run began with {before.get(key)!r}, not {after.get(key)!r}, and a resumed run stays the "
                "same; drop the option or put the file back, or choose another --output-dir"
            )
