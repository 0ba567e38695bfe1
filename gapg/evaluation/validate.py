"""The evaluation during training: the policy as it samples, on problems kept out of training."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import TYPE_CHECKING

import numpy as np

from gapg.console import say, warn
from gapg.evaluation.evaluate import as_result, respond
from gapg.evaluation.reliability import auroc, brier
from gapg.judge import Group, Judge, Outcome
from gapg.runs.outage import OracleDown, check_evaluation

if TYPE_CHECKING:
    from gapg.runs.run import Run


CLOUD = {
    "ignore": "the cloud, which nobody asks, counts as right",
    "cached": "where none of its answers is kept, the cloud counts as right",
    "ask": "the cloud as right as its answers",
}


def validate(run: Run) -> dict[str, float]:
    """The figures `eval/...` of the validation problems; prints and logs one transcript of each outcome.

    `accuracy`, `local_accuracy`, `call_fraction`, `unknown`: of one sampled response a problem, and what became of it.
    With `method: marginal` no decision is sampled: see `masked_figures`.
    """
    if not run.validation:
        return {}
    marginal = run.config.method == "marginal"
    # only calls need the cloud here, so that a failed oracle leaves out no wrong answer
    judge = run.judge if marginal else Judge(run.task, run.oracle, ask_unsolved=False, thinking=run.judge.thinking)
    # at the training temperature: S is trained to forecast the responses sampled there
    groups = respond(run.engine, run.task, run.tokenizer, judge, run.validation, run.sampling("validate", run.help))
    figures = masked_figures(groups, run.config.budget.cloud_fraction) if marginal else _decided(groups)
    together = "unknown" if math.isnan(figures["accuracy"]) else f"{figures['accuracy']:.3f}"
    local, called = f"{figures['local_accuracy']:.3f}", f"{figures['call_fraction']:.3f}"
    step, n = run.state.step, len(groups)
    if marginal:
        forecast = f"S, the chance to answer, tells which: AUROC {figures['auroc']:.3f}, Brier {figures['brier']:.3f}"
        say(f"step {step}: right alone {local} of {n} validation problems; {forecast}")
        say(f"    together {together} with the {called} of least S called; {CLOUD[run.config.marginal.cloud]}")
    else:
        say(f"step {step}: together {together}, local {local}, called {called} of {n} validation problems")
    try:
        check_evaluation(groups)
    except OracleDown as error:  # whether training ends is said by its own questions
        warn(str(error))
    if unknown := sum(g.unknown for g in groups):
        say("    nobody knows whether this is the best step so far, so it is not kept as that")
    _transcripts(run, groups)
    return {f"eval/{key}": figure for key, figure in figures.items()} | {"eval/unknown": unknown}


def masked_figures(groups: list[Group], cloud_fraction: float) -> dict[str, float]:
    """Of responses that were sampled with help forbidden, with S the chance that the policy answers along each.

    `local_accuracy`: the part that is right, no problem called. `brier`, `auroc`: of S as a forecast of that.
    `call_fraction`, `accuracy`: the problems of least S are called, as many as fit into `cloud_fraction`; each is then
    right as often as the cloud's known answers to it, or always where none is known. A group whose question failed is
    left out of these two; figures of no problems are NaN.
    """
    odds = [np.array(g.completions[0].help_log_odds or ()) for g in groups]
    stays = np.exp([-np.logaddexp(0, o).sum() for o in odds])
    right = np.array([float(g.solved_locally) for g in groups])
    cloud = np.array([1.0 if g.oracle_score is None else g.oracle_score for g in groups])
    known = np.flatnonzero([not g.unknown for g in groups])
    called = known[np.argsort(stays[known], kind="stable")]
    called = called[: math.floor(len(known) * Fraction(str(cloud_fraction)))]
    together = right.copy()
    together[called] = cloud[called]
    return {
        "accuracy": float(together[known].mean()) if len(known) else math.nan,
        "local_accuracy": float(right.mean()) if groups else math.nan,
        "call_fraction": len(called) / len(known) if len(known) else math.nan,
        "brier": brier(stays, right),
        "auroc": auroc(stays, right),
    }


def _decided(groups: list[Group]) -> dict[str, float]:
    row = as_result("", groups).row()
    return {key: row[key] for key in ("accuracy", "local_accuracy", "call_fraction")}


def _transcripts(run: Run, groups: list[Group]) -> None:
    shown: dict[Outcome, Group] = {}
    for group in groups:
        shown.setdefault(group.outcomes[0], group)
    for outcome, group in sorted(shown.items(), key=lambda item: item[0].value):
        text = f"{group.prompt.text} {group.completions[0].text}"
        flat = " ".join(text.split())
        say(f"    {outcome.value:<13} {flat[:150]}{'…' if len(flat) > 150 else ''}")
        run.tracker.text(f"transcripts/{outcome.value}", text, run.state.step)
