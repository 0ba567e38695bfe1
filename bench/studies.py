"""The README's part about studies, drawn from bench/results/studies; `gapg experiment` makes what lies there.

python bench/studies.py
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
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
    table = record["tables"][0]
    rows = [table["columns"], ["---"] * len(table["columns"]), *table["cells"]]
    lines = "\n".join("| " + " | ".join(row) + " |" for row in rows)
    seeds = ", ".join(map(str, record["seeds"]))
    return f"{table['title']} (`{record['command']}`, seeds {seeds}):\n\n{lines}\n\n{' '.join(record['conclusions'])}"


def main() -> None:
    records = {path.stem: json.loads(path.read_text()) for path in sorted(RESULTS.glob("*.json"))}
    text = block(records)
    print(text)
    begin, end = map(re.escape, MARKERS)
    readme = ROOT / "README.md"
    drawn = f"{MARKERS[0]}\n{text}\n{MARKERS[1]}"
    readme.write_text(re.sub(f"{begin}.*?{end}", lambda _: drawn, readme.read_text(), flags=re.DOTALL))


if __name__ == "__main__":
    main()
