"""`gapg` and `python -m gapg`."""

import sys


def main() -> None:
    """Runs the command line. Without the extra `train` it says what to install, and exits with 2."""
    try:
        from gapg.commands.cli import main as run
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0].startswith("gapg"):
            raise
        print(
            f"gapg: {error.name} is not installed; the commands need the trainer: pip install 'gapg[train]'",
            file=sys.stderr,
        )
        sys.exit(2)
    run()


if __name__ == "__main__":
    main()
