"""The cloud's price and the cloud's accuracy: a fixed alpha_c, and oracles that are worse, better or random."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from gapg.config import RunConfig
from gapg.errors import ConfigError
from gapg_rollout.oracle.solver import SolverOracle
from studies import arms
from studies.arms import Arm, Finished, Rows
from studies.drawing import COLOURS, SMALL, line_over, panels, percent
from studies.report import Record, Row, Study, Table, grouped, interval, mean_of, percents, seeds_of, table_of, verdict
from studies.settings import LAST, summary
from studies.statistics import Difference, at_calls, compare, mean_by_seed, problems, smoothed

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# ---- a fixed alpha_c

ALPHAS = (0.1, 0.3, 0.5, 0.7, 0.9)
PRICES = (0.25, 0.5)
"""What a call costs, in right answers."""
FEW, NEARLY_ALL = 0.02, 0.98


def fate(call_fractions: Sequence[float], window: int = LAST) -> dict[str, Any]:
    """What became of calling in a run, judged by the mean call fraction of the last 20 training steps.

    call_fractions: of all samples, one a training step, the first step being 1. state: "never calls" where that mean
    ends under 2%, "always calls" where it ends over 98%, else "still calls". step: the first step from which on it
    stayed beyond that bound; None for one that still calls. lowest, highest: of that mean, over the run.
    """
    means = smoothed(call_fractions, window)
    found = {"state": "still calls", "step": None, "lowest": float(means.min()), "highest": float(means.max())}
    for state, beyond in (("never calls", means < FEW), ("always calls", means > NEARLY_ALL)):
        if beyond[-1]:
            inside = np.flatnonzero(~beyond)
            begin = len(call_fractions) - len(means) + 1
            found |= {"state": state, "step": begin + (int(inside[-1]) + 1 if inside.size else 0)}
    return found


def measure_prices(finished: list[Finished]) -> tuple[Rows, list[Difference]]:
    """A row a run; at each price the utility of the policy worth most less that of each other."""
    table = problems(finished)
    right = at_calls(table, finished[0].config.budget.cloud_fraction)
    rows = [summary(run, table, right) | fate([row["call_fraction"] for row in run.metrics()]) for run in finished]
    comparisons: list[Difference] = []
    for price in PRICES:
        utility = table["correct"] - price * table["called"]
        worth = {arm: mean_by_seed(table, utility, arm) for arm in table["arm"].unique()}
        seeds = sorted({row["seed"] for row in rows})
        for row in rows:
            row[f"utility_{price:g}"] = worth[row["label"]][seeds.index(row["seed"])]
        best = max(worth, key=lambda arm: float(np.mean(worth[arm])))
        others = ((arm, compare(table, utility, best, arm)) for arm in worth if arm != best)
        comparisons += [{"a": best, "b": arm, "what": f"utility at {price:g} a call", **d} for arm, d in others]
    return rows, comparisons


def price_tables(record: Record) -> list[Table]:
    rows = record["rows"]
    turned = {"better": "worse", "worse": "better", "same": "same"}  # the best less this, told of this
    beside = {(d["what"], d["b"]): turned[verdict(d)] for d in record["comparisons"]}
    oracle = float(np.mean([row["cloud_alone"] for row in rows]))
    cells = [
        [
            row["label"].removeprefix("alpha_c "),
            str(row["seed"]),
            row["state"],
            "" if row["step"] is None else str(row["step"]),
            f"{percents(row['lowest'])} to {percents(row['highest'])}",
            *(percents(row[key]) for key in ("called", "accuracy", "local_alone")),
            *(f"{row[f'utility_{price:g}']:.3f}" for price in PRICES),
            *(beside.get((f"utility at {price:g} a call", row["label"]), "best") for price in PRICES),
        ]
        for row in rows
    ]
    columns = [
        "alpha_c", "seed", "", "from step", f"called in training, mean of {LAST} steps", "called (T=1)",
        "together (T=1)", "local alone, greedy", *(f"worth at {price:g} a call" for price in PRICES),
        *(f"at {price:g} (rule: alpha_c {max(0.0, 1 - price / oracle):.2f})" for price in PRICES),
    ]  # fmt: skip
    return [
        Table("A fixed alpha_c: what became of calling, and what the policy is worth at two prices", columns, cells)
    ]


def draw_prices(figure: Figure, record: Record) -> None:
    rows = record["rows"]
    training, outcome, worth = panels(figure, 3)
    lowest, highest, alphas = zip(*((row["lowest"], row["highest"], row["alpha_c"]) for row in rows), strict=True)
    training.vlines(alphas, lowest, highest, color=COLOURS[0], linewidth=6, alpha=0.3, label="lowest to highest")
    line_over(training, rows, "alpha_c", "called_in_training", COLOURS[0], "in the end")
    line_over(outcome, rows, "alpha_c", "called", COLOURS[0], "called")
    line_over(outcome, rows, "alpha_c", "accuracy", COLOURS[1], "right, together")
    line_over(outcome, rows, "alpha_c", "local_alone", COLOURS[2], "right, local alone (greedy)")
    for price, colour in zip(PRICES, (COLOURS[0], COLOURS[4]), strict=True):
        line_over(worth, rows, "alpha_c", f"utility_{price:g}", colour, f"{price:g} a call")
        means = pd.DataFrame(rows).groupby("alpha_c")[f"utility_{price:g}"].mean()
        worth.plot([means.idxmax()], [means.max()], "*", color=colour, markersize=16)
    training.set(ylim=(-0.02, 1.02), title=f"called in training, mean of {LAST} steps")
    outcome.set(ylim=(-0.02, 1.02), title="held-out problems, as trained (T = 1)")
    worth.set(title="right answers a problem, less the price of its call")
    for axis in (training, outcome, worth):
        axis.set_xlabel("alpha_c")
        axis.legend(fontsize=SMALL)
        percent(axis, y=axis is not worth)


COLLAPSE = Study(
    "collapse",
    "Where does a fixed alpha_c make calling die out or take over, and which one does a doubled price ask for?",
    arms.SEEDS,
    lambda seed: [Arm(f"alpha_c {a}", {**arms.FIXED_PRICE, "reward.alpha_c": f"{a}"}, seed) for a in ALPHAS],
    measure_prices,
    price_tables,
    draw_prices,
    notes="A run that still calls may have lost its own answers: local alone says how often it is right without a call,"
    " and falls where a call pays more. Worth is right answers a problem less the price of its calls; the last columns"
    " compare it with the best. The rule: where a call costs p right answers and the oracle is right on q, the best"
    " policy has alpha_c = 1 - p / q.",
)

# ---- oracles

DEFAULT = "GAPG"
ACCURACIES = (1.0, 0.8, 0.6, 0.4)
STOCHASTIC, SAMPLES = 0.6, 4
"""The stochastic oracle: each of 4 samples a question is right with its own chance of 60%."""
TRAINED, SWAPPED = "trained with it", "swapped in after training"


def label(accuracy: float, samples: int = 1) -> str:
    return f"oracle {accuracy:.0%}" + (f", {samples} samples" if samples > 1 else "")


def oracle_arms(seed: int) -> list[Arm]:
    stochastic = {"oracle.accuracy": f"{STOCHASTIC:g}", "oracle.samples": f"{SAMPLES}"}
    found = [Arm(label(a), {"oracle.accuracy": f"{a:g}"}, seed) for a in ACCURACIES]
    return [arms.gapg(seed), *found, Arm(label(STOCHASTIC, SAMPLES), stochastic, seed)]


def check_oracle(config: RunConfig) -> None:
    """Raises ConfigError: the cloud is a real one, whose accuracy nobody sets."""
    if config.oracle.kind != "solver":
        raise ConfigError("study oracle sets how often the cloud is right: it needs --oracle.kind solver")


def with_oracle(table: pd.DataFrame, accuracy: float, samples: int = 1) -> pd.DataFrame:
    """The table with its problems put to a solver of another accuracy: what it says of a problem is fixed.

    accuracy, samples: of `SolverOracle`, as a run's config would make it.
    """
    oracle = SolverOracle(str, accuracy, wrong="0", samples=samples)
    cloud = table["id"].map({name: oracle.score(name) for name in table["id"].unique()})
    return table.assign(cloud=cloud, correct=table["correct"].where(table["called"] == 0, cloud))


def measure_oracles(finished: list[Finished]) -> tuple[Rows, list[Difference]]:
    """A row a run and an oracle that answers it: the one it was trained with, and the default also with the others."""
    table, c = problems(finished), finished[0].config.budget.cloud_fraction
    own = [(run.config.oracle.accuracy, run.config.oracle.samples) for run in finished]
    answered = {key: with_oracle(table, *key) for key in set(own)}
    right = {key: at_calls(swapped, c) for key, swapped in answered.items()}
    rows: Rows = []
    for run, trained in zip(finished, own, strict=True):
        others = [(SWAPPED, (a, 1)) for a in ACCURACIES] if run.arm.label == DEFAULT else []
        for how, key in [(TRAINED, trained), *others]:
            row = summary(run, answered[key], right[key])
            row |= {"how": how, "oracle_accuracy": key[0], "oracle_samples": key[1]}
            rows.append(row | {"random_at_c": (1 - c) * row["local_alone"] + c * row["cloud_alone"]})
    pairs = [(label(a), DEFAULT, (a, 1), "same oracle") for a in ACCURACIES]
    both = f"both with the oracle of {SAMPLES} samples"
    pairs += [(label(STOCHASTIC, SAMPLES), label(STOCHASTIC), (STOCHASTIC, SAMPLES), both)]
    return rows, [
        {"a": a, "b": b, "what": f"greedy at the cloud fraction, {what}", **compare(table, right[key], a, b)}
        for a, b, key, what in pairs
    ]


def oracle_tables(record: Record) -> list[Table]:
    """A line a way and an oracle, the most accurate one first."""
    rows, less = record["rows"], {d["a"]: d for d in record["comparisons"]}
    rows = sorted(rows, key=lambda row: (-row["oracle_accuracy"], row["oracle_samples"], row["how"] == SWAPPED))

    def right(case: list[Row]) -> str:
        accuracy, samples = case[0]["oracle_accuracy"], case[0]["oracle_samples"]
        return f"{accuracy:.0%}" + (f" of each of {samples} samples" if samples > 1 else "")

    def against(text: Callable[[Difference], str]) -> Callable[[list[Row]], str]:
        return lambda case: text(less[case[0]["label"]]) if case[0]["label"] in less else ""

    columns = [
        ("oracle right", right),
        ("", lambda case: str(case[0]["how"])),
        (f"greedy, {rows[0]['cloud_fraction']:.0%} called", seeds_of("accuracy_at_c")),
        ("random offloading", seeds_of("random_at_c")),
        ("as trained (T=1)", seeds_of("accuracy")),
        ("called (T=1)", seeds_of("called")),
        ("local alone, greedy", seeds_of("local_alone")),
        ("cloud alone", seeds_of("cloud_alone")),
        ("alpha_c at the end", mean_of("alpha_c", "{:.2f}".format)),
        ("compared with", against(lambda d: str(d["b"]))),
        ("less it, points (95%)", against(interval)),
        ("verdict", against(verdict)),
    ]
    title = "How often the oracle is right: in training, and swapped in afterwards"
    return [table_of(title, grouped(rows, "how", "oracle_accuracy", "oracle_samples").values(), columns)]


def draw_oracles(figure: Figure, record: Record) -> None:
    c = record["rows"][0]["cloud_fraction"]
    of_kind = grouped(record["rows"], "how", "oracle_samples")
    for axis, key, title in zip(
        panels(figure, 3),
        ("accuracy_at_c", "called", "alpha_c"),
        (f"greedy accuracy, {c:.0%} called", "called, as trained (T = 1)", "alpha_c at the end of training"),
        strict=True,
    ):
        line_over(axis, of_kind[TRAINED, 1], "oracle_accuracy", key, COLOURS[0], TRAINED)
        if key == "accuracy_at_c":
            line_over(axis, of_kind[SWAPPED, 1], "oracle_accuracy", key, COLOURS[1], SWAPPED)
            chance = "its local answers, random offloading"
            line_over(axis, of_kind[TRAINED, 1], "oracle_accuracy", "random_at_c", COLOURS[9], chance)
        at = pd.DataFrame(of_kind[TRAINED, SAMPLES])
        axis.plot(at["oracle_accuracy"], at[key], "x", color=COLOURS[4], label=f"{SAMPLES} samples a question")
        if key == "called":
            axis.axhline(c, color="black", linewidth=0.8, linestyle="--")
        axis.set(xlabel="the oracle is right on", title=title)
        axis.legend(fontsize=SMALL)
        percent(axis, x=True, y=key != "alpha_c")


ORACLE = Study(
    "oracle",
    "What does a weaker, a better or a random cloud change, in training and swapped in after it?",
    arms.SEEDS,
    oracle_arms,
    measure_oracles,
    oracle_tables,
    draw_oracles,
    check_oracle,
    notes="The verdict is on greedy accuracy at the cloud fraction, the same oracle answering the calls of both.",
)
