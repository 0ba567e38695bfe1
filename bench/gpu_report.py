"""One page of whatever the stages of `bench/gpu.sh` brought back from a card, and a sentence about it for other pages.

    python bench/gpu_report.py bench/results/nvidia-h200          # README.md in that folder
    python bench/gpu_report.py bench/results/nvidia-h* --readme README.md docs/benchmarks.md    # and between markers

Nothing on the page is typed: a stage that did not come back is missing from it, and what failed stands under its own
heading with its reason.
"""

from __future__ import annotations

import argparse
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import heads_report
import record
import roofline
import update_step_report
from gapg_kernels.tiles import TILES
from gpu_goals import Goal, goals
from record import Row

MARKERS = ("<!-- gpu: drawn by bench/gpu_report.py --readme -->", "<!-- end of gpu -->")
RECORDS = {
    "kernels": "kernels/kernels-{}.json",
    "errors": "kernels/errors-{}.json",
    "tiles": "tiles/tiles-{}.json",
    "update": "update_step/{}.json",
    "shared": "shared_prompt/{}.json",
    "peers": "peers/kernels-{}.json",
    "cutlass": "cutlass/kernels-{}.json",
    "attention": "attention/{}.json",
}
"""What the stages leave, by device: A the first three, B the next two, C the rest."""
HEADS = ("kernels", "tiles", "peers", "cutlass")
"""Those with times that the roofline predicts."""


@dataclass(frozen=True)
class Results:
    """What came back from one card: records by name, and every step as (stage, step, seconds, limit, verdict)."""

    folder: Path
    records: dict[str, dict[str, Any]]
    steps: list[tuple[str, ...]]
    unreadable: list[str]

    @property
    def machine(self) -> dict[str, Any]:
        """Of any record: they are all of one card."""
        return next(iter(self.records.values()))["machine"]

    @property
    def device(self) -> str:
        """The card, or "cpu"."""
        return self.machine["device"]

    def rows(self, name: str) -> list[Row]:
        """Those of a record; none where it did not come back."""
        return self.records[name]["rows"] if name in self.records else []


def load(folder: Path) -> Results:
    """Raises ValueError for a folder without any record, or with those of two cards."""
    records, unreadable = {}, []
    for name, pattern in RECORDS.items():
        for device in ("cpu", "cuda"):  # a card's record takes the place of a dry run's
            path = folder / pattern.format(device)
            if not path.exists():
                continue
            try:
                records[name] = record.read(path)
            except ValueError:
                unreadable.append(str(path.relative_to(folder)))
    devices = {found["machine"]["device"] for found in records.values()}
    if len(devices) != 1:
        what = f"holds records of {', '.join(sorted(devices))}: one folder a card" if devices else "holds no record"
        raise ValueError(f"{folder} {what}; bench/gpu.sh makes them")
    steps = []
    for path in sorted(folder.glob("steps-?.tsv")):
        lines = [line.split("\t") for line in path.read_text().splitlines()[1:]]
        steps += [(path.stem[-1], *line) for line in lines if len(line) == 4]
    return Results(folder, records, steps, unreadable)


# --- the page --------------------------------------------------------------------------------------------------------


def page(results: Results) -> str:
    """Markdown, one section for each thing that was measured."""
    measured = results.device != "cpu"
    title = results.device if measured else "A dry run on a CPU: no measurement of any GPU"
    lines = [f"# {title}", "", *_provenance(results), ""]
    if measured:
        lines += [_goals(goals(results.rows)), ""]
    for heading, section in (
        ("The head", _tables(results, "kernels")),
        ("The roofline beside it", _roofline(results)),
        ("Tiles", _tables(results, "tiles")),
        ("The head's peers", _tables(results, "peers")),
        ("Its peers on CUTLASS", _tables(results, "cutlass")),
        ("Errors", _errors(results.rows("errors"))),
        ("One update", _update(results)),
        ("One prompt for its responses", _values(results.rows("shared"))),
        ("Attention", _values(results.rows("attention"))),
        ("What failed", _failed(results)),
        ("Steps", _table(("stage", "step", "seconds", "at most", ""), results.steps, right=(2, 3))),
    ):
        found = list(section)
        if found:
            lines += [f"## {heading}", "", *found, ""]
    return "\n".join(lines)


def _block(text: str) -> str:
    """Text as it stands in a terminal."""
    return f"```\n{text.strip(chr(10))}\n```"


def _provenance(results: Results) -> Iterator[str]:
    for name, found in results.records.items():
        machine, versions = found["machine"], found["versions"]
        card = f"driver {machine.get('driver')}, CUDA {machine.get('cuda')}, " if "driver" in machine else ""
        packages = ", ".join(f"{key} {versions[key]}" for key in ("torch", "triton", "transformers") if key in versions)
        yield f"- {name}: revision {_short(found)}, {card}{packages}"


def _short(found: dict[str, Any]) -> str:
    """A record's revision in twelve digits, and whether files differed from it."""
    revision, _, dirty = found["revision"].partition("+")
    return revision[:12] + ("+dirty" if dirty else "")


def _goals(found: list[Goal]) -> str:
    verdicts = {True: "met", False: "**not met**", None: "not measured"}
    lines = [(goal.what, goal.wanted, goal.shown, verdicts[goal.met]) for goal in found]
    return record.markdown(("goal", "wanted", "measured", ""), lines, right=(2,))


def _picture(results: Results, name: str) -> Iterator[str]:
    """The one that the stage has left beside a record, if it has."""
    picture = Path(RECORDS[name].format("cpu" if results.device == "cpu" else "cuda")).with_suffix(".png")
    if (results.folder / picture).exists():
        yield f"![times beside those of the others]({picture.as_posix()})\n"


def _tables(results: Results, name: str) -> Iterator[str]:
    """The picture, then a block a case of the head or of the sweep of tiles, whose winner is named."""
    if results.rows(name):
        yield from _picture(results, name)
    for case, part in record.by_case(results.rows(name)).items():
        times = {row["impl"]: row["median"] for row in part if row.get("metric") == "time"}
        if not times:
            continue
        yield _block(heads_report.table(case, part))
        tiles = [impl for impl in times if impl in TILES[9, 0]]
        if tiles:
            yield f"\n**{min(tiles, key=times.__getitem__)}** wins.\n"


def _update(results: Results) -> Iterator[str]:
    if results.rows("update"):
        yield from _picture(results, "update")
        yield _block(update_step_report.summary(results.rows("update")))


def _roofline(results: Results) -> Iterator[str]:
    for name in HEADS:
        if name in results.records:
            try:
                yield _block(roofline.compare(results.records[name])) + "\n"
            except ValueError as error:  # a card that has no prediction
                yield f"{error}.\n"


def _errors(rows: list[Row]) -> Iterator[str]:
    if rows:
        yield "Relative error of dH, and the worst error of a log-prob in nats, against float64:\n"
        yield heads_report.error_table(rows)


def _values(rows: list[Row]) -> Iterator[str]:
    measured = [row for row in rows if "median" in row]
    lines = [(row["case"], row["impl"], row["metric"], f"{row['median']:.4g}", row["unit"]) for row in measured]
    return _table(("case", "", "metric", "value", "unit"), lines, right=(3,))


def _table(head: Sequence[str], lines: Sequence[Sequence[str]], right: Sequence[int]) -> Iterator[str]:
    if lines:
        yield record.markdown(head, lines, right)


def _failed(results: Results) -> Iterator[str]:
    for stage, name, _, limit, verdict in results.steps:
        if verdict != "ok":
            yield f"- stage {stage}, {name}: {verdict}" + (f" of {limit} s" if "limit" in verdict else "")
    yield from (f"- {path} cannot be read" for path in results.unreadable)
    for name, found in results.records.items():
        reasons = Counter((row["impl"], row["error"]) for row in found["rows"] if "error" in row)
        for (impl, why), count in reasons.items():
            yield f"- {name}, {impl} ({count} case{'s' * (count > 1)}): {why}"


# --- the line of a page ----------------------------------------------------------------------------------------------


def status(results: Results, into: Path) -> str:
    """One sentence of a card: what was measured there, each goal with its figure, and where the report is.

    Raises ValueError for a dry run, and for a folder that a link of the page ``into`` would not find elsewhere.
    """
    if results.device == "cpu":
        raise ValueError(f"{results.folder} is a dry run on a CPU: it says nothing of a GPU")
    folder = results.folder.resolve()
    if folder.parent.parts[-2:] != ("bench", "results"):
        raise ValueError(f"{results.folder} is not in bench/results: copy it there first")
    found = goals(results.rows)
    said = "; ".join(f"{goal.what}: {goal.shown}, wanted {goal.wanted}" for goal in found if goal.met is not None)
    missing = ", ".join(goal.what for goal in found if goal.met is None)
    revision = _short(next(iter(results.records.values())))
    link = Path(os.path.relpath(folder / "README.md", into.resolve().parent)).as_posix()
    text = f"**Measured on an {results.device}** ([report]({link}), revision {revision}): {said}."
    return text + (f" Not measured: {missing}." if missing else "")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", type=Path, nargs="+", metavar="FOLDER", help="what the stages of one card left")
    parser.add_argument("--readme", type=Path, nargs="+", default=[], help="draw all folders' status into these pages")
    given = parser.parse_args(argv)
    with record.refusing(parser):
        cards = [load(folder) for folder in given.folders]
        lines = {readme: "\n\n".join(status(card, readme) for card in cards) for readme in given.readme}
        for card in cards:
            text = page(card)
            (card.folder / "README.md").write_text(text)
            print(text)
        for readme, text in lines.items():
            record.draw_between(readme, MARKERS, text)


if __name__ == "__main__":
    main()
