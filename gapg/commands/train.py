"""`gapg train`: checks everything cheap first, then warm start, GAPG, and an evaluation or the comparison."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from gapg.build import check_run, make_oracle, make_reward, make_task
from gapg.commands.eval import evaluate
from gapg.config import ConfigError, RunConfig
from gapg.evaluation.calibrate import help_control
from gapg.evaluation.validate import validate
from gapg.model.load import load_tokenizer
from gapg.reward import try_reward
from gapg.runs import preset, run_identity
from gapg.runs.outage import check_cloud
from gapg.runs.run import Run, build_run, set_threads
from gapg.runs.run_dir import open_folder, save_config
from gapg.runs.tracking import say
from gapg.studies import compare
from gapg.tasks.base import Task
from gapg.train import train
from gapg.warm_start import check_demonstrations, warm_start
from gapg_rollout.records import OracleUsage

PROCESSES = {"WORLD_SIZE": "RANK", "OMPI_COMM_WORLD_SIZE": "OMPI_COMM_WORLD_RANK", "PMI_SIZE": "PMI_RANK"}
"""What torchrun, and mpirun of Open MPI and of MPICH, tell each process: how many there are, and which one it is."""


def train_command(name: str, overrides: Mapping[str, str], *, resume: bool) -> None:
    """Runs the preset or YAML file `name`, or goes on with it.

    Raises ConfigError, OracleDown, Diverged, BaselineFailed, DiskFull and Stopped, each one line.
    """
    _refuse_many()
    config = preset.resolve(name, overrides, resume=resume)
    task = make_task(config)
    tokenizer = load_tokenizer(config.model, task)
    _check(config, task, tokenizer)
    with open_folder(config, resume=resume):
        run_identity.begin(config.output_dir, config, task, tokenizer)
        asked = _first_question(config, task)
        preset.remember(name, config.output_dir)
        save_config(config)
        folder = config.output_dir
        say(f"cloud budget {config.budget.cloud_fraction:.0%} of problems: rho = {config.budget.exact_rho}; {folder}/")
        set_threads(config)
        begin = folder / "warm-start" / "checkpoints"
        warm = warm_start(config, begin, task, tokenizer) if config.warm_start else None
        _gapg(config, task, warm, asked)


def _refuse_many() -> None:
    for size, rank in PROCESSES.items():
        if (number := os.environ.get(size, "")).isdecimal() and int(number) > 1:
            if os.environ.get(rank, "0") != "0":
                sys.exit(2)  # one of them says it
            raise ConfigError(f"{size}={number}: a run is one process; start it without a launcher, or unset {size}")


def _check(config: RunConfig, task: Task, tokenizer: PreTrainedTokenizerBase) -> None:
    check_run(config, task, tokenizer)
    check_demonstrations(config, task, tokenizer)
    reward = make_reward(config)
    try_reward(reward, config, task)
    if config.compare:
        help_control(tokenizer)  # the comparison masks and biases the phrase: a ConfigError where it cannot
        try_reward(reward, compare.task_tuned_config(config), task)


def _first_question(config: RunConfig, task: Task) -> OracleUsage:
    """One sample is enough. A cloud that hangs has one time limit, or a minute: a busy one may ask for that."""
    deadline_s = min(config.oracle.deadline_s, max(60.0, config.oracle.timeout_s))
    one = config.oracle.model_copy(update={"samples": 1, "deadline_s": deadline_s})
    oracle = make_oracle(config.model_copy(update={"oracle": one}), task, config.output_dir)
    try:
        if config.oracle.kind != "solver":
            say(f"asking {config.oracle.model} at {config.oracle.base_url} a first question")
        return check_cloud(oracle, task)
    finally:
        oracle.close()


def _gapg(config: RunConfig, task: Task, warm: Path | None, asked: OracleUsage) -> None:
    folder = config.output_dir
    with ExitStack() as parts:
        baseline = parts.enter_context(compare.task_tuned(config, warm)) if config.compare else None
        set_threads(config, side_by_side=2 if config.compare else 1)
        run = build_run(config, folder, task, warm)
        parts.callback(run.close)
        if run.state.step == 0 and config.oracle.kind != "solver":
            run.oracle.restore(asked)

        def watch_and_validate(run: Run) -> dict[str, float]:
            if baseline is not None:
                compare.check_alive(baseline, folder)
            return validate(run)

        if baseline is not None and run.state.step == 0:
            compare.assess_before_training(run)
        train(run, watch_and_validate)
        model = run.save() / "model"
        say(f"trained: {model}")
        if baseline is not None:
            compare.finish(run, baseline)
        elif config.eval.heldout != 0:
            evaluate(config, folder, task, run.tokenizer, run.engine, run.oracle, model=str(model))
