"""Is a run well: its numbers are finite, and its steps train something. What is not is counted, said, or ends the run.

A policy whose weights are ruined may look calm: RMSNorm divides by the root of a sum of squares, and where that
overflows every hidden state is 0 and every token equally likely. So the weights are looked at, and what they make of a
few tokens, before an engine or a checkpoint gets them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import PreTrainedModel

from gapg.runs.tracking import warn

if TYPE_CHECKING:
    from gapg.filtering import Selection
    from gapg.judge import Group
    from gapg.runs.run import Run

BAD_STEPS = 3
"""Skipped steps in a row that end a run: one may be an accident, three are the run's own doing."""
NOT_FINITE = "the loss or its gradient is not finite"
RUINED = "the weights, or the hidden states of a few tokens, overflow after the optimizer's step"

IDLE_STEPS = 3
"""More idle steps than others before that is said: a run of which most are idle is told, whatever lies between."""


class Diverged(RuntimeError):
    """A run that cannot go on: one line with the step, what is wrong, the last good checkpoint, and what to change.

    Nothing was saved, replaced or deleted since that checkpoint.
    """


def diverged(where: str, what: str, fix: str, last: Path | None) -> Diverged:
    """`where`: the step, as in "step 3", counted from 1; `last`: the newest checkpoint, if there is one."""
    kept = f"the last good checkpoint is {last}" if last else "the run ended before its first checkpoint"
    return Diverged(f"{where}: {' '.join(what.split())}; {kept}; {fix}, then go on with --resume")


@torch.no_grad()
def is_finite(model: PreTrainedModel, compute: torch.dtype) -> bool:
    """Whether the norms of the trainable weights, and of all hidden states of a few tokens, are finite in float32.

    A norm overflows where a square does. `compute` is the type of the matrix products. Waits for the device once.
    """
    ids = torch.arange(3, 11, device=model.device) % model.config.get_text_config().vocab_size
    with torch.autocast(model.device.type, compute, enabled=compute != torch.float32):
        out = model(input_ids=ids[None], use_cache=False, output_hidden_states=True)
    states = [x.float() for x in (*(out.hidden_states or ()), out.logits)]
    weights = [p.detach() for p in model.parameters() if p.requires_grad]
    return math.isfinite(float(nn.utils.get_total_norm(weights) + nn.utils.get_total_norm(states)))


def is_lost(groups: Sequence[Group]) -> bool:
    """Whether the engine gave log-probs and none is finite: its model is ruined, whatever the responses look like."""
    given = [c.logprobs for g in groups for c in g.completions if c.logprobs]
    return bool(given) and not any(math.isfinite(x) for logprobs in given for x in logprobs)


def warn_skipped(where: str, why: str, in_a_row: int) -> None:
    warn(f"{where}: {why}: skipped, {in_a_row} in a row; {BAD_STEPS} end the run")


def watch(run: Run, row: dict[str, Any], selection: Selection) -> None:
    """Counts the step that `row` tells of in the run's state; warns of a skipped one, and of many idle ones."""
    state, step = run.state, run.state.step + 1
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


def bad_steps(run: Run, row: dict[str, Any], last: Path | None) -> Diverged:
    """What ends a run of which BAD_STEPS steps in a row were skipped, up to the one that `row` tells of."""
    if row["rollout_lost"]:
        fix = "mend the engine, or change rollout.engine or model.dtype"
    else:
        penalty = ", loss.kl_coef" if run.config.loss.kl_coef else ""
        fix = f"lower optim.lr{penalty} or the rewards"
    return diverged(f"step {run.state.step}", f"{_why_bad(row)}, {BAD_STEPS} steps in a row", fix, last)


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
