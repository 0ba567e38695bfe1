"""`method: marginal`, one part at a time: the score, the decision's weight, the trace's worth, the prices, the clip."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from studies import arms, failures
from studies.arms import FRESH_SEEDS, Arm, Finished, Rows
from studies.marginal import FRESH, OURS
from studies.report import Column, Row, Table, grouped, mean_of, percents, seeds_of, table_of
from studies.settings import settings_study
from studies.statistics import area, curve, of_run

CALLED = (0.0, 0.1, 0.2, 0.3, 0.5, 0.7)
ROOMY = {"optim.grad_clip": "10"}
"""A bound on the gradient's norm that seldom binds; the learning rate stays."""
FEWER = {"rollout.prompts_per_step": "32", "rollout.samples_per_prompt": "8"}
"""As many responses to half as many problems: the quickstart's."""


def _marginal(label: str, **settings: str) -> Callable[[int], Arm]:
    own = {f"marginal.{key}": value for key, value in settings.items()}
    return lambda seed: Arm(f"{OURS}, {label}", {"method": "marginal", **own}, seed)


def _changed(arm: Arm, label: str, settings: dict[str, str]) -> Arm:
    return replace(arm, label=f"{arm.label}, {label}", overrides={**arm.overrides, **settings})


ARMS: tuple[Callable[[int], Arm], ...] = (
    arms.marginal,
    _marginal("decision weight 4", weight="4"),
    _marginal("trace worth U", trace="[1, 0]"),
    _marginal("trace worth r", trace="[0, 1]"),
    _marginal("Brier", score="brier"),
    _marginal("Brier, decision weight 4", score="brier", weight="4"),
    _marginal("Brier, prices .2 to .8", score="brier", prices="[0.2, 0.8]"),
    _marginal("fixed price", score="price"),
    arms.masked,
    lambda seed: _changed(arms.marginal(seed), "clip 10", ROOMY),
    lambda seed: _changed(arms.marginal(seed), "8 responses a problem", FEWER),
    arms.gapg,
    lambda seed: _changed(arms.gapg(seed), "clip 10", ROOMY),
    lambda seed: _changed(arms.gapg(seed), "8 responses a problem", FEWER),
)


def more_of(run: Finished) -> dict[str, Any]:
    """The curve in a few points, how the gradient's norm stood to `optim.grad_clip` in training, and what wrong answers
    are wrong by."""
    line, steps = curve(of_run(run)), [row for row in run.metrics() if row["grad_norm"] is not None]
    norms = [row["grad_norm"] for row in steps]
    return {
        "area": area(line),
        **{f"at_{c * 100:.0f}": float(line.at(c)) for c in CALLED},
        "grad_clip": run.config.optim.grad_clip,
        "clipped": float(np.mean([row["clipped"] for row in steps])),
        "grad_norm": float(np.median(norms)),
        "grad_norm_90": float(np.quantile(norms, 0.9)),
        **failures.by_kind(run, run.config.budget.cloud_fraction),
    }


def more_tables(rows: Rows) -> list[Table]:
    name: Column = ("", lambda of_label: of_label[0]["label"])
    lines: list[list[Row]] = list(grouped(rows, "label").values())
    curves = [name, *((f"{c:.0%}", mean_of(f"at_{c * 100:.0f}", percents)) for c in CALLED)]
    norms: list[Column] = [
        name,
        ("bound", lambda of_label: f"{of_label[0]['grad_clip']:g}"),
        ("updates that it binds", seeds_of("clipped")),
        ("median norm", mean_of("grad_norm", "{:.1f}".format)),
        ("90% are below", mean_of("grad_norm_90", "{:.1f}".format)),
    ]
    return [
        table_of(
            "Right of the held-out problems with exactly so many called, greedy, mean over seeds",
            lines,
            [*curves, ("area", mean_of("area", "{:.3f}".format))],
        ),
        table_of("The gradient's norm in training, and the bound on it", lines, norms),
        table_of(
            "What answers are wrong by, greedy, and how much of each kind is among the 30% that are called first",
            lines,
            [name, *failures.columns()],
        ),
    ]


MARGINAL_ABLATION = settings_study(
    "marginal-ablation",
    "Which part of the marginal method does it: the score, the weights, the prices, the masked rollouts, the clip?",
    FRESH_SEEDS[:3],
    lambda seed: [replace(arm, overrides={**FRESH, **arm.overrides}) for arm in (make(seed) for make in ARMS)],
    "The marginal method, one part changed at a time",
    less=OURS,
    more=more_of,
    more_tables=more_tables,
)
