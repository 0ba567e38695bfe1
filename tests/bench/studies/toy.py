"""Studies for the runner's tests, and a command line for them: python toy.py CONFIG FOLDER.

Some things wait for a file in the folder that TOY_FOLDER names: the third step of a controller for `gate`, and two sets
of predictions for `mended`, of which one fails without it, and for the other the cloud does.
"""

import os
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from gapg.config import RunConfig
from gapg.runs.run import Run
from studies.arms import Arm, Finished, Predictions, Rows
from studies.report import Record, Study, Table
from studies.runner import make_studies
from study import Options


@dataclass
class Gated:
    """Holds alpha_c. In its third step it waits for the gate, having said so."""

    alpha_c: float
    seen: int = 0

    def observe(self, call_fraction: float, local_accuracy: float, pace: float) -> None:
        self.seen += 1
        folder = Path(os.environ["TOY_FOLDER"])
        if self.seen == 3 and not (folder / "gate").exists():
            (folder / "waiting").touch()
            time.sleep(600)


def make_gated(config: RunConfig) -> Gated:
    return Gated(config.reward.alpha_c)


def lengths(run: Run) -> Rows:
    """Predictions of a study's own."""
    return [{"id": p.id, "length": len(p.text)} for p in run.validation]


def mended() -> bool:
    return (Path(os.environ["TOY_FOLDER"]) / "mended").exists()


def fragile(run: Run) -> Rows:
    if not mended():
        raise RuntimeError("these predictions are broken")
    return lengths(run)


def asked(run: Run) -> Rows:
    return [{"id": p.id, "oracle_score": 1.0 if mended() else None} for p in run.validation[:3]]


def measure(runs: list[Finished]) -> tuple[Rows, Rows]:
    """How often the greedy answer is right, a row a run."""
    rows = []
    for run in runs:
        right = [row["outcome"] == "local_correct" for row in run.rows("heldout-masked")]
        rows.append(
            {"method": run.arm.label, "seed": run.arm.seed, "local": statistics.mean(right), "n": len(right)}
            | {"steps": [row["step"] for row in run.metrics()], "train": len(run.rows("train-masked"))}
        )
    return rows, []


def tables(record: Record) -> list[Table]:
    return [Table("local | greedy", ["method", "local"], [[r["method"], f"{r['local']:.2f}"] for r in record["rows"]])]


def draw(figure: Figure, record: Record) -> None:
    figure.subplots().plot([0, 1])


def study(name: str, question: str, seeds: tuple[int, ...], arms: Any) -> Study:
    return Study(name, question, seeds, arms, measure, tables, draw)


TUNED = {"reward.alpha_c": "0", "budget.controller": "false", "budget.filter": "false"}
STUDIES = {
    study.name: study
    for study in (
        study("second", "Does it share?", (0,), lambda seed: [
            Arm("same as plain", {"reward.alpha_c": "0.40"}, seed),
            Arm("gated", {"checkpoint_every": "1"}, seed, controller="toy:make_gated"),
        ]),
        study("first", "Does it run?", (0, 1), lambda seed: [
            Arm("plain", {}, seed),
            Arm("tuned", TUNED, seed, predictions=(Predictions("lengths", lengths), Predictions("asked", asked))),
        ]),
        study("broken", "Does it say so?", (0,), lambda seed: [
            Arm("plain, measured", {}, seed, predictions=(Predictions("fragile", fragile),)),
        ]),
    )
}  # fmt: skip


def make(config: str, folder: Path, names: tuple[str, ...] = tuple(STUDIES), **more: Any) -> bool:
    folders = {"work_dir": folder / "work", "output": folder / "results"}
    return make_studies(names, STUDIES, Options(config=config, **(folders | more)), {})


if __name__ == "__main__":
    sys.exit(0 if make(sys.argv[1], Path(sys.argv[2]), jobs=2) else 1)
