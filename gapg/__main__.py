"""`gapg` and `python -m gapg`."""

import sys
from importlib.util import find_spec

TRAINER = (
    "pydantic", "yaml", "rich", "transformers", "tokenizers", "safetensors", "huggingface_hub", "datasets", "scipy",
    "sympy", "filelock", "matplotlib", "tensorboard", "openai", "math_verify",
)  # fmt: skip
"""What the extra `train` adds to the core, by what is imported."""


def main() -> None:
    """Runs the command line. Where a part of the extra `train` is missing: one line that says so, and exit code 2."""
    try:
        from gapg.commands.cli import main as run

        run()
    except ModuleNotFoundError as error:
        missing = [name for name in TRAINER if find_spec(name) is None]
        # transformers names none, where what it needs itself is missing
        if not missing or (error.name or "transformers").partition(".")[0] not in TRAINER:
            raise
        print(
            f"gapg: {missing[0]} is not installed; the commands need the trainer: pip install 'gapg[train]'",
            file=sys.stderr,
        )
        sys.exit(2)


if __name__ == "__main__":
    main()
