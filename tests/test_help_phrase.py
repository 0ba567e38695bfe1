"""Where a response could have begun the help phrase: as the engine saw it while it sampled, token by token."""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from gapg.help_phrase import deciding_tokens, help_control, masked, masked_logprobs, thinks_unseen
from gapg_rollout.engines.help import HelpSteering
from gapg_rollout.engines.transformers import TransformersEngine
from gapg_rollout.records import Completion, HelpControl, HelpSpelling, Sampling

VOCAB = 9
tokens = st.integers(0, 6)
spellings = st.builds(
    HelpSpelling,
    tokens,
    st.lists(tokens, max_size=3).map(tuple),
    st.lists(tokens, max_size=2).map(tuple),
)
marks = st.lists(st.integers(7, 8), max_size=2).map(tuple)  # no phrase has one in it
controls = st.builds(
    lambda found, opens, closes: HelpControl(tuple(dict.fromkeys(found)), opens=opens, closes=closes),
    st.lists(spellings, min_size=1, max_size=5),
    marks,
    marks,
)


def sampled(
    control: HelpControl, length: int, thinking: bool, rng: random.Random
) -> tuple[list[int], list[tuple[int, ...]]]:
    """A response as an engine makes it with help forbidden, and what it forbade at each token."""
    steering = HelpSteering(masked(control), 1.0, rows=1, max_new_tokens=length, device="cpu", thinking=thinking)
    ids: list[int] = []
    forbidden = []
    for t in range(length):
        recent = [*[-1] * steering.look_back, *ids][len(ids) :]
        scores = torch.zeros(1, VOCAB)
        deciding, forced = steering.look(scores, 1.0, torch.tensor([0]), t, torch.tensor([recent]).long())
        assert forced.item() == -1, "a phrase that cannot begin is not gone on with"
        forbidden.append(tuple(deciding[0].nonzero()[:, 0].tolist()))
        assume(len(forbidden[-1]) < VOCAB)
        ids.append(rng.choice([i for i in range(VOCAB) if i not in forbidden[-1]]))
    return ids, forbidden


@given(controls, st.integers(0, 24), st.booleans(), st.integers(0, 10**6))
def test_it_is_what_the_engine_forbade(control: HelpControl, length: int, thinking: bool, seed: int) -> None:
    ids, forbidden = sampled(control, length, thinking, random.Random(seed))
    assert deciding_tokens(control, ids, thinking) == forbidden


def test_the_phrase_begins_nowhere_in_a_think_block() -> None:
    control = HelpControl((HelpSpelling(1, (5,)), HelpSpelling(3)), opens=(6, 8), closes=(7, 9))
    alone, both = (3,), (1, 3)
    assert deciding_tokens(control, [5, 0, 6, 5, 0, 7, 5, 0]) == [alone, both, alone, (), (), (), alone, both]
    assert deciding_tokens(control, [5, 0, 9, 5, 0], thinking=True) == [(), (), (), alone, both]
    unknown = replace(control, opens=(), closes=())
    assert deciding_tokens(unknown, [6, 5, 0], thinking=True) == [alone, alone, both], "its end is not known"


def test_what_a_tokenizer_opens_and_closes_a_block_with(tokenizer: PreTrainedTokenizerBase) -> None:
    assert (help_control(tokenizer).opens, help_control(tokenizer).closes) == ((), ())
    thinker = copy.deepcopy(tokenizer)
    thinker.add_tokens(["<think>", "</think>", "[/THINK]", "<think", "think>"])
    ids = [thinker.convert_tokens_to_ids(mark) for mark in ("<think>", "</think>", "[/THINK]")]
    assert help_control(thinker) == replace(help_control(tokenizer), opens=(ids[0],), closes=(ids[1], ids[2]))


def test_spellings_with_shared_and_different_prefixes() -> None:
    """Two that go on after one prefix, one whose prefix ends in another's, and one that needs none."""
    control = HelpControl((HelpSpelling(1, (5,)), HelpSpelling(2, (5,)), HelpSpelling(2, (4, 5)), HelpSpelling(3)))
    assert deciding_tokens(control, [5, 5, 4, 5, 0]) == [(3,), (1, 2, 3), (1, 2, 3), (3,), (1, 2, 3)]
    control = HelpControl((HelpSpelling(1, (5,)), HelpSpelling(2, (4, 5))))
    assert deciding_tokens(control, [5, 0, 4, 5, 0]) == [(), (1,), (), (), (1, 2)]
    assert deciding_tokens(control, []) == []
    assert deciding_tokens(control, [5]) == [()], "what comes after the last token is no place of its"


def test_blocks_that_no_tokens_tell_of() -> None:
    control = HelpControl((HelpSpelling(1),), opens=(6,), closes=(7,))
    spelt, plain = "<think> 5 </think> 5", "5"

    def unseen(control: HelpControl, ids: tuple[int, ...], text: str, thinking: bool = False) -> bool:
        return thinks_unseen(control, Completion(ids, (0.0,) * len(ids), text, "stop"), thinking)

    assert not unseen(control, (6, 5, 7, 5), spelt) and not unseen(control, (5,), plain)
    assert not unseen(control, (5, 7, 5), "5 </think> 5", thinking=True)
    assert unseen(control, (2, 3, 5, 7, 5), spelt), "opened in other tokens"
    assert unseen(control, (5, 7, 5), "5 </think> 5"), "opened by nobody"
    unmarked = replace(control, opens=(), closes=())
    assert unseen(unmarked, (6, 5, 7, 5), spelt) and unseen(unmarked, (5,), plain, thinking=True)
    assert not unseen(unmarked, (5,), plain)


def test_the_engines_log_probs_among_what_was_not_forbidden(
    make_model: Callable[..., PreTrainedModel], tokenizer: PreTrainedTokenizerBase
) -> None:
    """Of a real engine's responses: pi~ of each token sums to one over all tokens, and the hazard is the engine's."""
    model = make_model(seed=3, vocab_size=14, eos_token_id=None, initializer_range=0.3)
    control = HelpControl(
        (HelpSpelling(11, (9,)), HelpSpelling(12, (9,)), HelpSpelling(13, (2, 9)), HelpSpelling(7, (3,)))
    )
    sampling = Sampling(12, temperature=0.7, help=masked(control), seed=4)
    found = dict(TransformersEngine(model, tokenizer).generate([[i, 9 - i] for i in range(8)], 4, sampling))
    places = 0
    for i, completions in found.items():
        for c in completions:
            deciding = deciding_tokens(control, c.token_ids)
            logprobs, hazard = masked_logprobs(c, deciding)
            ids = torch.tensor([[i, 9 - i, *c.token_ids]])
            with torch.no_grad():
                logits = model(ids, position_ids=torch.arange(ids.shape[1])[None]).logits[0, 1:-1].double() / 0.7
            want = 0.0
            for t, gone in enumerate(deciding):
                want -= math.log1p(-sum(logits[t].softmax(0)[list(gone)].tolist()))
                kept = logits[t].index_fill(0, torch.tensor(gone, dtype=torch.int64), -math.inf)
                assert logprobs[t] == pytest.approx(kept.log_softmax(0)[c.token_ids[t]].item(), abs=1e-5)
            assert hazard == pytest.approx(want, abs=1e-5)
            places += sum(map(bool, deciding))
    assert places > 20


def test_an_engine_that_saw_the_phrase_elsewhere_gives_nothing_to_rely_on() -> None:
    completion = Completion((1, 2, 3), (-0.5, -1.0, -2.0), "", "stop", help_log_odds=(0.3,))
    logprobs, hazard = masked_logprobs(completion, [(), (9,), ()])
    assert logprobs == [-0.5, -1.0 + math.log1p(math.exp(0.3)), -2.0] and hazard == math.log1p(math.exp(0.3))
    for deciding in ([(), (), ()], [(9,), (9,), ()]):
        logprobs, hazard = masked_logprobs(completion, deciding)
        assert math.isnan(hazard) and len(logprobs) == 3 and all(map(math.isnan, logprobs))
    assert masked_logprobs(Completion((1,), (-0.5,), "", "stop"), [()]) == ([-0.5], 0)
