"""What holds for every script in bench/: it hides no package, and the docs' tables are the committed results."""

import re
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
