"""One part at a time: the group's size, help in the demonstrations, a KL penalty."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from gapg.config import ConfigError, RunConfig
from gapg.studies import units
from gapg.studies.drawing import COLOURS, SMALL, panels
from gapg.studies.gradient_variance import (
    GROUP_SIZES,
    PRODUCT,
    Agreement,
    agreements,
    draw_variance,
    measured_rows,
    variance_table,
)
from gapg.studies.methods import by_label, interval, listed
from gapg.studies.settings import (
    compared,
    differences,
    draw_calls,
    draw_settings,
    in_percent,
    over_seeds,
    settings_table,
    steps,
)
from gapg.studies.study import Finished, Report, Study, Table, Unit

if TYPE_CHECKING:
    from matplotlib.figure import Figure

RESPONSES = 256
"""Sampled responses a step at every group size."""
DEFAULT_GROUP = "G = 8"
KL_COEFFICIENTS = (0.0, 0.01, 0.1)
WITHOUT_HELP = "no help demonstrations"


def group_units(seed: int) -> list[Unit]:
    """A run a group size, and the warm start, on which the gradient's variance is measured."""
    return [
        *(
            Unit(
                f"G = {g}",
                {"rollout.samples_per_prompt": f"{g}", "rollout.prompts_per_step": f"{RESPONSES // g}"},
                seed,
            )
            for g in GROUP_SIZES
        ),
        replace(units.warm_start(seed), products=(PRODUCT,)),
    ]


def analyse_groups(finished: list[Finished]) -> Report:
    rows, comparisons = compared([f for f in finished if PRODUCT not in f.unit.products], DEFAULT_GROUP)
    variance = measured_rows(finished)
    found = agreements(variance)
    sentences = [
        f"At {RESPONSES} responses a step, greedy accuracy at the cloud fraction less that of {DEFAULT_GROUP}, in "
        f"points: {differences(comparisons)}.",
        _variance_sentence(found),
    ]

    def draw(figure: Figure) -> None:
        accuracy, calls, scatter, sizes = panels(figure, 4, width=4.6)
        draw_settings((accuracy, calls), rows)
        draw_variance(scatter, variance)
        at = [a.group_size for a in found]
        sizes.plot(at, [a.formula for a in found], color="black", linewidth=1, label="formula")
        sizes.plot(at, [a.measured for a in found], "o", color=COLOURS[0], label="measured")
        sizes.set(xscale="log", yscale="log", xlabel="G", title="variance of a group's gradient, summed")
        sizes.minorticks_off()
        sizes.set_xticks(at, [str(g) for g in at])
        sizes.legend(fontsize=SMALL)

    table = settings_table(f"Group size at {RESPONSES} responses a step", rows, comparisons, DEFAULT_GROUP)
    return Report([*rows, *variance], [table, variance_table(found)], [c.row() for c in comparisons], sentences, draw)


def _variance_sentence(found: Sequence[Agreement]) -> str:
    first, last = found[0], found[-1]
    worst = max(found, key=lambda a: abs(a.ratio - 1))
    inside = sum(a.low <= 1 <= a.high for a in found)
    more = f"{last.measured * last.group_size / (first.measured * first.group_size):.2f}"
    return (
        f"The measured variance of a group's gradient at fixed prompts is the formula's within its 95% interval at "
        f"{inside} of {len(found)} group sizes (furthest: {worst.ratio:.3f} times at G = {worst.group_size}); from "
        f"G = {first.group_size} to {last.group_size} it falls {first.measured / last.measured:.1f} times, and at an "
        f"equal number of responses to {more} of what it was."
    )


def demonstration_units(seed: int) -> list[Unit]:
    return [units.gapg(seed), Unit(WITHOUT_HELP, {"task.args.help_shown": "false"}, seed)]


def check_demonstrations(config: RunConfig) -> None:
    """Raises ConfigError: the task's demonstrations cannot be told to leave help out."""
    if config.task.name != "countdown":
        raise ConfigError("experiment demonstrations turns off Countdown's help_shown: it needs task.name=countdown")


def calls_sampled(finished: Finished) -> dict[str, int | None]:
    """Of all responses sampled in training: how many called, and the first step with a call (None: none had)."""
    rollout, rows = finished.config.rollout, steps(finished)
    a_step = rollout.prompts_per_step * rollout.samples_per_prompt
    return {
        "calls_sampled": round(sum(row["call_fraction"] for row in rows) * a_step),
        "responses_sampled": a_step * len(rows),
        "first_call": next((row["step"] for row in rows if row["call_fraction"] > 0), None),
    }


def analyse_demonstrations(finished: list[Finished]) -> Report:
    rows, comparisons = compared(finished, "GAPG")
    rows = [row | calls_sampled(f) for row, f in zip(rows, finished, strict=True)]
    (comparison,) = comparisons
    calls, sampled = (sum(over_seeds(rows, key, WITHOUT_HELP)) for key in ("calls_sampled", "responses_sampled"))
    alphas = over_seeds(rows, "alpha_c", WITHOUT_HELP)
    sentences = [
        f"Started without help demonstrations, {calls:,.0f} of {sampled:,.0f} responses sampled in training called, "
        f"with alpha_c at {np.mean(alphas):.2f} in the end, and as trained the policy calls on "
        f"{in_percent(over_seeds(rows, 'called', WITHOUT_HELP))} of the held-out problems.",
        f"Its greedy accuracy with {rows[0]['cloud_fraction']:.0%} called is {comparison.verdict} GAPG's: "
        f"{interval(comparison.difference)} points.",
    ]

    def draw(figure: Figure) -> None:
        accuracy, calls_axis, over_time = panels(figure, 3, width=4.8)
        draw_settings((accuracy, calls_axis), rows)
        draw_calls(over_time, by_label(finished))

    table = settings_table("A warm start with and without help demonstrations", rows, comparisons, "GAPG")
    return Report(rows, [table, _calls_table(rows)], [comparison.row()], sentences, draw)


def _calls_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    cells = [
        [
            row["label"],
            str(row["seed"]),
            f"{row['calls_sampled']:,}",
            f"{row['responses_sampled']:,}",
            "never" if row["first_call"] is None else str(row["first_call"]),
        ]
        for row in rows
    ]
    return Table("Calls sampled in training", ("", "seed", "calls", "responses", "first step with a call"), cells)


def kl_units(seed: int) -> list[Unit]:
    return [Unit(f"KL {coef:g}", {"loss.kl_coef": f"{coef:g}"}, seed) for coef in KL_COEFFICIENTS]


def analyse_kl(finished: list[Finished]) -> Report:
    default = f"KL {KL_COEFFICIENTS[0]:g}"
    rows, comparisons = compared(finished, default)
    labels = list(dict.fromkeys(row["label"] for row in rows))
    calls = listed([f"{in_percent(over_seeds(rows, 'called', label))} at {label}" for label in labels])
    sentences = [
        f"Greedy accuracy at the cloud fraction less that without a penalty, in points: {differences(comparisons)}; "
        f"{listed([f'{c.a} is {c.verdict} none' for c in comparisons])}.",
        f"As trained, for a target of {rows[0]['cloud_fraction']:.0%}, the policy calls on {calls}.",
    ]
    table = settings_table("A KL penalty to the warm start", rows, comparisons, default)
    return Report(
        rows, [table], [c.row() for c in comparisons], sentences, lambda figure: draw_settings(panels(figure, 2), rows)
    )


GROUP_SIZE = Study(
    "group-size",
    "How many responses a prompt, at the same number in all, and is the gradient as noisy as the formula says?",
    units.SEEDS,
    group_units,
    analyse_groups,
)
DEMONSTRATIONS = Study(
    "demonstrations",
    "Can calling be learned by the policy gradient alone, from a warm start that never shows it?",
    units.SEEDS,
    demonstration_units,
    analyse_demonstrations,
    check_demonstrations,
)
KL = Study("kl", "Does a KL penalty to the warm start buy anything?", units.SEEDS, kl_units, analyse_kl)
