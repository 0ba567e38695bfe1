"""A logit bias on the help phrase that gives a wanted call fraction for one decoding (greedy calls less than T=1)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from transformers import PreTrainedTokenizerBase

from gapg.config import ConfigError
from gapg.rollout.records import HelpControl
from gapg.tasks.base import ANSWER_OPEN, HELP_PHRASE


def help_control(tokenizer: PreTrainedTokenizerBase) -> HelpControl:
    """The help phrase as tokens, split where it first differs from an answer block (often after a shared `<`).

    The phrase is tokenized by itself. A tokenizer that has other tokens for it after a blank is steered only where the
    model begins it without one.

    Raises ConfigError for a tokenizer that cannot tell the two endings apart.
    """
    phrase = tokenizer.encode(HELP_PHRASE, add_special_tokens=False)
    answer = tokenizer.encode(ANSWER_OPEN, add_special_tokens=False)
    shared = 0
    while shared < min(len(phrase), len(answer)) and phrase[shared] == answer[shared]:
        shared += 1
    if shared == len(phrase):
        raise ConfigError("the tokenizer encodes the help phrase as a part of the answer tag: it cannot be calibrated")
    return HelpControl(token_id=phrase[shared], prefix_ids=tuple(phrase[:shared]), rest_ids=tuple(phrase[shared + 1 :]))


def masked(control: HelpControl) -> HelpControl:
    """Help forbidden; the margins of the responses still say where it would have come."""
    return replace(control, bias=-math.inf)


def fit_bias(margins: Sequence[float], cloud_fraction: float) -> float:
    """The bias at which greedy decoding calls on `cloud_fraction` of these problems.

    margins: for each problem, decoded greedily with help masked, max over positions of (help logit - best other
    logit). With bias b a problem calls exactly where its margin exceeds -b: one pass, exact on these problems.
    Where fewer problems can be made to call (the phrase's prefix never came up in the others), all of those do.
    Raises ValueError when there are none.
    """
    reachable = sorted((m for m in margins if math.isfinite(m)), reverse=True)
    if not reachable:
        raise ValueError("no response came near the help phrase: a bias cannot reach the wanted call fraction")
    calls = round(cloud_fraction * len(margins))
    if calls == 0:
        return -reachable[0] - 1.0
    if calls >= len(reachable):
        return -reachable[-1] + 1.0
    return -(reachable[calls - 1] + reachable[calls]) / 2
