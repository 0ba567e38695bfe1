"""The command line: which command is meant, and errors as one line and an exit code. Imports no torch by itself."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import distributions

from gapg.commands import options
from gapg.console import printable
from gapg.errors import ConfigError
from gapg.runs.stop import Stopped, listening

EXITS = {"ConfigError": 2, "OracleDown": 3, "Stopped": 4, "Diverged": 1, "DiskFull": 1, "WorkFailed": 1}
"""Exit codes of errors that say all in one line, WorkFailed for a study's; by name, because importing some of them
would import torch."""

AGAIN = "what was under way was not written; run it again (paid answers are kept)"
INTERRUPTED = {"eval": AGAIN, "calibrate": AGAIN}


def main(argv: Sequence[str] | None = None) -> None:
    """Exit codes: 0 done, 1 failed, 2 a command or config to mend, 3 the cloud failed, 4 a signal ended the run (both
    saved what was trained)."""
    argv = list(sys.argv[1:] if argv is None else argv)
    with one_line_errors(INTERRUPTED.get(argv[0] if argv else "", "nothing was begun")):
        _run(argv)


@contextmanager
def one_line_errors(interrupted: str) -> Iterator[None]:
    """Turns errors that say all in one line into that line on stderr and an exit code; Ctrl-C into `interrupted`."""
    try:
        yield
    except (Exception, Stopped) as error:
        if type(error).__name__ not in EXITS:
            raise
        print(f"gapg: {printable(' '.join(str(error).split()))}", file=sys.stderr)
        sys.exit(EXITS[type(error).__name__])
    except KeyboardInterrupt:
        print(f"gapg: interrupted; {interrupted}", file=sys.stderr)
        sys.exit(130)


def _run(argv: list[str]) -> None:
    command, args = (argv[0], argv[1:]) if argv else ("", [])
    if command == "--version":
        found = next((d.version for d in distributions(name="gapg")), "of a source tree that is not installed")
        _print(f"gapg {found}")
        return
    if "-h" in argv or "--help" in argv:
        from gapg.commands.reference import help_text

        _print(help_text(command if command in options.COMMANDS else None))
        return
    if command == "experiment":
        raise ConfigError("experiment is no command any more: studies are `python bench/study.py NAME` in the sources")
    if command not in options.COMMANDS:
        said = f"{command!r} is no command" if command else "no command given"
        raise ConfigError(f"{said}; use gapg {', '.join(options.COMMANDS)} (--help says more)")
    match options.parse(command, args):
        case options.Train(name=name, resume=resume), overrides:
            with listening():  # from here on: the imports alone take seconds
                from gapg.commands.train import train_command

                train_command(name, overrides, resume=resume)
        case options.Eval() as wanted, overrides:
            from gapg.commands.eval import evaluate_command

            evaluate_command(wanted, overrides)
        case options.Calibrate() as wanted, overrides:
            from gapg.commands.calibrate import calibrate_command

            calibrate_command(wanted, overrides)
        case options.Config() as wanted, overrides:
            from gapg.commands.config import config_text

            _print(config_text(wanted, overrides))
        case options.Info() as wanted, overrides:
            from gapg.commands.info import info_command

            info_command(wanted, overrides)


def _print(text: str) -> None:
    try:
        print(text, flush=True)
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or it fails once more at the end
        if not isinstance(error, BrokenPipeError):  # `| head` has read enough
            raise ConfigError(f"standard output cannot be written: {error.strerror}") from None
