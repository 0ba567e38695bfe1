"""GAPG beside everything it should beat, at the same number of calls: `gapg experiment baselines`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from gapg.studies import units
from gapg.studies.baselines_picture import draw
from gapg.studies.baselines_tables import (
    CLOUD,
    LOCAL,
    MONEY,
    OURS,
    OWN,
    RANDOM,
    WITH_HELP,
    accuracy_for_money,
    differences_table,
    equal_calls,
    gap_table,
    money_table,
    operating_points,
)
from gapg.studies.curves import accuracies_at, apgr, curve, measures
from gapg.studies.da_grpo import multiplier_start
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
    sides,
    unanswered,
    without,
)
from gapg.studies.paired import Difference, paired_difference, seed_difference, spread
from gapg.studies.products import SAMPLES
from gapg.studies.prompt_router import PRODUCT as PROMPT_ROUTER
from gapg.studies.routers import mean_answer_logprob, mean_logprob, min_answer_logprob, self_consistency
from gapg.studies.study import Finished, Report, Study, Unit

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FRACTIONS = (0.1, 0.2, 0.3, 0.5)
"""Call fractions at which GAPG is compared, beside the one it is trained to: each method's own may lie elsewhere."""


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
            routed("+ mean log-prob", masked, mean_answer_logprob(masked)),
            calibration=mean_answer_logprob(calibration),
        ),
        Method(
            "+ min log-prob",
            seed,
            routed("+ min log-prob", masked, min_answer_logprob(masked)),
            calibration=min_answer_logprob(calibration),
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
    scores = {OWN: mean_answer_logprob, WITH_HELP: mean_logprob}
    return [
        by_help_phrase("warm start", runs["warm start"], left_out),
        *task_tuned_methods(runs["task-tuned"], left_out),
        by_help_phrase("no filter, fixed alpha_c", runs["collaboration-aware"], left_out),
        by_help_phrase("DA-GRPO", runs["DA-GRPO"], left_out),
        by_help_phrase("GAPG, std scaling", runs["GAPG, std scaling"], left_out),
        *(
            Method(name, ours.unit.seed, routed(name, masked, score(masked)), calibration=score(calibration))
            for name, score in scores.items()
        ),
        by_help_phrase(OURS, ours, left_out),
    ]


@dataclass(frozen=True)
class Measured:
    """All methods by name, each a list in the order of the seeds, with what they are measured against."""

    methods: dict[str, list[Method]]
    cloud_fraction: float
    prices: Prices
    differences: dict[float, dict[str, Difference]]
    """GAPG less the method with exactly this part of the problems called, paired by problem."""
    apgr: dict[str, Difference]
    """GAPG's APGR less the method's; empty where the cloud is no better than the task-tuned model."""
    multiplier_start: float
    """Where DA-GRPO's lambda starts."""

    def at_budget(self, name: str) -> list[float]:
        return [float(accuracies_at(m.routed, self.cloud_fraction).mean()) for m in self.methods[name]]

    def at_own(self) -> dict[str, Difference]:
        """The differences at the call fraction that GAPG is trained to."""
        return self.differences[self.cloud_fraction]

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
    multiplier = multiplier_start(by_label(finished)["DA-GRPO"][0].config)
    at = {f: at_fraction(methods, f) for f in sorted({*FRACTIONS, c})}
    return Measured(methods, c, prices(finished), at, recovered(methods), multiplier)


def at_fraction(methods: dict[str, list[Method]], fraction: float) -> dict[str, Difference]:
    """GAPG less each other method, each with exactly this part of the problems called."""
    right = {name: [accuracies_at(m.routed, fraction) for m in those] for name, those in methods.items()}
    return {name: paired_difference(right[OURS], right[name]) for name in methods if name != OURS}


def recovered(methods: dict[str, list[Method]]) -> dict[str, Difference]:
    """GAPG's APGR less each other method's; the gap is from the task-tuned model alone to the cloud."""
    alone = [float(m.routed.local.mean()) for m in methods[RANDOM]]
    found = {
        name: [apgr(curve(m.routed), start) for m, start in zip(those, alone, strict=True)]
        for name, those in methods.items()
    }
    known = {name: [v for v in values if v is not None] for name, values in found.items()}
    if any(len(known[name]) < len(alone) for name in methods):
        return {}
    return {name: seed_difference(known[OURS], known[name]) for name in methods if name != OURS}


def analyse(finished: list[Finished]) -> Report:
    measured = measure(finished)

    def picture(figure: Figure) -> None:
        draw(figure, measured)

    return Report(
        rows=raw_rows(measured),
        tables=[
            equal_calls(measured),
            differences_table(measured),
            operating_points(measured),
            gap_table(measured),
            money_table(measured),
        ],
        comparisons=[
            {"a": OURS, "b": name, "cloud_fraction": fraction, **asdict(d)}
            for fraction, found in measured.differences.items()
            for name, d in found.items()
        ]
        + [{"a": OURS, "b": name, "figure": "apgr", **asdict(d)} for name, d in measured.apgr.items()],
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


def conclusions(measured: Measured) -> list[str]:
    """Who loses to GAPG at its budget and who does not; who beats it anywhere on the curve; what the rows are."""
    ours, c, at_own = measured.at_budget(OURS), measured.cloud_fraction, measured.at_own()
    lose, tie, _ = sides(list(at_own.items()))
    lose.sort(key=lambda name: -at_own[name].mean)
    figures = [
        f"{plain(name)} {points(d.mean)} points ({d.wins} of {len(d.per_seed)} seeds)"
        for name in lose
        for d in [at_own[name]]
    ]
    first = f"With {c:.0%} of the problems called GAPG is right on {percents(spread(ours).mean)} of them"
    first += f", more than {listed(figures)}" if figures else ", and nothing here is shown to be worse"
    if tie:
        first += f"; no difference is shown there from {listed([f'{plain(n)} ({interval(at_own[n])})' for n in tie])}"
    return [f"{first}.", beaten(measured), notes(measured)]


def beaten(measured: Measured) -> str:
    """Where on its curve each method is better than GAPG, and how often the runs behind it call as trained."""
    parts, named = [], []
    for name, methods in measured.methods.items():
        at = [f"at {f:.0%} called ({interval(d[name])} points)"
              for f, d in measured.differences.items() if name != OURS and d[name].high < 0]  # fmt: skip
        if name in measured.apgr and measured.apgr[name].high < 0:
            at.append(f"in APGR ({interval(measured.apgr[name])})")
        if at:
            parts.append(f"{plain(name)} {listed(at)}")
            named += [(plain(name), [called(m.trained) for m in methods if m.trained])]
    fractions = listed([f"{f:.0%}" for f in measured.differences])
    if not parts:
        return f"Nothing here is shown to be better than GAPG at {fractions} called, nor in APGR."
    own = [called(m.trained) for m in measured.methods[OURS] if m.trained]
    trained = [f"{name} {percents(spread(calls).mean)}" for name, calls in named if calls]
    why = f"; as trained GAPG calls {percents(spread(own).mean)}, {listed(trained)}" if trained else ""
    return f"GAPG is worse than {'; '.join(parts)}{why}."


def notes(measured: Measured) -> str:
    return (
        f'"{OWN}" and the log-prob routers take each token\'s log-prob given that the response does not call;'
        f' "{WITH_HELP}" takes the recorded one, which holds log(1 - p) of the help phrase and so the model\'s own'
        f" decision inside it. DA-GRPO's lambda starts at alpha_a - alpha_c = {measured.multiplier_start:g},"
        " the price of a call at GAPG's first step, and not at 0."
    )


def plain(name: str) -> str:
    return name.removeprefix("+ ")


BASELINES = Study(
    "baselines",
    "At equal numbers of cloud calls, what is a decision trained into the policy worth against routers and"
    " against other ways to train it?",
    units.HEADLINE_SEEDS,
    baseline_units,
    analyse,
)
