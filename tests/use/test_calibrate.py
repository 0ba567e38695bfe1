"""The help bias: a fitted one calls on exactly the wanted part of the same problems, decoded greedily."""

import math
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from gapg.config import ConfigError
from gapg.rollout.records import Completion, HelpControl, Sampling
from gapg.rollout.transformers_engine import TransformersEngine
from gapg.tasks.base import HELP_PHRASE
from gapg.use.calibrate import fit_bias, help_control, masked


def words(*vocabulary: str) -> PreTrainedTokenizerFast:
    """A tokenizer whose tokens are exactly these, split by a regular expression at tags and blanks."""
    inner = Tokenizer(WordLevel({w: i for i, w in enumerate(vocabulary)}, unk_token=vocabulary[0]))
    inner.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(" ", "removed"),
            pre_tokenizers.Split("<", "isolated"),
            pre_tokenizers.Split(">", "isolated"),
        ]
    )
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token=vocabulary[0])


def test_a_phrase_of_one_token(tokenizer: PreTrainedTokenizerBase) -> None:
    assert help_control(tokenizer) == HelpControl(tokenizer.convert_tokens_to_ids(HELP_PHRASE))


def test_a_shared_beginning_is_left_alone() -> None:
    """`<` begins both endings: the bias must wait until they differ."""
    t = words("?", "<", ">", "answer", "unknown", "I", "need", "external", "assistance", "/unknown")
    control = help_control(t)
    assert control.prefix_ids == (1,)
    assert control.token_id == 4
    assert [*control.prefix_ids, control.token_id, *control.rest_ids] == t.encode(HELP_PHRASE)
    assert control.bias == 0.0
    assert masked(control) == replace(control, bias=-math.inf)


def test_a_tokenizer_that_cannot_tell_the_endings_apart_is_refused() -> None:
    inner = Tokenizer(WordLevel({"?": 0}, unk_token="?"))
    with pytest.raises(ConfigError, match="cannot be calibrated"):
        help_control(PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="?"))


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

    control = HelpControl(11, (9,) if prefix else (), rest_ids=(13, 12))
    margins = [c.help_margin for c in decode(masked(control))]
    assert all(m is not None for m in margins)
    reachable = sum(math.isfinite(m) for m in margins if m is not None)
    assert reachable > 40
    phrase = (*control.prefix_ids, 11, 13)
    for fraction in (0.05, 0.1, 0.25, 0.3):
        biased = replace(control, bias=fit_bias([m for m in margins if m is not None], fraction))
        called = [
            any(c.token_ids[t : t + len(phrase)] == phrase for t in range(len(c.token_ids) - len(phrase) + 1))
            or c.token_ids[-len(phrase) + 1 :] == phrase[:-1]
            for c in decode(biased)
        ]
        assert sum(called) == round(fraction * len(problems))
