"""The help bias: a fitted one calls on exactly the wanted part of the same problems, decoded greedily."""

import math
import random
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from gapg.batches.batching import Example, packed_batches
from gapg.errors import ConfigError
from gapg.evaluation.calibrate import fit_bias
from gapg.help_phrase import deciding_tokens, help_control, masked
from gapg.judge import parse
from gapg.model.policy import response_logprobs
from gapg.tasks.base import HELP_PHRASE, STOP
from gapg_rollout.engines.transformers import TransformersEngine
from gapg_rollout.records import Completion, HelpControl, HelpSpelling, Sampling
from tests.byte_pairs import ENDINGS, byte_pairs, metaspace

MakeModel = Callable[..., PreTrainedModel]


@pytest.fixture(scope="module")
def bpe() -> PreTrainedTokenizerFast:
    return byte_pairs()


def test_a_phrase_of_one_token(tokenizer: PreTrainedTokenizerBase) -> None:
    assert help_control(tokenizer) == HelpControl((HelpSpelling(tokenizer.convert_tokens_to_ids(HELP_PHRASE)),))


def test_a_shared_beginning_is_left_alone(bpe: PreTrainedTokenizerFast) -> None:
    """`<` begins both endings, in every spelling: the bias must wait until they differ."""
    assert {"<", "Ġ<", ".<"} <= bpe.get_vocab().keys()
    control = help_control(bpe)
    prefixes = {tuple(bpe.convert_ids_to_tokens(list(s.prefix_ids))) for s in control.spellings}
    assert prefixes == {(token,) for token in bpe.get_vocab() if token.endswith("<")}
    for spelling in control.spellings:
        text = bpe.decode([*spelling.prefix_ids, spelling.token_id, *spelling.rest_ids])
        assert text.lstrip(" .") == HELP_PHRASE
        assert spelling.token_id == bpe.convert_tokens_to_ids("unknown")
    assert control.bias == 0.0
    assert masked(control) == replace(control, bias=-math.inf)


def spelt(tokenizer: PreTrainedTokenizerBase, control: HelpControl, text: str) -> list[HelpSpelling]:
    """The spellings of the help phrase that a text holds."""
    ids = tuple(tokenizer.encode(text, add_special_tokens=False))
    found = []
    for s in control.spellings:
        phrase = (*s.prefix_ids, s.token_id, *s.rest_ids)
        found += [s for t in range(len(ids)) if ids[t : t + len(phrase)] == phrase]
    return found


Real = tuple[PreTrainedTokenizerFast, HelpControl]
ANSWER_TAGS, HELP_TAGS = ["<answer>", "</answer>"], ["<unknown>", "</unknown>"]
TAGS = ([], ANSWER_TAGS, HELP_TAGS, ANSWER_TAGS + HELP_TAGS)
"""Tags that may be tokens of their own."""
KINDS = {f"{make.__name__} {' '.join(tags)}": (make, tags) for make in (byte_pairs, metaspace) for tags in TAGS}


@pytest.fixture(scope="module", params=KINDS)
def real(request: pytest.FixtureRequest) -> Real:
    make, tags = KINDS[request.param]
    tokenizer = make()
    tokenizer.add_tokens(tags)
    return tokenizer, help_control(tokenizer)


TEXTS = st.text(alphabet='ab1 .)\n"<>=', max_size=6)


@given(before=TEXTS)
def test_however_the_phrase_comes_it_is_found(real: Real, before: str) -> None:
    assert len(spelt(*real, before + HELP_PHRASE)) == 1
    assert not spelt(*real, f"{before}<answer> 4 </answer>")


@given(text=TEXTS)
def test_what_is_no_call_is_neither_steered_nor_forbidden(real: Real, text: str) -> None:
    """Whichever of the tags are tokens of their own: `<` of an inequality begins no call, nor does a blank."""
    tokenizer, control = real
    ids = tokenizer.encode(f"{text}<answer> 4 < 5 </answer>", add_special_tokens=False)
    forbidden = deciding_tokens(control, [], ids)
    assert not [token for token, tokens in zip(ids, forbidden, strict=True) if token in tokens]


def test_words_that_swallow_the_tag_are_no_spelling() -> None:
    """A word tokenizer has `<unknown>` after a blank only; `x<unknown>` is another word, which says nothing."""
    vocabulary = ("?", "x", "<answer>", *HELP_PHRASE.split())
    inner = Tokenizer(WordLevel({w: i for i, w in enumerate(vocabulary)}, unk_token="?"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    t = PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="?")
    assert help_control(t).spellings == (HelpSpelling(3, (), (4, 5, 6, 7, 8)),)


def test_a_tokenizer_that_cannot_tell_the_endings_apart_is_refused() -> None:
    inner = Tokenizer(WordLevel({"?": 0}, unk_token="?"))
    with pytest.raises(ConfigError, match="cannot be calibrated"):
        help_control(PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="?"))


@pytest.fixture(scope="module")
def talker(make_model: MakeModel, bpe: PreTrainedTokenizerFast) -> PreTrainedModel:
    """A model that has learnt to end its text in all of `ENDINGS`, with an answer or, for some, with the phrase."""
    model = make_model(seed=0, vocab_size=len(bpe), hidden_size=64, intermediate_size=128)
    rng, examples = random.Random(0), []
    for i in range(60):
        tag = HELP_PHRASE if rng.random() < 0.2 else f"<answer> {i % 7} </answer>"
        text = ENDINGS[i % 4].format(i)
        examples.append(Example(bpe(text[:5])["input_ids"], bpe(text[5:] + tag)["input_ids"], 1.0))
    (batch,) = packed_batches(examples, 1 << 14, torch.device("cpu"))
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(60):
        loss = -response_logprobs(model, batch).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model


def talk(
    model: PreTrainedModel, bpe: PreTrainedTokenizerFast, control: HelpControl, n: int = 1, **settings: Any
) -> list[Completion]:
    prompts = [bpe(ENDINGS[i % 4].format(i)[:5])["input_ids"] for i in range(60)]
    sampling = Sampling(40, stop=STOP, help=control, **settings)
    found = sorted(TransformersEngine(model, bpe).generate(prompts, n, sampling), key=lambda pair: pair[0])
    return [c for _, completions in found for c in completions]


def test_a_real_tokenizer_is_calibrated_in_every_spelling(
    talker: PreTrainedModel, bpe: PreTrainedTokenizerFast
) -> None:
    control = help_control(bpe)
    held = talk(talker, bpe, masked(control), temperature=0.0)
    assert not any(parse(c.text).kind == "help" for c in held)
    before = {c.text[: c.text.index("<")][-1] for c in held if "<" in c.text}
    assert before >= {" ", "\n", "."}, "the spellings are all in use"
    margins = [c.help_margin for c in held if c.help_margin is not None]
    for fraction in (0.1, 0.3, 0.6, 0.9):
        called = talk(talker, bpe, replace(control, bias=fit_bias(margins, fraction)), temperature=0.0)
        assert sum(parse(c.text).kind == "help" for c in called) == round(fraction * 60)


@pytest.mark.parametrize(("temperature", "bias"), [(1.0, -1.0), (1.0, 1.5), (0.7, 0.5)])
def test_one_masked_pass_tells_what_any_bias_does_to_samples(
    talker: PreTrainedModel, bpe: PreTrainedTokenizerFast, temperature: float, bias: float
) -> None:
    """The expected call fraction of the masked samples against samples drawn with the bias."""
    control, n = help_control(bpe), 12
    held = talk(talker, bpe, masked(control), n, temperature=temperature, seed=1)
    odds = [c.help_log_odds for c in held if c.help_log_odds is not None]
    stays = [math.prod(1 / (1 + math.exp(o + bias / temperature)) for o in of_one) for of_one in odds]
    drawn = talk(talker, bpe, replace(control, bias=bias), n, temperature=temperature, seed=2)
    called = [parse(c.text).kind == "help" for c in drawn]
    expected = 1 - sum(stays) / len(stays)
    assert 0.05 < expected < 0.95
    deviation = math.sqrt(2 * expected * (1 - expected) / len(called))
    assert abs(sum(called) / len(called) - expected) < 4 * deviation


@given(st.lists(st.floats(-20, 20), min_size=2, max_size=60, unique=True), st.floats(0.01, 0.99))
def test_it_is_the_quantile(margins: list[float], c: float) -> None:
    """With bias b a problem calls exactly where its margin is above -b."""
    calls = round(c * len(margins))
    ordered = sorted(margins, reverse=True)
    gaps = [a - b for a, b in pairwise(ordered)]
    if min(gaps) < 1e-6:  # closer together than a bias can tell
        return
    bias = fit_bias(margins, c)
    assert sum(m > -bias for m in margins) == calls


def test_problems_where_the_phrase_never_came_up_do_not_call() -> None:
    margins = [-1.0, -2.0, -math.inf, -math.inf]
    assert [m > -fit_bias(margins, 0.5) for m in margins] == [True, True, False, False]
    assert [m > -fit_bias(margins, 0.75) for m in margins] == [True, True, False, False], "as many as can"
    with pytest.raises(ValueError, match="came near"):
        fit_bias([-math.inf] * 4, 0.3)


@pytest.mark.parametrize("prefix", [False, True])
def test_the_fitted_bias_calls_on_exactly_the_wanted_part(
    make_model: Callable[..., PreTrainedModel], tokenizer: PreTrainedTokenizerBase, prefix: bool
) -> None:
    """On a real model: one masked pass gives the margins, and the biased pass calls where they say."""
    model = make_model(seed=21, vocab_size=14, initializer_range=0.3, eos_token_id=None)
    engine = TransformersEngine(model, tokenizer)
    problems = [[i % 12, i // 12, (7 * i) % 13] for i in range(120)]

    def decode(control: HelpControl) -> list[Completion]:
        sampling = Sampling(10, temperature=0.0, help=control)
        return [c for _, (c,) in sorted(engine.generate(problems, 1, sampling), key=lambda pair: pair[0])]

    spelling = HelpSpelling(11, (9,) if prefix else (), (13, 12))
    control = HelpControl((spelling,))
    margins = [c.help_margin for c in decode(masked(control))]
    assert all(m is not None for m in margins)
    reachable = sum(math.isfinite(m) for m in margins if m is not None)
    assert reachable > 40
    phrase = (*spelling.prefix_ids, 11, 13)
    for fraction in (0.05, 0.1, 0.25, 0.3):
        biased = replace(control, bias=fit_bias([m for m in margins if m is not None], fraction))
        called = [
            any(c.token_ids[t : t + len(phrase)] == phrase for t in range(len(c.token_ids) - len(phrase) + 1))
            or c.token_ids[-len(phrase) + 1 :] == phrase[:-1]
            for c in decode(biased)
        ]
        assert sum(called) == round(fraction * len(problems))
