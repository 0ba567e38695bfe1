"""What training takes: samples, tokens, cloud requests, seconds."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from studies import arms
from studies.arms import Arm, Finished, Rows
from studies.drawing import COLOURS, SMALL, panels
from studies.report import Column, Record, Row, Study, Table, grouped, mean_of, seeds_of, table_of
from studies.rlcr import rlcr
from studies.statistics import Difference

if TYPE_CHECKING:
    from matplotlib.figure import Figure

OURS = "GAPG"
PHASES = ("rollout", "oracle", "update", "sync")
"""Parts of a step; metrics.jsonl has the seconds of each."""


def cost_arms(seed: int) -> list[Arm]:
    return [
        arms.gapg(seed),
        arms.marginal(seed),
        arms.masked(seed),
        arms.task_tuned(seed),
        arms.da_grpo(seed),
        rlcr(seed),
    ]


def measure(finished: list[Finished]) -> tuple[Rows, list[Difference]]:
    """A row a run: the policy gradient alone, without its warm start and without evaluations."""
    return [_row(run) for run in finished], []


def seconds_of(steps: Rows) -> dict[str, float]:
    """Of all steps, by phase."""
    return {phase: sum(row.get(f"seconds/{phase}", 0.0) for row in steps) for phase in PHASES}


def _row(run: Finished) -> dict[str, float | int | str]:
    steps, rollout = run.metrics(), run.config.rollout
    seconds = seconds_of(steps)
    return {
        "method": run.arm.label,
        "seed": run.arm.seed,
        "updates": len(steps),
        "samples": len(steps) * rollout.prompts_per_step * rollout.samples_per_prompt,
        "tokens": sum(row["tokens_sampled"] for row in steps),
        "groups": sum(row["groups/with_gradient"] for row in steps),
        "requests": run.info["oracle"]["requests"],
        "seconds": sum(seconds.values()),
        "seconds_whole": run.info["seconds"],
        **{f"seconds_{phase}": value for phase, value in seconds.items()},
    }


def tables(record: Record) -> list[Table]:
    count = "{:,.0f}".format
    base = {row["seed"]: row["seconds_whole"] for row in record["rows"] if row["method"] == OURS}

    def over(rows: list[Row]) -> str:
        ratios = [row["seconds_whole"] / base[row["seed"]] for row in rows]
        return f"{np.mean(ratios):.2f}x ({min(ratios):.2f} to {max(ratios):.2f})"

    columns: list[Column] = [
        ("method", lambda rows: str(rows[0]["method"])),
        ("updates", mean_of("updates", count)),
        ("responses sampled", mean_of("samples", count)),
        ("tokens sampled", mean_of("tokens", count)),
        ("groups with a gradient", mean_of("groups", count)),
        ("cloud requests", mean_of("requests", count)),
        (
            "seconds",
            seeds_of("seconds", lambda values: f"{np.mean(values):.0f} ({min(values):.0f} to {max(values):.0f})"),
        ),
        *((f"of these, {phase}", mean_of(f"seconds_{phase}", count)) for phase in PHASES),
        (f"with evaluations, over {OURS}'s", over),
    ]
    title = "A training run, mean over seeds: the policy gradient alone, without its warm start and evaluations"
    return [table_of(title, grouped(record["rows"], "method").values(), columns)]


def draw(figure: Figure, record: Record) -> None:
    """Seconds by phase, and cloud requests, mean over seeds."""
    groups = {method: rows for (method,), rows in grouped(record["rows"], "method").items()}
    seconds, requests = panels(figure, 2, width=6.4)
    left, at = np.zeros(len(groups)), np.arange(len(groups))
    for phase, colour in zip(PHASES, COLOURS, strict=False):
        width = np.array([np.mean([row[f"seconds_{phase}"] for row in rows]) for rows in groups.values()])
        seconds.barh(at, width, left=left, color=colour, label=phase)
        left += width
    requests.barh(at, [np.mean([row["requests"] for row in rows]) for rows in groups.values()], color=COLOURS[0])
    for axis, title in ((seconds, "seconds of a run"), (requests, "cloud requests of a run")):
        axis.set_yticks(at, list(groups), fontsize=SMALL)
        axis.invert_yaxis()
        axis.set_title(title)
    seconds.legend(fontsize=SMALL)


TRAINING_COST = Study(
    "training-cost",
    "What does a training run of each method take, in samples, tokens, cloud requests and time?",
    arms.SEEDS,
    cost_arms,
    measure,
    tables,
    draw,
    notes="Seconds are those of runs that may have had other work beside them on the machine: compare them only within"
    " one command with `--jobs 1`; all else is exact.",
)
