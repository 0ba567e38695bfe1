"""Training runs that studies need, each written down once so that it is trained once; and a finished one's files."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from gapg.config import RunConfig
from gapg.jsonl import read_jsonl
from gapg.runs.run import Run

Rows = list[dict[str, Any]]

HEADLINE_SEEDS = (20, 21, 22, 23, 24)
"""For what the project claims: baselines, budgets, filter and controller."""
SEEDS = HEADLINE_SEEDS[:3]
"""For everything else."""
FRESH_SEEDS = (40, 41, 42, 43, 44)
"""For `marginal` beside all others: nothing was tuned on them."""


@dataclass(frozen=True)
class Predictions:
    """What is measured on a trained model: kept in its run's folder as `products/<name>.jsonl`."""

    name: str
    make: Callable[[Run], Rows]
    """A function of a module. A row whose `oracle_score` is None, because the cloud failed, is asked for again."""

    def path(self, folder: Path) -> Path:
        return predictions_path(folder, self.name)


def predictions_path(folder: Path, name: str) -> Path:
    return folder / "products" / f"{name}.jsonl"


@dataclass(frozen=True)
class Arm:
    """One training run of a study. Arms of equal settings and controller share one run, also across studies."""

    label: str
    """The method or setting in the study's own words: "GAPG", "alpha_c 0.3"."""
    overrides: Mapping[str, str]
    """Dotted keys over the base config, as `load_config` takes them: {"reward.alpha_c": "0.3"}."""
    seed: int
    controller: str | None = None
    """Import path `module:function` of a factory (RunConfig) -> controller; None: the config's own."""
    predictions: tuple[Predictions, ...] = ()
    """What is measured beyond `predictions.STANDARD`."""


@dataclass(frozen=True)
class Entrant:
    """A method of a comparison along the whole curve: the run it is made from, and whom it calls first."""

    name: str
    arm: Callable[[int], Arm] = field(repr=False)
    """The run of a seed; entrants of one run name arms of the same label."""
    predictions: Predictions | None = None
    """Rows of {"id", "split": "validation" or "heldout", "score": the highest is called first, "local": 0 or 1, right
    without a call}, one a problem. Without "local" it is the run's own greedy answer with help masked that counts; with
    a "response", and all else that `stacked.features` reads, the answer is that of another model, and judged as such.
    None: the score is the margin of the help phrase in that answer."""
    sees: Literal["answer", "prompt"] = "answer"
    """What it decides by. One that sees the answer can also use the answer's log-probs and length."""


@dataclass(frozen=True)
class Finished:
    """An arm whose run is trained and whose predictions are all there."""

    arm: Arm
    folder: Path
    config: RunConfig

    def rows(self, name: str) -> Rows:
        """One prediction a problem, in the order of the task. Raises FileNotFoundError: the arm did not ask for it."""
        path = predictions_path(self.folder, name)
        if not path.exists():
            raise FileNotFoundError(f"{path}: {self.arm.label!r} names no predictions {name!r}")
        return read_jsonl(path)

    def metrics(self) -> Rows:
        """One row a training step (key `step`), from metrics.jsonl."""
        return [row for row in read_jsonl(self.folder / "metrics.jsonl") if "call_fraction" in row]

    @cached_property
    def info(self) -> dict[str, Any]:
        """done.json: what the run took (`seconds`), its last `step`, what the oracle was asked (`oracle`)."""
        return dict(json.loads((self.folder / "done.json").read_text()))


FIXED_PRICE: Mapping[str, str] = {"budget.controller": "false"}
"""alpha_c stays where the config starts it."""
UNFILTERED: Mapping[str, str] = {"budget.filter": "false"}
MASKED: Mapping[str, str] = {
    "method": "marginal", "marginal.score": "brier", "marginal.trace": "[0, 1]", "marginal.weight": "0",
}  # fmt: skip
"""Task-tuning: help is forbidden in the rollouts, a right answer is worth 1, and the decision is not trained."""
HELP_NOT_SHOWN: Mapping[str, str] = {"task.args.help_shown": "false"}
"""Countdown's demonstrations without a call."""


def gapg(seed: int, predictions: tuple[Predictions, ...] = ()) -> Arm:
    """The config as it is: filter, controller, its own cloud fraction."""
    return Arm("GAPG", {}, seed, predictions=predictions)


def gapg_at(cloud_fraction: float, seed: int) -> Arm:
    """GAPG trained to a cloud fraction; at the config's own it is the run of `gapg`."""
    return Arm(f"GAPG, {cloud_fraction:.0%}", {"budget.cloud_fraction": f"{cloud_fraction:g}"}, seed)


def gapg_fixed(alpha_c: float, seed: int) -> Arm:
    """The filter, and a fixed price in the controller's place."""
    return Arm(f"GAPG, alpha_c {alpha_c:g}", {"reward.alpha_c": f"{alpha_c:g}", **FIXED_PRICE}, seed)


def reward_alone(alpha_c: float, seed: int) -> Arm:
    """`collaboration_aware` at a price."""
    return Arm(
        f"reward alone, alpha_c {alpha_c:g}", {"reward.alpha_c": f"{alpha_c:g}", **UNFILTERED, **FIXED_PRICE}, seed
    )


def task_tuned(seed: int, predictions: tuple[Predictions, ...] = ()) -> Arm:
    """Calls never pay: task-tuning only. Help is not masked: `masked` does that."""
    return Arm("task-tuned", {"reward.alpha_c": "0", **UNFILTERED, **FIXED_PRICE}, seed, predictions=predictions)


def masked(seed: int) -> Arm:
    """Masked rollouts alone, rewarded for right answers: the model that routers are put on."""
    return Arm("task-tuned, masked", MASKED, seed)


def without_help(arm: Arm) -> Arm:
    """The same from a warm start whose demonstrations never call."""
    return replace(arm, label=f"{arm.label}, help not shown", overrides={**arm.overrides, **HELP_NOT_SHOWN})


def warm_start(seed: int, predictions: tuple[Predictions, ...] = ()) -> Arm:
    """The model that every other run starts from."""
    return Arm("warm start", {"steps": "0"}, seed, predictions=predictions)


def collaboration_aware(seed: int) -> Arm:
    """Neither filter nor controller: the reward alone."""
    return Arm("collaboration-aware", {**UNFILTERED, **FIXED_PRICE}, seed)


def std_scaled(seed: int) -> Arm:
    return Arm("GAPG, std scaling", {"loss.advantage": "grpo"}, seed)


def da_grpo(seed: int) -> Arm:
    """DA-GRPO's multiplier in the place of the controller, and no filter.

    Where the multiplier starts is this project's choice: see `studies.da_grpo.make_multiplier`.
    """
    overrides = {"reward.function": "studies.da_grpo:rewards", **UNFILTERED}
    return Arm("DA-GRPO", overrides, seed, controller="studies.da_grpo:make_multiplier")


def da_grpo_at(cloud_fraction: float, start: float, seed: int) -> Arm:
    """DA-GRPO trained to a cloud fraction, its multiplier starting at `start` (of alpha_a = 1)."""
    default = da_grpo(seed)
    own = {"budget.cloud_fraction": f"{cloud_fraction:g}", "reward.alpha_c": f"{1 - start:g}"}
    label = f"DA-GRPO, {cloud_fraction:.0%}, lambda {start:g}"
    return replace(default, label=label, overrides={**default.overrides, **own})


def marginal(seed: int, predictions: tuple[Predictions, ...] = ()) -> Arm:
    """The decision integrated out: one run for every budget, without a cloud."""
    return Arm("marginal", {"method": "marginal"}, seed, predictions=predictions)
