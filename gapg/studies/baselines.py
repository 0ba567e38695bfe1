"""GAPG beside everything it should beat, at the same number of calls: `gapg experiment baselines`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from gapg.studies import units
from gapg.studies.baselines_picture import draw
from gapg.studies.curves import accuracies_at, cost_curve, curve, measures
from gapg.studies.methods import (
    Method,
    Prices,
    accuracy,
    by_help_phrase,
    by_label,
    called,
    interval,
    listed,
    percents,
    points,
    prices,
    routed,
    seeds_range,
    sides,
    unanswered,
    without,
)
from gapg.studies.paired import Difference, paired_difference, spread
from gapg.studies.prompt_router import PRODUCT as PROMPT_ROUTER
from gapg.studies.routers import mean_logprob, min_logprob, self_consistency
from gapg.studies.study import Finished, Report, Study, Table, Unit

if TYPE_CHECKING:
    from matplotlib.figure import Figure

OURS = "GAPG"
LOCAL, RANDOM, CLOUD = "task-tuning only", "+ random offloading", "cloud only"
SAMPLES = 5
MONEY = (0.1, 0.3, 0.5)
"""Parts of a cloud call that a problem may cost, for the table of accuracy against money."""


def baseline_units(seed: int) -> list[Unit]:
    """The runs of one seed; the routers are built from the task-tuned one."""
    return [
        units.warm_start(seed),
        units.task_tuned(seed, products=("heldout-samples", "calibration-samples", PROMPT_ROUTER)),
        units.collaboration_aware(seed),
        units.gapg(seed),
        units.std_scaled(seed),
        units.da_grpo(seed),
    ]


def task_tuned_methods(run: Finished, left_out: set[str]) -> list[Method]:
    """The routers outside the task-tuned model: at random, by the prompt, by the response, by several responses."""
    masked, calibration = without(run.rows("heldout-masked"), left_out), run.rows("train-masked")
    seed = run.unit.seed
    prompts = run.rows(PROMPT_ROUTER)
    by_id = {row["id"]: row["score"] for row in prompts if row["split"] == "heldout"}
    agreement, voted = self_consistency(without(run.rows("heldout-samples"), left_out))
    chance = routed(RANDOM, masked, np.zeros(len(masked)))
    votes = routed(f"+ self-consistency of {SAMPLES}", masked, agreement)
    return [
        Method(RANDOM, seed, chance, answers_first=False),
        Method(
            "+ prompt-only router",
            seed,
            routed("+ prompt-only router", masked, np.array([by_id[row["id"]] for row in masked])),
            calibration=np.array([row["score"] for row in prompts if row["split"] == "calibration"]),
            answers_first=False,
        ),
        Method(
            "+ mean log-prob",
            seed,
            routed("+ mean log-prob", masked, mean_logprob(masked)),
            calibration=mean_logprob(calibration),
        ),
        Method(
            "+ min log-prob",
            seed,
            routed("+ min log-prob", masked, min_logprob(masked)),
            calibration=min_logprob(calibration),
        ),
        Method(
            votes.name,
            seed,
            type(votes)(votes.name, votes.score, voted, votes.cloud),
            calibration=self_consistency(run.rows("calibration-samples"))[0],
            samples=SAMPLES,
        ),
    ]


def seed_methods(runs: dict[str, Finished], left_out: set[str]) -> list[Method]:
    """Every method of one seed, GAPG last."""
    ours = runs["GAPG"]
    masked, calibration = without(ours.rows("heldout-masked"), left_out), ours.rows("train-masked")
    own = "GAPG, its log-prob"
    return [
        by_help_phrase("warm start", runs["warm start"], left_out),
        *task_tuned_methods(runs["task-tuned"], left_out),
        by_help_phrase("no filter, fixed alpha_c", runs["collaboration-aware"], left_out),
        by_help_phrase("DA-GRPO", runs["DA-GRPO"], left_out),
        by_help_phrase("GAPG, std scaling", runs["GAPG, std scaling"], left_out),
        Method(
            own,
            ours.unit.seed,
            routed(own, masked, mean_logprob(masked)),
            calibration=mean_logprob(calibration),
        ),
        by_help_phrase(OURS, ours, left_out),
    ]


@dataclass(frozen=True)
class Measured:
    """All methods by name, each a list in the order of the seeds, with what they are measured against."""

    methods: dict[str, list[Method]]
    cloud_fraction: float
    prices: Prices
    differences: dict[str, Difference]
    """GAPG less the method, at equal call fraction, paired by problem."""
    left_out: int

    def at_budget(self, name: str) -> list[float]:
        return [float(accuracies_at(m.routed, self.cloud_fraction).mean()) for m in self.methods[name]]

    def alone(self) -> list[float]:
        """The task-tuned model's accuracy without a call, a seed."""
        return [float(m.routed.local.mean()) for m in self.methods[RANDOM]]

    def cloud(self) -> float:
        return float(self.methods[RANDOM][0].routed.cloud.mean())


def measure(finished: Sequence[Finished]) -> Measured:
    """Raises ValueError where the runs were measured on different problems."""
    left_out = unanswered(f.rows("heldout-masked") for f in finished)
    by_seed: dict[int, dict[str, Finished]] = {}
    for label, runs in by_label(finished).items():
        for run in runs:
            by_seed.setdefault(run.unit.seed, {})[label] = run
    methods: dict[str, list[Method]] = {}
    for seed in sorted(by_seed):
        for m in seed_methods(by_seed[seed], left_out):
            methods.setdefault(m.name, []).append(m)
    c = finished[0].config.budget.cloud_fraction
    ours = [accuracies_at(m.routed, c) for m in methods[OURS]]
    differences = {
        name: paired_difference(ours, [accuracies_at(m.routed, c) for m in those])
        for name, those in methods.items()
        if name != OURS
    }
    return Measured(methods, c, prices(finished), differences, len(left_out))


def analyse(finished: list[Finished]) -> Report:
    measured = measure(finished)

    def picture(figure: Figure) -> None:
        draw(figure, measured)

    return Report(
        rows=raw_rows(measured),
        tables=[equal_calls(measured), operating_points(measured), gap_table(measured), money_table(measured)],
        comparisons=[
            {"a": OURS, "b": name, "cloud_fraction": measured.cloud_fraction, **asdict(d)}
            for name, d in measured.differences.items()
        ],
        conclusions=conclusions(measured),
        draw=picture,
    )


def raw_rows(measured: Measured) -> list[dict[str, Any]]:
    """A row a method and seed; a curve is kept at every twentieth of the calls."""
    rows: list[dict[str, Any]] = []
    grid = np.linspace(0, 1, 21)
    alone = dict(zip((m.seed for m in measured.methods[RANDOM]), measured.alone(), strict=True))
    for name, methods in measured.methods.items():
        for m in methods:
            points_ = curve(m.routed)
            row: dict[str, Any] = {"method": name, "seed": m.seed, "problems": m.routed.score.size}
            row |= {"at_budget": points_.at(measured.cloud_fraction), **measures(points_, alone[m.seed])}
            row["curve"] = [round(points_.at(c), 5) for c in grid.tolist()]
            for kind, result in (("calibrated", m.at_threshold(measured.cloud_fraction)), ("trained", m.trained)):
                if result is not None:
                    row |= {f"{kind}_called": called(result), f"{kind}_accuracy": accuracy(result)}
            for share in MONEY:
                row[f"for_{share:g}_calls_of_money"] = accuracy_for_money(m, share * measured.prices.call, measured)
            rows.append(row)
    rows += [{"method": LOCAL, "seed": seed, "accuracy": value, "called": 0.0} for seed, value in alone.items()]
    rows += [{"method": CLOUD, "seed": seed, "accuracy": measured.cloud(), "called": 1.0} for seed in alone]
    return rows


def equal_calls(measured: Measured) -> Table:
    """Table A: every method's own curve at the budget."""
    cells = []
    for name in measured.methods:
        values = measured.at_budget(name)
        d = measured.differences.get(name)
        against = ["", ""] if d is None else [interval(d), f"{d.wins} of {len(values)}"]
        cells.append([name, percents(spread(values).mean), seeds_range(values), *against])
    cells.sort(key=lambda row: float(row[1][:-1]))
    alone = measured.alone()
    cells.insert(0, [f"{LOCAL} (no calls)", percents(spread(alone).mean), seeds_range(alone), "", ""])
    cells.append([f"{CLOUD} (all calls)", percents(measured.cloud()), percents(measured.cloud()), "", ""])
    return Table(
        f"Accuracy with exactly {measured.cloud_fraction:.0%} of the held-out problems called",
        ["method", "accuracy", "seeds", "GAPG less it, points (95%)", "seeds GAPG wins"],
        cells,
    )


def operating_points(measured: Measured) -> Table:
    """Table B: what each method really does with the threshold that a calibration set gave it, and as trained."""
    cells = []
    for name, methods in measured.methods.items():
        calibrated = [r for m in methods if (r := m.at_threshold(measured.cloud_fraction))]
        trained = [m.trained for m in methods if m.trained]
        row = [name]
        for results in (calibrated, trained):
            if results:
                calls, right = [called(r) for r in results], [accuracy(r) for r in results]
                row += [percents(spread(calls).mean), seeds_range(calls), percents(spread(right).mean)]
            else:
                row += ["–", "–", "–"]
        cells.append(row)
    return Table(
        f"Operating points: threshold set to {measured.cloud_fraction:.0%} on calibration problems, greedy;"
        " and as trained, at the training temperature",
        ["method", "called", "seeds", "accuracy", "called, as trained", "seeds", "accuracy, as trained"],
        cells,
    )


def gap_table(measured: Measured) -> Table:
    """Table C: RouteLLM's measures; the gap is from the task-tuned model alone to the cloud, for every method."""
    cells = []
    for name, methods in measured.methods.items():
        figures = [measures(curve(m.routed), a) for m, a in zip(methods, measured.alone(), strict=True)]
        row = [name]
        for key in ("area", "apgr", "calls_for_20", "calls_for_50", "calls_for_80"):
            known = [value for f in figures if (value := f[key]) is not None]
            text = "–" if len(known) < len(figures) else f"{spread(known).mean:.3f}"
            row.append(percents(spread(known).mean) if text != "–" and key.startswith("calls") else text)
        cells.append(row)
    return Table(
        f"The whole curve; the gap is from the task-tuned model alone ({percents(spread(measured.alone()).mean)})"
        f" to the cloud ({percents(measured.cloud())})",
        ["method", "area", "APGR", "calls for 20% of the gap", "50%", "80%"],
        cells,
    )


def accuracy_for_money(m: Method, money: float, measured: Measured) -> float | None:
    """The best accuracy on the method's curve for at most `money` a problem; None where it cannot be had for that."""
    points_, spent = cost_curve(
        m.routed, measured.prices.local * m.samples, measured.prices.call, answers_first=m.answers_first
    )
    if money < spent[0]:
        return None
    # money rises with the calls, and a method need not call where that hurts
    reached = points_.accuracy[spent <= money]
    return float(max(reached.max(), np.interp(money, spent, points_.accuracy)))


def money_table(measured: Measured) -> Table:
    cells = []
    for name, methods in measured.methods.items():
        row = [name]
        for share in MONEY:
            values = [accuracy_for_money(m, share * measured.prices.call, measured) for m in methods]
            known = [v for v in values if v is not None]
            row.append(percents(spread(known).mean) if len(known) == len(values) else "–")
        cells.append(row)
    budgets = [f"{share * measured.prices.call:.2g} a problem" for share in MONEY]
    return Table(f"Accuracy for money; {measured.prices.text}", ["method", *budgets], cells)


def conclusions(measured: Measured) -> list[str]:
    """Who loses to GAPG at equal calls and on how many seeds; who does not."""
    ours, c = measured.at_budget(OURS), measured.cloud_fraction
    lose, tie, win = sides(list(measured.differences.items()))
    lose.sort(key=lambda name: -measured.differences[name].mean)
    figures = [
        f"{name.removeprefix('+ ')} {points(d.mean)} points ({d.wins} of {len(d.per_seed)} seeds)"
        for name in lose
        for d in [measured.differences[name]]
    ]
    first = f"With {c:.0%} of the problems called GAPG is right on {percents(spread(ours).mean)} of them"
    first += f", more than {listed(figures)}." if figures else ", and nothing here is shown to be worse."
    parts = []
    if tie:
        names = [f"{name.removeprefix('+ ')} ({interval(measured.differences[name])})" for name in tie]
        parts.append(f"no difference is shown from {listed(names)}")
    if win:
        names = [f"{name.removeprefix('+ ')} ({interval(measured.differences[name])})" for name in win]
        parts.append(f"it is worse than {listed(names)}")
    second = "; ".join(parts) or "all of these intervals leave 0 out: nothing here comes up to it"
    return [first, second[:1].upper() + second[1:] + "."]


BASELINES = Study(
    "baselines",
    "At equal numbers of cloud calls, what is a decision trained into the policy worth against routers and"
    " against other ways to train it?",
    units.HEADLINE_SEEDS,
    baseline_units,
    analyse,
)
