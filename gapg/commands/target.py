"""The model that a command is about: its folder, the run that it belongs to, and what that run's config names."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from gapg.build import check_use, make_engine, make_oracle, make_task
from gapg.config import RunConfig, load_config
from gapg.console import say
from gapg.errors import ConfigError
from gapg.evaluation import trust
from gapg.model.load import load_model, load_tokenizer
from gapg.model.route import choose_route
from gapg.runs import checkpoint
from gapg.tasks.base import Task
from gapg.threads import set_threads
from gapg_rollout.records import Engine, Oracle


@dataclass(frozen=True, slots=True)
class Target:
    """A model to use: its folder, the run it belongs to if any, and what its config names.

    trained: the config that its run was trained by, whatever the command line changes; `config` where no run is known.
    settings: which weights and which config, for the record. notice: what must be said before the oracle is asked.
    trust_code: the user vouches for the code that the run's own config names.
    """

    model_path: Path
    run_folder: Path | None
    config: RunConfig
    trained: RunConfig
    task: Task
    tokenizer: PreTrainedTokenizerBase
    settings: Mapping[str, Any] = field(default_factory=dict)
    notice: str | None = None
    trust_code: bool = False

    def trained_task(self) -> Task:
        """The task that the model was trained by: `task`, or where the command line names another, that of its run.

        Raises ConfigError, also where that is code of others which nobody vouches for.
        """
        if self.run_folder is None or self.trained.task == self.config.task:
            return self.task
        file = self.run_folder / "config.yaml"
        try:
            if not self.trust_code:
                trust.check_code(self.trained, file, ("reward", "rollout"))  # of which nothing is used
        except ConfigError:
            raise ConfigError(
                f"{file}: its task, {self.trained.task.name}, which tells what was trained on, brings code that is not "
                "gapg's: add --trust-code if you trust whoever wrote it, or leave out --suite"
            ) from None
        try:
            return make_task(self.trained)
        except ConfigError as error:
            raise ConfigError(f"{file}: its task, which tells what was trained on: {error}") from None

    def engine(self) -> Engine:
        """Loads the weights. Raises ConfigError."""
        model = load_model(self.config.model, self.tokenizer, self.config.seed)
        choose_route(model, longest=self.config.rollout.longest)
        return make_engine(self.config, model, self.tokenizer, str(self.model_path))

    def oracle(self, folder: Path) -> Oracle:
        """Opened, with the run's paid answers, which are not paid again; without a run `folder` keeps them."""
        oracle = make_oracle(self.config, self.task, self.run_folder or folder)
        if self.notice:
            say(self.notice)
        return oracle

    def beside(self, kind: str) -> Path:
        """Where results about this model go: a folder of its run's, or of `runs`; each model has its own.

        `step-40`, `best-step-40` and `warm-start-step-40` of a run; any other by its name and a hash of its place.
        """
        path, real = self.model_path, self.model_path.resolve()
        if self.run_folder is None:
            name = real.parent.name if real.name == "model" else real.name
            return Path("runs") / kind / f"{name}-{hashlib.sha256(bytes(real)).hexdigest()[:8]}"
        link = path.parent if path.name == "model" else path
        names = [link.name] if link.is_symlink() else []  # `best`
        names += [part for part in real.relative_to(self.run_folder.resolve()).parts if part != "checkpoints"]
        return self.run_folder / kind / "-".join(names).removesuffix("-model")

    def place(self, usual: Path, wanted: Path | None) -> Path:
        """The folder for results, made: `wanted`, or `usual`.

        Raises ConfigError, before anything is spent, where nothing can be written, and where a link, which may be
        someone else's, puts `usual` outside the run's folder.
        """
        folder = wanted or usual
        try:
            if wanted is None and self.run_folder and not folder.resolve().is_relative_to(self.run_folder.resolve()):
                raise ValueError("a link leads out of the run's folder")
            folder.mkdir(parents=True, exist_ok=True)
            if not os.access(folder, os.W_OK):
                raise ValueError("it cannot be written")
        except (OSError, ValueError, RuntimeError) as error:  # the last for links in a circle
            why = getattr(error, "strerror", None) or error
            raise ConfigError(f"{folder}: no place for results: {why}; choose another --output-dir") from None
        return folder


def open_target(
    target: Path, config_name: str | None, overrides: Mapping[str, str], *, trust_code: bool = False
) -> Target:
    """All but the weights. Raises ConfigError where the folder or the config is missing, naming the fix.

    Nothing is imported for a config that the folder brings, unless it is of this package or `trust_code` is set.
    """
    try:
        model_path, run_folder = find_model(target)
    except OSError as error:
        raise ConfigError(f"{target}: {error.strerror}; name a folder that you can read") from None
    notice = None
    if config_name is not None:
        config = load_config(config_name, overrides)
    elif run_folder is not None:
        config_name = str(file := run_folder / "config.yaml")
        config = load_config(config_name, overrides)
        if not trust_code:
            trust.check_code(config, file, overrides)
            trust.check_cache(config, file, overrides)
        notice = trust.where_questions_go(config, file, overrides)
    else:
        raise ConfigError(f"{target}: not part of a run, so name the task with --config, e.g. --config gsm8k-smollm2")
    set_threads(config)
    task = make_task(config)
    trained = load_config(str(run_folder / "config.yaml")) if run_folder else config
    config = config.model_copy(update={"model": config.model.model_copy(update={"path": str(model_path)})})
    tokenizer = load_tokenizer(config.model, task)
    check_use(config, tokenizer)
    settings = {"checkpoint": str(model_path.resolve()), "config": config_name, "overrides": dict(overrides)}
    return Target(model_path, run_folder, config, trained, task, tokenizer, settings, notice, trust_code)


def find_model(target: Path) -> tuple[Path, Path | None]:
    """(model folder, run folder or None) of a run, a checkpoint, or a model folder. Raises ConfigError."""
    newest = checkpoint.latest(target / "checkpoints")
    for candidate in ([newest / "model"] if newest else []) + [target / "model", target]:
        if (candidate / "config.json").is_file():
            if candidate.parent != newest:
                checkpoint.check(candidate.parent)
            # <run>/checkpoints/step-N/model, or <run>/warm-start/checkpoints/step-N/model
            above = [p.parent for p in candidate.resolve().parents if p.name in ("checkpoints", "warm-start")]
            return candidate, next((p for p in above if (p / "config.yaml").is_file()), None)
    what = "holds no model" if target.exists() else "no such folder"
    raise ConfigError(f"{target}: {what}; give a run's folder, a checkpoint, or a Hugging Face model folder")
