"""One part at a time: the group's size, help in the demonstrations, a KL penalty, the filter, the controller."""

from __future__ import annotations

from fractions import Fraction
from typing import TYPE_CHECKING

from gapg.config import RunConfig
from gapg.errors import ConfigError
from studies import arms
from studies.arms import HEADLINE_SEEDS, SEEDS, Arm, Finished, Rows
from studies.drawing import BLUE, COLOURS, GREEN, ORANGE
from studies.gradient_variance import (
    GRADIENT_VARIANCE,
    GROUP_SIZES,
    draw_sizes,
    draw_variance,
    measured_rows,
    variance_table,
)
from studies.report import Column, Record, Study, Table, table_of
from studies.settings import draw_settings, less_table, measure_settings, settings_study
from studies.statistics import Difference

if TYPE_CHECKING:
    from matplotlib.figure import Figure

KL = settings_study(
    "kl",
    "Does a KL penalty to the warm start buy anything?",
    SEEDS,
    lambda seed: [Arm(f"KL {coef:g}", {"loss.kl_coef": f"{coef:g}"}, seed) for coef in (0.0, 0.01, 0.1)],
    "A KL penalty to the warm start",
    less="KL 0",
)

# ---- filter and controller, each on and off

FILTER_CONTROLLER = settings_study(
    "filter-controller",
    "What do the prompt filter and the budget controller buy, each alone and together?",
    HEADLINE_SEEDS,
    lambda seed: [
        Arm("filter + controller", {}, seed),
        Arm("controller only", arms.UNFILTERED, seed),
        Arm("filter only", arms.FIXED_PRICE, seed),
        Arm("neither", {**arms.UNFILTERED, **arms.FIXED_PRICE}, seed),
    ],
    "Filter and controller, each on and off; the budget is {budget}",
    pairs=[
        ("the filter, with controller", "filter + controller", "controller only"),
        ("the filter, with a fixed alpha_c", "filter only", "neither"),
        ("the controller, with filter", "filter + controller", "filter only"),
        ("the controller, without filter", "controller only", "neither"),
        ("both", "filter + controller", "neither"),
    ],
    colours=(BLUE, GREEN, ORANGE, COLOURS[3]),
    sets=("budget.rho", "budget.filter", "budget.controller"),
)

# ---- a rho set wrong on purpose

FRACTION, RIGHT_RHO = 0.3, Fraction(3, 7)
RHO_FACTORS = {"half": Fraction(1, 2), "right": Fraction(1), "twice": Fraction(2)}
LAWS = {"controller": {}, "fixed alpha_c": arms.FIXED_PRICE}


def rho_arms(seed: int) -> list[Arm]:
    found = []
    for law, overrides in LAWS.items():
        for factor, times in RHO_FACTORS.items():
            rho = {} if times == 1 else {"budget.rho": f"{float(RIGHT_RHO * times):.12g}"}
            own = {"budget.cloud_fraction": f"{FRACTION:g}", **overrides, **rho}
            found.append(Arm(f"{factor} rho, {law}", own, seed))
    return found


WRONG_RHO = settings_study(
    "wrong-rho",
    "What does the filter's rho do to the call fraction when it is set wrong, with and without the controller?",
    SEEDS,
    rho_arms,
    f"rho set wrong on purpose: {FRACTION:.0%} needs {RIGHT_RHO}",
    pairs=[
        (f"{factor} rho, {how} controller", f"{factor} rho, {law}", f"right rho, {law}")
        for law, how in zip(LAWS, ("with", "without"), strict=True)
        for factor in ("half", "twice")
    ],
    colours=("#63b3ed", BLUE, "#2a4365", "#f6ad55", ORANGE, "#7b341e"),
    sets=("budget.rho", "budget.filter", "budget.controller"),
)

# ---- help left out of the demonstrations


def check_demonstrations(config: RunConfig) -> None:
    """Raises ConfigError: the task's demonstrations cannot be told to leave help out."""
    if config.task.name != "countdown":
        raise ConfigError("study demonstrations turns off Countdown's help_shown: it needs task.name=countdown")


def calls_sampled(run: Finished) -> dict[str, int | None]:
    """Of all responses sampled in training: how many called, and the first step with a call (None: none had)."""
    rollout, steps = run.config.rollout, run.metrics()
    a_step = rollout.prompts_per_step * rollout.samples_per_prompt
    return {
        "calls_sampled": round(sum(row["call_fraction"] for row in steps) * a_step),
        "responses_sampled": a_step * len(steps),
        "first_call": next((row["step"] for row in steps if row["call_fraction"] > 0), None),
    }


def calls_table(rows: Rows) -> list[Table]:
    columns: list[Column] = [
        ("", lambda of_run: of_run[0]["label"]),
        ("seed", lambda of_run: str(of_run[0]["seed"])),
        ("calls", lambda of_run: f"{of_run[0]['calls_sampled']:,}"),
        ("responses", lambda of_run: f"{of_run[0]['responses_sampled']:,}"),
        ("first step with a call", lambda of_run: str(of_run[0]["first_call"] or "never")),
    ]
    by_seed = sorted(rows, key=lambda row: row["seed"])
    return [table_of("Calls sampled in training", [[row] for row in by_seed], columns)]


DEMONSTRATIONS = settings_study(
    "demonstrations",
    "Can calling be learned by the policy gradient alone, from a warm start that never shows it?",
    SEEDS,
    lambda seed: [arms.gapg(seed), Arm("no help demonstrations", {"task.args.help_shown": "false"}, seed)],
    "A warm start with and without help demonstrations",
    less="GAPG",
    more=calls_sampled,
    more_tables=calls_table,
    check=check_demonstrations,
)

# ---- the group's size, and the gradient's variance

RESPONSES = 256
"""Sampled responses a step at every group size."""


def group_arms(seed: int) -> list[Arm]:
    """A run a group size, and the warm start, on which the gradient's variance is measured."""
    sizes = {
        g: {"rollout.samples_per_prompt": f"{g}", "rollout.prompts_per_step": f"{RESPONSES // g}"} for g in GROUP_SIZES
    }
    return [Arm(f"G = {g}", own, seed) for g, own in sizes.items()] + [arms.warm_start(seed, (GRADIENT_VARIANCE,))]


def measure_groups(runs: list[Finished]) -> tuple[Rows, list[Difference]]:
    trained = [run for run in runs if not run.arm.predictions]
    rows, comparisons = measure_settings(trained, "G = 8", (), lambda run: {})
    return rows + measured_rows([run for run in runs if run.arm.predictions]), comparisons


def split(record: Record) -> tuple[Rows, Rows]:
    """(rows of trained arms, rows of the gradient's variance)."""
    variance = [row for row in record["rows"] if "group_size" in row]
    return [row for row in record["rows"] if "group_size" not in row], variance


def group_tables(record: Record) -> list[Table]:
    rows, variance = split(record)
    title = f"Group size at {RESPONSES} responses a step"
    return [less_table(title, rows, record["comparisons"]), variance_table(variance)]


def draw_groups(figure: Figure, record: Record) -> None:
    rows, variance = split(record)
    scatter, sizes = draw_settings(figure, rows, more=2)
    draw_variance(scatter, variance)
    draw_sizes(sizes, variance)


GROUP_SIZE = Study(
    "group-size",
    "How many responses a prompt, at the same number in all, and is the gradient as noisy as the formula says?",
    SEEDS,
    group_arms,
    measure_groups,
    group_tables,
    draw_groups,
)
