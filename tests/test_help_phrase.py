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

VOCAB = 11
tokens = st.integers(0, 6)
spellings = st.builds(
    HelpSpelling,
    tokens,
    st.lists(tokens, max_size=3).map(tuple),
    st.lists(tokens, max_size=2).map(tuple),
)
# no phrase has a mark in it
blocks = st.sampled_from([(), ((7, 8),), ((7, 8), (9, 10))])
controls = st.builds(
    lambda found, blocks: HelpControl(tuple(dict.fromkeys(found)), blocks=blocks),
    st.lists(spellings, min_size=1, max_size=5),
    blocks,
)
prompts = st.lists(st.integers(0, 10), max_size=3)


def sampled(
    control: HelpControl, prompt: list[int], length: int, thinking: bool, rng: random.Random
) -> tuple[list[int], list[tuple[int, ...]]]:
    """A response as an engine makes it with help forbidden, and what it forbade at each token."""
    steering = HelpSteering(Sampling(length, help=masked(control), thinking=thinking), [prompt], 1, "cpu")
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


@given(controls, prompts, st.integers(0, 24), st.booleans(), st.integers(0, 10**6))
def test_it_is_what_the_engine_forbade(
    control: HelpControl, prompt: list[int], length: int, thinking: bool, seed: int
) -> None:
    ids, forbidden = sampled(control, prompt, length, thinking, random.Random(seed))
    assert deciding_tokens(control, prompt, ids, thinking) == forbidden


def test_the_phrase_begins_nowhere_in_a_think_block() -> None:
    control = HelpControl((HelpSpelling(1, (5,)), HelpSpelling(3)), blocks=((6, 7), (8, 9)))
    alone, both = (3,), (1, 3)
    assert deciding_tokens(control, [6], [5, 0, 6, 5, 0, 7, 5, 0]) == [alone, both, alone, (), (), (), alone, both]
    assert deciding_tokens(control, [], [6, 9, 5, 0]) == [alone, (), (), ()], "another kind's mark closes nothing"
    assert deciding_tokens(control, [2, 8, 4], [5, 0, 9, 5, 0], thinking=True) == [(), (), (), alone, both]
    # what the prompt opens is known by its mark: not where it is spelled out, nor where the last mark closes
    for prompt in ([2, 4], [6, 7, 4]):
        assert deciding_tokens(control, prompt, [5, 0], thinking=True) == [alone, both]


def test_the_blocks_that_a_tokenizer_has_marks_for(tokenizer: PreTrainedTokenizerBase) -> None:
    assert help_control(tokenizer).blocks == ()
    thinker = copy.deepcopy(tokenizer)
    thinker.add_tokens(["<think>", "</think>", "[/THINK]", "<seed:think", "think>"])
    begin, end = thinker.convert_tokens_to_ids(["<think>", "</think>"])
    assert help_control(thinker) == replace(help_control(tokenizer), blocks=((begin, end),))


def test_blocks_that_no_tokens_tell_of() -> None:
    control = HelpControl((HelpSpelling(1),), blocks=((6, 7),))
    block, plain = "<think> 5 </think> 5", "5"

    def unseen(ids: tuple[int, ...], text: str, prompt: tuple[int, ...] = (), control: HelpControl = control) -> bool:
        return thinks_unseen(control, prompt, Completion(ids, (0.0,) * len(ids), text, "stop"), thinking=bool(prompt))

    assert not unseen((6, 5, 7, 5), block) and not unseen((5,), plain)
    assert not unseen((5, 7, 5), "5 </think> 5", prompt=(6,))
    assert not unseen((5, 5), "5 5", prompt=(6,)), "it has not ended"
    assert not unseen((6, 5, 6, 5, 7, 5), "<think> 5 <think> 5 </think> 5"), "a mark in a block opens nothing"
    assert not unseen((6, 2, 5, 2, 7, 5), "<think> <reasoning> 5 </reasoning> </think> 5")
    assert unseen((2, 3, 5, 7, 5), block), "opened in other tokens"
    assert unseen((5, 2, 3, 5), "5 </think> 5", prompt=(6,)), "closed in other tokens"
    assert unseen((6, 7, 2, 3, 5), "<think></think><reasoning> 5"), "another after it"
    assert unseen((5, 7, 5), "5 </think> 5"), "opened by nobody"
    assert unseen((5, 4, 3, 5), "5 </reasoning> 5", prompt=(2, 4)), "a prompt's, in other tokens"
    assert unseen((6, 5, 7, 5), block, control=replace(control, blocks=()))


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
            deciding = deciding_tokens(control, [], c.token_ids)
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
