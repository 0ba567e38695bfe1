"""The in-process engine steers the help phrase as it is told, and says how far it was from choosing it."""

import math
from collections import Counter
from collections.abc import Callable

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from gapg.tasks.base import HELP_PHRASE, STOP
from gapg_rollout.engines.transformers import TransformersEngine
from gapg_rollout.records import HelpControl, HelpSpelling
from tests.rollout.engine_checks import generate, next_token, p_value

MakeModel = Callable[..., PreTrainedModel]


@pytest.fixture
def steered(make_model: MakeModel, tokenizer: PreTrainedTokenizerBase) -> tuple[PreTrainedModel, TransformersEngine]:
    model = make_model(seed=14, initializer_range=0.15)
    return model, TransformersEngine(model, tokenizer)


@pytest.mark.parametrize("temperature", [0.0, 1.0, 2.0])
def test_minus_infinity_forbids_the_phrase(
    steered: tuple[PreTrainedModel, TransformersEngine],
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[list[int]],
    temperature: float,
) -> None:
    _, engine = steered
    token = tokenizer.convert_tokens_to_ids(HELP_PHRASE)
    settings = {"max_new_tokens": 40, "temperature": temperature, "stop": STOP}
    free = [c for cs in generate(engine, prompts, 10, **settings) for c in cs]
    if temperature:
        assert any(token in c.token_ids for c in free)
    held = [
        c
        for cs in generate(engine, prompts, 10, **settings, help=HelpControl((HelpSpelling(token),), bias=-math.inf))
        for c in cs
    ]
    assert not any(token in c.token_ids for c in held)
    assert all(math.isfinite(x) for c in held for x in c.logprobs)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_large_bias_always_calls(
    steered: tuple[PreTrainedModel, TransformersEngine],
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[list[int]],
    temperature: float,
) -> None:
    model, engine = steered
    token = tokenizer.convert_tokens_to_ids(HELP_PHRASE)
    control = HelpControl((HelpSpelling(token),), bias=1e4)
    found = generate(engine, prompts, 2, temperature=temperature, stop=STOP, help=control)
    for prompt, completions in zip(prompts, found, strict=True):
        for c in completions:
            assert (c.token_ids, c.text, c.finish_reason) == ((token,), HELP_PHRASE, "stop")
            # the policy's own log-prob, before the bias
            assert c.logprobs[0] == pytest.approx(float(next_token(model, [prompt])[0, token].log()), abs=1e-4)


def test_the_bias_is_added_to_the_logit_at_any_temperature(
    steered: tuple[PreTrainedModel, TransformersEngine], tokenizer: PreTrainedTokenizerBase, prompts: list[list[int]]
) -> None:
    model, engine = steered
    token, bias, temperature = tokenizer.convert_tokens_to_ids(HELP_PHRASE), 3.0, 2.0
    ids = torch.tensor(prompts[:1])
    with torch.no_grad():
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0, -1].double()
    logits[token] += bias
    chances = dict(enumerate(torch.softmax(logits / temperature, -1).tolist()))
    (completions,) = generate(
        engine,
        prompts[:1],
        4000,
        max_new_tokens=1,
        temperature=temperature,
        help=HelpControl((HelpSpelling(token),), bias=bias),
    )
    assert p_value(Counter(c.token_ids[0] for c in completions), chances) > 1e-3


@pytest.mark.parametrize("k", [0, 1, 2])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_rest_of_the_phrase_is_forced(
    make_model: MakeModel, tokenizer: PreTrainedTokenizerBase, prompts: list[list[int]], k: int, temperature: float
) -> None:
    """Wherever the prefix stands, a large bias writes the deciding token and then every other one, and nothing else."""
    vocab = 14  # few tokens, so that a prefix of k comes up by chance
    model = make_model(seed=15, vocab_size=vocab, initializer_range=0.3, eos_token_id=1)
    engine = TransformersEngine(model, tokenizer)
    few = [[t % vocab for t in p] for p in prompts]
    settings = {"temperature": temperature, "max_new_tokens": 30}
    free = [c.token_ids for cs in generate(engine, few, 6, **settings) for c in cs]
    grams = Counter(ids[t : t + k] for ids in free for t in range(len(ids) - k))
    prefix = next(g for g, _ in grams.most_common() if not {1, 5, 11, 12, 13} & set(g))
    control = HelpControl((HelpSpelling(11, prefix, (12, 5, 13)),), bias=1e4)
    found = [c for cs in generate(engine, few, 6, **settings, help=control) for c in cs]
    phrase, seen = (*prefix, 11, 12, 5, 13), 0
    for c in found:
        t = 0
        while t + k <= len(c.token_ids):
            if c.token_ids[t : t + k] == prefix:
                cut = len(c.token_ids) - t
                assert c.token_ids[t : t + len(phrase)] == phrase[:cut]
                seen += cut > k
                t += len(phrase)
            else:
                t += 1
    assert seen > 20


@pytest.mark.parametrize(
    ("temperature", "bias"), [(0.0, 0.5), (0.0, -math.inf), (1.0, 0.0), (1.0, 1.0), (0.6, -0.5), (1.0, -math.inf)]
)
def test_of_several_spellings_each_is_steered(
    make_model: MakeModel, tokenizer: PreTrainedTokenizerBase, prompts: list[list[int]], temperature: float, bias: float
) -> None:
    """Margin, log-odds and forced rest, position by position; where two spellings fit, the longer prefix wins."""
    model = make_model(seed=16, vocab_size=14, initializer_range=0.2, eos_token_id=1)
    few = [[t % 14 for t in p] for p in prompts]
    spellings = (HelpSpelling(11, (9,), (13, 5)), HelpSpelling(11, (), (12,)), HelpSpelling(10, (8,), ()))
    control = HelpControl(spellings, bias=bias)
    engine = TransformersEngine(model, tokenizer)
    found = generate(engine, few, 6, temperature=temperature, max_new_tokens=14, help=control)
    begun: Counter[HelpSpelling] = Counter()
    for prompt, completions in zip(few, found, strict=True):
        for c in completions:
            margins, odds, forced = [-math.inf], [], []
            ids = torch.tensor([[*prompt, *c.token_ids]])
            with torch.no_grad():
                logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0, len(prompt) - 1 :].double()
            for t, token in enumerate(c.token_ids):
                if forced:
                    assert token == forced.pop(0)
                    continue
                fit = [s for s in spellings if c.token_ids[: t + 1][-len(s.prefix_ids) - 1 : -1] == s.prefix_ids]
                fit = [s for s in fit if t >= len(s.prefix_ids)]
                chances = torch.softmax(logits[t] / (temperature or 1.0), -1)
                helps = torch.zeros(14, dtype=torch.bool)
                helps[[s.token_id for s in fit]] = True
                odds.append(float(chances[helps].sum().log() - chances[~helps].sum().log()))
                best = chances[helps].max().log() - chances[~helps].max().log()
                margins.append(float(best) * (temperature or 1.0))
                if temperature == 0:
                    assert (token in (s.token_id for s in fit)) == (margins[-1] + bias > 0)
                begins = [s for s in fit if s.token_id == token]
                if begins:
                    spelling = max(begins, key=lambda s: len(s.prefix_ids))
                    begun[spelling] += 1
                    forced = list(spelling.rest_ids)
            assert c.help_margin == pytest.approx(max(margins), abs=1e-4)
            assert c.help_log_odds == pytest.approx(odds, abs=1e-3)
    assert bool(begun) == (bias > -math.inf)
    if bias == 1.0:
        assert set(begun) == set(spellings)


def test_without_control_there_is_no_margin(
    make_model: MakeModel, tokenizer: PreTrainedTokenizerBase, prompts: list[list[int]]
) -> None:
    engine = TransformersEngine(make_model(), tokenizer)
    assert all(c.help_margin is None and c.help_log_odds is None for cs in generate(engine, prompts, 2) for c in cs)
