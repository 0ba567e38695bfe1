"""The cloud's failures as a run meets them: asked before it begins, told with their reasons, and when they end it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from concurrent.futures import wait
from contextlib import closing
from heapq import nsmallest

from gapg.build import asks_in_training, make_oracle, make_training_oracle
from gapg.config import RunConfig
from gapg.console import say, say_once, warn
from gapg.errors import ConfigError
from gapg.judge import Group
from gapg.runs import stop
from gapg.runs.state import TrainState
from gapg.tasks.base import Task
from gapg_rollout.records import Oracle, OracleAnswer, OracleUsage

LOST_STEPS = 3
"""Steps in a row in which every question failed that end a run."""

WARN_SHARE = 0.1
"""The part of a step's questions that may fail before that is warned of; each reason is told in any case."""


class OracleDown(RuntimeError):
    """The cloud answers nothing that it is asked: one line with its words. What was trained is saved."""


def first_question(config: RunConfig, task: Task) -> OracleUsage:
    """`check_cloud` with the config's oracle, whose answer is kept in the run's folder.

    One sample is enough. A cloud that hangs has one time limit, or a minute: a busy one may ask for that. Where
    training asks nothing, nothing is asked here; answers that it is to find must be there (ConfigError).
    """
    if not asks_in_training(config):
        if config.marginal.cloud == "cached" and config.oracle.kind != "solver":
            _check_cached(config, task)
        return OracleUsage()
    deadline_s = min(config.oracle.deadline_s, max(60.0, config.oracle.timeout_s))
    one = config.oracle.model_copy(update={"samples": 1, "deadline_s": deadline_s})
    with closing(make_oracle(config.model_copy(update={"oracle": one}), task, config.output_dir)) as oracle:
        if config.oracle.kind != "solver":
            say(f"asking {config.oracle.model} at {config.oracle.base_url} a first question")
        return check_cloud(oracle, task)


def _check_cached(config: RunConfig, task: Task) -> None:
    """Says to how many training problems the cloud's answers are there. Raises ConfigError where that is none."""
    prompts, known = task.prompts("train"), 0
    with closing(make_training_oracle(config, task, config.output_dir)) as oracle:
        for prompt in prompts:
            stop.look()
            first = oracle.ask(task.question(prompt)).result()[0]
            if first.text is None and not first.offline:
                raise ConfigError(f"marginal.cloud=cached: {first.error}")
            known += first.text is not None
    if not known:
        raise ConfigError(
            "marginal.cloud=cached: the cache has no answer to a training problem from this oracle.base_url, model, "
            "temperature and max_tokens; name a file that has in oracle.cache, or set marginal.cloud=ignore"
        )
    say(f"the cloud's answers to {known} of {len(prompts)} training problems are cached; else it counts as right")


def check_cloud(oracle: Oracle, task: Task) -> OracleUsage:
    """Asks one question before anything is trained, and returns what that cost.

    It is that of the shortest training problem, as training would ask it: the cheapest whose answer is of use later,
    and a server that refuses the key, the model or a setting refuses it too. A failure of that question's own
    (moderation, a reply without text) says nothing of others, so up to two more are asked then. Raises OracleDown, and
    Stopped while it waits.
    """
    for prompt in nsmallest(3, task.prompts("train"), key=lambda p: len(p.text)):
        asked = oracle.ask(task.question(prompt))
        while not wait([asked], timeout=0.2).done:
            stop.look()
        answers = asked.result()
        if any(a.text is not None for a in answers):
            return oracle.usage
        if not answers[0].own:
            break
    raise OracleDown(f"the oracle failed a first question, so nothing was trained: {answers[0].error}")


def watch(state: TrainState, groups: Sequence[Group]) -> OracleAnswer | None:
    """Counts a training step whose every question failed, tells why any did, and returns an answer that failed.

    Groups that needed no cloud say nothing about it.
    """
    asked = [g for g in groups if g.oracle_asked]
    failed = [g for g in asked if g.oracle_score is None]
    if asked:
        state.lost_steps = state.lost_steps + 1 if len(failed) == len(asked) else 0
    tell(groups)
    step = state.step + 1
    # ever more rarely: the reasons were told when they came
    if len(failed) > WARN_SHARE * len(asked) and step >= 2 * state.outage_said_at:
        state.outage_said_at = step
        share = f"{len(failed)} of {len(asked)} questions of step {step}"
        warn(f"the oracle failed {share}, whose prompts are asked again later; the last reason: {_reason(failed[-1])}")
    return next((a for a in failures(groups) if a.permanent), next(failures(failed), None))


def verdict(state: TrainState, failure: OracleAnswer | None, last: bool) -> str | None:
    """Why the run must end after this step, in one line; None where it need not.

    failure: what `watch` returned of the step. last: it is the last one.
    """
    if failure is None:
        return None
    then = "the run is saved: mend it, then go on with --resume"
    if failure.permanent:
        return f"step {state.step}: the oracle failed for good: {failure.error}; {then}"
    if state.lost_steps >= LOST_STEPS or (last and state.lost_steps):
        steps = "step" if state.lost_steps == 1 else f"{state.lost_steps} steps"
        return f"the oracle failed every question of the last {steps}: {failure.error}; {then}"
    return None


def check_evaluation(groups: Sequence[Group]) -> None:
    """Tells why questions of an evaluation failed, and how many. Raises OracleDown where all did: nothing is known."""
    asked = [g for g in groups if g.oracle_asked]
    failed = [g for g in asked if g.oracle_score is None]
    if not failed:
        return
    tell(groups)
    if len(failed) == len(asked):
        raise OracleDown(f"the oracle failed all {len(asked)} questions of an evaluation: {_reason(failed[-1])}")
    warn(f"the oracle failed {len(failed)} of {len(asked)} questions: those problems are left out of the accuracy")


def tell(groups: Sequence[Group]) -> None:
    """Says each reason for which an answer failed once, whatever numbers and ids differ in it."""
    for answer in failures(groups):
        reason = answer.error or "no reason given"
        say_once(f"the oracle failed: {reason}", about=re.sub(r"\b(?=\w*\d)\w+", "#", reason))


def failures(groups: Sequence[Group]) -> Iterator[OracleAnswer]:
    """The answers that failed."""
    return (a for g in groups if g.oracle_asked for a in g.oracle_answers if a.text is None)


def _reason(group: Group) -> str:
    return next((a.error for a in failures([group]) if a.error), "no reason given")
