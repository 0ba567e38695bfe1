"""`gapg train`: checks everything cheap first, then the warm start, the policy gradient, and an evaluation."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from gapg.build import asks_in_training, check_run, make_oracle, make_reward, make_task
from gapg.config import RunConfig
from gapg.console import say
from gapg.errors import ConfigError
from gapg.evaluation.heldout import evaluate
from gapg.evaluation.validate import validate
from gapg.model.load import load_tokenizer
from gapg.reward import try_reward
from gapg.runs import preset, run_identity
from gapg.runs.outage import first_question
from gapg.runs.run import Run, build_run
from gapg.runs.run_dir import open_folder, save_config
from gapg.tasks.base import Task
from gapg.tasks.members import check_members
from gapg.threads import set_threads
from gapg.train import train
from gapg.warm_start import check_demonstrations, warm_start
from gapg_rollout.records import Oracle, OracleUsage

PROCESSES = {"WORLD_SIZE": "RANK", "OMPI_COMM_WORLD_SIZE": "OMPI_COMM_WORLD_RANK", "PMI_SIZE": "PMI_RANK"}
"""What torchrun, and mpirun of Open MPI and of MPICH, tell each process: how many there are, and which one it is."""


def train_command(name: str, overrides: Mapping[str, str], *, resume: bool) -> None:
    """Runs the preset or YAML file `name`, or goes on with it.

    Raises ConfigError, OracleDown, Diverged, DiskFull and Stopped, each one line.
    """
    config = preset.resolve(name, overrides, resume=resume)
    task, tokenizer = check(config)
    with (
        begun(name, config, task, tokenizer, resume=resume) as (warm, asked),
        closing(build_run(config, config.output_dir, task, warm)) as run,
    ):
        if run.state.step == 0 and config.oracle.kind != "solver":
            run.oracle.restore(asked)
        train(run, validate)
        model = run.save() / "model"
        say(f"trained: {model}")
        if config.method == "marginal":
            share = f"--cloud-fraction {config.budget.cloud_fraction:g}"
            say(f"no budget is set yet, any is a calibration away: gapg calibrate {config.output_dir} {share}")
        if config.eval.heldout != 0:
            oracle = _evaluation_oracle(run)
            evaluate(
                config, config.output_dir, task, run.tokenizer, run.engine, oracle, model=str(model), trained=config
            )


def _evaluation_oracle(run: Run) -> Oracle:
    """What the last evaluation asks: the oracle of training; a solver, which is free, in any case."""
    if asks_in_training(run.config):
        return run.oracle
    if run.config.oracle.kind == "solver":
        return make_oracle(run.config, run.task, run.folder)
    cloud = run.config.oracle.model or "one"
    say(f"no cloud is asked here, so calls may stay unknown: gapg eval {run.folder} asks {cloud}")
    return run.oracle


def check(config: RunConfig) -> tuple[Task, PreTrainedTokenizerBase]:
    """The run's task and tokenizer, after all that can be checked before anything is written. Raises ConfigError."""
    _refuse_many()
    task = make_task(config)
    check_members(config, task)
    tokenizer = load_tokenizer(config.model, task)
    check_run(config, task, tokenizer)
    check_demonstrations(config, task, tokenizer)
    try_reward(make_reward(config), config, task)
    return task, tokenizer


@contextmanager
def begun(
    name: str, config: RunConfig, task: Task, tokenizer: PreTrainedTokenizerBase, *, resume: bool
) -> Iterator[tuple[Path | None, OracleUsage]]:
    """Makes the output folder a run, which is this process's until it is left; then the warm start, if there is one.

    Yields its model, and what the first question to the cloud cost. Raises ConfigError, OracleDown, Diverged, DiskFull
    and Stopped.
    """
    folder = config.output_dir
    with open_folder(config, resume=resume):
        run_identity.begin(folder, config, task, tokenizer)
        asked = first_question(config, task)
        preset.remember(name, folder)
        save_config(config)
        say(f"{_budget(config)}; {folder}/")
        set_threads(config)
        begin = folder / "warm-start" / "checkpoints"
        yield warm_start(config, begin, task, tokenizer) if config.warm_start else None, asked


def _budget(config: RunConfig) -> str:
    """What the run is trained to, in words."""
    if config.method == "gapg":
        return f"cloud budget {config.budget.cloud_fraction:.0%} of problems: rho = {config.budget.exact_rho}"
    cloud = {
        "ignore": "is not asked",
        "cached": "counts by its cached answers",
        "ask": "is asked about each problem",
    }
    price = f"a price of a call, alpha_c = {config.reward.alpha_c:g}"
    goal = price if config.marginal.score == "price" else "every cloud budget at once"
    return f"for {goal}; the cloud {cloud[config.marginal.cloud]}"


def _refuse_many() -> None:
    for size, rank in PROCESSES.items():
        if (number := os.environ.get(size, "")).isdecimal() and int(number) > 1:
            if os.environ.get(rank, "0") != "0":
                sys.exit(2)  # one of them says it
            raise ConfigError(f"{size}={number}: a run is one process; start it without a launcher, or unset {size}")
