"""The README's part about studies, from their committed JSON."""

import json

import studies
from record import ROOT


def test_the_readme_shows_what_is_committed() -> None:
    records = {path.stem: json.loads(path.read_text()) for path in sorted(studies.RESULTS.glob("*.json"))}
    text = studies.block(records)
    begin, end = studies.MARKERS
    assert f"{begin}\n{text}\n{end}" in (ROOT / "README.md").read_text(), "python bench/studies.py draws it again"
    for name in studies.SHOWN:
        for said in records[name]["conclusions"]:
            assert said in text, "also where GAPG buys nothing"
    assert all(f"README.md#{name}" in text for name in records)
