"""Makes the runs that studies need, one of a kind once, and writes the studies whose runs are all there."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import record
from gapg.console import say, warn
from gapg.errors import ConfigError
from studies.arms import Arm, Finished
from studies.pool import do_all
from studies.predictions import STANDARD
from studies.report import Record, Study, draw_readme, earlier_runs, markdown, measured, write_study
from studies.runs import Place, by_name, check, make_run, place

if TYPE_CHECKING:
    from study import Options


def make_studies(
    names: Sequence[str], studies: Mapping[str, Study], options: Options, overrides: Mapping[str, str]
) -> bool:
    """Makes what is missing, and writes the studies whose runs are all there; says which are not and returns False.

    Raises ConfigError, before anything slow.
    """
    plans = [(study, _plan(study, options, overrides)) for study in map(studies.__getitem__, names)]
    runs = _merge([p for _, plan in plans for p in plan])
    check(runs)
    for folder, option in ((options.work_dir, "--work-dir"), (options.output, "--output")):
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"{folder}: {error.strerror}; choose a {option} you can write to") from None
    jobs = {p.title: (p.folder / "log.txt", partial(make_run, p)) for p in runs if not p.finished()}
    say(f"{len(runs)} runs, {len(runs) - len(jobs)} of them there; {options.work_dir}/")
    failed = do_all(jobs, options.jobs, "runs", len(runs)) if jobs else {}
    lost = {p.folder for p in runs if p.title in failed}
    written = [_write(study, plan, options, overrides, lost) for study, plan in plans]
    draw_readme(studies, options.output)
    return all(written)


def _plan(study: Study, options: Options, overrides: Mapping[str, str]) -> list[Place]:
    """Where the runs of the study's arms lie, seed by seed. Raises ConfigError."""
    arms = [arm for seed in options.seeds or study.seeds for arm in study.arms(seed)]
    _check_overrides(study, arms, overrides)
    plan = [place(arm, options.config or study.config, overrides, options.work_dir.resolve()) for arm in arms]
    if study.check is not None:
        for p in plan:
            study.check(p.config)
    return plan


def _check_overrides(study: Study, arms: Sequence[Arm], overrides: Mapping[str, str]) -> None:
    """Raises ConfigError where a command says what the study says: the study would win, and the record would lie."""
    # no steps are an arm that is not trained, whatever the command says of those that are
    own = {key for arm in arms for key, value in arm.overrides.items() if (key, value) != ("steps", "0")}
    for key in overrides:
        for mine in sorted(own.union(study.sets)):
            if key == mine or key.startswith(f"{mine}.") or mine.startswith(f"{key}."):
                what = "" if key == mine else f" ({mine})"
                raise ConfigError(f"--{key}: study {study.name} sets it itself{what}; drop it")


def _merge(plan: Sequence[Place]) -> list[Place]:
    """Each run once, for the first arm that needs it, with the predictions of all that do."""
    merged: dict[Path, Place] = {}
    for p in plan:
        first = merged.get(p.folder, p)
        merged[p.folder] = replace(first, predictions=tuple(dict.fromkeys((*first.predictions, *p.predictions))))
    return list(merged.values())


def _write(
    study: Study, plan: Sequence[Place], options: Options, overrides: Mapping[str, str], lost: Collection[Path]
) -> bool:
    if missing := sum(p.folder in lost and not p.finished() for p in plan):
        warn(f"{study.name}: not written, {missing} of its {len(plan)} runs failed; the same command goes on")
        return False
    runs = [Finished(p.arm, p.folder, p.config) for p in plan]
    made: Record = {
        "study": study.name,
        "question": study.question,
        "config": options.config or study.config,
        "overrides": dict(overrides),
        "revision": record.revision(),
        "machine": record.machine(),
        "versions": record.versions(),
        "seeds": list(options.seeds or study.seeds),
        "own_seeds": list(study.seeds),
    }
    try:
        earlier = earlier_runs(study, options.output, made)
        rows, comparisons = measured(study, runs, options.output)
    except ConfigError as error:
        warn(f"{study.name}: not written: {error}")
        return False
    if earlier:
        made["seeds"] = sorted({*made["seeds"], *(run["seed"] for run in earlier)})
    made |= {"comparisons": comparisons, "rows": rows, "runs": [*earlier, *map(_about, runs)]}
    tables = study.tables(made)
    write_study(study, made | {"tables": [asdict(table) for table in tables]}, options.output)
    shown = "\n\n".join(map(markdown, tables))
    say(f"{study.name}: {study.question}\n\n{shown}\n\n{options.output}/{study.name}.md  .png  .json")
    return True


def _about(run: Finished) -> Record:
    """`measured`: the revisions that made the predictions which the study uses; `unknown`: where the cloud failed."""
    names = [p.name for p in (*STANDARD, *run.arm.predictions)]
    later, unknown = by_name(run.info.get("product_revisions", {})), by_name(run.info["products"])
    return {
        "label": run.arm.label,
        "seed": run.arm.seed,
        "run": run.folder.name,
        **{key: run.info[key] for key in ("step", "seconds", "revision")},
        "measured": sorted({later.get(name, run.info["revision"]) for name in names}),
        "unknown": max(unknown[name] for name in names),
    }
