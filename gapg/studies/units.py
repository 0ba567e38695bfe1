"""Training runs that several studies need, each written down once so that it is trained once."""

from __future__ import annotations

from collections.abc import Mapping

from gapg.studies.study import Unit

HEADLINE_SEEDS = (20, 21, 22, 23, 24)
"""For what the project claims: baselines, budgets, filter and controller."""
SEEDS = HEADLINE_SEEDS[:3]
"""For everything else."""

FIXED_PRICE: Mapping[str, str] = {"budget.controller": "false"}
"""alpha_c stays where the config starts it."""
UNFILTERED: Mapping[str, str] = {"budget.filter": "false"}


def gapg(seed: int, products: tuple[str, ...] = ()) -> Unit:
    """The config as it is: filter, controller, its own cloud fraction."""
    return Unit("GAPG", {}, seed, products=products)


def gapg_at(cloud_fraction: float, seed: int) -> Unit:
    """GAPG trained to a cloud fraction; at the config's own it is the run of `gapg`."""
    return Unit(f"GAPG, {cloud_fraction:.0%}", {"budget.cloud_fraction": f"{cloud_fraction:g}"}, seed)


def task_tuned(seed: int, products: tuple[str, ...] = ()) -> Unit:
    """Calls never pay: task-tuning only. Help is not masked, which would be unstable in training."""
    overrides = {"reward.alpha_c": "0", **UNFILTERED, **FIXED_PRICE}
    return Unit("task-tuned", overrides, seed, products=products)


def warm_start(seed: int) -> Unit:
    """The model that every other run starts from."""
    return Unit("warm start", {"steps": "0"}, seed)


def without_filter(seed: int) -> Unit:
    return Unit("GAPG without filter", UNFILTERED, seed)


def without_controller(seed: int) -> Unit:
    return Unit("GAPG, fixed alpha_c", FIXED_PRICE, seed)


def collaboration_aware(seed: int) -> Unit:
    """Neither filter nor controller: the reward alone."""
    return Unit("collaboration-aware", {**UNFILTERED, **FIXED_PRICE}, seed)


def std_scaled(seed: int) -> Unit:
    return Unit("GAPG, std scaling", {"loss.advantage": "grpo"}, seed)


def da_grpo(seed: int) -> Unit:
    """DA-GRPO's multiplier in the place of the controller, and no filter.

    Where the multiplier starts is this project's choice: see `gapg.studies.da_grpo.make_multiplier`.
    """
    overrides = {"reward.function": "gapg.studies.da_grpo:rewards", **UNFILTERED}
    return Unit("DA-GRPO", overrides, seed, controller="gapg.studies.da_grpo:make_multiplier")
