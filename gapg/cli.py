"""The command line: `gapg train`, `gapg eval`, `gapg config show`, `gapg info`. Orchestrates; knows no method."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from tyro.conf import Positional, subcommand

from gapg.config import ConfigError, RunConfig, dump_config, load_config, parse_overrides, presets

EXIT_USAGE, EXIT_ORACLE = 2, 3


@dataclass(frozen=True)
class Train:
    """Train a device model. Every key of `gapg config show NAME` is an option too: --optim.lr 1e-4 --seed 3."""

    config: Positional[str]
    """A preset (see `gapg config list`) or a YAML file."""
    resume: bool = False
    """Go on from the last checkpoint in the output folder."""


@dataclass(frozen=True)
class Eval:
    """Evaluate a checkpoint or any Hugging Face model folder on held-out problems, greedy and sampled."""

    checkpoint: Positional[Path]
    """A run's folder, one of its checkpoints, or a model folder."""
    config: str | None = None
    """Preset or YAML file; empty: the config of the run the checkpoint belongs to."""
    output_dir: Path | None = None
    """Where summary.json and predictions.jsonl go; empty: beside the checkpoint."""


@dataclass(frozen=True)
class Config:
    """`gapg config list` names the presets; `gapg config show NAME` prints one with its defaults and overrides."""

    action: Positional[str]
    name: Positional[str] = ""


@dataclass(frozen=True)
class Info:
    """Versions, devices, and which kernels, attention and engines are in use, and why."""


Command = (
    Annotated[Train, subcommand("train")]
    | Annotated[Eval, subcommand("eval")]
    | Annotated[Config, subcommand("config")]
    | Annotated[Info, subcommand("info")]
)
OWN_OPTIONS = {"train": {"--resume"}, "eval": {"--config", "--output-dir"}, "config": set(), "info": set()}


def main(argv: Sequence[str] | None = None) -> None:
    """Exit codes: 0 done, 2 a command or config to mend, 3 the oracle stayed away (the run was saved)."""
    try:
        own, overrides = _split(list(sys.argv[1:] if argv is None else argv))
        command = tyro.cli(Command, args=own, prog="gapg", description=__doc__)
        match command:
            case Train():
                _train(load_config(command.config, parse_overrides(overrides)), resume=command.resume)
            case Eval():
                from gapg.use.evaluate_command import evaluate_command

                evaluate_command(command.checkpoint, command.config, command.output_dir, parse_overrides(overrides))
            case Config():
                _config(command, overrides)
            case Info():
                from gapg.info import print_info

                print_info()
    except ConfigError as error:
        print(f"gapg: {error}", file=sys.stderr)
        sys.exit(EXIT_USAGE)
    except KeyboardInterrupt:
        print("gapg: interrupted; go on with --resume", file=sys.stderr)
        sys.exit(130)


def _split(argv: list[str]) -> tuple[list[str], list[str]]:
    """(what tyro parses, config overrides): every option that is not the command's own is a key of the config."""
    own, overrides = argv[:1], []
    known = OWN_OPTIONS.get(argv[0], set()) if argv else set()
    queue = argv[1:]
    while queue:
        word = queue.pop(0)
        name = word.partition("=")[0]
        takes_value = "=" not in word and queue and not queue[0].startswith("--")
        if not word.startswith("-") or name in known or name in ("-h", "--help"):
            own.append(word)
            if name in known and name != "--resume" and takes_value:
                own.append(queue.pop(0))
        else:
            overrides.append(word)
            if takes_value:
                overrides.append(queue.pop(0))
    return own, overrides


def _config(command: Config, overrides: list[str]) -> None:
    if command.action == "list":
        print("\n".join(presets()))
    elif command.action == "show" and command.name:
        print(dump_config(load_config(command.name, parse_overrides(overrides))), end="")
    else:
        raise ConfigError("usage: gapg config list | gapg config show NAME [--key value …]")


def _train(config: RunConfig, *, resume: bool) -> None:
    """Checks everything cheap first, then: warm start, GAPG, and with `compare` the baseline and the table."""
    from gapg.model import load_tokenizer
    from gapg.run import build_run, check_prompts, make_oracle, make_task, open_folder, set_threads
    from gapg.studies import compare
    from gapg.tracking import say
    from gapg.train import OracleDown, train
    from gapg.use.validate import validate
    from gapg.warm_start import check_demonstrations, warm_start

    folder = config.output_dir
    task = make_task(config)
    check_demonstrations(config, task)
    tokenizer = load_tokenizer(config.model, task)
    check_prompts(config, task, tokenizer)
    with open_folder(config, resume=resume):
        make_oracle(config.oracle, task, folder, config.seed).close()
        say(f"cloud budget {config.budget.cloud_fraction:.0%} of problems: rho = {config.budget.exact_rho}; {folder}/")
        set_threads(config)
        model_path = (
            warm_start(config, folder / "warm-start" / "checkpoints", task, tokenizer) if config.warm_start else None
        )
        baseline = compare.start_task_tuned(config, model_path) if config.compare else None
        set_threads(config, side_by_side=2 if config.compare else 1)
        run = build_run(config, folder, task, model_path)
        try:
            if baseline is not None and run.state.step == 0:
                compare.assess_before_training(run)
            train(run, validate)
            if baseline is not None:
                compare.finish(run, baseline)
        except OracleDown as error:
            print(f"gapg: {error}", file=sys.stderr)
            sys.exit(EXIT_ORACLE)
        finally:
            run.close()
        say(f"done: {folder}/checkpoints/step-{run.state.step}/model")
