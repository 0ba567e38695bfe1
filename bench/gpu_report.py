"""One page of whatever the stages of `bench/gpu.sh` brought back from a card, and the README's line about it.

    python bench/gpu_report.py bench/results/nvidia-h200                     # README.md and report.png in that folder
    python bench/gpu_report.py bench/results/nvidia-h* --readme README.md    # and the line between that file's markers

Nothing on the page is typed: a stage that did not come back is missing from it, and what failed stands under its own
heading with its reason.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gpu_report_picture as picture
import heads_report
import record
import roofline
import update_step_report
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
}
"""What the stages leave, by device: A the first three, B the next two, C the rest."""


@dataclass(frozen=True)
class Results:
    """What came back from one card: records by name, and every step as (stage, step, seconds, limit, verdict)."""

    folder: Path
    records: dict[str, dict[str, Any]]
    steps: list[tuple[str, str, str, str, str]]
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
            found = _read(path)
            if found is None:
                unreadable.append(str(path.relative_to(folder)))
            else:
                records[name] = found
    devices = {found["machine"]["device"] for found in records.values()}
    if len(devices) != 1:
        what = f"holds records of {', '.join(sorted(devices))}: one folder a card" if devices else "holds no record"
        raise ValueError(f"{folder} {what}; bench/gpu.sh makes them")
    steps = []
    for path in sorted(folder.glob("steps-?.tsv")):
        lines = [line.split("\t") for line in path.read_text().splitlines()[1:]]
        steps += [(path.stem[-1], *line) for line in lines if len(line) == 4]
    return Results(folder, records, steps, unreadable)


def _read(path: Path) -> dict[str, Any] | None:
    """A record; None where the file is none, or was cut off."""
    try:
        found = record.read(path)
    except ValueError:
        return None
    whole = isinstance(found, dict) and {"rows", "machine", "revision", "versions"} <= found.keys()
    return found if whole else None


# --- the page --------------------------------------------------------------------------------------------------------


def page(results: Results) -> str:
    """Markdown, one section for each thing that was measured."""
    measured = results.device != "cpu"
    title = results.device if measured else "A dry run on a CPU: no measurement of any GPU"
    lines = [f"# {title}", "", *_provenance(results), ""]
    if measured:
        lines += ["![ratios, roofline, errors and the update](report.png)", "", *_goals(goals(results)), ""]
    for heading, section in (
        ("The head", _head(results.rows("kernels"))),
        ("The roofline beside it", _roofline(results)),
        ("Tiles", _tiles(results.rows("tiles"))),
        ("The head's peers", _head(results.rows("peers"))),
        ("Its peers on CUTLASS", _head(results.rows("cutlass"))),
        ("Errors", _errors(results)),
        ("One update", _update(results.rows("update"))),
        ("One prompt for its responses", _plain(results.rows("shared"))),
        ("What failed", _failed(results)),
        ("Steps", _steps(results)),
    ):
        found = list(section)
        if found:
            lines += [f"## {heading}", "", *found, ""]
    return "\n".join(lines)


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


def _goals(found: list[Goal]) -> Iterator[str]:
    yield from ("| goal | wanted | measured | |", "|---|---|---:|---|")
    for goal in found:
        verdict = {True: "met", False: "**not met**", None: "not measured"}[goal.met]
        yield f"| {goal.what} | {goal.wanted} | {goal.shown} | {verdict} |"


def _head(rows: list[Row]) -> Iterator[str]:
    """A table a case, the fastest first: times, and ratios to the bare products and to the fastest of ours."""
    for case in dict.fromkeys(row["case"] for row in rows if row.get("metric") == "time"):
        found = heads_report.by_metric([row for row in rows if row["case"] == case])
        times, _ = heads_report.times_of(rows, case)
        ours = heads_report.fastest(times, ours=True)
        yield from (f"**T H V = {case}**", "")
        yield "| | ms (20 to 80%) | of bare | of ours | peak GiB | dH error | log-prob error | |"
        yield "|---|---:|---:|---:|---:|---:|---:|---|"
        for impl in sorted((i for i in found if "time" in found[i]), key=lambda i: found[i]["time"]["median"]):
            row = found[impl]
            ms = " to ".join(f"{row['time'][key] * 1e3:.2f}" for key in ("p20", "p80"))
            bare = row["time"]["median"] / times[heads_report.FLOOR]
            own = f"{row['time']['median'] / times[ours]:.2f}" if ours else ""
            peak = f"{row['peak_memory']['median'] / 2**30:.2f}" if "peak_memory" in row else ""
            errors = [f"{row[m]['median']:.0e}" if m in row else "" for m in ("dH_error", "logprob_error")]
            note = "sums a cross entropy" if row["time"].get("computes") == heads_report.ENTROPY else ""
            yield (
                f"| {impl} | {row['time']['median'] * 1e3:.2f} ({ms}) | {bare:.2f} | {own} | {peak} | "
                f"{' | '.join(errors)} | {note} |"
            )
        yield ""


def _roofline(results: Results) -> Iterator[str]:
    for name in ("kernels", "tiles", "peers", "cutlass"):
        if name in results.records:
            try:
                yield from ("```", roofline.compare(results.records[name]), "```", "")
            except ValueError as error:  # a card that has no prediction
                yield from (f"{error}.", "")


def _errors(results: Results) -> Iterator[str]:
    if "errors" in results.records:
        yield "Relative error of dH, and the worst error of a log-prob in nats, against float64:"
        yield from ("", heads_report.error_table(results.records["errors"]))


def _tiles(rows: list[Row]) -> Iterator[str]:
    """Times of the sweep's tiles, and which won."""
    times = [row for row in rows if row.get("metric") == "time"]
    for case in dict.fromkeys(row["case"] for row in times):
        found = {row["impl"]: row["median"] * 1e3 for row in times if row["case"] == case}
        order = sorted(found, key=found.__getitem__)
        tiles = [impl for impl in order if not impl.startswith("torch")]
        won = f"**{tiles[0]}** wins" if tiles else "no tile ran"
        yield f"- {case}: {won}; " + ", ".join(f"{impl} {found[impl]:.2f} ms" for impl in order)


def _update(rows: list[Row]) -> Iterator[str]:
    if rows:
        yield from ("```", update_step_report.summary(rows).strip("\n"), "```")


def _plain(rows: list[Row]) -> Iterator[str]:
    if any("median" in row for row in rows):
        yield from ("| case | | metric | value | unit |", "|---|---|---|---:|---|")
    for row in rows:
        if "median" in row:
            yield f"| {row['case']} | {row['impl']} | {row['metric']} | {row['median']:.4g} | {row['unit']} |"


def _failed(results: Results) -> Iterator[str]:
    for stage, name, _, limit, verdict in results.steps:
        if verdict != "ok":
            yield f"- stage {stage}, {name}: {verdict}" + (f" of {limit} s" if "limit" in verdict else "")
    yield from (f"- {path} cannot be read" for path in results.unreadable)
    for name, found in results.records.items():
        reasons: dict[tuple[str, str], int] = {}
        for row in found["rows"]:
            if "error" in row:
                key = (row["impl"], row["error"])
                reasons[key] = reasons.get(key, 0) + 1
        for (impl, why), count in reasons.items():
            yield f"- {name}, {impl} ({count} case{'s' * (count > 1)}): {why}"


def _steps(results: Results) -> Iterator[str]:
    if results.steps:
        yield from ("| stage | step | seconds | at most | |", "|---|---|---:|---:|---|")
    for step in results.steps:
        yield f"| {' | '.join(step)} |"


# --- the README ------------------------------------------------------------------------------------------------------


def status(results: Results, root: Path) -> str:
    """One sentence of a card: what was measured there, each goal with its figure, and where the page is.

    Raises ValueError for a dry run.
    """
    if results.device == "cpu":
        raise ValueError(f"{results.folder} is a dry run on a CPU: it says nothing of a GPU")
    found = goals(results)
    said = "; ".join(f"{goal.what}: {goal.shown}, wanted {goal.wanted}" for goal in found if goal.met is not None)
    missing = ", ".join(goal.what for goal in found if goal.met is None)
    revision = _short(next(iter(results.records.values())))
    if not results.folder.resolve().is_relative_to(root.resolve()):
        raise ValueError(f"{results.folder} is not below {root}: copy it under bench/results first")
    path = results.folder.resolve().relative_to(root.resolve())
    text = f"**Measured on an {results.device}** ([report]({path.as_posix()}/README.md), revision {revision}): {said}."
    return text + (f" Not measured: {missing}." if missing else "")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", type=Path, nargs="+", metavar="FOLDER", help="what the stages of one card left")
    parser.add_argument("--readme", type=Path, help="draw the status of all folders between this file's markers")
    given = parser.parse_args(argv)
    try:
        cards = [load(folder) for folder in given.folders]
        lines = [status(card, given.readme.parent) for card in cards] if given.readme else []
    except ValueError as error:
        parser.error(str(error))
    for card in cards:
        text = page(card)
        (card.folder / "README.md").write_text(text)
        picture.plot(card, card.machine, card.folder / "report.png")
        print(text)
    if given.readme:
        try:
            record.draw_between(given.readme, MARKERS, "\n\n".join(lines))
        except (OSError, ValueError) as error:
            parser.error(str(error))


if __name__ == "__main__":
    main()
