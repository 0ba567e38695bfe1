"""The in-process engine ends a response where it must: end tokens, one-token stops, stop strings."""

from collections import Counter
from collections.abc import Callable

import pytest
import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE, WordLevel
from tokenizers.trainers import BpeTrainer
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from gapg.batches.batching import Example, packed_batches
from gapg.model.policy import response_logprobs
from gapg.tasks.base import HELP_PHRASE, STOP
from gapg_rollout.engines.transformers import TransformersEngine
from gapg_rollout.records import HelpControl, HelpSpelling
from tests.rollout.engine_checks import check_stops_outside_thought, generate

MakeModel = Callable[..., PreTrainedModel]


def test_eos_is_part_of_the_response(
    make_model: MakeModel, tokenizer: PreTrainedTokenizerBase, prompts: list[list[int]]
) -> None:
    eos = tokenizer.eos_token_id
    model = make_model(seed=8)
    found = [c for cs in generate(TransformersEngine(model, tokenizer), prompts, 20, max_new_tokens=25) for c in cs]
    ended = [c for c in found if c.finish_reason == "stop"]
    cut = [c for c in found if c.finish_reason == "length"]
    assert len(ended) > 20
    assert len(cut) > 20
    for c in ended:
        assert c.token_ids[-1] == eos
        assert eos not in c.token_ids[:-1]
        assert "<eos>" not in c.text
        assert len(c.logprobs) == len(c.token_ids)
    for c in cut:
        assert len(c.token_ids) == len(c.logprobs) == 25
        assert eos not in c.token_ids


def test_every_eos_of_the_generation_config_ends_a_response(
    make_model: MakeModel, tokenizer: PreTrainedTokenizerBase, prompts: list[list[int]]
) -> None:
    """Instruct models end a turn and a text with different tokens."""
    model = make_model(seed=8)
    other = tokenizer.convert_tokens_to_ids("5")
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, other]
    found = [c for cs in generate(TransformersEngine(model, tokenizer), prompts, 8, max_new_tokens=25) for c in cs]
    last = Counter(c.token_ids[-1] for c in found if c.finish_reason == "stop")
    assert last[other] > 0
    assert last[tokenizer.eos_token_id] > 0
    assert set(last) == {other, tokenizer.eos_token_id}
    assert not any(other in c.token_ids[:-1] for c in found)


def test_one_token_stops(make_model: MakeModel, tokenizer: PreTrainedTokenizerBase, prompts: list[list[int]]) -> None:
    """In the tiny tokenizer the closing tag and the whole help phrase are one token each."""
    ends = {tokenizer.convert_tokens_to_ids(t) for t in ("</answer>", HELP_PHRASE)} | {tokenizer.eos_token_id}
    engine = TransformersEngine(make_model(seed=9), tokenizer)
    found = [c for cs in generate(engine, prompts, 10, max_new_tokens=60, stop=STOP) for c in cs]
    ended = [c for c in found if c.finish_reason == "stop"]
    assert {c.token_ids[-1] for c in ended} == ends
    assert not any(ends & set(c.token_ids[:-1]) for c in found)
    helped = [c for c in ended if c.token_ids[-1] == tokenizer.convert_tokens_to_ids(HELP_PHRASE)]
    assert all(c.text.endswith(HELP_PHRASE) for c in helped)


@pytest.mark.parametrize("thinking", [False, True])
def test_a_stop_inside_a_think_block_does_not_count(make_model: MakeModel, thinking: bool) -> None:
    """A reasoning model may try out an answer there; `thinking`: the prompt has opened the block."""
    words = ["<pad>", "<eos>", "<think>", "</think>", "</answer>", *(f"w{i}" for i in range(5, 12))]
    inner = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>"))
    words_only = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<eos>", pad_token="<pad>")
    engine = TransformersEngine(make_model(seed=3, vocab_size=len(words), eos_token_id=1), words_only)
    found = generate(engine, [[5, 6], [7]], 90, max_new_tokens=30, stop=("</answer>",), thinking=thinking)
    check_stops_outside_thought(words_only, [c for cs in found for c in cs], {1}, "</answer>", thinking)


CORPUS = [
    "two and two. <answer> 4 </answer>. and so on and on",
    "half: <answer>1/2</answer> then more text",
    f"hard. {HELP_PHRASE} yes please",
    f"also\n{HELP_PHRASE}\nmore >> text > here",
]


@pytest.fixture(scope="module")
def bpe() -> PreTrainedTokenizerFast:
    """A byte-level BPE with a few merges, so that tags are several tokens whose ends join what follows (`>.`)."""
    inner = Tokenizer(BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    trainer = BpeTrainer(
        vocab_size=320,
        special_tokens=["<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        min_frequency=1,
    )
    inner.train_from_iterator([*CORPUS, "x>. " * 40, "</ans" * 20, "</unk" * 20], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token="<|end|>", pad_token="<|end|>", clean_up_tokenization_spaces=False
    )


@pytest.fixture(scope="module")
def talker(make_model: MakeModel, bpe: PreTrainedTokenizerFast) -> PreTrainedModel:
    """A model that knows the corpus by heart, what comes after the stop strings included."""
    model = make_model(
        seed=0, vocab_size=len(bpe), hidden_size=64, intermediate_size=128, eos_token_id=bpe.eos_token_id
    )
    examples = [Example(bpe(t[:3])["input_ids"], bpe(t[3:])["input_ids"] + [0], 1.0) for t in CORPUS]
    assert all(bpe.decode([*e.prompt_ids, *e.response_ids[:-1]]) == t for e, t in zip(examples, CORPUS, strict=True))
    (batch,) = packed_batches(examples, 4096, torch.device("cpu"))
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(120):
        loss = -response_logprobs(model, batch).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.02
    return model


def test_multi_token_stop_strings(talker: PreTrainedModel, bpe: PreTrainedTokenizerFast) -> None:
    """The response ends with the very token that completes the stop string, which stays part of it."""
    assert all(len(bpe(s)["input_ids"]) > 2 for s in STOP)
    engine = TransformersEngine(talker, bpe)
    found = generate(engine, [bpe(t[:3])["input_ids"] for t in CORPUS], temperature=0.0, max_new_tokens=80, stop=STOP)
    for text, (completion,) in zip(CORPUS, found, strict=True):
        assert completion.finish_reason == "stop"
        assert completion.text == bpe.decode(completion.token_ids)
        assert (text[:3] + completion.text).startswith(text[: text.find("</") + 9])
        assert sum(s in completion.text for s in STOP) == 1
        without_last = bpe.decode(completion.token_ids[:-1])
        assert not any(s in without_last for s in STOP)


def test_without_stop_strings_it_goes_on_to_eos(talker: PreTrainedModel, bpe: PreTrainedTokenizerFast) -> None:
    found = generate(
        TransformersEngine(talker, bpe), [bpe(t[:3])["input_ids"] for t in CORPUS], temperature=0.0, max_new_tokens=80
    )
    assert [t[:3] + c.text for t, (c,) in zip(CORPUS, found, strict=True)] == CORPUS
    assert all(c.finish_reason == "stop" and c.token_ids[-1] == bpe.eos_token_id for (c,) in found)


def test_a_long_stop_string_spelt_out_in_bytes(make_model: MakeModel, prompts: list[list[int]]) -> None:
    """Of the user's own making; the phrase is forced, and ends the response though its tokens are many."""
    inner = Tokenizer(BPE({c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, []))
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    byte_tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, clean_up_tokenization_spaces=False)
    stop = "please ask a stronger model"
    spelt = byte_tokenizer(f"I say: {stop} and more")["input_ids"]
    engine = TransformersEngine(make_model(vocab_size=256, eos_token_id=None), byte_tokenizer)
    control = HelpControl((HelpSpelling(spelt[0], (), tuple(spelt[1:])),), bias=1e4)
    ((completion,),) = generate(engine, prompts[:1], max_new_tokens=len(spelt), stop=(stop,), help=control)
    assert (completion.text, completion.finish_reason) == (f"I say: {stop}", "stop")


@pytest.mark.parametrize("roles", [{}, {"eos_token": "</answer>"}, {"pad_token": "</answer>"}])
def test_tags_that_are_special_tokens_stay_in_the_text(
    make_model: MakeModel, prompts: list[list[int]], roles: dict[str, str]
) -> None:
    """What is judged is the text, whichever tokens the tokenizer calls special; one may be the end token itself."""
    inner = Tokenizer(BPE({c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, []))
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tags = ["<answer>", "</answer>", "<unknown>", "</unknown>"]
    names = {"eos_token": "<eos>", "pad_token": "<pad>", **roles}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, additional_special_tokens=tags, **names)
    text = "<answer> 3 </answer>"
    spelt = tokenizer(text)["input_ids"]
    engine = TransformersEngine(make_model(vocab_size=len(tokenizer), eos_token_id=None), tokenizer)
    control = HelpControl((HelpSpelling(spelt[0], (), tuple(spelt[1:])),), bias=1e4)
    ((completion,),) = generate(engine, prompts[:1], max_new_tokens=len(spelt) + 3, stop=STOP, help=control)
    assert completion.token_ids == tuple(spelt)
    assert (completion.text, completion.finish_reason) == (text, "stop")
