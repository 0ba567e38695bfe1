"""The committed figures: their tables are drawn from the rows of their JSON, and their pages are as drawn."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from studies.catalog import STUDIES
from studies.report import draw_readme, overview, section
from studies.statistics import t_interval
from study import COMMITTED, LINK, MARKERS, PAGE, SHOWN


def committed(name: str) -> dict[str, Any]:
    return dict(json.loads((COMMITTED / f"{name}.json").read_text()))


@pytest.mark.parametrize("name", STUDIES)
def test_every_printed_digit_comes_from_the_rows(name: str) -> None:
    """The JSON also holds the tables as they were printed when the study was made."""
    record = committed(name)
    drawn = {table.title: table for table in STUDIES[name].tables(record)}
    for table in record["tables"]:
        made = drawn[table["title"]]
        shown = len(table["columns"])  # verdicts were added after them
        assert list(made.columns[:shown]) == table["columns"]
        assert [list(cells[:shown]) for cells in made.cells] == table["cells"]
    assert (COMMITTED / f"{name}.md").read_text() == f"# {name}\n\n{section(STUDIES[name], record)}"


@pytest.mark.parametrize("name", STUDIES)
def test_intervals_are_those_of_the_seeds(name: str) -> None:
    for d in committed(name)["comparisons"]:
        if len(d["per_seed"]) > 1:
            assert (d["low"], d["high"]) == pytest.approx(t_interval(d["per_seed"]), abs=1e-12)
            assert d["mean"] == pytest.approx(sum(d["per_seed"]) / len(d["per_seed"]))


def test_the_pages_of_all_studies_are_as_drawn(tmp_path: Path) -> None:
    """`python bench/study.py --redraw` draws them again."""
    for path in COMMITTED.glob("*.json"):
        shutil.copy(path, tmp_path)
    draw_readme(STUDIES, tmp_path)
    assert (tmp_path / "README.md").read_text() == (COMMITTED / "README.md").read_text()
    drawn = overview(STUDIES, COMMITTED, SHOWN, LINK)
    assert f"{MARKERS[0]}\n{drawn}\n{MARKERS[1]}" in PAGE.read_text()
