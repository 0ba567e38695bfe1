"""A real model with its own chat template, tokens and vLLM: SmolLM2-135M-Instruct on arithmetic in words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from gapg.config import RunConfig
from gapg.errors import ConfigError
from studies import arms, probe, self_check
from studies.arms import Arm, Entrant, Finished, Rows
from studies.by_problem import HELDOUT, VALIDATION, Router, collect, log_prob_router, stacked
from studies.drawing import COLOURS, GREY, SMALL, panels, percent
from studies.report import (
    Column,
    Record,
    Row,
    Study,
    Table,
    covered,
    grouped,
    interval,
    mean_of,
    percents,
    seeds_of,
    table_of,
    verdict,
)
from studies.shift import calibration
from studies.statistics import (
    Difference,
    area,
    at_calls,
    at_threshold,
    bootstrap_of_kinds,
    compare,
    curve,
    shares_at,
    t_interval,
    threshold_for,
)
from studies.training_cost import PHASES, seconds_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

OURS, MASKED = "marginal", "task-tuned, masked"
FRACTIONS = (0.1, 0.2, 0.3, 0.5, 0.7)
BUDGET = 0.3
KINDS = {"template/": "new templates", "numbers/": "known templates"}
"""The two kinds of held-out problems, by how their ids begin."""
SHOWN, LONGEST = 1, 400
"""Responses that are shown of each outcome of a run, and most characters of one."""


ENTRANTS = (
    Entrant("warm start", arms.warm_start),
    Entrant(OURS, arms.marginal),
    Entrant("GAPG", arms.gapg),
    Entrant(MASKED, arms.masked),
    *(e for e in (*probe.ENTRANTS, *self_check.ENTRANTS) if e.predictions in (probe.PROBE, self_check.UNTRAINED)),
)
ROUTERS: Mapping[str, Mapping[str, Router]] = {
    MASKED: {"+ mean log-prob": log_prob_router("answer_logprob_mean")},
}


def word_arms(seed: int) -> list[Arm]:
    """Each run once, with what is measured on it."""
    found: dict[str, Arm] = {}
    for entrant in ENTRANTS:
        arm = found.setdefault(entrant.arm(seed).label, entrant.arm(seed))
        if entrant.predictions:
            found[arm.label] = replace(arm, predictions=(*arm.predictions, entrant.predictions))
    return list(found.values())


def check(config: RunConfig) -> None:
    """Raises ConfigError: not this task."""
    if config.task.name != "word-problems":
        raise ConfigError("study word-problems needs its task: give --config arithmetic-smollm2")


def measure(finished: list[Finished]) -> tuple[Rows, list[Difference]]:
    """A row a method and seed; ours less each other at equal calls, and stacked less stacked. Greedy."""
    table = collect(finished, ENTRANTS, ROUTERS)
    # `template/ticket-price/…`: problems of a template are right and wrong together
    table["kind"] = table["id"].str.split("/").str[1]
    held, valid = (table[table["split"] == split].reset_index(drop=True) for split in (HELDOUT, VALIDATION))
    right = {c: at_calls(held, c) for c in FRACTIONS}
    runs = {(run.arm.label, run.arm.seed): run for run in finished}
    rows: Rows = []
    for (method, seed), part in held.groupby(["arm", "seed"], sort=False):
        line, at = curve(part), {f"at_{c:g}": values[part.index] for c, values in right.items()}
        row: Row = {"method": method, "seed": int(seed), "n": len(part), "area": area(line)}
        row |= {"at_0": float(line.at(0.0)), "at_1": float(line.at(1.0))}
        row |= {key: float(values.mean()) for key, values in at.items()}
        row["at_budget_interval"] = bootstrap_of_kinds(at[f"at_{BUDGET:g}"].to_numpy(), part["kind"].tolist())
        share = pd.Series(shares_at(part["score"].to_numpy(), BUDGET), part.index)
        for start, kind in KINDS.items():
            mine = part["id"].str.startswith(start)
            row[kind] = {
                "called": _mean(share[mine]),
                "alone": _mean(part["local"][mine]),
                "together": _mean(at[f"at_{BUDGET:g}"][mine]),
            }
        scores = valid.loc[(valid["arm"] == method) & (valid["seed"] == seed), "score"].to_numpy()
        row["landed"] = at_threshold(part, threshold_for(scores, BUDGET))
        rows.append(row | (_of_run(runs[method, seed]) if (method, seed) in runs else {}))
    return rows, _comparisons(held, right)


def _comparisons(held: pd.DataFrame, right: Mapping[float, pd.Series]) -> list[Difference]:
    names = held["arm"].unique()
    pairs = [(stacked(OURS) if name.endswith(stacked("")) else OURS, name) for name in names]
    return [
        {"a": a, "b": b, "cloud_fraction": c, **compare(held, right[c], a, b)}
        for a, b in pairs
        if a != b
        for c in right
    ]


def _mean(values: pd.Series) -> float | None:
    return float(values.mean()) if len(values) else None


def _of_run(run: Finished) -> Row:
    """What is said of a trained model: its training, what it does as trained, its forecast, and some responses."""
    stays, sampled, steps = run.rows("heldout-masked"), run.rows("heldout-sampled"), run.metrics()
    score = np.array([row["stays"] for row in stays])
    alone = np.array([float(row["outcome"] == "local_correct") for row in stays])
    outcomes = pd.Series([row["outcome"] for row in sampled])
    return {
        "outcomes": outcomes.value_counts(normalize=True).to_dict(),
        "forecast": calibration(score, alone),
        "training": [
            {key: row[key] for key in ("step", "local_accuracy", "accuracy", "call_fraction", "response_tokens")}
            for row in steps
        ],
        "cost": _cost(steps),
        "transcripts": [
            {key: row[key] for key in ("outcome", "problem", "response", "gold")}
            for _, of_outcome in sorted(grouped(sampled, "outcome").items())
            for row in of_outcome[:SHOWN]
        ],
    }


def _cost(steps: Rows) -> dict[str, float] | None:
    """Seconds a step by phase; tokens a second, sampled and given to the update. None where nothing was trained."""
    if not steps:
        return None
    seconds = seconds_of(steps)
    return {
        **{phase: value / len(steps) for phase, value in seconds.items()},
        "sampled_per_s": sum(row["tokens_sampled"] for row in steps) / seconds["rollout"],
        "updated_per_s": sum(row["tokens/given"] for row in steps) / seconds["update"],
    }


def tables(record: Record) -> list[Table]:
    rows, less = record["rows"], grouped(record["comparisons"], "b")

    def against(of: list[Row]) -> str:
        found = less.get((of[0]["method"],), [])
        return "; ".join(f"{d['cloud_fraction']:.0%}: {interval(d)} {verdict(d)}" for d in found)

    name: Column = ("method", lambda of: str(of[0]["method"]))
    at_equal: list[Column] = [
        name,
        ("local alone", seeds_of("at_0")),
        *((f"{c:.0%} called", seeds_of(f"at_{c:g}")) for c in FRACTIONS),
        (f"95% at {BUDGET:.0%}", _at_budget),
        ("area", mean_of("area", "{:.3f}".format)),
        (f"{OURS} less it, points (95%); stacked less stacked", against),
    ]
    by_kind: list[Column] = [
        (f"{kind}, {what}", lambda of, k=kind, w=what: _share([row[k][w] for row in of]))  # type: ignore[misc]
        for kind in KINDS.values()
        for what in ("alone", "called", "together")
    ]
    landing: list[Column] = [
        (what, lambda of, i=i: _share([row["landed"][i] for row in of]))  # type: ignore[misc]
        for i, what in enumerate(("called", "together"))
    ]
    everyone = list(grouped(rows, "method").values())
    models = list(grouped([row for row in rows if "forecast" in row], "method").values())
    covers = covered(len(record["seeds"]), "templates")
    return [
        table_of(f"Right together at equal calls, greedy; {covers}", everyone, at_equal),
        table_of(f"The same at {BUDGET:.0%} of all called, by kind of held-out problem", everyone, [name, *by_kind]),
        table_of(f"A threshold for {BUDGET:.0%}, set on validation problems", everyone, [name, *landing]),
        table_of("As trained, sampled", models, [name, *map(_outcome, _outcomes(models))]),
        table_of("S as a forecast of a right answer, greedy", models, [name, *map(_forecast, FORECAST)]),
        table_of("A training step", [m for m in models if m[0]["cost"]], [name, *map(_costs, COSTS)]),
        Table("Responses, sampled", ("method", "outcome", "problem", "response"), _transcripts(models)),
    ]


def _share(values: Sequence[float | None]) -> str:
    return "–" if None in values else percents(float(np.mean(values)))  # type: ignore[arg-type]


def _at_budget(rows: list[Row]) -> str:
    """Over seeds where there are several, else over templates."""
    values = [row[f"at_{BUDGET:g}"] for row in rows]
    low, high = t_interval(values) if len(values) > 1 else rows[0]["at_budget_interval"]
    return f"{percents(low)} to {percents(high)}"


def _outcomes(models: Sequence[list[Row]]) -> list[str]:
    return sorted({outcome for rows in models for row in rows for outcome in row["outcomes"]})


def _outcome(outcome: str) -> Column:
    return outcome.replace("_", " "), lambda of: _share([row["outcomes"].get(outcome, 0.0) for row in of])


FORECAST = {"mean S": "stays", "Brier score": "brier", "calibration error": "ece", "by chance": "ece_by_chance"} | {
    "AUROC": "auroc"
}


def _forecast(title: str) -> Column:
    return title, lambda of: mean_of("x", "{:.3f}".format)([{"x": row["forecast"][FORECAST[title]]} for row in of])


COSTS = {f"{phase}, s": phase for phase in PHASES} | {
    "sampled tokens/s": "sampled_per_s",
    "updated tokens/s": "updated_per_s",
}


def _costs(title: str) -> Column:
    return title, lambda of: mean_of("x", "{:.1f}".format)([{"x": row["cost"][COSTS[title]]} for row in of])


def _transcripts(models: Sequence[list[Row]]) -> list[tuple[str, str, str, str]]:
    """Of each model's first seed."""
    return [
        (str(of[0]["method"]), t["outcome"].replace("_", " "), f"{t['problem']} ({t['gold']})", _short(t["response"]))
        for of in models
        for t in of[0]["transcripts"]
    ]


def _short(text: str) -> str:
    """On one line, as Markdown shows it."""
    line = " ⏎ ".join(text[:LONGEST].split("\n")) + "…" * (len(text) > LONGEST)
    return line.replace("<", "&lt;").replace(">", "&gt;")


def draw(figure: Figure, record: Record) -> None:
    """Accuracy against calls; training by step; S as a forecast."""
    of_method = {method: rows for (method,), rows in grouped(record["rows"], "method").items()}
    plain = [method for method in of_method if not method.endswith(stacked(""))]
    colours = dict(zip(plain, COLOURS, strict=False))
    called, trained, calls, forecast = panels(figure, 2, 2, width=6.4)
    at = np.array([0.0, *FRACTIONS, 1.0])
    for method, rows in of_method.items():
        y_SK = np.array([[row[f"at_{c:g}"] for c in at] for row in rows])
        style: dict[str, Any] = {"color": colours[method.removesuffix(stacked(""))]}
        called.plot(at, y_SK.mean(0), "-" if method in colours else "--", linewidth=2, label=method, **style)
        if "training" in rows[0] and rows[0]["training"]:
            _curve(trained, rows, "local_accuracy", method, colours[method])
            _curve(calls, rows, "call_fraction", method, colours[method])
            bins = pd.DataFrame([b for row in rows for b in row["forecast"]["reliability"]]).sort_values("stays")
            forecast.plot(bins["stays"], bins["right"], "o-", color=colours[method], markersize=4, label=method)
    forecast.plot([0, 1], [0, 1], color=GREY, linewidth=0.8, linestyle="--")
    called.set(xlabel="called", ylabel="right together", title="held-out problems, greedy")
    trained.set(xlabel="step", ylabel="right alone, sampled", title="training")
    calls.set(xlabel="step", ylabel="called", title="training")
    forecast.set(xlabel="S", ylabel="right alone", title="S as a forecast")
    percent(called, x=True, y=True)
    percent(forecast, x=True, y=True)
    for axis in (trained, calls):
        percent(axis, y=True)
    for axis in (called, trained, forecast):
        axis.legend(fontsize=SMALL)


def _curve(axis: Axes, rows: list[Row], key: str, label: str, colour: str) -> None:
    """Each seed's steps, and their running mean."""
    of = pd.DataFrame([step for row in rows for step in row["training"]]).groupby("step")[key].mean()
    axis.plot(of.index, of, color=colour, alpha=0.25)
    axis.plot(of.index, of.rolling(5, min_periods=1).mean(), color=colour, linewidth=2, label=label)


WORD_PROBLEMS = Study(
    "word-problems",
    "A real model, its own tokens and words: does training the decision beat a router on the same model tuned alone?",
    (1,),
    word_arms,
    measure,
    tables,
    draw,
    check,
    sets=("task.name", "task.args.held_out_by"),
    notes="SmolLM2-135M-Instruct. Routers (+) decide for the model of masked rollouts rewarded for right answers."
    ' "stacked": a logistic regression of the score, the help margin, the mean and least log-prob and the length,'
    " fitted on the validation problems. A fifth of the templates is never trained on: half of the held-out problems"
    " are of these, half of the others, with numbers never trained on. Verdicts are not corrected for their number.",
    config="arithmetic-smollm2",
)
