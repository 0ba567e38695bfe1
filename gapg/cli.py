"""The command line: `gapg train`, `eval`, `calibrate`, `experiment`, `config`, `info`. Orchestrates only."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro
from tyro.conf import FlagCreatePairsOff, Positional, subcommand

from gapg.config import ConfigError, RunConfig, dump_config, load_config, parse_overrides, presets
from gapg.config_keys import needs_value, take_option

if TYPE_CHECKING:
    from gapg.tasks.base import Task

EXIT_FAILED, EXIT_USAGE, EXIT_ORACLE = 1, 2, 3


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
    "eval": {"--config": str, "--output-dir": str},
    "calibrate": {
        "--cloud-fraction": float, "--temperature": float, "--problems": int, "--accuracy": bool,
        "--config": str, "--output-dir": str,
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
    """Exit codes: 0 done, 1 failed, 2 a command or config to mend, 3 the oracle stayed away (the run was saved)."""
    try:
        own, rest = _split(list(sys.argv[1:] if argv is None else argv))
        _check_words(own)
        command = tyro.cli(Command, args=own, prog="gapg", description=__doc__)
        overrides = parse_overrides(rest)
        match command:
            case Train():
                _train(_run_config(command, overrides), resume=command.resume)
            case Eval():
                from gapg.use.evaluate_command import evaluate_command

                evaluate_command(command.checkpoint, command.config, command.output_dir, overrides)
            case Experiment():
                _experiment(command, overrides)
            case Calibrate():
                from gapg.use.calibrate_command import Wanted, calibrate_command

                wanted = Wanted(command.cloud_fraction, command.temperature, command.problems, command.accuracy)
                calibrate_command(command.checkpoint, wanted, command.config, command.output_dir, overrides)
            case Config():
                _config(command, overrides)
            case Info(config=str(name)):
                from gapg.memory import print_plan

                print_plan(load_config(name, overrides))
            case Info() if rest:
                raise ConfigError(f"{rest[0]}: belongs to a run, which --config NAME names")
            case Info():
                from gapg.info import print_info

                print_info()
    except ConfigError as error:
        print(f"gapg: {error}", file=sys.stderr)
        sys.exit(EXIT_USAGE)
    except KeyboardInterrupt:
        print("gapg: interrupted; go on with --resume (a study: with the same command)", file=sys.stderr)
        sys.exit(130)


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


def _run_config(command: Train, overrides: dict[str, str]) -> RunConfig:
    """The named config; on a resume the one the run was started with, so that its options need not be given again."""
    config = load_config(command.config, overrides)
    saved = config.output_dir / "config.yaml"
    return load_config(str(saved), overrides) if command.resume and saved.exists() else config


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
        sys.exit(EXIT_FAILED)


def _train(config: RunConfig, *, resume: bool) -> None:
    """Checks everything cheap first, then: warm start, GAPG, and an evaluation or, with `compare`, the comparison."""
    from gapg.folder import open_folder, save_config
    from gapg.health import Diverged
    from gapg.model import load_tokenizer
    from gapg.parts import check_run, make_oracle, make_reward, make_task
    from gapg.reward import try_reward
    from gapg.run import set_threads
    from gapg.studies import compare
    from gapg.tracking import say
    from gapg.train import OracleDown
    from gapg.use.calibrate import help_control
    from gapg.warm_start import check_demonstrations, warm_start

    task = make_task(config)
    reward = make_reward(config)
    tokenizer = load_tokenizer(config.model, task)
    check_run(config, task, tokenizer)
    check_demonstrations(config, task, tokenizer)
    try_reward(reward, config, task)
    if config.compare:
        help_control(tokenizer)  # the comparison masks and biases the phrase: a ConfigError where it cannot
        try_reward(reward, compare.task_tuned_config(config), task)
    with open_folder(config, resume=resume):
        make_oracle(config, task, config.output_dir).close()
        save_config(config)
        rho, folder = config.budget.exact_rho, config.output_dir
        say(f"cloud budget {config.budget.cloud_fraction:.0%} of problems: rho = {rho}; {folder}/")
        set_threads(config)
        begin = folder / "warm-start" / "checkpoints"
        try:
            warm = warm_start(config, begin, task, tokenizer) if config.warm_start else None
            _gapg(config, task, warm)
        except OracleDown as error:
            print(f"gapg: {error}", file=sys.stderr)
            sys.exit(EXIT_ORACLE)
        except (Diverged, compare.BaselineFailed) as error:
            print(f"gapg: {error}", file=sys.stderr)
            sys.exit(EXIT_FAILED)


def _gapg(config: RunConfig, task: Task, warm: Path | None) -> None:
    from gapg.run import Run, build_run, set_threads
    from gapg.studies import compare
    from gapg.tracking import say
    from gapg.train import train
    from gapg.use.evaluate_command import evaluate
    from gapg.use.validate import validate

    folder = config.output_dir
    baseline = compare.start_task_tuned(config, warm) if config.compare else None
    set_threads(config, side_by_side=2 if config.compare else 1)
    run = build_run(config, folder, task, warm)

    def watch_and_validate(run: Run) -> dict[str, float]:
        if baseline is not None:
            compare.check_alive(baseline, folder)
        return validate(run)

    try:
        if baseline is not None and run.state.step == 0:
            compare.assess_before_training(run)
        train(run, watch_and_validate)
        model = run.save() / "model"
        say(f"trained: {model}")
        if baseline is not None:
            compare.finish(run, baseline)
        elif config.eval.heldout != 0:
            evaluate(config, folder, task, run.tokenizer, run.engine, run.oracle, model=str(model))
    finally:
        run.close()
