"""Studies for the runner's tests, and a command line for them: python toy.py NAME CONFIG FOLDER [JOBS].

Some things wait for a file in the folder that TOY_FOLDER names: the third step of a controller for `gate`, and two
products for `mended`, of which one fails without it, and for the other the cloud does.
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
from gapg.studies.experiment import Order, experiment
from gapg.studies.study import Finished, Report, Study, Table, Unit


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


def lengths(run: Run) -> list[dict[str, Any]]:
    """A product of a study's own."""
    return [{"id": p.id, "length": len(p.text)} for p in run.validation]


def mended() -> bool:
    return (Path(os.environ["TOY_FOLDER"]) / "mended").exists()


def fragile(run: Run) -> list[dict[str, Any]]:
    if not mended():
        raise RuntimeError("this product is broken")
    return lengths(run)


def asked(run: Run) -> list[dict[str, Any]]:
    return [{"id": p.id, "oracle_score": 1.0 if mended() else None} for p in run.validation[:3]]


def analyse(finished: list[Finished]) -> Report:
    """How often the greedy answer is right, a row a run; nothing is drawn."""
    rows = []
    for run in finished:
        right = [row["outcome"] == "local_correct" for row in run.rows("heldout-masked")]
        rows.append(
            {"method": run.unit.label, "seed": run.unit.seed, "local": statistics.mean(right), "n": len(right)}
            | {"steps": [row["step"] for row in run.metrics()], "train": len(run.rows("train-masked"))}
        )
    table = Table("local | greedy", ["method", "local"], [[r["method"], f"{r['local']:.2f}"] for r in rows])
    return Report(rows, [table], [], ["It ran.", "It ended."], draw)


def draw(figure: Figure) -> None:
    figure.subplots().plot([0, 1])


PLAIN: dict[str, str] = {}
TUNED = {"reward.alpha_c": "0", "budget.controller": "false", "budget.filter": "false"}

STUDIES = {
    study.name: study
    for study in (
        Study("second", "Does it share?", (0,), lambda seed: [
            Unit("same as plain", {"reward.alpha_c": "0.40"}, seed),
            Unit("gated", {"checkpoint_every": "1"}, seed, controller="toy:make_gated"),
        ], analyse),
        Study("first", "Does it run?", (0, 1), lambda seed: [
            Unit("plain", PLAIN, seed), Unit("tuned", TUNED, seed, products=("toy:lengths", "toy:asked")),
        ], analyse),
        Study("broken", "Does it say so?", (0,), lambda seed: [
            Unit("plain, measured", PLAIN, seed, products=("toy:fragile",)),
        ], analyse),
    )
}  # fmt: skip


if __name__ == "__main__":
    name, config, folder = sys.argv[1:4]
    order = Order(
        name, jobs=int(sys.argv[4]), config=config, work=Path(folder) / "work", results=Path(folder) / "results"
    )
    sys.exit(0 if experiment(order, STUDIES) else 1)
