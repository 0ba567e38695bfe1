"""`gapg experiment`: makes the runs that studies need, and of each study a table, a picture and raw JSON."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

from gapg.config import ConfigError
from gapg.evaluation.report import save_figure
from gapg.files import write_whole
from gapg.runs.tracking import say, warn
from gapg.studies.pool import Job, run_jobs
from gapg.studies.products import STANDARD
from gapg.studies.provenance import machine, revision, versions
from gapg.studies.runs import Place, check, make_run, make_warm_start, place
from gapg.studies.study import Finished, Report, Study, Unit

matplotlib.use("agg")
from matplotlib.figure import Figure

ALL = "all"
Studies = Mapping[str, Study]


@dataclass(frozen=True)
class Order:
    """What `gapg experiment` was asked for. `seeds`: empty for each study's own."""

    name: str
    seeds: tuple[int, ...] = ()
    jobs: int = 1
    config: str = "quickstart"
    overrides: Mapping[str, str] | None = None
    work: Path = Path("runs/studies")
    results: Path = Path("bench/results/studies")

    def command(self, study: Study) -> str:
        """What makes this study's results again."""
        words = ["gapg", "experiment", study.name]
        if self.seeds and self.seeds != study.seeds:
            words += ["--seeds", ",".join(map(str, self.seeds))]
        if self.config != Order.config:
            words += ["--config", self.config]
        for key, value in (self.overrides or {}).items():
            words += [f"--{key}", value]
        return shlex.join(words)


def experiment(order: Order, studies: Studies) -> bool:
    """Makes what is missing, and writes the studies whose runs are all there; says which are not and returns False.

    Raises ConfigError, before anything slow.
    """
    chosen = _chosen(order.name, studies)
    if order.jobs < 1:
        raise ConfigError(f"--jobs {order.jobs}: must be 1 or more")
    work = order.work.resolve()
    plans = [(s, _plan(s, order, work)) for s in chosen]
    runs = _merge([run for _, plan in plans for run in plan])
    for study, plan in plans:
        if study.check is not None:
            for _, p in plan:
                study.check(p.config)
    check(p for _, p in runs)
    _make_folder(work, "--work-dir")
    _make_folder(order.results, "--results-dir")
    jobs = _jobs([(unit, p) for unit, p in runs if not p.finished()])
    say(f"{len(runs)} runs, {len(runs) - sum(job.counted for job in jobs)} of them there; {order.work}/")
    failed = run_jobs(jobs, order.jobs, "runs", len(runs)) if jobs else {}
    whole = True
    for study, plan in plans:
        lost = [unit for unit, p in plan if str(p.folder) in failed and not p.finished()]
        if lost:
            whole = False
            warn(f"{study.name}: not written, {len(lost)} of its {len(plan)} runs failed; the same command goes on")
            continue
        try:
            write_study(study, order, [Finished(unit, p.folder, p.config) for unit, p in plan])
        except ConfigError as error:
            whole = False
            warn(f"{study.name}: not written: {error}")
    return whole


def list_studies(studies: Studies) -> str:
    """A line a study: its name and its question."""
    width = max(map(len, studies), default=0)
    return "\n".join(f"{name:<{width}}  {study.question}" for name, study in studies.items())


def parse_seeds(text: str | None) -> tuple[int, ...]:
    """ "0,1,2" as numbers, none of no text. Raises ConfigError."""
    seeds = (text or "").split(",") if text is not None else []
    if not all(seed.strip().isdecimal() for seed in seeds) or len(set(map(int, seeds))) < len(seeds):
        raise ConfigError(f"--seeds {text}: give different whole numbers, as in --seeds 0,1,2")
    return tuple(map(int, seeds))


def _chosen(name: str, studies: Studies) -> list[Study]:
    if name == ALL:
        return list(studies.values())
    if name not in studies:
        raise ConfigError(f"no study {name!r}: use one of {', '.join(studies)} or {ALL}; gapg experiment list")
    return [studies[name]]


def _make_folder(folder: Path, option: str) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{folder}: {error.strerror}; choose a {option} you can write to") from None


def _plan(study: Study, order: Order, work: Path) -> list[tuple[Unit, Place]]:
    """The study's units, seed by seed, and where the run of each lies. Raises ConfigError."""
    units = [unit for seed in order.seeds or study.seeds for unit in study.units(seed)]
    _refuse_overrides(study, units, order.overrides or {})
    return [(unit, place(unit, order.config, order.overrides or {}, work)) for unit in units]


def _refuse_overrides(study: Study, units: Sequence[Unit], overrides: Mapping[str, str]) -> None:
    """Raises ConfigError where a command says what the study says: the study would win, and the record would lie."""
    # no steps are a unit that is not trained, whatever the command says of those that are
    own = {key for unit in units for key, value in unit.overrides.items() if (key, value) != ("steps", "0")}
    for key in overrides:
        for mine in sorted(own.union(study.sets)):
            if key == mine or key.startswith(f"{mine}.") or mine.startswith(f"{key}."):
                what = "" if key == mine else f" ({mine})"
                raise ConfigError(f"--{key}: experiment {study.name} sets it itself{what}; drop it")


def _merge(plan: Sequence[tuple[Unit, Place]]) -> list[tuple[Unit, Place]]:
    """Each run once, with the first unit that needs it and the products of all that do."""
    merged: dict[Path, tuple[Unit, Place]] = {}
    for unit, p in plan:
        first, before = merged.get(p.folder, (unit, p))
        merged[p.folder] = first, replace(p, products=tuple(dict.fromkeys((*before.products, *p.products))))
    return list(merged.values())


def _jobs(runs: Sequence[tuple[Unit, Place]]) -> list[Job]:
    """The runs in their order, each warm start right before the first that needs it."""
    jobs: dict[str, Job] = {}
    for unit, p in runs:
        warm = None if p.warm_finished() else str(p.warm)
        if warm is not None and warm not in jobs:
            title = f"warm start, seed {unit.seed}"
            jobs[warm] = Job(warm, title, Path(warm) / "log.txt", partial(make_warm_start, p), counted=False)
        key, title = str(p.folder), f"{unit.label}, seed {unit.seed}"
        jobs[key] = Job(key, title, p.folder / "log.txt", partial(make_run, p), after=warm)
    return list(jobs.values())


def write_study(study: Study, order: Order, runs: list[Finished]) -> None:
    """NAME.png, NAME.md and NAME.json, each whole, and README.md of everything that lies beside them."""
    report = study.analyse(runs)
    folder = order.results
    _draw(report.draw, folder / f"{study.name}.png")
    record = _record(study, order, runs, report)
    write_whole(folder / f"{study.name}.md", f"# {study.name}\n\n{section(record)}")
    write_whole(folder / f"{study.name}.json", json.dumps(record, indent=1, allow_nan=False, default=_plain) + "\n")
    redraw(folder)
    say("\n".join([f"{study.name}: {study.question}", *report.conclusions, f"{folder}/{study.name}.md  .png  .json"]))


def _record(study: Study, order: Order, runs: Sequence[Finished], report: Report) -> dict[str, Any]:
    return {
        "study": study.name,
        "question": study.question,
        "config": order.config,
        "overrides": dict(order.overrides or {}),
        "command": order.command(study),
        "revision": revision(),
        "machine": machine(),
        "versions": versions(),
        "seeds": list(order.seeds or study.seeds),
        "own_seeds": list(study.seeds),
        "conclusions": report.conclusions,
        "tables": [asdict(table) for table in report.tables],
        "comparisons": report.comparisons,
        "rows": report.rows,
        "runs": [
            {
                "label": run.unit.label,
                "seed": run.unit.seed,
                "run": run.folder.name,
                **{key: run.info[key] for key in ("step", "seconds", "revision")},
                "measured": _measured(run),
                "unknown": max(run.info["products"][product] for product in _products(run)),
            }
            for run in runs
        ],
    }


def _measured(run: Finished) -> list[str]:
    """The revisions that made the products of the run which the study uses."""
    later = run.info.get("product_revisions", {})
    return sorted({later.get(product, run.info["revision"]) for product in _products(run)})


def _products(run: Finished) -> tuple[str, ...]:
    return (*STANDARD, *run.unit.products)


def _revisions(found: Iterable[str]) -> str:
    return ", ".join(sorted({revision[:12] + revision[40:] for revision in found}))


def section(record: dict[str, Any]) -> str:
    """A study in Markdown, from its JSON, below whatever heading it is given."""
    tables = [markdown(table) for table in record["tables"]]
    seeds, own = record["seeds"], record["own_seeds"]
    fewer = "" if set(own) <= set(seeds) else f" (of the study's own {', '.join(map(str, own))})"
    trained = _revisions(run["revision"] for run in record["runs"])
    measured = _revisions(r for run in record["runs"] for r in run.get("measured", [run["revision"]]))
    made = f"trained at {trained}" + ("" if measured == trained else f", measured at {measured}")
    where, unknown = record["machine"], max(run["unknown"] for run in record["runs"])
    lost = f"The cloud failed on up to {unknown} predictions of a run, which are left out. " if unknown else ""
    foot = (
        f"{len(record['runs'])} runs, seeds {', '.join(map(str, seeds))}{fewer}: `{record['command']}`, "
        f"analysed at revision {_revisions([record['revision']])}, {made}, "
        f"on {where['device'] if where['device'] != 'cpu' else where['cpu']}. "
        f"{lost}Raw figures: [{record['study']}.json]({record['study']}.json)."
    )
    parts = [record["question"], *tables, " ".join(record["conclusions"]), f"![]({record['study']}.png)", foot]
    return "\n\n".join(part for part in parts if part) + "\n"


def markdown(table: dict[str, Any]) -> str:
    """A study's table from its JSON, below its title."""

    def row(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"

    lines = [row(table["columns"]), "|" + "---|" * len(table["columns"]), *map(row, table["cells"])]
    return f"{table['title']}\n\n" + "\n".join(lines) if table["title"] else "\n".join(lines)


def redraw(folder: Path) -> None:
    """README.md of a results folder, from the JSON files in it."""
    records = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    listed = "\n".join(f"- [{r['study']}](#{r['study']}): {r['question']}" for r in records)
    sections = "\n".join(f"## {r['study']}\n\n{section(r)}" for r in records)
    head = "Drawn by `gapg experiment` from the JSON files beside it. Each study is made by the command below it."
    write_whole(folder / "README.md", f"# Studies\n\n{head}\n\n{listed}\n\n{sections}")


def _draw(draw: Callable[[Figure], None], path: Path) -> None:
    figure = Figure(figsize=(11, 5), layout="constrained")
    draw(figure)
    save_figure(figure, path)


def _plain(value: Any) -> Any:
    """NumPy's numbers and arrays in JSON."""
    if isinstance(value, np.generic | np.ndarray):
        return value.tolist()
    raise TypeError(f"{type(value).__name__} in a report: give numbers, texts, lists and mappings")
