"""`method: marginal` beside everything that could beat it, along the whole curve, on problems never looked at before.

What is compared with what, and what counts, was written down before the first run: docs/studies.md.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial

import numpy as np

from studies import along_the_curve_shown, arms, frozen_decision, probe, prompt_router, rejection, rlcr, self_check
from studies.along_the_curve import Contest
from studies.arms import FRESH_SEEDS, Arm, Entrant, Finished, Predictions, Rows
from studies.by_problem import HELDOUT, VALIDATION, Router, log_prob_router, right_alone, stacked
from studies.predictions import CALIBRATION_SAMPLES, HELDOUT_SAMPLES, SAMPLES
from studies.report import ByProblem, Study
from studies.routers import reading, self_consistency
from studies.statistics import FloatArray

FRESH = {"task.args.seed": "9", "rollout.prompts_per_step": "64", "rollout.samples_per_prompt": "4"}
"""Problems cut otherwise than those on which anything was tuned; and, for all methods, as many responses an update as
the quickstart's, to twice as many problems."""
FRESH_NUMBERS = {**FRESH, "task.args.split": "numbers"}
OURS, MASKED, GAPG = "marginal", "task-tuned, masked", "GAPG"
UNSHOWN = f"{MASKED}, help not shown"
ALPHAS = (0.2, 0.3, 0.4, 0.5, 0.6)
BUDGETS = (0.1, 0.2, 0.3, 0.5)
STARTS = (0.5, 0.6)
"""Where DA-GRPO's lambda starts."""
AT_BUDGETS, BEST_GAPG, BEST_REWARD = "GAPG, trained to each budget", "GAPG, best alpha_c", "reward alone, best alpha_c"
BEST_DA_GRPO = "DA-GRPO, trained to each budget"
RANDOM, VOTES = "+ random offloading", f"+ self-consistency of {SAMPLES}"

# ---- routers put on a trained model, from predictions that every run has


def _random(run: Finished, split: str, answers: Rows) -> tuple[FloatArray, FloatArray]:
    return np.zeros(len(answers)), right_alone(answers)


def _perfect(run: Finished, split: str, answers: Rows) -> tuple[FloatArray, FloatArray]:
    """Calls on exactly the wrong answers first."""
    return 1 - right_alone(answers), right_alone(answers)


def _votes(run: Finished, split: str, answers: Rows) -> tuple[FloatArray, FloatArray]:
    rows = run.rows({VALIDATION: CALIBRATION_SAMPLES, HELDOUT: HELDOUT_SAMPLES}[split].name)
    votes = np.stack(self_consistency(rows, reading(run.config.task.name)), 1)
    of_id = dict(zip(dict.fromkeys(row["id"] for row in rows), votes, strict=True))
    score, local = np.stack([of_id[row["id"]] for row in answers], 1)
    return score, local


LOG_PROBS = {"mean log-prob": "answer_logprob_mean", "min log-prob": "answer_logprob_min"}
ROUTERS: Mapping[str, Mapping[str, Router]] = {
    MASKED: {
        RANDOM: _random,
        **{f"+ {name}": log_prob_router(key) for name, key in LOG_PROBS.items()},
        VOTES: _votes,
        "+ perfect self-check": _perfect,
    },
    UNSHOWN: {f"+ {name}, help not shown": log_prob_router(key) for name, key in LOG_PROBS.items()},
    OURS: {
        "marginal, its mean log-prob": log_prob_router("answer_logprob_mean"),
        "marginal, perfect self-check": _perfect,
    },
}
CEILINGS = ("+ perfect self-check", "marginal, perfect self-check")
LOG_PROB_ROUTERS = (
    *(f"+ {name}" for name in LOG_PROBS),
    *(f"+ {name}, help not shown" for name in LOG_PROBS),
    stacked(MASKED),
    stacked(UNSHOWN),
)

PICKED = (
    "+ probe with attention on hidden states, stacked",
    BEST_DA_GRPO,
    BEST_REWARD,
    GAPG,
    "+ prompt-only router, the device model",
    "+ mean log-prob",
)
"""What the picture tells apart: the best of each kind."""

# ---- who takes part


def _unshown(seed: int) -> Arm:
    return arms.without_help(arms.masked(seed))


def _sweep(*made: Callable[[int], Arm]) -> tuple[Entrant, ...]:
    """One entrant an arm, of the arm's label."""
    return tuple(Entrant(make(0).label, make) for make in made)


def _names(members: Sequence[Entrant]) -> tuple[str, ...]:
    return tuple(member.name for member in members)


Sweeps = Mapping[str, tuple[Entrant, ...]]


def sweeps(alphas: Sequence[float], budgets: Sequence[float], starts: Sequence[float]) -> Sweeps:
    """The members of each method that has to be set to a budget; without `starts` no DA-GRPO."""
    found = {
        AT_BUDGETS: _sweep(*(partial(arms.gapg_at, c) for c in budgets)),
        BEST_GAPG: _sweep(*(partial(arms.gapg_fixed, alpha) for alpha in alphas)),
        BEST_REWARD: _sweep(*(partial(arms.reward_alone, alpha) for alpha in alphas)),
    }
    if starts:
        found[BEST_DA_GRPO] = _sweep(*(partial(arms.da_grpo_at, c, start) for c in budgets for start in starts))
    return found


def contest(members: Sweeps, others: Sequence[Entrant], goal: Sequence[Entrant]) -> Contest:
    """others: entrants beside these of every contest; `goal`: those of them that the goal is about."""
    own = (
        Entrant(OURS, arms.marginal),
        Entrant(GAPG, arms.gapg),
        Entrant(MASKED, arms.masked),
        Entrant(UNSHOWN, _unshown),
    )
    aimed = [*_names(goal), *(stacked(entrant.name) for entrant in goal if entrant.sees == "answer")]
    families = {family: _names(of_family) for family, of_family in members.items()}
    about = (GAPG, *families, *LOG_PROB_ROUTERS, *aimed)
    return Contest(
        OURS,
        MASKED,
        (*own, *others, *goal, *(entrant for of_family in members.values() for entrant in of_family)),
        ROUTERS,
        families,
        about,
        CEILINGS,
        tuple(name for name in PICKED if name in about),
    )


# probes and prompt-only routers, which the goal names; the probes also on the model that was never shown a call
ON_MASKED = tuple(entrant for entrant in probe.ENTRANTS if entrant.arm is arms.masked)
ROUTERS_OF_GOAL = (
    *ON_MASKED,
    *(replace(entrant, name=f"{entrant.name}, help not shown", arm=_unshown) for entrant in ON_MASKED),
    *prompt_router.ENTRANTS,
)
# everything else that was put up against it
RIVALS = (
    *(entrant for entrant in probe.ENTRANTS if entrant not in ON_MASKED),
    *self_check.ENTRANTS,
    *frozen_decision.ENTRANTS,
    *rejection.ENTRANTS,
    *rlcr.ENTRANTS,
)
PLAIN = (
    Entrant("warm start", arms.warm_start),
    Entrant("task-tuned", arms.task_tuned),
    Entrant("task-tuned, help not shown", lambda seed: arms.without_help(arms.task_tuned(seed))),
)

# ---- the studies


def contest_arms(contest: Contest, problems: Mapping[str, str], seed: int) -> list[Arm]:
    """Each run once, with the predictions of all entrants made from it, on these problems."""
    found: dict[str, Arm] = {}
    for entrant in contest.entrants:
        arm = entrant.arm(seed)
        arm = found.setdefault(arm.label, replace(arm, overrides={**arm.overrides, **problems}))
        more: tuple[Predictions, ...] = (entrant.predictions,) if entrant.predictions else ()
        if arm.label == MASKED:
            more += (HELDOUT_SAMPLES, CALIBRATION_SAMPLES)
        found[arm.label] = replace(arm, predictions=tuple(dict.fromkeys((*arm.predictions, *more))))
    return list(found.values())


def contest_study(name: str, question: str, contest: Contest, problems: Mapping[str, str], notes: str) -> Study:
    by_problem = ByProblem(contest.collect, contest.figures)
    return Study(
        name,
        question,
        FRESH_SEEDS,
        partial(contest_arms, contest, problems),
        by_problem.measure,
        partial(along_the_curve_shown.tables, contest),
        partial(along_the_curve_shown.draw, contest),
        notes=notes,
        by_problem=by_problem,
    )


NOTES = (
    "One run of `marginal` a seed is every point of its curve. A method with several runs (a budget, an alpha_c) is at"
    " each call fraction the run that does best there on the validation problems, seed by seed. Routers (+) decide"
    ' for the model of masked rollouts rewarded for right answers alone. "stacked": a logistic regression of the score,'
    " the help margin, the mean and least log-prob and the length, fitted on validation problems; of a method with"
    " several runs the best run on validation. Votes count answers of one value as one. A perfect self-check calls on"
    " exactly the wrong answers first."
)

MARGINAL = contest_study(
    "marginal",
    "Does one run with the decision integrated out, which asks the cloud nothing, do as well at every number of calls"
    " as each other method set to that number?",
    contest(sweeps(ALPHAS, BUDGETS, STARTS), (*PLAIN, *RIVALS), ROUTERS_OF_GOAL),
    FRESH,
    NOTES,
)
MARGINAL_NUMBERS = contest_study(
    "marginal-numbers",
    "The same where no held-out problem shares its numbers with a training problem?",
    contest(sweeps((0.4,), (0.3,), ()), (), ROUTERS_OF_GOAL),
    FRESH_NUMBERS,
    f"{NOTES} Validation problems do share their numbers with training problems, so thresholds are set on easier ones.",
)
