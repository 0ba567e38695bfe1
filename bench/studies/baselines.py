"""GAPG beside everything it should beat, at the same number of calls."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from studies import arms, statistics
from studies.arms import Arm, Finished, Rows
from studies.drawing import BLUE, COLOURS, GREEN, GREY, SMALL, panels, percent
from studies.predictions import CALIBRATION_SAMPLES, HELDOUT_SAMPLES, SAMPLES
from studies.prompt_router import PROMPT_ROUTER
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
    seeds_of,
    seeds_range,
    table_of,
    verdict,
)
from studies.routers import doubt, reading, self_consistency
from studies.statistics import Difference, FloatArray, help_margins, threshold_for

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

OURS, LOCAL, CLOUD = "GAPG", "task-tuning only", "cloud only"
TUNED, WARM, AWARE = "task-tuned", "warm start", "no filter, fixed alpha_c"
RANDOM, PROMPT, VOTES = "+ random offloading", "+ prompt-only router", f"+ self-consistency of {SAMPLES}"
LOG_PROBS = {"+ mean log-prob": "answer_logprob_mean", "+ min log-prob": "answer_logprob_min"}
OWN_LOG_PROBS = {"GAPG, its log-prob": "answer_logprob_mean", "GAPG, its log-prob with help in it": "logprob_mean"}
ROUTERS = (RANDOM, PROMPT, *LOG_PROBS, VOTES, *OWN_LOG_PROBS)
"""They decide who answers after the training; the other methods are trained to decide."""
METHODS = (WARM, *ROUTERS[:5], AWARE, "DA-GRPO", "GAPG, std scaling", *OWN_LOG_PROBS, OURS)
FRACTIONS = (0.1, 0.2, 0.3, 0.5, 0.7, 0.9)
"""Call fractions at which GAPG is compared, beside the one it is trained to: each method's own may lie elsewhere."""
MONEY = (0.1, 0.3, 0.5, 1.0)
"""Parts of a cloud call that a problem may cost, for the table of accuracy against money."""
GRID = np.linspace(0, 1, 21)
Lines = Sequence[list[Row]]
UNSAID = {"cloud_fraction": 0.3, "call_price": 1.0, "local_price": 0.01}
"""What older records do not say of themselves."""


def baseline_arms(seed: int) -> list[Arm]:
    """The runs of one seed; the routers are built from the task-tuned one."""
    return [
        arms.warm_start(seed),
        arms.task_tuned(seed, predictions=(HELDOUT_SAMPLES, CALIBRATION_SAMPLES, PROMPT_ROUTER)),
        replace(arms.collaboration_aware(seed), label=AWARE),
        arms.gapg(seed),
        arms.std_scaled(seed),
        arms.da_grpo(seed),
    ]


# ---- measured


def with_routers(finished: Sequence[Finished]) -> tuple[pd.DataFrame, dict[tuple[str, int], FloatArray]]:
    """(the table of all methods, scores on calibration problems by method and seed where a method has some)."""
    table = statistics.problems(finished)
    parts, calibration = [table], {}
    for run in finished:
        label, seed, train = run.arm.label, run.arm.seed, run.rows("train-masked")
        mine = table[(table["arm"] == label) & (table["seed"] == seed)]
        known = set(mine["id"])
        masked = [row for row in run.rows("heldout-masked") if row["id"] in known]
        for name, key in {TUNED: LOG_PROBS, OURS: OWN_LOG_PROBS}.get(label, {}).items():
            parts.append(mine.assign(arm=name, score=doubt(masked, key)))
            calibration[name, seed] = doubt(train, key)
        if label != TUNED:
            calibration[label, seed] = help_margins(train)
            continue
        prompts = run.rows(PROMPT_ROUTER.name)
        by_id = {row["id"]: row["score"] for row in prompts if row["split"] == "heldout"}
        read, samples = reading(run.config.task.name), run.rows(HELDOUT_SAMPLES.name)
        agreement, voted = self_consistency([row for row in samples if row["id"] in known], read)
        parts += [
            mine.assign(arm=RANDOM, score=0.0),
            mine.assign(arm=PROMPT, score=mine["id"].map(by_id)),
            mine.assign(arm=VOTES, score=agreement, local=voted),
        ]
        calibration[PROMPT, seed] = np.array([row["score"] for row in prompts if row["split"] == "calibration"])
        calibration[VOTES, seed] = self_consistency(run.rows(CALIBRATION_SAMPLES.name), read)[0]
    return pd.concat(parts, ignore_index=True), calibration


def prices(runs: Sequence[Finished]) -> dict[str, float]:
    """`call_price`: the mean price of the calls that the runs made in training, their tokens at the config's prices;
    1 where the config names no price, or no tokens were counted. `local_price`: of a response of the device model."""
    # the prices as they are now: a run may be older than they are, and is the same run at any price
    oracle, call = runs[0].config.oracle, 1.0
    if oracle.price_per_million_prompt is not None and oracle.price_per_million_completion is not None:
        used = pd.DataFrame([run.info["oracle"] for run in runs]).sum()
        cost = used["prompt_tokens"] * oracle.price_per_million_prompt
        cost += used["completion_tokens"] * oracle.price_per_million_completion
        call = float(cost / 1e6 / used["requests"]) if cost else 1.0
    return {"call_price": call, "local_price": oracle.local_share * call}


def spent(method: str, called: FloatArray, price: Mapping[str, float]) -> FloatArray:
    """The money a problem costs at these call fractions. A router of the prompt alone saves the device's work where it
    calls; the others call after the device has answered."""
    answered = 1 - called if method in (RANDOM, PROMPT) else np.ones_like(called)
    return price["local_price"] * (SAMPLES if method == VOTES else 1) * answered + price["call_price"] * called


def measure(finished: list[Finished]) -> tuple[Rows, list[Difference]]:
    """A row a method and seed, with its curve at every twentieth of the calls; GAPG less each other method with equal
    parts of the problems called, and in APGR where there is a gap."""
    table, calibration = with_routers(finished)
    c, price = finished[0].config.budget.cloud_fraction, prices(finished)
    parts = dict(iter(table.groupby(["arm", "seed"])))
    alone = {seed: float(part["local"].mean()) for (arm, seed), part in parts.items() if arm == TUNED}
    rows = [
        method_row(parts[name, seed], local, calibration.get((name, seed)), c, price)
        for name in METHODS
        for seed, local in alone.items()
    ]
    comparisons: list[Difference] = []
    for fraction in sorted({*FRACTIONS, c}):
        right = statistics.at_calls(table, fraction)
        found = {name: statistics.compare(table, right, OURS, name) for name in METHODS[:-1]}
        comparisons += [{"a": OURS, "b": name, "cloud_fraction": fraction, **d} for name, d in found.items()]
    if all(row["apgr"] is not None for row in rows):
        recovered = {name: [row["apgr"] for row in of_name] for (name,), of_name in grouped(rows, "method").items()}
        found = {name: statistics.compare_seeds(recovered[OURS], recovered[name]) for name in METHODS[:-1]}
        comparisons += [{"a": OURS, "b": name, "figure": "apgr", **d} for name, d in found.items()]
    cloud = float(table["cloud"][table["arm"] == TUNED].mean())
    rows += [{"method": LOCAL, "seed": seed, "accuracy": value, "called": 0.0} for seed, value in alone.items()]
    about = {"cloud_fraction": c, **price}
    return rows + [{"method": CLOUD, "seed": s, "accuracy": cloud, "called": 1.0, **about} for s in alone], comparisons


def method_row(
    part: pd.DataFrame, local: float, calibration: FloatArray | None, c: float, price: Mapping[str, float]
) -> dict[str, Any]:
    """part: the method's problems under one seed. local: the task-tuned model's accuracy without a call."""
    name, line = part["arm"].iat[0], statistics.curve(part)
    row = {"method": name, "seed": int(part["seed"].iat[0]), "problems": len(part), "at_budget": line.at(c)}
    row |= {**statistics.measures(line, local), "curve": [round(line.at(x), 5) for x in GRID.tolist()]}
    if calibration is not None:
        called, right = statistics.at_threshold(part, threshold_for(calibration, c))
        row |= {"calibrated_called": called, "calibrated_accuracy": right}
    if name not in ROUTERS:
        row |= {"trained_called": part["called"].mean(), "trained_accuracy": part["correct"].mean()}
    money = spent(name, line.called, price)
    for share in MONEY:
        had = share * price["call_price"]
        row[f"for_{share:g}_calls_of_money"] = np.interp(had, money, line.accuracy) if had >= money[0] else None
    return row


# ---- on paper

NAME: Column = ("method", lambda rows: str(rows[0]["method"]))


def about(record: Record) -> dict[str, float]:
    """cloud_fraction, call_price, local_price."""
    return {key: record["rows"][-1].get(key, unsaid) for key, unsaid in UNSAID.items()}


def differences(record: Record) -> list[Difference]:
    """Those of the record, and where it is older than a call fraction of ours, that of the seeds' curves there."""
    found: list[Difference] = list(record["comparisons"])
    missing = set(FRACTIONS).difference(d.get("cloud_fraction") for d in found) if len(record["seeds"]) > 1 else ()
    curves = grouped((row for row in record["rows"] if "curve" in row), "method")
    for fraction in sorted(missing):
        at = {name: [row["curve"][round(fraction * (GRID.size - 1))] for row in r] for (name,), r in curves.items()}
        for name in METHODS[:-1]:
            d = statistics.compare_seeds(at[OURS], at[name])
            found.append({"a": OURS, "b": name, "cloud_fraction": fraction, **d})
    return found


def less(record: Record, at: float | str, text: Callable[[Difference], str]) -> Callable[[list[Row]], str]:
    """A column's text: GAPG less the method of the line, at this call fraction or in "apgr"."""
    found = {d["b"]: d for d in differences(record) if d.get("cloud_fraction", "apgr") == at}
    return lambda rows: text(found[rows[0]["method"]]) if rows[0]["method"] in found else ""


def tables(record: Record) -> list[Table]:
    groups = {name: rows for (name,), rows in grouped(record["rows"], "method").items()}
    own, ends = [groups[name] for name in METHODS], (groups[LOCAL], groups[CLOUD])
    return [
        _equal_calls(record, own, ends),
        _along_the_curve(record, own[:-1]),
        _operating_points(f"{about(record)['cloud_fraction']:.0%}", own),
        _gap(own, ends),
        _money(about(record), own, ends),
    ]


def _equal_calls(record: Record, own: Lines, ends: Lines) -> Table:
    c = about(record)["cloud_fraction"]
    alone, cloud = (
        [{"method": f"{row['method']} ({calls} calls)", "at_budget": row["accuracy"]} for row in rows]
        for rows, calls in zip(ends, ("no", "all"), strict=True)
    )
    ranked = sorted(own, key=lambda rows: round(float(np.mean([row["at_budget"] for row in rows])), 3))
    columns: list[Column] = [
        ("accuracy", mean_of("at_budget")),
        ("seeds", seeds_of("at_budget", lambda values: seeds_range(sorted(set(values))))),
        ("GAPG less it, points (95%)", less(record, c, interval)),
        ("seeds GAPG wins", less(record, c, lambda d: f"{d['wins']} of {len(d['per_seed'])}")),
        ("GAPG is", less(record, c, verdict)),
    ]
    title = f"Accuracy with exactly {c:.0%} of the held-out problems called; {covered(len(record['seeds']))}"
    return table_of(title, [alone, *ranked, cloud], [NAME, *columns])


def _along_the_curve(record: Record, others: Lines) -> Table:
    """All along the curve, because the runs are not trained to the same call fraction."""
    said = dict.fromkeys(d["cloud_fraction"] for d in record["comparisons"] if "cloud_fraction" in d)
    later = dict.fromkeys(d["cloud_fraction"] for d in differences(record)[len(record["comparisons"]) :])
    at: dict[float | str, str] = {f: f"{f:.0%} called" for f in said} | {"apgr": "APGR"}
    at |= {f: f"{f:.0%} called" for f in later}

    def verdicts(rows: list[Row]) -> str:
        found = {name: less(record, key, verdict)(rows) for key, name in at.items()}
        words = {word: [name for name, v in found.items() if v == word] for word in ("better", "worse")}
        return "; ".join(f"{word} at {', '.join(where)}" for word, where in words.items() if where) or "same"

    places = ", ".join(at[f] for f in said)
    title = f"GAPG less it, points (95%), at exactly {places}, and in APGR (points of the gap)"
    columns = [(name, less(record, key, interval)) for key, name in at.items()]
    return table_of(f"{title}; {covered(len(record['seeds']))}", others, [NAME, *columns, ("GAPG is", verdicts)])


def _operating_points(c: str, own: Lines) -> Table:
    """What each method really does with the threshold that a calibration set gave it, and as trained."""
    columns: list[Column] = []
    for kind, trained in (("calibrated", ""), ("trained", ", as trained")):
        key = f"{kind}_called"
        columns += [(f"called{trained}", mean_of(key)), ("seeds", seeds_of(key, seeds_range))]
        columns += [(f"accuracy{trained}", mean_of(f"{kind}_accuracy"))]
    title = f"Operating points: threshold set to {c} on calibration problems, greedy;"
    return table_of(f"{title} and as trained, at the training temperature", own, [NAME, *columns])


def _gap(own: Lines, ends: Lines) -> Table:
    """RouteLLM's measures; the gap is from the task-tuned model alone to the cloud, for every method."""
    alone, cloud = map(mean_of("accuracy"), ends)
    columns = [(title, mean_of(key, "{:.3f}".format)) for title, key in (("area", "area"), ("APGR", "apgr"))]
    columns += [("calls for 20% of the gap", mean_of("calls_for_20"))]
    columns += [(f"{share}%", mean_of(f"calls_for_{share}")) for share in (50, 80)]
    title = f"The whole curve; the gap is from the task-tuned model alone ({alone}) to the cloud ({cloud})"
    return table_of(title, own, [NAME, *columns])


def _money(price: Mapping[str, float], own: Lines, ends: Lines) -> Table:
    call, local = price["call_price"], price["local_price"]
    shares = {f"for_{share:g}_calls_of_money": share * call for share in MONEY}
    # these two call on no problem or on all: what they cost is had or not
    had = [
        [{**row, **{key: row["accuracy"] for key, money in shares.items() if money >= cost}} for row in rows]
        for rows, cost in zip(ends, (local, call), strict=True)
    ]
    unit = f"a call costs {call:.2g}, the mean paid in training at the config's token prices"
    unit = "money in cloud calls: one call is 1" if call == 1 else unit
    title = f"Accuracy for money; {unit}; a response of the device model is taken to cost {local / call:g} of it"
    return table_of(
        title, [*own, *had], [NAME, *((f"{money:.2g} a problem", mean_of(key)) for key, money in shares.items())]
    )


def draw(figure: Figure, record: Record) -> None:
    """Accuracy against calls and against money, GAPG's lead at the budget, and where the thresholds really land."""
    others = iter(colour for colour in COLOURS if colour != BLUE)
    fixed = {OURS: BLUE, RANDOM: GREY, WARM: "#718096"}
    colours = {name: fixed[name] if name in fixed else next(others) for name in METHODS}
    calls, money, lead, landed = panels(figure, 2, 2, width=7.2, height=5.4)
    _draw_curves(calls, money, record, colours)
    c = about(record)["cloud_fraction"]
    _draw_lead(lead, [d for d in record["comparisons"] if d.get("cloud_fraction") == c], colours)
    lead.set_title(f"GAPG less each method, {c:.0%} called")
    _draw_landed(landed, record, colours)
    for axis in (calls, landed):
        axis.axvline(c, color="black", linewidth=0.8, linestyle=":")
        axis.set(xlabel="called", ylabel="accuracy together")
        percent(axis, x=True, y=True)
    seeds = len(record["seeds"])
    figure.suptitle(f"{record['rows'][0]['problems']:,} held-out problems, mean over {seeds} seed{'s' * (seeds > 1)}")


def _draw_curves(calls: Axes, money: Axes, record: Record, colours: Mapping[str, str]) -> None:
    price, cloud = about(record), record["rows"][-1]["accuracy"]
    grid = np.geomspace(max(price["local_price"], 0.001 * price["call_price"]), 1.2 * price["call_price"], 300)
    for name, colour in colours.items():
        style: dict[str, Any] = {"linewidth": 2.8, "zorder": 5} if name == OURS else {"linewidth": 1.4}
        style["linestyle"] = "--" if name in (RANDOM, WARM) else "-"
        y_SK = np.array([row["curve"] for row in record["rows"] if row["method"] == name])
        calls.plot(GRID, y_SK.mean(0), color=colour, label=name, **style)
        if name == OURS:
            calls.fill_between(GRID, y_SK.min(0), y_SK.max(0), color=colour, alpha=0.1, linewidth=0)
        money.plot(grid, np.interp(grid, spent(name, GRID, price), y_SK.mean(0), np.nan, np.nan), color=colour, **style)
    for axis in (calls, money):
        axis.axhline(cloud, color=GREEN, linewidth=0.8, linestyle=":")
        axis.text(0.02, cloud, CLOUD, transform=axis.get_yaxis_transform(), va="bottom", fontsize=SMALL, color=GREEN)
    calls.set_title("accuracy against calls, greedy")
    calls.legend(fontsize=SMALL, loc="lower right", title="+ : routers of the task-tuned model", title_fontsize=SMALL)
    unit = "cloud calls" if price["call_price"] == 1 else "the config's currency"
    money.set(xscale="log", xlabel=f"cost of a problem, in {unit}", ylabel="accuracy together")
    money.set_title("accuracy against money, greedy")
    percent(money, y=True)


def _draw_lead(axis: Axes, comparisons: Sequence[Difference], colours: Mapping[str, str]) -> None:
    ordered = sorted(comparisons, key=lambda d: -d["mean"])
    for i, d in enumerate(ordered):
        colour, n = colours[d["b"]], len(d["per_seed"])
        axis.plot(np.array([d["low"], d["high"]]) * 100, [i, i], color=colour, linewidth=2, solid_capstyle="butt")
        axis.plot(d["mean"] * 100, i, "o", color=colour, markersize=5)
        at = i + np.linspace(-0.22, 0.22, n) * (n > 1)
        axis.scatter(np.array(d["per_seed"]) * 100, at, s=10, color=colour, alpha=0.5, linewidth=0)
    axis.axvline(0, color="black", linewidth=0.8)
    axis.set_yticks(range(len(ordered)), [d["b"] for d in ordered], fontsize=SMALL)
    axis.invert_yaxis()
    axis.grid(False, axis="y")
    axis.set_xlabel("points (95% interval of the mean; dots: seeds)")


def _draw_landed(axis: Axes, record: Record, colours: Mapping[str, str]) -> None:
    for row in record["rows"]:
        name, colour = row["method"], colours.get(row["method"])
        if "calibrated_called" in row:
            axis.scatter(row["calibrated_called"], row["calibrated_accuracy"], s=26, color=colour, alpha=0.8)
        if "trained_called" in row and name != WARM:
            at = row["trained_called"], row["trained_accuracy"]
            axis.scatter(*at, s=30, facecolors="none", edgecolors=colour)
    axis.set_title("where thresholds land on the held-out problems (rings: as trained)")


BASELINES = Study(
    "baselines",
    "At equal numbers of cloud calls, what is a decision trained into the policy worth against routers and"
    " against other ways to train it?",
    arms.HEADLINE_SEEDS,
    baseline_arms,
    measure,
    tables,
    draw,
    notes='"GAPG, its log-prob" and the log-prob routers take each token\'s log-prob given that the response does not'
    ' call; "GAPG, its log-prob with help in it" takes the recorded one, which holds log(1 - p) of the help phrase and'
    " so the model's own decision inside it. DA-GRPO's lambda starts at alpha_a - alpha_c, the price of a call at"
    " GAPG's first step, and not at 0.",
)
