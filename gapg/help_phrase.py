"""The help phrase in a tokenizer's tokens: how it is written, and where in a response it could have begun."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

from transformers import PreTrainedTokenizerBase

from gapg.errors import ConfigError
from gapg.judge import parse
from gapg.tasks.base import ANSWER_OPEN, HELP_PHRASE
from gapg_rollout.records import Completion, HelpControl, HelpSpelling
from gapg_rollout.text import THINK, plain_text, spoken, think_marks

UNSEEN = "whose marks are not single tokens"
"""Of a think block that a `HelpControl` does not know."""


def help_control(tokenizer: PreTrainedTokenizerBase) -> HelpControl:
    """The help phrase in tokens, in every way that the tokenizer writes it, whatever stands before it.

    Real tokenizers join its `<` with a blank or a mark into other tokens (` <`, `.<`). Each spelling is split at the
    token that first says more than an answer block in the same place could. Where one of the tags is a token of its own
    and the other is not, their tokens differ earlier: at a `<`, or a blank, of any text. Think blocks are those whose
    marks are tokens of their own.

    Raises ConfigError for a tokenizer that cannot tell the two endings apart.
    """

    def encode(text: str) -> list[int]:
        return list(tokenizer.encode(text, add_special_tokens=False))

    found, both = [], HELP_PHRASE[: _shared(HELP_PHRASE, ANSWER_OPEN)]
    for before in ("x", "x ", "x\n", *_joined(tokenizer)):
        phrase = encode(before + HELP_PHRASE)
        split = _shared(phrase, encode(before + ANSWER_OPEN))
        while split < len(phrase) and _begins(before + both, plain_text(tokenizer, phrase[: split + 1])):
            split += 1
        # a token that only holds what stood before is no part of the phrase; one that joins both is
        start = min(split, _shared(phrase, encode(before)))
        # a word tokenizer may have swallowed a part of the phrase with what stood before
        if split < len(phrase) and parse(plain_text(tokenizer, phrase[start:])).kind == "help":
            found.append(HelpSpelling(phrase[split], tuple(phrase[start:split]), tuple(phrase[split + 1 :])))
    if not found:
        raise ConfigError(
            "the tokenizer encodes the help phrase as a part of the answer tag: it cannot be calibrated, nor trained "
            "by method=marginal; take a model with another tokenizer, or method=gapg without a calibration"
        )
    known = tokenizer.get_vocab()
    blocks = tuple((known[begin], known[end]) for begin, end in THINK if begin in known and end in known)
    return HelpControl(tuple(dict.fromkeys(found)), blocks=blocks)


def _joined(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """What the tokenizer joins with the beginning of the phrase in one token, after a letter."""
    ids = sorted(i for token, i in tokenizer.get_vocab().items() if HELP_PHRASE[0] in token)
    # behind a letter, because SentencePiece takes the blank away from what begins a text
    letter = list(tokenizer.encode("x", add_special_tokens=False))
    head = plain_text(tokenizer, letter)
    texts = [plain_text(tokenizer, [*letter, i]).removeprefix(head) for i in ids]
    cuts = [(text, text.rfind(HELP_PHRASE[0])) for text in texts]
    return [f"x{text[:cut]}" for text, cut in cuts if cut > 0 and HELP_PHRASE.startswith(text[cut:])]


def _begins(text: str, part: str) -> bool:
    """Whether a text begins with a part, blanks aside: some tokenizers put them between words, or take them away."""
    return "".join(text.split()).startswith("".join(part.split()))


def _shared(a: Sequence[object], b: Sequence[object]) -> int:
    """How many tokens, or letters, two sequences begin with together."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def masked(control: HelpControl) -> HelpControl:
    """Help forbidden; the margins of the responses still say where it would have come."""
    return replace(control, bias=-math.inf)


def deciding_tokens(
    control: HelpControl, prompt_ids: Sequence[int], response_ids: Sequence[int], thinking: bool = False
) -> list[tuple[int, ...]]:
    """For each token of a response that was sampled with help forbidden: the tokens that would have begun the phrase.

    Ascending; empty where the phrase could not begin. It could where the tokens before end in a spelling's prefix,
    outside think blocks, as an engine sees it (`gapg_rollout.engines.help`). thinking: the prompt opened a block.
    """
    found, length = _deciding(control, response_ids), len(response_ids)
    changes = [*_changes(control, prompt_ids, response_ids, thinking), (length - 1, -1)]
    for (opens, block), (closes, _) in pairwise(changes):
        if block >= 0:
            found[opens + 1 : closes + 1] = [()] * (closes - opens)
    return found


def thinks_unseen(control: HelpControl, prompt_ids: Sequence[int], completion: Completion, thinking: bool) -> bool:
    """Whether a response thinks in a block that `control.blocks` does not tell of: the phrase's chance counts in it."""
    if spoken(completion.text, thinking) == completion.text:
        return False
    (_, prompts), *changes = _changes(control, prompt_ids, completion.token_ids, thinking)
    return (thinking and prompts < 0) or len(changes) < think_marks(completion.text, thinking)


def _changes(
    control: HelpControl, prompt_ids: Sequence[int], response_ids: Sequence[int], thinking: bool
) -> list[tuple[int, int]]:
    """(t, the token that closes the think block of what follows token t, -1 for none): of the prompt, with t = -1; and
    of each token that opens or closes a block."""
    close_of = dict(control.blocks)
    marks = close_of.keys() | close_of.values()
    found = [(-1, control.block_after(prompt_ids, thinking))]
    for t in [t for t, token in enumerate(response_ids) if token in marks] if marks else []:
        block, token = found[-1][1], response_ids[t]
        if block < 0 and token in close_of:
            found.append((t, close_of[token]))
        elif block == token:
            found.append((t, -1))
    return found


def _deciding(control: HelpControl, response_ids: Sequence[int]) -> list[tuple[int, ...]]:
    """The same, in think blocks too."""
    ids, after = tuple(response_ids), dict[tuple[int, ...], set[int]]()
    for s in control.spellings:
        after.setdefault(s.prefix_ids, set()).add(s.token_id)
    found = [tuple(sorted(after.get((), ())))] * len(ids)
    lengths, last = {len(prefix) for prefix in after}, {prefix[-1] for prefix in after if prefix}
    for t in [t for t, token in enumerate(ids[:-1], 1) if token in last]:  # few: the others are not looked at
        found[t] = tuple(sorted(set().union(*(after.get(ids[max(0, t - n) : t], ()) for n in lengths))))
    return found


def masked_logprobs(completion: Completion, deciding: Sequence[tuple[int, ...]]) -> tuple[list[float], float]:
    """(log pi~ of each token, among those that do not begin the phrase; the hazard -sum log(1 - p)) by the engine.

    NaN where the engine saw the phrase in other places than `deciding` has them.
    """
    places = [t for t, tokens in enumerate(deciding) if tokens]
    odds = completion.help_log_odds or ()
    if len(odds) != len(places):
        return [math.nan] * len(completion.logprobs), math.nan
    hazards = [max(x, 0.0) + math.log1p(math.exp(-abs(x))) for x in odds]
    logprobs = list(completion.logprobs)
    for t, hazard in zip(places, hazards, strict=True):
        logprobs[t] += hazard
    return logprobs, sum(hazards)
