"""--help and docs/configuration.md say every key, and neither they nor the start of a command need torch."""

import os
import re
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

from gapg.__main__ import TRAINER
from gapg.commands.cli import main
from gapg.commands.options import COMMANDS
from gapg.commands.reference import groups, markdown, option
from gapg.config import RunConfig, load_config
from gapg.config_keys import find, keys, sections

ROOT = Path(__file__).parents[2]


def said(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    main(argv)
    return capsys.readouterr().out


def test_train_s_help_has_every_key_with_its_meaning(capsys: pytest.CaptureFixture[str]) -> None:
    lines = said(capsys, "train", "--help").splitlines()
    for key in keys(RunConfig):
        at = [i for i, line in enumerate(lines) if f"{line} ".startswith(f"  {option(key)} ")]
        if any(sections(kind) for kind in find(RunConfig, key)):
            assert any(line.startswith(key) for line in lines), key
        else:
            assert len(at) == 1, key
            assert lines[at[0] + 1].startswith(" " * 6), f"{key}: what does it mean?"
    assert max(map(len, lines)) <= 120


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_s_help_has_its_own_options_and_no_other(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    out = said(capsys, command, "--help")
    assert out == said(capsys, command, "x", "-h")
    assert out.startswith(f"usage: gapg {command}")
    model = COMMANDS[command]
    for name in model.model_fields:
        assert (name.upper() if name in model.words else option(name)) in out
    assert "--no-" not in out, "which is no option"


def test_defaults_are_those_of_the_config() -> None:
    shown = {key.name: key.default for group in groups(RunConfig) for key in group.keys}
    assert shown["task.name"] == "required"
    assert (shown["optim.lr"], shown["warm_start.optim.lr"], shown["optim.betas"]) == ("5e-06", "0.003", "0.9,0.98")
    assert (shown["budget.filter"], shown["loss.clip"], shown["task.args"]) == ("true", "empty", "empty")
    # as options they change nothing
    given = {key: value for key, value in shown.items() if value not in ("required", "empty")}
    given = {key: value for key, value in given.items() if not key.startswith(("warm_start", "model.lora"))}
    assert load_config("quickstart", given | {"output_dir": "runs/quickstart"}).optim == RunConfig(task="x").optim  # type: ignore[arg-type]


def test_the_page_of_the_docs_is_this_config_s() -> None:
    made = "`python -m gapg.commands.reference > docs/configuration.md` makes it anew"
    assert (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8") == markdown(), made


@pytest.mark.parametrize("argv", [["--help"], ["train", "--help"], ["config", "list"], ["--version"]])
def test_a_start_that_needs_no_torch_imports_none(argv: list[str]) -> None:
    slow = "('torch', 'transformers', 'datasets', 'matplotlib', 'scipy')"
    code = (
        f"import sys; from gapg.commands.cli import main\ntry: main({argv})\nexcept SystemExit: pass\n"
        f"print([name for name in {slow} if name in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.splitlines()[-1] == "[]"


def test_the_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert said(capsys, "--version").startswith("gapg 0.")


@pytest.mark.parametrize("argv", [["--help"], ["train", "--help"], ["config", "show", "quickstart"], ["--version"]])
def test_a_reader_that_has_read_enough_is_no_error(argv: list[str]) -> None:
    """As in `gapg config show quickstart | head -1`, where head has ended."""
    reads, writes = os.pipe()
    os.close(reads)
    done = subprocess.run([sys.executable, "-m", "gapg", *argv], stdout=writes, stderr=subprocess.PIPE, text=True)
    os.close(writes)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
def test_a_full_disk_below_the_output_is_one_line() -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "gapg", "config", "list"], stdout=full, stderr=subprocess.PIPE, text=True
        )
    said = "gapg: standard output cannot be written: No space left on device\n"
    assert (done.returncode, done.stderr) == (2, said)


def asks_for(*lines: str) -> set[str]:
    return {re.split("[<>=;]", line)[0].lower().replace("_", "-") for line in lines}


def test_what_the_trainer_needs_is_known_by_name() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    providers = packages_distributions()
    found = {name for module in TRAINER for name in asks_for(*providers[module])}
    assert found == asks_for(*project["optional-dependencies"]["train"]) - asks_for(*project["dependencies"])


@pytest.mark.parametrize("module", ["pydantic", "rich", "transformers", "safetensors", "scipy"])
def test_a_part_of_the_trainer_that_is_missing_is_one_line(module: str) -> None:
    """Wherever it is missed first: other packages may have brought some parts, and not all."""
    code = f"import sys; sys.modules[{module!r}] = None; from gapg.__main__ import main; main()"
    argv = [sys.executable, "-c", code, "train", "quickstart", "--model.path", "/no/such/model"]
    done = subprocess.run(argv, capture_output=True, text=True)
    said = f"gapg: {module} is not installed; the commands need the trainer: pip install 'gapg[train]'\n"
    assert (done.returncode, done.stdout, done.stderr) == (2, "", said)
