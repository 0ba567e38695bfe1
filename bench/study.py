"""Makes studies: training runs, and of each study a table, a picture and a JSON of its figures.

    python bench/study.py list                          each study and its question
    python bench/study.py NAME … [--key value …]        these studies; `all`: every one of the quickstart
    python bench/study.py quickstart [--key value …]    one GAPG run beside its task-tuned twin, in minutes
    python bench/study.py --redraw                      the committed tables and pictures again, from the same figures

Every key of the config is an option too: --optim.lr 1e-4. The same command goes on where a killed one stopped.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, ValidationError, field_validator

from gapg.commands.cli import one_line_errors
from gapg.config import RunConfig
from gapg.config_keys import explain, parse
from gapg.config_sections import Section
from gapg.errors import ConfigError
from gapg.runs.stop import listening
from record import ROOT, draw_between

QUICKSTART = "quickstart"
COMMITTED = ROOT / "bench" / "results" / "studies"
PAGE, MARKERS = ROOT / "docs" / "benchmarks.md", ("<!-- studies -->", "<!-- end of studies -->")
SHOWN, LINK = ("marginal", "baselines", "budgets"), "../bench/results/studies/README.md"
"""Committed studies whose first table stands on the page, and where all are."""


class Options(Section):
    seeds: tuple[int, ...] = ()
    """Seeds, as in 0,1,2; empty: each study's own."""
    jobs: Annotated[int, Field(ge=1)] = 1
    """Training runs side by side."""
    config: str | None = None
    """Preset or YAML file that the study starts from; empty: each study's own."""
    work_dir: Path = Path("runs/studies")
    """Where warm starts and runs are kept; studies share them."""
    output: Path = Path("runs/studies/results")
    """Where NAME.md, NAME.png, NAME.json and README.md go."""
    resume: bool = False
    """Changes nothing: the same command goes on anyway. What a run says when it ends early names it."""
    redraw: bool = False
    """Draw the studies whose JSON lies in --output (here: bench/results/studies) again, and make none."""

    @field_validator("seeds", mode="before")
    @classmethod
    def _different_numbers(cls, value: Any) -> Any:
        seeds = value.split(",") if isinstance(value, str) else value
        if not all(str(seed).strip().isdecimal() for seed in seeds) or len(set(map(int, seeds))) < len(seeds):
            raise ValueError(f"seeds={value}: give different whole numbers, as in --seeds 0,1,2")
        return seeds


def main(argv: Sequence[str] | None = None) -> None:
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or "-h" in argv or "--help" in argv:
        print(__doc__)
        for name, field in Options.model_fields.items():
            print(f"  --{name.replace('_', '-'):<10} {field.description}")
        return
    with one_line_errors("the same command goes on where it stopped"):
        run(argv)


def run(argv: list[str]) -> None:
    kinds = {name: field.annotation for name, field in Options.model_fields.items()}
    words, given, overrides = parse(argv, RunConfig, kinds)
    try:
        options = Options.model_validate(given)
    except ValidationError as error:
        raise ConfigError(explain(Options, error)) from None
    if bool(words) == options.redraw:
        raise ConfigError("usage: python bench/study.py list | all | NAME … | --redraw [--key value …]; see --help")
    if words == ["quickstart"]:
        if spare := given.keys() - {"config", "resume"}:
            raise ConfigError(f"--{min(spare).replace('_', '-')}: quickstart is one run; give --seed, --output-dir")
        with listening():  # from here on: the imports alone take seconds
            from studies.quickstart import quickstart

            quickstart(options.config or QUICKSTART, overrides)
        return
    from studies.catalog import STUDIES
    from studies.report import overview, redraw
    from studies.runner import make_studies

    every = [name for name, study in STUDIES.items() if study.config == QUICKSTART]
    if options.redraw:
        folder = options.output if "output" in given else COMMITTED
        if not os.path.isdir(folder):
            raise ConfigError(f"--output {folder}: no such folder; name one with the JSON files of studies")
        print(f"{folder}: {', '.join(redraw(STUDIES, folder))}")
        if folder == COMMITTED:
            draw_between(PAGE, MARKERS, overview(STUDIES, COMMITTED, SHOWN, LINK))
    elif words == ["list"]:
        width = max(map(len, STUDIES))
        print("\n".join(f"{name:<{width}}  {study.question}" for name, study in STUDIES.items()))
    elif unknown := [word for word in words if word not in STUDIES and words != ["all"]]:
        raise ConfigError(f"no study {unknown[0]!r}: use some of {', '.join(STUDIES)}, or quickstart or all alone")
    elif not make_studies(every if words == ["all"] else words, STUDIES, options, overrides):
        sys.exit(1)


if __name__ == "__main__":
    main()
