"""The in-process engine: it samples the policy itself, says so truly, ends where it must, and follows the trainer."""

import copy
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence

import pytest
import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from gapg.batching import Example, packed_batches
from gapg.policy import response_logprobs
from gapg.rollout.records import Completion, HelpControl, Sampling
from gapg.rollout.transformers_engine import TransformersEngine
from gapg.tasks.base import HELP_PHRASE, STOP
from gapg.tasks.countdown import Countdown

MakeModel = Callable[..., PreTrainedModel]


def generate(
    engine: TransformersEngine, prompts: Sequence[Sequence[int]], n: int = 1, **settings: object
) -> list[list[Completion]]:
    """Completions in the order of the prompts; each prompt must come exactly once."""
    found = list(engine.generate(prompts, n, Sampling(**{"max_new_tokens": 8, **settings})))  # type: ignore[arg-type]
    assert sorted(i for i, _ in found) == list(range(len(prompts)))
    assert all(len(completions) == n for _, completions in found)
    return [completions for _, completions in sorted(found, key=lambda pair: pair[0])]


@pytest.fixture(scope="module")
def prompts(countdown: Countdown, tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Of three to nine tokens, in no order of length."""
    rendered = [countdown.render(p, tokenizer) for p in countdown.prompts("train")[:24]]
    return [ids[-3 - i % 4 :] + ids[: i % 3] for i, ids in enumerate(rendered)]


def next_token(model: PreTrainedModel, ids: Sequence[Sequence[int]], temperature: float = 1.0) -> torch.Tensor:
    """[B, V] probabilities, float64, from the plain model; prompts of one length."""
    with torch.no_grad():
        batch = torch.tensor(ids)
        logits = model(input_ids=batch, attention_mask=torch.ones_like(batch)).logits[:, -1]
    return torch.softmax(logits.double() / temperature, -1)


def p_value(counts: Counter[object], chances: dict[object, float]) -> float:
    """Chi-square, cells expected under five merged; the tail by Wilson and Hilferty's approximation."""
    n = counts.total()
    assert all(chances.get(cell, 0.0) > 0 for cell in counts)
    large = [c for c, p in chances.items() if n * p >= 5]
    cells = [(counts[c], n * chances[c]) for c in large]
    rest = n - sum(e for _, e in cells)
    cells.append((n - sum(o for o, _ in cells), rest))
    statistic = sum((o - e) ** 2 / e for o, e in cells if e > 1e-6)
    k = len(cells) - 1
    z = ((statistic / k) ** (1 / 3) - (1 - 2 / (9 * k))) / math.sqrt(2 / (9 * k))
    return 0.5 * math.erfc(z / math.sqrt(2))


# --- the policy itself -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("settings", [{}, {"num_key_value_heads": 1, "tie_word_embeddings": True}])
def test_logprobs_are_the_trainers(
    make_model: MakeModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[list[int]],
    temperature: float,
    settings: dict[str, object],
) -> None:
    model = make_model(seed=1, **settings)
    engine = TransformersEngine(model, tokenizer)
    found = generate(engine, prompts, 5, temperature=temperature, max_new_tokens=12)
    examples = [Example(p, c.token_ids, 1.0, c.logprobs) for p, cs in zip(prompts, found, strict=True) for c in cs]
    gaps = []
    for batch in packed_batches(examples, 512, torch.device("cpu")):
        with torch.no_grad():
            gaps.append((response_logprobs(model, batch, temperature) - batch.rollout_logprob).abs().max())
    assert len(gaps) > 1
    assert max(gaps) < 1e-5


def test_greedy_logprobs_are_those_at_temperature_one(
    make_model: MakeModel, tokenizer: PreTrainedTokenizerBase, prompts: list[list[int]]
) -> None:
    model = make_model(seed=1)
    for prompt, (completion,) in zip(
        prompts, generate(TransformersEngine(model, tokenizer), prompts, temperature=0.0), strict=True
    ):
        best = next_token(model, [prompt])[0]
        assert completion.token_ids[0] == int(best.argmax())
        assert completion.logprobs[0] == pytest.approx(float(best.max().log()), abs=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_one_token_samples_follow_the_softmax(
    make_model: MakeModel, tokenizer: PreTrainedTokenizerBase, prompts: list[list[int]], temperature: float
) -> None:
    """All of it: the model folder's generation settings say top_k = 5, and are ignored."""
    model = make_model(seed=2)
    model.generation_config.do_sample, model.generation_config.top_k = True, 5
    model.generation_config.top_p, model.generation_config.repetition_penalty = 0.5, 3.0
    engine = TransformersEngine(model, tokenizer)
    (completions,) = generate(engine, prompts[:1], 4000, max_new_tokens=1, temperature=temperature, seed=11)
    counts = Counter(c.token_ids[0] for c in completions)
    chances = dict(enumerate(next_token(model, prompts[:1], temperature)[0].tolist()))
    assert len(counts) > 20
    assert p_value(counts, chances) > 1e-3


def test_two_token_samples_follow_the_joint_distribution(
    make_model: MakeModel, tokenizer: PreTrainedTokenizerBase, prompts: list[list[int]]
) -> None:
    """Rows of several prompts, all decoded together, with and without padding."""
    model = make_model(seed=3, initializer_range=0.15)
    engine = TransformersEngine(model, tokenizer)
    chosen = [prompts[0], prompts[3], prompts[0][:2]]
    assert len({len(p) for p in chosen}) > 1
    for prompt, completions in zip(chosen, generate(engine, chosen, 2500, max_new_tokens=2, seed=5), strict=True):
        first = next_token(model, [prompt])[0]
        second = next_token(model, [[*prompt, t] for t in range(len(first))])
        chances: dict[object, float] = {}
        for t, p in enumerate(first.tolist()):
            if t == tokenizer.eos_token_id:
                chances[(t,)] = p
            else:
                chances |= {(t, u): p * q for u, q in enumerate(second[t].tolist())}
        assert p_value(Counter(c.token_ids for c in completions), chances) > 1e-3


def test_that_check_would_see_a_hidden_top_k(
    make_model: MakeModel, tokenizer: PreTrainedTokenizerBase, prompts: list[list[int]]
) -> None:
    """transformers' own generate, left to that generation config, fails the test above by far."""
    model = make_model(seed=2).eval()
    ids = torch.tensor(prompts[:1])
    with torch.no_grad():
        out = model.generate(ids, do_sample=True, top_k=50, max_new_tokens=1, num_return_sequences=4000)
    chances = dict(enumerate(next_token(model, prompts[:1])[0].tolist()))
    assert p_value(Counter(out[:, -1].tolist()), chances) < 1e-6


# --- batches ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("max_rows", [1, 7, 2048])
def test_batched_greedy_equals_one_by_one(
    make_model: MakeModel, tokenizer: PreTrainedTokenizerBase, prompts: list[list[int]], max_rows: int
) -> None:
    """Mixed lengths are padded on the left, finished rows leave the batch, and small waves change nothing."""
    model = make_model(seed=4)
    one = TransformersEngine(model, tokenizer)
    alone = [generate(one, [p], temperature=0.0, max_new_tokens=20)[0][0] for p in prompts]
    assert len({len(c.token_ids) for c in alone} | {len(p) for p in prompts}) > 3
    together = generate(
        TransformersEngine(model, tokenizer, max_rows=max_rows), prompts, temperature=0.0, max_new_tokens=20
    )
    for a, (b,) in zip(alone, together, strict=True):
        assert (a.token_ids, a.text, a.finish_reason) == (b.token_ids, b.text, b.finish_reason)
        assert a.logprobs == pytest.approx(b.logprobs, abs=1e-5)


def test_finished_rows_do_not_disturb_the_others(
    make_model: MakeModel, tokenizer: PreTrainedTokenizerBase, prompts: list[list[int]]
) -> None:
    """Many stop strings end rows at all lengths; the log-probs of what is left are still the trainer's."""
    model = make_model(seed=5)
    engine = TransformersEngine(model, tokenizer)
    found = generate(engine, prompts, 8, max_new_tokens=30, stop=("7", "+", "1"))
    lengths = Counter(len(c.token_ids) for cs in found for c in cs)
    assert len(lengths) > 10
    examples = [Example(p, c.token_ids, 1.0, c.logprobs) for p, cs in zip(prompts, found, strict=True) for c in cs]
    for batch in packed_batches(examples, 4096, torch.device("cpu")):
        with torch.no_grad():
            assert (response_logprobs(model, batch) - batch.rollout_logprob).abs().max() < 1e-5


def test_the_seed_decides(make_model: MakeModel, tokenizer: PreTrainedTokenizerBase, prompts: list[list[int]]) -> None:
    engine = TransformersEngine(make_model(seed=6), tokenizer)
    first, again, other = (generate(engine, prompts, 3, seed=s) for s in (1, 1, 2))
    assert first == again
    assert first != other
    assert len({c.token_ids for c in first[0]}) > 1, "the n responses of a prompt differ"


def test_responses_come_as_they_end(
    make_model: MakeModel, tokenizer: PreTrainedTokenizerBase, prompts: list[list[int]]
) -> None:
    """Judging may start while others decode: a prompt's completions come when its last one has ended."""
    engine = TransformersEngine(make_model(seed=7), tokenizer)
    stream: Iterator[tuple[int, list[Completion]]] = engine.generate(prompts, 1, Sampling(30, stop=("7", "+")))
    lengths = [len(completions[0].token_ids) for _, completions in stream]
    assert lengths == sorted(lengths)
    assert lengths[0] < lengths[-1]


def test_no_prompts_and_empty_prompts(make_model: MakeModel, tokenizer: PreTrainedTokenizerBase) -> None:
    engine = TransformersEngine(make_model(), tokenizer)
    assert generate(engine, []) == []
    with pytest.raises(ValueError, match="prompt 1 is empty"):
        generate(engine, [[3, 4], []])


# --- endings ---------------------------------------------------------------------------------------------------------


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
    control = HelpControl(spelt[0], rest_ids=tuple(spelt[1:]), bias=1e4)
    ((completion,),) = generate(engine, prompts[:1], max_new_tokens=len(spelt), stop=(stop,), help=control)
    assert (completion.text, completion.finish_reason) == (f"I say: {stop}", "stop")


# --- weights ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tied", [False, True])
def test_after_sync_the_engine_is_a_fresh_one(
    make_model: MakeModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[list[int]],
    dtype: torch.dtype,
    tied: bool,
) -> None:
    model = make_model(seed=10, tie_word_embeddings=tied)
    engine = TransformersEngine(model, tokenizer, dtype=dtype)
    before = generate(engine, prompts, 2, seed=1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(3):
        (batch,) = packed_batches([Example(p, (5, 6, 7), 1.0) for p in prompts], 4096, torch.device("cpu"))
        (-response_logprobs(model, batch).mean()).backward()
        optimizer.step()
        optimizer.zero_grad()
        engine.sync(model.state_dict())
    after = generate(engine, prompts, 2, seed=1)
    assert after != before
    assert after == generate(TransformersEngine(model, tokenizer, dtype=dtype), prompts, 2, seed=1)
    assert next(engine.model.parameters()).dtype == dtype
    assert all(p.requires_grad for p in model.parameters()), "the trainer's parameters stay trainable"
    embedding, head = engine.model.get_input_embeddings().weight, engine.model.get_output_embeddings().weight
    assert (embedding.data_ptr() == head.data_ptr()) == tied


def test_sync_takes_the_weights_of_another_model(
    make_model: MakeModel, tokenizer: PreTrainedTokenizerBase, prompts: list[list[int]]
) -> None:
    one, other = make_model(seed=11), make_model(seed=12)
    engine = TransformersEngine(one, tokenizer)
    engine.sync(copy.deepcopy(other).state_dict())
    assert generate(engine, prompts, 2) == generate(TransformersEngine(other, tokenizer), prompts, 2)
    assert generate(engine, prompts, 2) != generate(TransformersEngine(one, tokenizer), prompts, 2)


def test_training_goes_on_after_a_rollout(
    make_model: MakeModel, tokenizer: PreTrainedTokenizerBase, prompts: list[list[int]]
) -> None:
    """Shared tensors must not become inference tensors; and a stream left half read does no harm."""
    model = make_model(seed=13)
    engine = TransformersEngine(model, tokenizer)
    next(engine.generate(prompts, 2, Sampling(8)))
    assert torch.is_grad_enabled()
    assert not torch.is_inference_mode_enabled()
    (batch,) = packed_batches([Example(p, (5, 6), 1.0) for p in prompts], 4096, torch.device("cpu"))
    response_logprobs(model, batch).sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    assert model.training
    engine.close()
    engine.close()


# --- steering the help phrase ----------------------------------------------------------------------------------------


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
    held = [c for cs in generate(engine, prompts, 10, **settings, help=HelpControl(token, bias=-math.inf)) for c in cs]
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
    control = HelpControl(token, bias=1e4)
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
        engine, prompts[:1], 4000, max_new_tokens=1, temperature=temperature, help=HelpControl(token, bias=bias)
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
    control = HelpControl(11, prefix, rest_ids=(12, 5, 13), bias=1e4)
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


def test_a_phrase_that_begins_by_itself_is_finished(
    make_model: MakeModel, tokenizer: PreTrainedTokenizerBase, prompts: list[list[int]]
) -> None:
    model = make_model(seed=15, vocab_size=14, initializer_range=0.1, eos_token_id=1)
    control = HelpControl(11, rest_ids=(12, 5), bias=0.0)
    few = [[t % 14 for t in p] for p in prompts]
    found = [
        c for cs in generate(TransformersEngine(model, tokenizer), few, 6, max_new_tokens=30, help=control) for c in cs
    ]
    begun = 0
    for c in found:
        for t, token in enumerate(c.token_ids[:-2]):
            if token == 11:
                begun += 1
                assert c.token_ids[t : t + 3] == (11, 12, 5)
    assert begun > 20


@pytest.mark.parametrize("prefix", [(), (9,)])
def test_margins_are_those_of_the_plain_model(
    make_model: MakeModel, tokenizer: PreTrainedTokenizerBase, prompts: list[list[int]], prefix: tuple[int, ...]
) -> None:
    """max over positions of (help logit - best other logit), at positions where the phrase could begin."""
    model = make_model(seed=16, vocab_size=14, initializer_range=0.3, eos_token_id=1)
    few = [[t % 14 for t in p] for p in prompts]
    control = HelpControl(11, prefix, bias=-math.inf)
    found = generate(TransformersEngine(model, tokenizer), few, temperature=0.0, max_new_tokens=12, help=control)
    finite = 0
    for prompt, (c,) in zip(few, found, strict=True):
        expected = -math.inf
        for t in range(len(c.token_ids)):
            if c.token_ids[max(0, t - len(prefix)) : t] == prefix:
                logits = next_token(model, [[*prompt, *c.token_ids[:t]]])[0].log()
                others = torch.cat([logits[:11], logits[12:]])
                expected = max(expected, float(logits[11] - others.max()))
        assert c.help_margin == pytest.approx(expected, abs=1e-4)
        finite += math.isfinite(expected)
    assert finite >= 3


def test_without_control_there_is_no_margin(
    make_model: MakeModel, tokenizer: PreTrainedTokenizerBase, prompts: list[list[int]]
) -> None:
    engine = TransformersEngine(make_model(), tokenizer)
    assert all(c.help_margin is None for cs in generate(engine, prompts, 2) for c in cs)
