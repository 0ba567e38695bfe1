"""A cloud that is worse, better or random: in training, and after it. `gapg experiment oracle`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from gapg.config import ConfigError, RunConfig
from gapg.studies import units
from gapg.studies.curves import FloatArray, accuracies_at
from gapg.studies.drawing import COLOURS, GREY, SMALL, panels, percent
from gapg.studies.methods import Rows, by_label, interval, listed, percents
from gapg.studies.paired import paired_difference
from gapg.studies.settings import (
    Comparison,
    called,
    correctness,
    figures,
    in_percent,
    over_seeds,
    own_curve,
)
from gapg.studies.study import Finished, Report, Study, Table, Unit
from gapg_rollout.oracle_solver import SolverOracle

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ACCURACIES = (1.0, 0.8, 0.6, 0.4)
STOCHASTIC, SAMPLES = 0.6, 4
"""The stochastic oracle: each of 4 samples a question is right with its own chance of 60%."""
DEFAULT = "GAPG"
TRAINED, SWAPPED = "trained with it", "swapped in after training"


def label(accuracy: float, samples: int = 1) -> str:
    return f"oracle {accuracy:.0%}" + (f", {samples} samples" if samples > 1 else "")


def oracle_units(seed: int) -> list[Unit]:
    return [
        units.gapg(seed),
        *(Unit(label(a), {"oracle.accuracy": f"{a:g}"}, seed) for a in ACCURACIES),
        Unit(
            label(STOCHASTIC, SAMPLES),
            {"oracle.accuracy": f"{STOCHASTIC:g}", "oracle.samples": f"{SAMPLES}"},
            seed,
        ),
    ]


def check_oracle(config: RunConfig) -> None:
    """Raises ConfigError: the cloud is a real one, whose accuracy nobody sets."""
    if config.oracle.kind != "solver":
        raise ConfigError("experiment oracle sets how often the cloud is right: it needs --oracle.kind solver")


def with_oracle(rows: Rows, accuracy: float, samples: int = 1) -> Rows:
    """The same predictions, their problems put to a solver of another accuracy: what it says of a problem is fixed.

    accuracy, samples: of `SolverOracle`, as a run's config would make it.
    """
    oracle = SolverOracle(str, accuracy, wrong="0", samples=samples)
    swapped = []
    for row in rows:
        score = oracle.score(row["id"])
        cloud = "cloud_correct" if score >= 0.5 else "cloud_wrong"
        outcome = cloud if row["outcome"].startswith("cloud") else row["outcome"]
        swapped.append(row | {"oracle_score": score, "outcome": outcome})
    return swapped


def greedy(finished: Finished, accuracy: float, samples: int = 1) -> FloatArray:
    """[n] correctness of the greedy policy with its cloud fraction called, the calls answered by such an oracle."""
    rows = with_oracle(finished.rows("heldout-masked"), accuracy, samples)
    return accuracies_at(own_curve(finished.unit.label, rows), finished.config.budget.cloud_fraction)


def measure(finished: Finished, accuracy: float, samples: int, how: str) -> dict[str, Any]:
    """A raw row: the run's figures with calls answered by an oracle of this accuracy."""
    sampled = with_oracle(finished.rows("heldout-sampled"), accuracy, samples)
    c, masked = finished.config.budget.cloud_fraction, with_oracle(finished.rows("heldout-masked"), accuracy, samples)
    own = own_curve(finished.unit.label, masked)
    local, cloud = float(own.local.mean()), float(own.cloud.mean())
    return figures(finished, set()) | {
        "how": how,
        "oracle_accuracy": accuracy,
        "oracle_samples": samples,
        "called": float(called(sampled).mean()),
        "accuracy": float(correctness(sampled).mean()),
        "accuracy_at_c": float(accuracies_at(own, c).mean()),
        "cloud_alone": cloud,
        "random_at_c": (1 - c) * local + c * cloud,
    }


def analyse_oracle(finished: list[Finished]) -> Report:
    groups = by_label(finished)
    rows, comparisons = [], []
    for f in finished:
        oracle = f.config.oracle
        rows.append(measure(f, oracle.accuracy, oracle.samples, TRAINED))
        if f.unit.label == DEFAULT:
            rows += [measure(f, a, 1, SWAPPED) for a in ACCURACIES]
    for accuracy in ACCURACIES:
        trained, swapped = ([greedy(f, accuracy) for f in groups[name]] for name in (label(accuracy), DEFAULT))
        difference = paired_difference(trained, swapped)
        comparisons.append(
            Comparison(label(accuracy), DEFAULT, "greedy at the cloud fraction, same oracle", difference)
        )
    several, one = (
        [greedy(f, STOCHASTIC, SAMPLES) for f in groups[name]]
        for name in (label(STOCHASTIC, SAMPLES), label(STOCHASTIC))
    )
    what = f"greedy at the cloud fraction, both with the oracle of {SAMPLES} samples"
    stochastic = Comparison(label(STOCHASTIC, SAMPLES), label(STOCHASTIC), what, paired_difference(several, one))
    return Report(
        rows,
        [_table(rows)],
        [c.row() for c in (*comparisons, stochastic)],
        [_training_sentence(rows, comparisons), _other_sentence(rows, stochastic)],
        lambda figure: _draw(figure, rows),
    )


def _cases(rows: Iterable[Mapping[str, Any]]) -> dict[tuple[str, float, int], list[Mapping[str, Any]]]:
    """(how, accuracy, samples) -> a row a seed; the most accurate oracle first."""
    found: dict[tuple[str, float, int], list[Mapping[str, Any]]] = {}
    for row in sorted(rows, key=lambda row: (-row["oracle_accuracy"], row["oracle_samples"], row["how"] == SWAPPED)):
        found.setdefault((row["how"], row["oracle_accuracy"], row["oracle_samples"]), []).append(row)
    return found


def _table(rows: Sequence[Mapping[str, Any]]) -> Table:
    keys = ("accuracy_at_c", "random_at_c", "accuracy", "called", "local_alone", "cloud_alone")
    cells = [
        [
            f"{accuracy:.0%}" + (f" of each of {samples} samples" if samples > 1 else ""),
            how,
            *(in_percent(over_seeds(of_case, key)) for key in keys),
            f"{np.mean(over_seeds(of_case, 'alpha_c')):.2f}",
        ]
        for (how, accuracy, samples), of_case in _cases(rows).items()
    ]
    c = rows[0]["cloud_fraction"]
    columns = (
        "oracle right", "", f"greedy, {c:.0%} called", "random offloading", "as trained (T=1)", "called (T=1)",
        "local alone, greedy", "cloud alone", "alpha_c at the end",
    )  # fmt: skip
    return Table("How often the oracle is right: in training, and swapped in afterwards", columns, cells)


def _training_sentence(rows: Sequence[Mapping[str, Any]], comparisons: Sequence[Comparison]) -> str:
    cases = _cases(rows)

    def mean(accuracy: float, key: str) -> str:
        return percents(float(np.mean(over_seeds(cases[TRAINED, accuracy, 1], key))))

    ends = [
        f"{mean(a, 'accuracy_at_c')} with an oracle right on {a:.0%} (random offloading {mean(a, 'random_at_c')})"
        for a in (max(ACCURACIES), min(ACCURACIES))
    ]
    less = ", ".join(f"{c.a} {interval(c.difference)}" for c in comparisons)
    return (
        f"Greedy accuracy at the cloud fraction is {listed(ends)}; of a policy trained with the oracle that answers it "
        f"less that of {DEFAULT}, trained with another, in points: {less}."
    )


def _other_sentence(rows: Sequence[Mapping[str, Any]], stochastic: Comparison) -> str:
    alphas = [
        f"{np.mean(over_seeds(of_case, 'alpha_c')):.2f} at {accuracy:.0%}"
        for (how, accuracy, samples), of_case in _cases(rows).items()
        if how == TRAINED and samples == 1
    ]
    return (
        f"The alpha_c that the controller ends with is {listed(alphas)}; with {SAMPLES} independent samples a "
        f"question, rewarded by their mean, the policy is {stochastic.verdict} one trained with a fixed answer of the "
        f"same accuracy: {interval(stochastic.difference)} points."
    )


def _draw(figure: Figure, rows: Sequence[Mapping[str, Any]]) -> None:
    accuracy, calls, price = panels(figure, 3)
    single = {key: of_case for key, of_case in _cases(rows).items() if key[2] == 1}
    for how, colour in ((TRAINED, COLOURS[0]), (SWAPPED, COLOURS[1])):
        cases = {a: of_case for (h, a, _), of_case in single.items() if h == how}
        for key, axis in (("accuracy_at_c", accuracy), ("called", calls), ("alpha_c", price)):
            if how == SWAPPED and axis is not accuracy:
                continue
            axis.plot(list(cases), [np.mean(over_seeds(r, key)) for r in cases.values()], color=colour, label=how)
            dots = [(a, value) for a, of_case in cases.items() for value in over_seeds(of_case, key)]
            axis.plot(*zip(*dots, strict=True), "o", color=colour, markersize=4, alpha=0.6)
        if how == TRAINED:
            chance = [np.mean(over_seeds(of_case, "random_at_c")) for of_case in cases.values()]
            accuracy.plot(list(cases), chance, color=GREY, linestyle="--", label="its local answers, random offloading")
    stochastic = [row for row in rows if row["oracle_samples"] > 1]
    for key, axis in (("accuracy_at_c", accuracy), ("called", calls), ("alpha_c", price)):
        at = over_seeds(stochastic, "oracle_accuracy")
        axis.plot(at, over_seeds(stochastic, key), "x", color=COLOURS[4], label=f"{SAMPLES} samples a question")
        axis.set(xlabel="the oracle is right on")
        axis.legend(fontsize=SMALL)
        percent(axis, x=True, y=axis is not price)
    c = rows[0]["cloud_fraction"]
    calls.axhline(c, color="black", linewidth=0.8, linestyle="--")
    accuracy.set_title(f"greedy accuracy, {c:.0%} called")
    calls.set_title("called, as trained (T = 1)")
    price.set_title("alpha_c at the end of training")


ORACLE = Study(
    "oracle",
    "What does a weaker, a better or a random cloud change, in training and swapped in after it?",
    units.SEEDS,
    oracle_units,
    analyse_oracle,
    check_oracle,
)
