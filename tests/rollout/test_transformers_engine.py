"""The in-process engine: it samples the policy itself, says so truly, and follows the trainer."""

from collections import Counter
from collections.abc import Callable, Iterator

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from gapg.batches.batching import Example, packed_batches
from gapg.model.policy import response_logprobs
from gapg_rollout.engines.transformers import TransformersEngine
from gapg_rollout.records import Completion, Sampling
from tests.rollout.engine_checks import generate, next_token, p_value

MakeModel = Callable[..., PreTrainedModel]


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
    # stop strings end rows at all lengths, and they leave the batch
    found = generate(engine, prompts, 8, temperature=temperature, max_new_tokens=30, stop=("7", "+", "1"))
    assert len({len(c.token_ids) for cs in found for c in cs}) > 10
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
