"""What holds for every script in bench/: it hides no package, the docs' commands are its own, and their tables are the
committed results."""

import contextlib
import importlib
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
import transformers.utils.import_utils

import heads
import heads_report
import record
import update_step
import update_step_report
from peers import updates

BENCH = record.ROOT / "bench"
PAGES = [record.ROOT / name for name in ("README.md", "CONTRIBUTING.md")]
PAGES += [*record.ROOT.glob("docs/*.md"), *BENCH.glob("*.md"), *BENCH.glob("*.py")]


def commands() -> dict[str, set[str]]:
    """The options that the docs, and the scripts' own, give to each script of bench/."""
    found: dict[str, set[str]] = {}
    for page in PAGES:
        for name, rest in re.findall(r"(?:\bbench/|`)(\w+)\.py\b([^`\n#|]*)", page.read_text()):
            found.setdefault(name, set()).update(re.findall(r" (--[a-z-]+)", rest))
    return found


def helped(name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> str:
    """What a script says of its options."""
    if name == "tiles":  # it sets a variable that Triton reads when it is imported
        command = [sys.executable, str(BENCH / "tiles.py"), "--help"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout
    monkeypatch.setattr(sys, "argv", [f"{name}.py", "--help"])
    with contextlib.suppress(SystemExit):
        importlib.import_module(name).main()
    return capsys.readouterr().out


SCRIPTS = sorted(path.stem for path in BENCH.glob("*.py") if "\ndef main(" in path.read_text())


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_has_the_options_that_the_docs_give_it(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = helped(name, monkeypatch, capsys)
    assert "python bench/" in text
    assert not {option for option in commands()[name] if option not in text}, "the docs give it others"


def test_the_docs_name_no_script_that_is_not_there() -> None:
    named = {script for page in PAGES for script in re.findall(r"\bbench/([\w/]+\.(?:py|sh))\b", page.read_text())}
    assert not {script for script in named if not (BENCH / script).exists()} - {"NAME.py"}
    assert len(SCRIPTS) > 8 and {f"{script}.py" for script in SCRIPTS} <= named


def test_no_script_hides_a_package() -> None:
    """A script's folder comes first on sys.path: `kernels.py` there would be taken for Hugging Face's `kernels`, which
    transformers looks for when it is imported."""
    names = {path.stem for path in BENCH.iterdir() if path.suffix == ".py" or path.is_dir()} - {"__pycache__"}
    optional = Path(transformers.utils.import_utils.__file__).read_text()
    wanted = set(re.findall(r'_is_package_available\("([\w.]+)"', optional))
    assert "kernels" in wanted and len(wanted) > 50
    assert not names & (wanted | set(metadata.packages_distributions()) | sys.stdlib_module_names)


@pytest.mark.parametrize(
    ("markers", "text"),
    [
        (heads_report.MARKERS, heads_report.error_table(record.read(heads.RESULTS / "errors-cpu.json")["rows"])),
        (
            update_step_report.MARKERS,
            update_step_report.counted_table(record.read(update_step.COUNTED)["rows"], list(updates.PEERS)),
        ),
    ],
    ids=["heads", "update_step"],
)
def test_the_page_of_benchmarks_shows_what_is_committed(markers: tuple[str, str], text: str) -> None:
    begin, end = markers
    page = (record.ROOT / "docs" / "benchmarks.md").read_text()
    assert f"{begin}\n{text}\n{end}" in page, "python bench/heads.py (or update_step.py) --table docs/benchmarks.md"
