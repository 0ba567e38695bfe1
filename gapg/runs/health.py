"""Is a run well: its numbers are finite, and its steps train something. What is not is counted and said, or ends it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gapg.config import RunConfig
from gapg.console import say_once, warn
from gapg.filtering import Selection
from gapg.help_phrase import UNSEEN, thinks_unseen
from gapg.judge import Group
from gapg.runs.state import TrainState
from gapg_rollout.records import HelpControl
from gapg_rollout.text import spoken

BAD_STEPS = 3
"""Skipped steps in a row that end a run: one may be an accident, three are the run's own doing."""
NOT_FINITE = "the loss or its gradient is not finite"
RUINED = "the weights, or the hidden states of a few tokens, overflow after the optimizer's step"

IDLE_STEPS = 3
"""More idle steps than others before that is said: a run of which most are idle is told, whatever lies between."""
COLLAPSED_AFTER = 20
"""Steps in a row in which all responses call, or none does, of which that is said."""
LOST, LOST_PART = 0.15, 0.25
"""How many of all answers, and how many of those that were right, are lost before that is said."""


class Diverged(RuntimeError):
    """A run that cannot go on: one line with the step, what is wrong, the last good checkpoint, and what to change.

    Nothing was saved, replaced or deleted since that checkpoint.
    """


def diverged(where: str, what: str, fix: str, last: Path | None) -> Diverged:
    """`where`: the step, as in "step 3", counted from 1; `last`: the newest checkpoint, if there is one."""
    kept = f"the last good checkpoint is {last}" if last else "the run ended before its first checkpoint"
    return Diverged(f"{where}: {' '.join(what.split())}; {kept}; {fix}, then go on with --resume")


def is_lost(groups: Sequence[Group]) -> bool:
    """Whether the engine gave log-probs and none is finite: its model is ruined, whatever the responses look like."""
    given = [c.logprobs for g in groups for c in g.completions if c.logprobs]
    return bool(given) and not any(math.isfinite(x) for logprobs in given for x in logprobs)


def warn_skipped(where: str, why: str, in_a_row: int) -> None:
    warn(f"{where}: {why}: skipped, {in_a_row} in a row; {BAD_STEPS} end the run")


def watch(state: TrainState, row: dict[str, Any], selection: Selection) -> None:
    """Counts the step that `row` tells of; warns of a skipped one, and of many idle ones."""
    step = state.step + 1
    if row["skipped"]:
        state.bad_steps += 1
        state.bad_in_a_row += 1
        warn_skipped(f"step {step}", _why_bad(row), state.bad_in_a_row)
    elif row["groups/with_gradient"]:
        state.bad_in_a_row, state.idle_excess = 0, max(0, state.idle_excess - 1)
    else:
        state.idle_steps += 1
        state.idle_excess += 1
        # ever more rarely: a run that is idle for most of its steps would say nothing else
        if state.idle_excess >= IDLE_STEPS and step >= 2 * state.idle_said_at:
            state.idle_said_at = step
            warn(f"{state.idle_steps} of {step} steps trained on nothing, the last because {_why_idle(selection)}")


def warn_if_collapsed(config: RunConfig, state: TrainState, row: dict[str, Any]) -> None:
    """Counts the steps in which nobody called, or everybody, and warns of many; and warns where answers get worse."""
    marginal = config.method == "marginal"
    has_price = not marginal or config.marginal.score == "price"  # a forecast has none
    # task-tuning only is meant never to call
    pays = (row["alpha_c"] > 0 or not has_price) and not (marginal and config.marginal.weight == 0)
    n = config.rollout.prompts_per_step * config.rollout.samples_per_prompt
    calls = row["call_fraction"] * n  # of chances their sum, which is never quite 0 or all
    state.never_called = state.never_called + 1 if calls < 0.5 and pays else 0
    state.always_called = state.always_called + 1 if n - calls < 0.5 and pays else 0
    if COLLAPSED_AFTER in (state.never_called, state.always_called):
        what = "never called the cloud" if state.never_called else "always called the cloud"
        fix = "raise reward.alpha_c or " if state.never_called else "lower reward.alpha_c or "
        fix = fix if has_price else ""
        warn(f"policy collapsed: it {what} for {COLLAPSED_AFTER} steps; {fix}lengthen the warm start")
    if math.isfinite(right := row.get("marginal/right", math.nan)):
        _warn_if_answers_are_lost(state, right)


def _warn_if_answers_are_lost(state: TrainState, right: float) -> None:
    """The decision's gradient moves all weights: too large a step by it ruins the answers, at a good score."""
    state.right += (right - state.right) / min(state.step, COLLAPSED_AFTER)
    if state.step >= COLLAPSED_AFTER:
        state.most_right = max(state.most_right, state.right)
    lost = state.right < min(state.most_right - LOST, (1 - LOST_PART) * state.most_right)
    if lost and not state.loss_said:
        warn(
            f"policy collapsed: of its answers {state.right:.0%} are right by now, and {state.most_right:.0%} were; "
            "train with a lower optim.lr or marginal.weight"
        )
    # not while it hovers about the bound
    state.loss_said = lost or (state.loss_said and state.right < (1 - LOST_PART / 2) * state.most_right)


def say_if_thinking(groups: Sequence[Group], ids_of: Mapping[str, Sequence[int]], help: HelpControl | None) -> None:
    """Says once that most responses end inside a think block; and once, of responses with help forbidden, that their
    hazard counts places in blocks, where nothing is a call. ids_of: each prompt's token ids."""
    found = [(g, c) for g in groups for c in g.completions]
    if 2 * sum(spoken(c.text, g.thinking) is None for g, c in found) > len(found):
        say_once("most responses end while they think, without an answer: raise rollout.max_new_tokens")
    if help and any(thinks_unseen(help, ids_of[g.prompt.id], c, g.thinking) for g, c in found):
        say_once(
            f"method=marginal: responses reason in a think block {UNSEEN}, so the chance of the help phrase counts in "
            "there too and is trained, where it is no call: ask for marks that the tokenizer has (<think>), take a "
            "model that does not think, or method=gapg"
        )


def bad_steps(config: RunConfig, step: int, row: dict[str, Any], last: Path | None) -> Diverged:
    """What ends a run of which BAD_STEPS steps in a row were skipped, up to `step`, of which `row` tells."""
    if row["rollout_lost"]:
        fix = "mend the engine, or change rollout.engine or model.dtype"
    else:
        worth = "marginal.weight and marginal.trace" if config.method == "marginal" else "the rewards"
        fix = f"lower optim.lr{', loss.kl_coef' if config.loss.kl_coef > 0 else ''} or {worth}"
    return diverged(f"step {step}", f"{_why_bad(row)}, {BAD_STEPS} steps in a row", fix, last)


def _why_bad(row: dict[str, Any]) -> str:
    return "no log-prob of the engine is finite" if row["rollout_lost"] else NOT_FINITE


def _why_idle(selection: Selection) -> str:
    """The reason, as of the last step, and what helps."""
    more, easier = "raise rollout.samples_per_prompt", "lengthen the warm start, take easier problems"
    if not (selection.d1 or selection.d2 or selection.unsolved):
        return "the oracle failed every prompt; mend the oracle"
    if selection.d1:
        return f"all responses to a prompt are worth the same; {more}, or take harder problems"
    if selection.kept:
        return f"no response is right, and all to a prompt are worth the same; {easier}, or {more}"
    if selection.d2:
        lost = f"the filter drops all {selection.d2} prompts that only the cloud solves"
        return f"no response is right, so {lost}; {easier}, {more}, or set budget.filter=false"
    return f"neither the model nor the cloud solves a prompt; {easier}, or ask a better oracle"
