"""The command line: `gapg train`, `eval`, `calibrate`, `experiment`, `config`, `info`. Orchestrates only."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from tyro.conf import FlagCreatePairsOff, Positional, subcommand

from gapg.config import ConfigError, dump_config, load_config, parse_overrides, presets
from gapg.config_keys import needs_value, take_option
from gapg.runs.stop import Stopped, listening
from gapg.runs.tracking import printable

EXITS = {"ConfigError": 2, "OracleDown": 3, "Stopped": 4, "Diverged": 1, "BaselineFailed": 1, "DiskFull": 1}
"""Exit codes of errors that say all in one line; by name, because importing some of them would import torch."""

INTERRUPTED = {
    "experiment": "the same command goes on where it stopped",
    "eval": "nothing was written; run it again (paid answers are kept)",
    "calibrate": "nothing was written; run it again (paid answers are kept)",
}


@dataclass(frozen=True)
class Train:
    """Train a device model. Every key of `gapg config show NAME` is an option too: --optim.lr 1e-4 --seed 3."""

    config: Positional[str]
    """A preset (see `gapg config list`) or a YAML file."""
    resume: FlagCreatePairsOff[bool] = False
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
    trust_code: FlagCreatePairsOff[bool] = False
    """Run code of others that the folder's own config names (a task, a reward function), and its settings of vLLM."""


@dataclass(frozen=True)
class Calibrate:
    """Find the bias on the help phrase that gives a call fraction, and save it beside the model.

    Decodes the training problems once with help masked. `gapg eval` reads what is saved.
    """

    checkpoint: Positional[Path]
    """A run's folder, one of its checkpoints, or a model folder."""
    cloud_fraction: float | None = None
    """Part of the problems that may go to the cloud; empty: the config's budget.cloud_fraction."""
    temperature: float = 0.0
    """The decoding to calibrate; 0 is greedy."""
    problems: int | None = None
    """How many training problems to calibrate on; empty: all that fit."""
    accuracy: FlagCreatePairsOff[bool] = False
    """Ask a paid oracle about every calibration problem, for the accuracy together (a solver is always asked).
    The bias needs no oracle."""
    config: str | None = None
    """Preset or YAML file; empty: the config of the run the checkpoint belongs to."""
    output_dir: Path | None = None
    """Where curve.png, summary.json and predictions.jsonl go; empty: beside the checkpoint."""
    trust_code: FlagCreatePairsOff[bool] = False
    """Run code of others that the folder's own config names (a task, a reward function), and its settings of vLLM."""


@dataclass(frozen=True)
class Config:
    """`gapg config list` names the presets; `gapg config show NAME` prints one with its defaults and overrides."""

    action: Positional[str]
    name: Positional[str] = ""


@dataclass(frozen=True)
class Info:
    """Versions, devices, and which kernels, attention and engines are in use, and why."""

    config: str | None = None
    """Preset or YAML file: what an update of this run would need in memory, instead. Takes its options too."""


@dataclass(frozen=True)
class Experiment:
    """Run a study to a table, a picture and raw JSON; `gapg experiment list` names them, `all` runs every one.

    Every key of the config is an option too. The same command goes on where a killed one stopped.
    """

    name: Positional[str]
    """A study, `list` or `all`."""
    seeds: str | None = None
    """Seeds, as in 0,1,2; empty: the study's own."""
    jobs: int = 1
    """Training runs side by side."""
    config: str = "quickstart"
    """Preset or YAML file that the study starts from."""
    work_dir: Path = Path("runs/studies")
    """Where warm starts and runs are kept; studies share them."""
    results_dir: Path = Path("bench/results/studies")
    """Where NAME.md, NAME.png, NAME.json and README.md go."""


Command = (
    Annotated[Train, subcommand("train")]
    | Annotated[Eval, subcommand("eval")]
    | Annotated[Calibrate, subcommand("calibrate")]
    | Annotated[Experiment, subcommand("experiment")]
    | Annotated[Config, subcommand("config")]
    | Annotated[Info, subcommand("info")]
)
OWN_OPTIONS: dict[str, dict[str, type]] = {
    "train": {"--resume": bool},
    "eval": {"--config": str, "--output-dir": str, "--trust-code": bool},
    "calibrate": {
        "--cloud-fraction": float, "--temperature": float, "--problems": int, "--accuracy": bool,
        "--config": str, "--output-dir": str, "--trust-code": bool,
    },
    "experiment": {"--seeds": str, "--jobs": int, "--config": str, "--work-dir": str, "--results-dir": str},
    "config": {},
    "info": {"--config": str},
}  # fmt: skip
"""What a command's options are, beside the config's keys; those of type bool take no value."""

WORDS = {
    "train": ("NAME",),
    "eval": ("CHECKPOINT",),
    "calibrate": ("CHECKPOINT",),
    "experiment": ("list | NAME | all",),
    "config": ("list | show", "NAME"),
    "info": (),
}
"""The words that a command takes before and between options."""


def main(argv: Sequence[str] | None = None) -> None:
    """Exit codes: 0 done, 1 failed, 2 a command or config to mend, 3 the cloud failed, 4 a signal ended the run (both
    saved what was trained)."""
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        _run(argv)
    except (Exception, Stopped) as error:
        if type(error).__name__ not in EXITS:
            raise
        print(f"gapg: {printable(' '.join(str(error).split()))}", file=sys.stderr)
        sys.exit(EXITS[type(error).__name__])
    except KeyboardInterrupt:
        print(f"gapg: interrupted; {INTERRUPTED.get(argv[0] if argv else '', 'nothing was begun')}", file=sys.stderr)
        sys.exit(130)


def _run(argv: list[str]) -> None:
    own, rest = _split(argv)
    _check_words(own)
    command = tyro.cli(Command, args=own, prog="gapg", description=__doc__)
    overrides = parse_overrides(rest)
    match command:
        case Train():
            with listening():  # from here on: the imports alone take seconds
                from gapg.commands.train import train_command

                train_command(command.config, overrides, resume=command.resume)
        case Eval(checkpoint, config, output_dir, trust_code):
            from gapg.commands.eval import evaluate_command

            evaluate_command(checkpoint, config, output_dir, overrides, trust_code=trust_code)
        case Experiment():
            _experiment(command, overrides)
        case Calibrate():
            from gapg.commands.calibrate import Wanted, calibrate_command

            wanted = Wanted(command.cloud_fraction, command.temperature, command.problems, command.accuracy)
            calibrate_command(
                command.checkpoint, wanted, command.config, command.output_dir, overrides, trust_code=command.trust_code
            )
        case Config():
            _config(command, overrides)
        case Info(config=str(name)):
            from gapg.model.memory import print_plan

            print_plan(load_config(name, overrides))
        case Info() if rest:
            raise ConfigError(f"{rest[0]}: belongs to a run, which --config NAME names")
        case Info():
            from gapg.commands.info import print_info

            print_info()


def _split(argv: list[str]) -> tuple[list[str], list[str]]:
    """(what tyro parses, config overrides): every option that is not the command's own is a key of the config.

    Values are joined to their options, so that tyro takes none that begins with a dash for an option. Raises
    ConfigError: an option of the command's own without a value, or with a wrong one.
    """
    own, overrides = argv[:1], []
    known = OWN_OPTIONS.get(argv[0], {}) if argv else {}
    queue = argv[1:]
    while queue:
        if not queue[0].startswith("-") or queue[0] in ("-h", "--help") or known.get(queue[0]) is bool:
            own.append(queue.pop(0))
            continue
        option, value = take_option(queue)
        kind = known.get(name := option.replace("_", "-"))
        if kind is None:
            overrides.append(option if value is None else f"{option}={value}")
        elif kind is bool:
            raise ConfigError(f"{option}: takes no value; leave it out for no")
        elif not value:
            raise ConfigError(needs_value(option))
        else:
            _check_kind(option, value, kind)
            own.append(f"{name}={value}")
    return own, overrides


def _check_kind(option: str, value: str, kind: type) -> None:
    try:
        kind(value)
    except ValueError:
        raise ConfigError(f"{option} {value}: must be {'a whole number' if kind is int else 'a number'}") from None


def _check_words(own: list[str]) -> None:
    """One line for what tyro would say in a box."""
    command, words = own[0] if own else "", [w for w in own[1:] if not w.startswith("-")]
    if "-h" in own or "--help" in own:
        return
    if command not in OWN_OPTIONS:
        said = f"{command!r} is no command" if command else "no command given"
        raise ConfigError(f"{said}; use gapg train, eval, calibrate, experiment, config or info (--help says more)")
    usage = f"usage: {' '.join(('gapg', command, *WORDS[command]))} [--key value …]; gapg {command} --help says more"
    if WORDS[command] and not words:
        raise ConfigError(usage)
    if spare := words[len(WORDS[command]) :]:
        raise ConfigError(f"{spare[0]!r}: one word too many; {usage}")


def _config(command: Config, overrides: dict[str, str]) -> None:
    if command.action == "list":
        print("\n".join(presets()))
    elif command.action == "show" and command.name:
        print(dump_config(load_config(command.name, overrides)), end="")
    else:
        raise ConfigError("usage: gapg config list | gapg config show NAME [--key value …]")


def _experiment(command: Experiment, overrides: dict[str, str]) -> None:
    from gapg.studies.catalog import STUDIES
    from gapg.studies.experiment import Order, experiment, list_studies, parse_seeds

    if command.name == "list":
        print(list_studies(STUDIES))
        return
    order = Order(
        command.name,
        parse_seeds(command.seeds),
        command.jobs,
        command.config,
        overrides,
        command.work_dir,
        command.results_dir,
    )
    if not experiment(order, STUDIES):
        sys.exit(1)
