"""The committed figures: their tables are drawn from the rows of their JSON, and their pages are as drawn."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from studies.baselines import differences
from studies.catalog import STUDIES
from studies.report import draw_readme, overview, section
from studies.statistics import t_interval
from study import COMMITTED, LINK, MARKERS, PAGE, SHOWN


def committed(name: str) -> dict[str, Any]:
    return dict(json.loads((COMMITTED / f"{name}.json").read_text()))


MADE = sorted(path.stem for path in COMMITTED.glob("*.json"))


@pytest.mark.parametrize("name", MADE)
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


@pytest.mark.parametrize("name", MADE)
def test_intervals_are_those_of_the_seeds(name: str) -> None:
    for d in committed(name)["comparisons"]:
        if len(d["per_seed"]) > 1:
            assert (d["low"], d["high"]) == pytest.approx(t_interval(d["per_seed"]), abs=1e-12)
            assert d["mean"] == pytest.approx(sum(d["per_seed"]) / len(d["per_seed"]))


def test_an_older_record_has_the_later_call_fractions_from_its_curves() -> None:
    """70 and 90% called were compared later: a seed's difference is that of its two curves there."""
    record = committed("baselines")
    said = {d.get("cloud_fraction") for d in record["comparisons"]}
    later = [d for d in differences(record) if "cloud_fraction" in d and d["cloud_fraction"] not in said]
    assert {d["cloud_fraction"] for d in later} == {0.7, 0.9} or not later
    # the same way, one that is on record comes out as on record
    without = record | {"comparisons": [d for d in record["comparisons"] if d.get("cloud_fraction") != 0.2]}
    at_20 = {d["b"]: d for d in record["comparisons"] if d.get("cloud_fraction") == 0.2}
    again = [d for d in differences(without) if d.get("cloud_fraction") == 0.2]
    assert len(again) == len(at_20) > 10
    for d in again:
        assert d["per_seed"] == pytest.approx(at_20[d["b"]]["per_seed"], abs=2e-5)


def test_the_pages_of_all_studies_are_as_drawn(tmp_path: Path) -> None:
    """`python bench/study.py --redraw` draws them again."""
    for path in COMMITTED.glob("*.json"):
        shutil.copy(path, tmp_path)
    draw_readme(STUDIES, tmp_path)
    assert (tmp_path / "README.md").read_text() == (COMMITTED / "README.md").read_text()
    drawn = overview(STUDIES, COMMITTED, SHOWN, LINK)
    assert f"{MARKERS[0]}\n{drawn}\n{MARKERS[1]}" in PAGE.read_text()
