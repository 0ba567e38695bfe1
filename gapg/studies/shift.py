"""Problems that the model was not trained on: whether it knows when to call. `gapg experiment shift`."""

from __future__ import annotations

import inspect
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from gapg.config import ConfigError, RunConfig
from gapg.runs.run import Run
from gapg.seeding import derive
from gapg.studies import units
from gapg.studies.curves import FloatArray, threshold_for
from gapg.studies.methods import listed, percents
from gapg.studies.paired import spread, t_interval
from gapg.studies.products import greedy_masked
from gapg.studies.routers import help_margins
from gapg.studies.settings import LAST, in_percent, steps
from gapg.studies.shift_picture import draw
from gapg.studies.study import Finished, Report, Study, Table, Unit
from gapg.tasks.arithmetic import random_trace, traces
from gapg.tasks.base import Prompt
from gapg.tasks.countdown import Countdown

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


def check_shift(config: RunConfig) -> None:
    """Raises ConfigError: no Countdown."""
    if config.task.name != "countdown":
        raise ConfigError("experiment shift makes its own Countdown problems: it needs task.name=countdown")


def shapes(config: RunConfig) -> dict[str, Shape]:
    """The shifted sets by name, each one step beyond the config's problems; without those that its vocabulary
    leaves no room for."""
    bound = inspect.signature(Countdown).bind(**config.task.args)
    bound.apply_defaults()
    given = bound.arguments
    number, target, value = given["max_number"], given["max_target"], given["max_value"]
    count = given["numbers"] if isinstance(given["numbers"], int) else max(given["numbers"])
    words = max(number, target, value)  # the tokenizer knows no more
    larger = min(2 * number, words)
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


def shifted(run: Run) -> list[dict[str, Any]]:
    """A product: greedy predictions with help forbidden on every shifted set, named by `set`."""
    rollout = run.config.rollout
    longer = rollout.model_copy(update={"max_new_tokens": LONGER * rollout.max_new_tokens})
    roomy = replace(run, config=run.config.model_copy(update={"rollout": longer}))
    rows = []
    for name, shape in shapes(run.config).items():
        # the same problems for every run
        prompts = make_problems(shape, PROBLEMS, derive(0, "shift", name))
        rows += [{"set": name, **row} for row in greedy_masked(roomy, f"shift: {name}", prompts)]
    return rows


PRODUCT = f"{__name__}:{shifted.__name__}"


def shift_units(seed: int) -> list[Unit]:
    return [units.gapg(seed, products=(PRODUCT,))]


def ways(problem: str, max_value: int) -> int:
    """How many computations reach the target of `3 8 15 = 39`."""
    numbers, _, target = problem.partition(" = ")
    return sum(t.value == int(target) for t in traces(tuple(map(int, numbers.split())), max_value))


def decisions(called: npt.ArrayLike, failed: npt.ArrayLike) -> dict[str, float | None]:
    """Calls against the model's own failures: precision is P(failed | called), recall is P(called | failed)."""
    calls, fails = np.asarray(called, dtype=bool), np.asarray(failed, dtype=bool)
    both = float((calls & fails).sum())
    return {
        "called": float(calls.mean()),
        "failed": float(fails.mean()),
        "precision": both / float(calls.sum()) if calls.any() else None,
        "recall": both / float(fails.sum()) if fails.any() else None,
    }


def boundary(margins: FloatArray, local: FloatArray) -> dict[str, Any]:
    """Local success by the margin of help: in bins, and at the call boundary (None where nothing is near it)."""
    near, bin_of = np.abs(margins) <= NEAR, np.searchsorted(EDGES, margins)
    bins = []
    for i in range(len(EDGES) + 1):
        inside = bin_of == i
        bins.append({"n": int(inside.sum()), "right": float(local[inside].mean()) if inside.any() else None})
    return {"near": int(near.sum()), "right_near": float(local[near].mean()) if near.any() else None, "bins": bins}


def _set_row(
    finished: Finished, name: str, rows: Sequence[dict[str, Any]], threshold: float, max_value: int
) -> dict[str, Any]:
    """The raw row of one seed and set; calls are greedy, at the threshold set on the training problems."""
    known = [row for row in rows if row["oracle_score"] is not None]
    margins = help_margins(known)
    called = margins > threshold
    local = np.array([row["outcome"] == "local_correct" for row in known], dtype=np.float64)
    cloud = np.array([row["oracle_score"] for row in known], dtype=np.float64)
    number_of_ways = np.array([ways(row["id"], max_value) for row in known])
    buckets = []
    for low, high in WAYS:
        inside = (number_of_ways >= low) & (number_of_ways <= high)
        found = decisions(called[inside], local[inside] == 0) if inside.any() else None
        buckets.append({"ways": [low, high], "n": int(inside.sum()), **(found or {})})
    price = float(np.mean([row["alpha_c"] for row in steps(finished)[-LAST:]]))
    return {
        "set": name,
        "seed": finished.unit.seed,
        "n": len(known),
        **decisions(called, local == 0),
        "called_unbiased": float((margins > 0).mean()),
        "accuracy": float(np.where(called, cloud, local).mean()),
        "local_alone": float(local.mean()),
        "cloud_alone": float(cloud.mean()),
        "buckets": buckets,
        "boundary": boundary(margins, local),
        "alpha_c": price,
        "implied": price * float(cloud.mean()),
    }


def analyse_shift(finished: list[Finished]) -> Report:
    rows = []
    for f in finished:
        max_value = next(iter(shapes(f.config).values())).max_value
        threshold = threshold_for(help_margins(f.rows("train-masked")), f.config.budget.cloud_fraction)
        rows.append(_set_row(f, TRAINED, f.rows("heldout-masked"), threshold, max_value))
        elsewhere = f.rows(PRODUCT)
        for name in shapes(f.config):
            of_set = [row for row in elsewhere if row["set"] == name]
            rows.append(_set_row(f, name, of_set, threshold, max_value))
    names = list(dict.fromkeys(row["set"] for row in rows))
    return Report(
        rows,
        [_sets_table(rows, names), _buckets_table(rows, names), _boundary_table(rows, names)],
        [_more_calls(rows, name) for name in names[1:]],
        [_calls_sentence(rows, names), _boundary_sentence(rows, names)],
        lambda figure: draw(figure, rows, names, EDGES),
    )


def _of_set(rows: Sequence[Mapping[str, Any]], name: str, key: str) -> list[float]:
    return [row[key] for row in rows if row["set"] == name and row[key] is not None]


def _more_calls(rows: Sequence[Mapping[str, Any]], name: str) -> dict[str, Any]:
    """How much more a set is called than the problems trained on; the interval is over seeds, and needs two of them."""
    per_seed = np.subtract(_of_set(rows, name, "called"), _of_set(rows, TRAINED, "called")).tolist()
    low, high = t_interval(per_seed) if len(per_seed) > 1 else (None, None)
    found = spread(per_seed)
    return {"a": name, "b": TRAINED, "what": "called", "mean": found.mean, "low": low, "high": high,
            "per_seed": list(found.values)}  # fmt: skip


def _shown(values: Sequence[float]) -> str:
    return in_percent(values) if values else "–"


def _sets_table(rows: Sequence[Mapping[str, Any]], names: Sequence[str]) -> Table:
    keys = ("called", "failed", "precision", "recall", "accuracy", "local_alone", "cloud_alone", "called_unbiased")
    cells = [
        [name, f"{np.mean(_of_set(rows, name, 'n')):.0f}", *(_shown(_of_set(rows, name, key)) for key in keys)]
        for name in names
    ]
    columns = (
        "", "problems", "called", "fails alone", "calls that were needed", "failures that are called", "together",
        "local alone", "cloud alone", "called, no threshold",
    )  # fmt: skip
    return Table("Greedy, with the threshold of the help phrase set on the training problems", columns, cells)


def _bucket(rows: Sequence[Mapping[str, Any]], name: str, i: int, key: str) -> list[float]:
    buckets = [row["buckets"][i] for row in rows if row["set"] == name]
    return [b[key] for b in buckets if b.get(key) is not None]


def _ways(low: int, high: int) -> str:
    return f"{low}" if low == high else f"{low} or more" if high > 1000 else f"{low} to {high}"


def _buckets_table(rows: Sequence[Mapping[str, Any]], names: Sequence[str]) -> Table:
    cells = [
        [
            name,
            _ways(*WAYS[i]),
            f"{np.mean(_bucket(rows, name, i, 'n')):.0f}",
            *(_shown(_bucket(rows, name, i, key)) for key in ("called", "failed", "precision", "recall")),
        ]
        for name in names
        for i in range(len(WAYS))
    ]
    columns = ("", "ways to the target", "problems", "called", "fails alone", "calls needed", "failures called")
    return Table("By difficulty: in how many ways the target can be reached", columns, cells)


def _boundary_table(rows: Sequence[Mapping[str, Any]], names: Sequence[str]) -> Table:
    cells = []
    for name in names:
        of_set, right = [row for row in rows if row["set"] == name], _near(rows, name)
        near, implied = np.mean([row["boundary"]["near"] for row in of_set]), np.mean(_of_set(rows, name, "implied"))
        cells.append([name, f"{near:.0f}", "–" if right is None else f"{right:.3f}", f"{implied:.3f}"])
    columns = ("", f"problems with a margin within {NEAR:g} of 0", "right alone there", "alpha_c P(oracle right)")
    return Table("The implied threshold: where help and an answer are equally likely", columns, cells)


def _calls_sentence(rows: Sequence[Mapping[str, Any]], names: Sequence[str]) -> str:
    def mean(name: str, key: str) -> str:
        found = _of_set(rows, name, key)
        return percents(float(np.mean(found))) if found else "–"

    sets = [f"{mean(name, 'called')} on {name} (fails alone on {mean(name, 'failed')})" for name in names[1:]]
    recalls = [f"{mean(name, 'recall')} ({name})" for name in names]
    rises = all(min(_of_set(rows, name, "called")) > max(_of_set(rows, TRAINED, "called")) for name in names[1:])
    return (
        f"Calling {'rises' if rises else 'does not always rise'} with the shift: from {mean(TRAINED, 'called')} on "
        f"problems like those trained on (fails alone on {mean(TRAINED, 'failed')}) to {listed(sets)}; of its failures "
        f"it calls on {listed(recalls)}."
    )


def _near(rows: Sequence[Mapping[str, Any]], name: str) -> float | None:
    """Local success at the call boundary, the mean over the seeds that have problems there."""
    found = [row["boundary"]["right_near"] for row in rows if row["set"] == name]
    known = [value for value in found if value is not None]
    return float(np.mean(known)) if known else None


def _boundary_sentence(rows: Sequence[Mapping[str, Any]], names: Sequence[str]) -> str:
    near = {name: _near(rows, name) for name in names}
    shown = {name: "none (nothing lies there)" if value is None else percents(value) for name, value in near.items()}
    implied = percents(float(np.mean(_of_set(rows, TRAINED, "implied"))))
    elsewhere = listed([f"{shown[name]} on {name}" for name in names[1:]])
    return (
        f"Where help and an answer are equally likely, answers are right on {shown[TRAINED]} of the problems like "
        f"those trained on (alpha_c P(oracle right), the threshold that the reward implies, is {implied}), and on "
        f"{elsewhere}."
    )


SHIFT = Study(
    "shift",
    "On problems unlike those trained on: does calling rise with difficulty, and is it the model's own failures?",
    units.SEEDS,
    shift_units,
    analyse_shift,
    check_shift,
)
