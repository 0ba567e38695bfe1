"""The README's part about studies, drawn from bench/results/studies; `gapg experiment` makes what lies there.

python bench/studies.py
"""

from __future__ import annotations

import json
from typing import Any

from gapg.studies.experiment import markdown
from record import ROOT, draw_between

RESULTS = ROOT / "bench" / "results" / "studies"
MARKERS = ("<!-- studies: drawn by bench/studies.py -->", "<!-- end of studies -->")
SHOWN = ("baselines", "budgets")
"""Studies whose first table and sentences are shown; the others are a line."""


def block(records: dict[str, dict[str, Any]]) -> str:
    """The shown studies' first table and conclusions, then a line a study that leads to the whole."""
    parts = [_shown(records[name]) for name in SHOWN if name in records]
    rest = [
        f"- [{name}](bench/results/studies/README.md#{name}): {record['question']}" for name, record in records.items()
    ]
    return "\n\n".join([*parts, "\n".join(rest)])


def _shown(record: dict[str, Any]) -> str:
    table, seeds = record["tables"][0], ", ".join(map(str, record["seeds"]))
    title = f"{table['title']} (`{record['command']}`, seeds {seeds}):"
    return f"{markdown({**table, 'title': title})}\n\n{' '.join(record['conclusions'])}"


def main() -> None:
    records = {path.stem: json.loads(path.read_text()) for path in sorted(RESULTS.glob("*.json"))}
    text = block(records)
    print(text)
    draw_between(ROOT / "README.md", MARKERS, text)


if __name__ == "__main__":
    main()
