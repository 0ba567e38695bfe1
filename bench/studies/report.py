"""A study on paper: what it is made of, its JSON, and the tables and pictures that are drawn from the JSON alone."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from gapg.config import RunConfig
from gapg.errors import ConfigError
from gapg.evaluation.report import save_figure
from gapg.files import write_whole
from studies.arms import Arm, Finished, Rows
from studies.by_problem import read_problems, write_problems
from studies.statistics import Difference

Record = dict[str, Any]
"""A study's JSON: `rows` and `comparisons` as its `measure` made them, and `seeds`, beside what made them."""
Row = dict[str, Any]


@dataclass(frozen=True)
class Table:
    title: str
    columns: Sequence[str]
    cells: Sequence[Sequence[str]]
    """Rows of texts, as many as there are columns."""


@dataclass(frozen=True)
class ByProblem:
    """A study's figures, each from the table of what happened on every problem, which is kept beside its JSON."""

    collect: Callable[[list[Finished]], pd.DataFrame]
    """The table of the finished runs, as `studies.by_problem` keeps it."""
    figures: Callable[[pd.DataFrame], tuple[Rows, list[Difference]]]

    def measure(self, runs: list[Finished]) -> tuple[Rows, list[Difference]]:
        return self.figures(self.collect(runs))


@dataclass(frozen=True)
class Study:
    """A question, the runs that answer it, what is measured on them, and how that is shown."""

    name: str
    question: str
    seeds: tuple[int, ...]
    arms: Callable[[int], list[Arm]] = field(repr=False)
    """The arms of one seed."""
    measure: Callable[[list[Finished]], tuple[Rows, list[Difference]]] = field(repr=False)
    """All seeds' finished arms, in the order of `arms`, seed by seed -> rows and comparisons for the JSON."""
    tables: Callable[[Record], list[Table]] = field(repr=False)
    draw: Callable[[Figure, Record], None] = field(repr=False)
    """Draws on an empty figure of a constrained layout; may resize it."""
    check: Callable[[RunConfig], None] | None = field(default=None, repr=False)
    """Raises ConfigError, before anything slow, for a config that the study cannot work with."""
    sets: tuple[str, ...] = ()
    """Keys that no command may override, beside those that arms set: the study takes them as it has them."""
    notes: str = ""
    """What a reader needs to know of the rows."""
    config: str = "quickstart"
    """The preset that its runs start from."""
    by_problem: ByProblem | None = field(default=None, repr=False)
    """For a study whose figures come from a file of what happened on each problem: `measure` is its two steps."""


# ---- texts


def percents(value: float) -> str:
    return f"{value * 100:.1f}%"


def points(value: float) -> str:
    """A difference of fractions, in points and signed; never a negative zero."""
    return f"{round(value * 100, 1) + 0.0:+.1f}"


def interval(d: Difference) -> str:
    """+5.1 (+4.0 to +6.2), in points."""
    return f"{points(d['mean'])} ({points(d['low'])} to {points(d['high'])})"


def verdict(d: Difference) -> str:
    """How a does against b: by whether the 95% interval of a less b leaves 0 out."""
    return "better" if d["low"] > 0 else "worse" if d["high"] < 0 else "same"


def seeds_range(values: Sequence[float]) -> str:
    """The lowest and the highest seed, in percent."""
    low, high = percents(min(values)), percents(max(values))
    return low if len(values) == 1 else f"{low[:-1]} to {high}"


def in_percent(values: Sequence[float]) -> str:
    """The mean, and the lowest and highest seed where there are several."""
    mean = percents(float(np.mean(values)))
    return mean if len(values) == 1 else f"{mean} ({seeds_range(values)})"


def covered(seeds: int, others: str = "problems") -> str:
    """What the intervals of a table say something about, for its title; others: of what one seed's are resampled."""
    if seeds == 1:
        return f"intervals: other {others} for this one seed"
    return f"intervals: over {seeds} seeds (Student's t), the held-out problems are the same in all"


# ---- tables of rows


def grouped(rows: Iterable[Row], *keys: str) -> dict[tuple[Any, ...], list[Row]]:
    """The rows by their values of these keys, in the order in which they come."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row[key] for key in keys), []).append(row)
    return groups


Column = tuple[str, Callable[[list[Row]], str]]
"""A column's title, and its text for the rows of one line."""


def mean_of(key: str, text: Callable[[float], str] = percents) -> Callable[[list[Row]], str]:
    """A column's text: the mean over seeds, a dash where a seed has no such figure."""
    return seeds_of(key, lambda values: text(float(np.mean(values))))


def seeds_of(key: str, text: Callable[[Sequence[float]], str] = in_percent) -> Callable[[list[Row]], str]:
    """A column's text from the figures of all seeds, a dash where a seed has none."""

    def show(rows: list[Row]) -> str:
        values = [row.get(key) for row in rows]
        return "–" if None in values else text(values)  # type: ignore[arg-type]

    return show


def table_of(title: str, groups: Iterable[list[Row]], columns: Sequence[Column]) -> Table:
    """One line a group of rows."""
    return Table(title, [name for name, _ in columns], [[text(rows) for _, text in columns] for rows in groups])


def markdown(table: Table) -> str:
    """The table below its title."""

    def row(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"

    lines = [row(table.columns), "|" + "---|" * len(table.columns), *map(row, table.cells)]
    return f"{table.title}\n\n" + "\n".join(lines)


# ---- pages


def measured(study: Study, runs: list[Finished], folder: Path) -> tuple[Rows, list[Difference]]:
    """The study's rows and comparisons; what they are made from, problem by problem, is in `folder` then.

    What lies there already of other seeds is kept, and takes part: a study may be made seed by seed, on any machine.
    """
    if study.by_problem is None:
        return study.measure(runs)
    path, table = problems_path(study, folder), study.by_problem.collect(runs)
    if path.exists():
        kept = read_problems(path)
        table = pd.concat([kept[~kept["seed"].isin(table["seed"])], table]).sort_values("seed", kind="stable")
    write_problems(path, table)
    return study.by_problem.figures(read_problems(path))


def earlier_runs(study: Study, folder: Path, made: Record) -> list[Record]:
    """What an earlier record says of its runs of other seeds, whose problems `measured` keeps.

    Raises ConfigError where it is of other settings.
    """
    path = folder / f"{study.name}.json"
    if study.by_problem is None or not path.exists() or not problems_path(study, folder).exists():
        return []
    earlier: Record = json.loads(path.read_text())
    if any(earlier[key] != made[key] for key in ("config", "overrides")):
        raise ConfigError(f"{path}: of other settings ({command(study, earlier)}); choose another --output")
    return [run for run in earlier["runs"] if run["seed"] not in made["seeds"]]


def problems_path(study: Study, folder: Path) -> Path:
    return folder / f"{study.name}.problems.jsonl.xz"


def write_study(study: Study, record: Record, folder: Path) -> None:
    """NAME.json, and NAME.md, NAME.png drawn from it; each whole. README.md of the folder is `redraw`'s."""
    text = json.dumps(record, indent=1, allow_nan=False) + "\n"
    write_whole(folder / f"{study.name}.json", text)
    draw_study(study, json.loads(text), folder)


def draw_study(study: Study, record: Record, folder: Path) -> None:
    figure = Figure(figsize=(11, 5), layout="constrained")
    study.draw(figure, record)
    save_figure(figure, folder / f"{study.name}.png")
    write_whole(folder / f"{study.name}.md", f"# {study.name}\n\n{section(study, record)}")


def redraw(studies: Mapping[str, Study], folder: Path) -> list[str]:
    """Draws every study of a results folder again, and its README.md; returns their names.

    Where what happened on each problem lies there, all figures are computed from it again.
    """
    found = records(studies, folder)
    for name, record in found.items():
        if (of := studies[name].by_problem) and (path := problems_path(studies[name], folder)).exists():
            record["rows"], record["comparisons"] = of.figures(read_problems(path))
            record["tables"] = [asdict(table) for table in studies[name].tables(record)]
            write_study(studies[name], record, folder)
        else:
            draw_study(studies[name], record, folder)
    draw_readme(studies, folder)
    return list(found)


def records(studies: Mapping[str, Study], folder: Path) -> dict[str, Record]:
    """The studies that lie in a results folder, by name."""
    return {
        name: json.loads(path.read_text()) for name in sorted(studies) if (path := folder / f"{name}.json").exists()
    }


def draw_readme(studies: Mapping[str, Study], folder: Path) -> None:
    """README.md of a results folder, from the JSON files in it."""
    found = records(studies, folder)
    listed = "\n".join(f"- [{name}](#{name}): {record['question']}" for name, record in found.items())
    sections = "\n".join(f"## {name}\n\n{section(studies[name], record)}" for name, record in found.items())
    head = (
        "Drawn by `python bench/study.py --redraw` from the JSON files beside it. Each study is made by the command"
        " below it."
    )
    write_whole(folder / "README.md", f"# Studies\n\n{head}\n\n{listed}\n\n{sections}")


def overview(studies: Mapping[str, Study], folder: Path, shown: Collection[str], link: str) -> str:
    """The first table of those `shown`, then a line a study that leads to the whole at `link`."""
    found, parts = records(studies, folder), []
    for name in shown:
        table, seeds = studies[name].tables(found[name])[0], ", ".join(map(str, found[name]["seeds"]))
        parts.append(
            markdown(replace(table, title=f"{table.title} (`{command(studies[name], found[name])}`, seeds {seeds}):"))
        )
    lines = [f"- [{name}]({link}#{name}): {record['question']}" for name, record in found.items()]
    return "\n\n".join([*parts, "\n".join(lines)])


def section(study: Study, record: Record) -> str:
    """A study in Markdown, below whatever heading it is given."""
    name, seeds, own = record["study"], record["seeds"], record["own_seeds"]
    fewer = "" if set(own) <= set(seeds) else f" (of the study's own {', '.join(map(str, own))})"
    trained = _revisions(run["revision"] for run in record["runs"])
    measured = _revisions(r for run in record["runs"] for r in run["measured"])
    made = f"trained at {trained}" + ("" if measured == trained else f", measured at {measured}")
    kept = problems_path(study, Path()).name
    where, unknown = record["machine"], max(run["unknown"] for run in record["runs"])
    lost = f"The cloud failed on up to {unknown} predictions of a run, which are left out. " if unknown else ""
    foot = (
        f"{len(record['runs'])} runs, seeds {', '.join(map(str, seeds))}{fewer}: `{command(study, record)}`, "
        f"analysed at revision {_revisions([record['revision']])}, {made}, "
        f"on {where['device'] if where['device'] != 'cpu' else where['cpu']}. "
        f"{lost}Raw figures: [{name}.json]({name}.json)"
        + (f", computed by `--redraw` from [{kept}]({kept})." if study.by_problem else ".")
    )
    parts = [record["question"], study.notes, *map(markdown, study.tables(record)), f"![]({name}.png)", foot]
    return "\n\n".join(filter(None, parts)) + "\n"


def command(study: Study, record: Record) -> str:
    """What makes the record again."""
    words = ["python", "bench/study.py", record["study"]]
    if record["seeds"] != record["own_seeds"]:
        words += ["--seeds", ",".join(map(str, record["seeds"]))]
    if record["config"] != study.config:
        words += ["--config", record["config"]]
    for key, value in record["overrides"].items():
        words += [f"--{key}", value]
    return shlex.join(words)


def _revisions(found: Iterable[str]) -> str:
    return ", ".join(sorted({revision[:12] + revision[40:] for revision in found}))
