"""Problems that the model was not trained on: whether it knows when to call, and how likely it is to be right."""

from __future__ import annotations

import inspect
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from gapg.config import RunConfig
from gapg.errors import ConfigError
from gapg.evaluation.reliability import auroc, bin_scores, brier, ece, ece_by_chance
from gapg.runs.run import Run
from gapg.seeding import derive
from gapg.tasks.arithmetic import random_trace, traces
from gapg.tasks.base import Prompt
from gapg.tasks.countdown import Countdown
from studies import arms, drawing
from studies.arms import Finished, Predictions, Rows
from studies.predictions import greedy_masked, heldout
from studies.report import Column, Record, Row, Study, Table, grouped, mean_of, seeds_of, table_of, verdict
from studies.settings import LAST
from studies.statistics import Difference, FloatArray, compare_seeds, help_margins, threshold_for

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PROBLEMS = 1000
"""Problems a shifted set, or as many as there are."""
LONGER = 2
"""How many times as many tokens as in training a response may have: four numbers need more."""
TRAINED = "as trained on"
WAYS = ((1, 1), (2, 2), (3, 4), (5, 10**9))
"""Buckets of difficulty: in how many ways the target can be reached."""
EDGES = (-4.0, -2.0, -1.0, 0.0, 1.0, 2.0, 4.0)
"""Borders between bins of the help margin, in logits; at 0 help and the best other token are equally likely."""
NEAR = 1.0
"""The call boundary: margins up to this far from 0."""
OURS = "GAPG"
BINS = 10
"""Bins of equally many problems by S, for the picture."""


@dataclass(frozen=True)
class Shape:
    """What a shifted problem looks like: `count` numbers up to `number`, one of them at least over `over_number`, and a
    target in (over_target, target]; no value on the way is over `max_value`."""

    count: int
    number: int
    over_number: int
    target: int
    over_target: int
    max_value: int


def check(config: RunConfig) -> None:
    """Raises ConfigError: no Countdown."""
    if config.task.name != "countdown":
        raise ConfigError("study shift makes its own Countdown problems: it needs task.name=countdown")


def shapes(config: RunConfig) -> dict[str, Shape]:
    """The shifted sets by name, each one step beyond the config's problems; without those that its vocabulary
    leaves no room for."""
    bound = inspect.signature(Countdown).bind(**config.task.args)
    bound.apply_defaults()
    given = bound.arguments
    number, target, value = given["max_number"], given["max_target"], given["max_value"]
    count = given["numbers"] if isinstance(given["numbers"], int) else max(given["numbers"])
    larger = min(2 * number, max(number, target, value))  # the tokenizer knows no more
    found = {f"{count + 1} numbers": Shape(count + 1, number, 0, target, 0, value)}
    if larger > number:
        found[f"numbers of {number + 1} to {larger}"] = Shape(count, larger, number, target, 0, value)
    if value > target:
        found[f"targets of {target + 1} to {value}"] = Shape(count, number, 0, value, target, value)
    return found


def make_problems(shape: Shape, n: int, seed: int) -> list[Prompt]:
    """Up to n distinct random problems of the shape, each solvable because it was made by a computation."""
    rng = random.Random(seed)
    found: dict[str, Prompt] = {}
    for _ in range(50 * n):
        numbers = sorted(rng.randint(1, shape.number) for _ in range(shape.count))
        trace = random_trace(numbers, shape.max_value, rng) if numbers[-1] > shape.over_number else None
        if trace and shape.over_target < trace.value <= shape.target:
            problem = f"{' '.join(map(str, numbers))} = {trace.value}"
            found.setdefault(problem, Prompt(problem, f"{problem} :", trace.expression, "countdown"))
        if len(found) == n:
            break
    return list(found.values())


def shifted(run: Run) -> Rows:
    """Greedy predictions with help forbidden on held-out problems and every shifted set, named by `set`; the same
    problems for every run."""
    rollout = run.config.rollout
    longer = rollout.model_copy(update={"max_new_tokens": LONGER * rollout.max_new_tokens})
    roomy = replace(run, config=run.config.model_copy(update={"rollout": longer}))
    sets = {
        name: make_problems(shape, PROBLEMS, derive(0, "shift", name)) for name, shape in shapes(run.config).items()
    }
    return [
        {"set": name, **row}
        for name, prompts in {TRAINED: heldout(run), **sets}.items()
        for row in greedy_masked(roomy, f"shift: {name}", prompts)
    ]


SHIFTED = Predictions("shifted-stays", shifted)


def ways(problem: str, max_value: int) -> int:
    """How many computations reach the target of `3 8 15 = 39`."""
    numbers, _, target = problem.partition(" = ")
    return sum(t.value == int(target) for t in traces(tuple(map(int, numbers.split())), max_value))


def decisions(table: pd.DataFrame) -> dict[str, float | None]:
    """Calls against the model's own failures: precision is P(failed | called), recall is P(called | failed).

    table: a row a problem with the columns called and local, both 0 or 1.
    """
    called, failed = table["called"], 1 - table["local"]
    both = float((called * failed).sum())
    return {
        "called": float(called.mean()),
        "failed": float(failed.mean()),
        "precision": both / float(called.sum()) if called.any() else None,
        "recall": both / float(failed.sum()) if failed.any() else None,
    }


def boundary(margins: pd.Series, local: pd.Series) -> dict[str, Any]:
    """Local success by the margin of help: in bins, and at the call boundary (None where nothing is near it)."""

    def right(inside: Any) -> float | None:
        return float(local[inside].mean()) if inside.any() else None

    near, bin_of = margins.abs() <= NEAR, np.searchsorted(EDGES, margins)
    bins = [{"n": int((bin_of == i).sum()), "right": right(bin_of == i)} for i in range(len(EDGES) + 1)]
    return {"near": int(near.sum()), "right_near": right(near), "bins": bins}


def measure(finished: list[Finished]) -> tuple[Rows, list[Difference]]:
    """A row a method, seed and set; calls are greedy, at the threshold set on the training problems. Compared are each
    method's calls on a shifted set with those on the problems as trained on, and the Brier scores of S on each set."""
    rows = []
    for run in finished:
        threshold = threshold_for(help_margins(run.rows("train-masked")), run.config.budget.cloud_fraction)
        sets = grouped(run.rows(SHIFTED.name), "set")
        rows += [_set_row(run, name, of_set, threshold) for (name,), of_set in sets.items()]
    groups = grouped(rows, "method", "set")
    comparisons: list[Difference] = []
    for (method, name), of_set in groups.items():
        called, brier_score = ([row[key] for row in of_set] for key in ("called", "brier"))
        if name != TRAINED:
            as_trained = [row["called"] for row in groups[method, TRAINED]]
            more = compare_seeds(called, as_trained)
            comparisons.append({"a": name, "b": TRAINED, "what": "called", "method": method, **more})
        if method != OURS and (OURS, name) in groups:
            less = compare_seeds(brier_score, [row["brier"] for row in groups[OURS, name]])
            comparisons.append({"a": method, "b": OURS, "what": "Brier score of S", "set": name, **less})
    return rows, comparisons


def _set_row(run: Finished, name: str, predictions: Sequence[Row], threshold: float) -> dict[str, Any]:
    max_value = next(iter(shapes(run.config).values())).max_value
    known = [row for row in predictions if row["oracle_score"] is not None]
    table = pd.DataFrame(
        {
            "margin": help_margins(known),
            "local": [float(row["outcome"] == "local_correct") for row in known],
            "cloud": [float(row["oracle_score"]) for row in known],
            "ways": [ways(row["id"], max_value) for row in known],
            "stays": [row["stays"] for row in known],
        }
    )
    table["called"] = (table["margin"] > threshold).astype(float)
    buckets = []
    for low, high in WAYS:
        inside = table[table["ways"].between(low, high)]
        buckets.append({"ways": [low, high], "n": len(inside), **(decisions(inside) if len(inside) else {})})
    cloud = float(table["cloud"].mean())
    # the marginal method is trained at every price, so its boundary stands for none
    price = None if run.config.method == "marginal" else float(np.mean([r["alpha_c"] for r in run.metrics()[-LAST:]]))
    return {
        "method": run.arm.label,
        "set": name,
        "seed": run.arm.seed,
        "n": len(table),
        **decisions(table),
        "called_unbiased": float((table["margin"] > 0).mean()),
        "accuracy": float(table["cloud"].where(table["called"] > 0, table["local"]).mean()),
        "local_alone": float(table["local"].mean()),
        "cloud_alone": cloud,
        "buckets": buckets,
        "boundary": boundary(table["margin"], table["local"]),
        "alpha_c": price,
        "implied": None if price is None else price * cloud,
        **calibration(table["stays"].to_numpy(), table["local"].to_numpy()),
    }


def calibration(stays: FloatArray, right: FloatArray) -> dict[str, Any]:
    """How good a forecast of a right answer S is: its mean, Brier score, calibration error beside the one that chance
    alone would leave, and the AUROC (None where all answers are alike); `reliability`: the bins of the picture."""
    area = auroc(stays, right)
    return {
        "stays": float(stays.mean()),
        "brier": brier(stays, right),
        "ece": ece(stays, right),
        "ece_by_chance": ece_by_chance(stays),
        "auroc": None if math.isnan(area) else area,
        "reliability": [{"n": b.n, "stays": b.score, "right": b.right} for b in bin_scores(stays, right, BINS)],
    }


def rows_of(record: Record) -> Rows:
    """Older records are of GAPG alone, and do not say so."""
    return [{"method": OURS, **row} for row in record["rows"]]


def tables(record: Record) -> list[Table]:
    sets = grouped(rows_of(record), "method", "set").values()
    words = {"better": "more", "worse": "fewer", "same": "same"}
    calls_less = {
        (d.get("method", OURS), d["a"]): words[verdict(d)] for d in record["comparisons"] if d["what"] == "called"
    }
    several = len({rows[0]["method"] for rows in sets}) > 1
    name: Column = ("", lambda rows: f"{rows[0]['method']}, {rows[0]['set']}" if several else str(rows[0]["set"]))
    number: Column = ("problems", mean_of("n", "{:.0f}".format))
    calls: list[Column] = [("called", seeds_of("called")), ("fails alone", seeds_of("failed"))]
    by_set: list[Column] = [
        ("calls that were needed", seeds_of("precision")),
        ("failures that are called", seeds_of("recall")),
        ("together", seeds_of("accuracy")),
        ("local alone", seeds_of("local_alone")),
        ("cloud alone", seeds_of("cloud_alone")),
        ("called, no threshold", seeds_of("called_unbiased")),
        (f"calls, beside {TRAINED}", lambda rows: calls_less.get((rows[0]["method"], rows[0]["set"]), "")),
    ]
    needed: list[Column] = [("calls needed", seeds_of("precision")), ("failures called", seeds_of("recall"))]
    buckets = [[{**_named(row), **row["buckets"][i]} for row in rows] for rows in sets for i in range(len(WAYS))]
    edge = [[{**row, **row["boundary"]} for row in rows] for rows in sets if rows[0]["implied"] is not None]
    at_edge: list[Column] = [
        (f"problems with a margin within {NEAR:g} of 0", mean_of("near", "{:.0f}".format)),
        ("right alone there", mean_of("right_near", "{:.3f}".format)),
        ("alpha_c P(oracle right)", mean_of("implied", "{:.3f}".format)),
    ]
    first = "Greedy, with the threshold of the help phrase set on the training problems"
    second = "By difficulty: in how many ways the target can be reached"
    third = "The implied threshold: where help and an answer are equally likely"
    made = [
        table_of(first, sets, [name, number, *calls, *by_set]),
        table_of(second, buckets, [name, ("ways to the target", _ways), number, *calls, *needed]),
        table_of(third, edge, [name, *at_edge]),
    ]
    return made + [_calibration_table(record, list(sets), [name])] * all("brier" in rows[0] for rows in sets)


def _calibration_table(record: Record, sets: Sequence[list[Row]], first: list[Column]) -> Table:
    less = {(d["a"], d["set"]): d for d in record["comparisons"] if d["what"] != "called"}

    def than_ours(rows: list[Row]) -> str:
        d = less.get((rows[0]["method"], rows[0]["set"]))
        return "" if d is None else {"better": "worse", "worse": "better", "same": "same"}[verdict(d)]

    three = "{:.3f}".format
    columns: list[Column] = [
        ("right alone", seeds_of("local_alone")),
        ("mean S", seeds_of("stays")),
        ("Brier score", mean_of("brier", three)),
        ("calibration error", mean_of("ece", three)),
        ("of which by chance", mean_of("ece_by_chance", three)),
        ("AUROC", mean_of("auroc", three)),
        (f"Brier score is, than {OURS}'s", than_ours),
    ]
    title = "S, the policy's own chance of answering, as a forecast of a right answer (greedy, help forbidden)"
    return table_of(title, sets, [*first, *columns])


def _named(row: Row) -> Row:
    return {"method": row["method"], "set": row["set"]}


def _ways(rows: list[Row]) -> str:
    low, high = rows[0]["ways"]
    return f"{low}" if low == high else f"{low} or more" if high > 1000 else f"{low} to {high}"


def draw(figure: Figure, record: Record) -> None:
    """Calls against failures by set, the same by difficulty, precision and recall, success by the help margin, and S as
    a forecast. GAPG by dots, another method by triangles."""
    every = rows_of(record)
    known = all("reliability" in row for row in every)
    sets, difficulty, both, margins, *forecast = drawing.panels(figure, 4 + known, width=4.8)
    colours = dict(zip(dict.fromkeys(row["set"] for row in every), drawing.COLOURS, strict=False))
    for (method, name), rows in grouped(every, "method", "set").items():
        colour, mark = colours[name], "o" if method == OURS else "^"
        of_seeds, label = pd.DataFrame(rows), name if method == OURS else None
        sets.plot(of_seeds["failed"], of_seeds["called"], mark, color=colour, label=label)
        both.plot(of_seeds["recall"], of_seeds["precision"], mark, color=colour)
        buckets = pd.DataFrame([bucket for row in rows for bucket in row["buckets"] if bucket["n"]])
        difficulty.scatter(
            buckets["failed"], buckets["called"], 3 + buckets["n"] / 15, color=colour, alpha=0.7, marker=mark
        )
        if method == OURS:
            _draw_margins(margins, rows, colour, name)
        for axis in forecast:
            bins = pd.DataFrame([b for row in rows for b in row["reliability"]]).sort_values("stays")
            axis.plot(bins["stays"], bins["right"], mark, color=colour, markersize=4, alpha=0.6)
    others = [method for (method,) in grouped(every, "method") if method != OURS]
    marks = f"a dot a seed; triangles: {', '.join(others)}" if others else "a dot a seed"
    for axis, title in ((sets, f"sets, {marks}"), (difficulty, "by the number of ways to the target")):
        axis.set(xlabel="fails alone", ylabel="called", title=title)
    for axis in forecast:
        axis.set(xlabel="S", ylabel="right alone", title=f"S as a forecast, {BINS} bins a seed")
    for axis in (sets, difficulty, *forecast):
        axis.plot([0, 1], [0, 1], color=drawing.GREY, linewidth=0.8, linestyle="--")
    both.set(xlabel="recall: failures that are called", ylabel="precision: calls that fail alone")
    both.set_title("calls against its own failures")
    implied = float(np.mean([row["implied"] for row in every if row["implied"] is not None]))
    margins.axhline(implied, color="black", linewidth=0.8, linestyle="--", label="alpha_c P(oracle right)")
    margins.axvline(0, color="black", linewidth=0.8)
    margins.set(xlabel="help margin, logits", ylabel="right alone", title=f"success at {OURS}'s call boundary")
    for axis in (sets, difficulty, both, margins, *forecast):
        drawing.percent(axis, x=axis is not margins, y=True)
    for axis in (sets, margins):
        axis.legend(fontsize=drawing.SMALL)


def _draw_margins(axis: Axes, rows: list[Row], colour: str, name: str) -> None:
    centres = [EDGES[0] - 1.5, *(np.add(EDGES[:-1], EDGES[1:]) / 2), EDGES[-1] + 1.5]
    bins = pd.DataFrame([{"bin": i, **b} for row in rows for i, b in enumerate(row["boundary"]["bins"])])
    bins["right"] = bins["n"] * bins["right"].astype(float)
    # over the seeds, weighed by their problems; 0 / 0, an empty bin, is not drawn
    of_bins = bins.groupby("bin").sum()
    axis.plot(centres, of_bins["right"] / of_bins["n"], "o-", color=colour, markersize=4, label=name)


SHIFT = Study(
    "shift",
    "On problems unlike those trained on: does calling rise with difficulty, is it the model's own failures, and is its"
    " chance of answering still the chance of being right?",
    arms.SEEDS,
    lambda seed: [arms.gapg(seed, predictions=(SHIFTED,)), arms.marginal(seed, predictions=(SHIFTED,))],
    measure,
    tables,
    draw,
    check,
)
