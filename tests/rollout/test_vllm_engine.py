"""The real vLLM engine on a tiny random Llama, against transformers as the reference."""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from gapg_rollout.records import Completion, Engine, HelpControl, HelpSpelling, Sampling
from tests.rollout.engine_checks import check_stops_outside_thought, next_token, p_value

pytest.importorskip("vllm")
pytestmark = pytest.mark.vllm

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
VOCABULARY = 130
EOS = 1
TAGS = {120: "<think>", 121: "</think>", 122: "</answer>"}
LONG = tuple(2 + (7 * i) % 100 for i in range(300))  # more than two 128-token blocks of the cache
PROMPTS = [(5, 9, 12), (40, 41), (77, 3, 3, 8, 20), LONG]


def save_model(folder: Path, *, tied: bool = False, seed: int = 0, head_dim: int = 32) -> Any:
    """A random model, its tokenizer, and a generation_config.json that must not be obeyed."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words = {"<pad>": 0, "<eos>": EOS} | {TAGS.get(i, f"w{i}"): i for i in range(2, VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>").save_pretrained(folder)
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=head_dim, max_position_embeddings=512, tie_word_embeddings=tied,
        bos_token_id=None, eos_token_id=EOS, pad_token_id=0, initializer_range=0.2,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    model.save_pretrained(folder)
    greed = {"do_sample": True, "top_k": 5, "top_p": 0.5, "temperature": 0.3, "repetition_penalty": 1.8}
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [EOS, 4], **greed}))
    return model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("model")


@pytest.fixture(scope="module")
def model(folder: Path) -> Any:
    return save_model(folder)


@pytest.fixture(scope="module")
def start() -> Iterator[Callable[[Path], Any]]:
    from gapg_rollout.engines.vllm import VLLMEngine

    made: list[VLLMEngine] = []

    def one(folder: Path) -> VLLMEngine:
        made.append(VLLMEngine(folder, dtype="float32", max_model_len=400, max_num_seqs=128, enforce_eager=True))
        return made[-1]

    yield one
    for engine in made:
        engine.close()


@pytest.fixture(scope="module")
def engine(start: Callable[[Path], Any], folder: Path, model: Any) -> Any:
    return start(folder)


def generate(engine: Engine, prompts: Sequence[Sequence[int]], n: int, sampling: Sampling) -> list[list[Completion]]:
    found = dict(engine.generate(prompts, n, sampling))
    assert sorted(found) == list(range(len(prompts)))
    assert all(len(completions) == n for completions in found.values())
    return [found[i] for i in range(len(prompts))]


def flat(groups: list[list[Completion]]) -> list[Completion]:
    return [completion for group in groups for completion in group]


@torch.no_grad()
def logits_of(model: Any, prompt: Sequence[int], completion: Completion) -> torch.Tensor:
    """[response, V]: the logits from which each token of the response was chosen."""
    ids = torch.tensor([[*prompt, *completion.token_ids]])
    logits: torch.Tensor = model(input_ids=ids).logits[0, len(prompt) - 1 : -1]
    return logits.float()


def reference_logprobs(model: Any, prompt: Sequence[int], completion: Completion, temperature: float) -> torch.Tensor:
    logp = torch.log_softmax(logits_of(model, prompt, completion) / temperature, -1)
    return logp.gather(1, torch.tensor(completion.token_ids)[:, None]).squeeze(1)


@pytest.mark.parametrize("temperature", [1.0, 0.7, 0.0])
def test_logprobs_equal_transformers(engine: Any, model: Any, temperature: float) -> None:
    for prompt, completions in zip(
        PROMPTS, generate(engine, PROMPTS, 4, Sampling(40, temperature=temperature, seed=1)), strict=True
    ):
        for completion in completions:
            assert len(completion.logprobs) == len(completion.token_ids)
            expected = reference_logprobs(model, prompt, completion, temperature or 1.0)
            torch.testing.assert_close(torch.tensor(completion.logprobs), expected, rtol=0, atol=1e-4)
            if temperature == 0:
                assert logits_of(model, prompt, completion).argmax(-1).tolist() == list(completion.token_ids)


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_first_tokens_are_distributed_as_the_whole_softmax(engine: Any, model: Any, temperature: float) -> None:
    n = 3000
    ((*completions,),) = generate(engine, [PROMPTS[0]], n, Sampling(1, temperature=temperature, seed=7))
    counts = Counter(c.token_ids[0] for c in completions)
    chances = dict(enumerate(next_token(model, [PROMPTS[0]], temperature)[0].tolist()))
    assert sum(n * p >= 5 for p in chances.values()) > 20, "the model is too sure for this test to see a top-k"
    assert p_value(counts, chances) > 1e-3


def test_the_effective_parameters_truncate_and_penalise_nothing(engine: Any) -> None:
    engine._llm.llm_engine.add_request("probe", {"prompt_token_ids": [5]}, engine._params(Sampling(3), 0, 1))
    (state,) = engine._llm.llm_engine.engine_core.engine_core.scheduler.requests.values()
    params = state.sampling_params
    assert (params.temperature, params.top_p, params.top_k, params.min_p) == (1.0, 1.0, 0, 0.0)
    assert (params.repetition_penalty, params.presence_penalty, params.frequency_penalty) == (1.0, 0.0, 0.0)
    assert set(params.stop_token_ids) | {params.eos_token_id} == {EOS, 4}
    while engine._llm.llm_engine.has_unfinished_requests():
        engine._llm.llm_engine.step()


def test_the_end_token_is_part_of_the_response(engine: Any) -> None:
    completions = [c for group in generate(engine, PROMPTS, 64, Sampling(60, seed=3)) for c in group]
    assert {c.finish_reason for c in completions} == {"stop", "length"}
    assert {c.token_ids[-1] for c in completions if c.finish_reason == "stop"} == {EOS, 4}
    for c in completions:
        ends = [i for i, token in enumerate(c.token_ids) if token in (EOS, 4)]
        assert ends == ([len(c.token_ids) - 1] if c.finish_reason == "stop" else [])
        assert len(c.token_ids) == 60 or c.finish_reason == "stop"


def test_a_stop_string_of_two_tokens_ends_the_response_and_stays_in_it(engine: Any) -> None:
    free = generate(engine, PROMPTS, 8, Sampling(40, seed=5))
    first = next(c for c in free[1] if len(c.token_ids) > 12)
    stop = f"w{first.token_ids[9]} w{first.token_ids[10]}"
    stopped = generate(engine, PROMPTS, 8, Sampling(40, seed=5, stop=(stop,)))
    hits = 0
    for before, after in zip(flat(free), flat(stopped), strict=True):
        if stop in before.text:
            hits += 1
            assert after.finish_reason == "stop"
            assert after.text.endswith(stop) and after.text.count(stop) == 1
            assert before.token_ids[: len(after.token_ids)] == after.token_ids
            assert " ".join(f"w{i}" for i in after.token_ids) == after.text
        else:
            assert before == after
    assert hits > 0


@pytest.mark.parametrize("thinking", [False, True])
def test_a_stop_inside_a_think_block_does_not_count(engine: Any, thinking: bool) -> None:
    sampling = Sampling(60, stop=("</answer>",), seed=5, thinking=thinking)
    found = [c for cs in generate(engine, PROMPTS[:3], 150, sampling) for c in cs]
    check_stops_outside_thought(engine._tokenizer, found, {EOS, 4}, "</answer>", thinking)


def test_a_token_may_go_on_behind_a_stop_inside_a_think_block() -> None:
    """`></` is one token in many a tokenizer: vLLM cuts its own text between, and with it the start of `</think>`."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast
    from vllm import SamplingParams
    from vllm.v1.engine import EngineCoreRequest
    from vllm.v1.engine.detokenizer import IncrementalDetokenizer

    from gapg_rollout.engines.vllm import _stop_outside_thought

    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    inner.train_from_iterator(["></ " * 9], trainers.BpeTrainer(vocab_size=258, initial_alphabet=alphabet))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner)
    text = "<think> <answer> 9 </answer></think> <answer> 3 </answer> more"
    ids = tokenizer.encode(text)
    assert any("></" in tokenizer.decode([i]) for i in ids)
    params = SamplingParams(stop=["</answer>"], include_stop_str_in_output=True, skip_special_tokens=False)
    request = EngineCoreRequest("1", [ids[0]], None, params, None, 0.0, None, None, None)
    detokenizer = IncrementalDetokenizer.from_new_request(tokenizer, request)
    _stop_outside_thought(detokenizer, tokenizer, thinking=False)
    read = next(n for n, token in enumerate(ids, 1) if detokenizer.update([token], False))
    assert tokenizer.decode(ids[:read]) == text.removesuffix(" more")


def test_the_seed_decides_and_the_batch_does_not(engine: Any) -> None:
    sampling = Sampling(20, seed=11)
    all_at_once = generate(engine, PROMPTS, 6, sampling)
    assert generate(engine, PROMPTS, 6, sampling) == all_at_once
    assert generate(engine, PROMPTS, 6, Sampling(20, seed=12)) != all_at_once
    alone = generate(engine, PROMPTS[:1], 2, sampling)[0]
    assert [c.token_ids for c in alone] == [c.token_ids for c in all_at_once[0][:2]]
    assert len({c.token_ids for c in all_at_once[0]}) > 1


def test_prompts_come_as_they_end_and_leaving_early_is_harmless(engine: Any) -> None:
    order = []
    for index, completions in engine.generate(PROMPTS * 4, 2, Sampling(60, seed=2)):
        order.append((max(len(c.token_ids) for c in completions), index))
    assert [length for length, _ in order] == sorted(length for length, _ in order)
    iterator = engine.generate(PROMPTS, 8, Sampling(60, seed=2))
    next(iterator)
    with pytest.raises(RuntimeError, match="finish the previous generate"):
        next(engine.generate(PROMPTS, 1, Sampling(1)))
    iterator.close()
    assert not engine._llm.llm_engine.has_unfinished_requests()
    assert generate(engine, PROMPTS, 6, Sampling(20, seed=11)) == generate(engine, PROMPTS, 6, Sampling(20, seed=11))


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_after_a_sync_the_engine_is_like_a_fresh_one(
    start: Callable[[Path], Any], engine: Any, model: Any, tmp_path: Path, tied: bool
) -> None:
    sampling = Sampling(30, temperature=0.0)
    if tied:
        model = save_model(tmp_path / "tied", tied=True, seed=0)
        engine = start(tmp_path / "tied")
    fresh = generate(engine, PROMPTS, 1, sampling)
    other = save_model(tmp_path / "other", tied=tied, seed=1)
    engine.sync(other.state_dict())
    synced = generate(engine, PROMPTS, 1, sampling)
    for prompt, (before,), (after,) in zip(PROMPTS, fresh, synced, strict=True):
        assert before.token_ids != after.token_ids
        assert logits_of(other, prompt, after).argmax(-1).tolist() == list(after.token_ids)
        expected = reference_logprobs(other, prompt, after, 1.0)
        torch.testing.assert_close(torch.tensor(after.logprobs), expected, rtol=0, atol=1e-4)
    engine.sync(model.state_dict())
    assert generate(engine, PROMPTS, 1, sampling) == fresh
    if tied:
        with pytest.raises(ValueError, match=r"lm_head\.weight"):  # it would leave the CPU's packed head stale
            engine.sync(dict(model.named_parameters()))
        engine.close()
        engine.close()
        with pytest.raises(RuntimeError, match="was closed"):
            next(engine.generate(PROMPTS, 1, sampling))


def save_variant(folder: Path, kind: str, seed: int, **settings: Any) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    save_model(folder)
    torch.manual_seed(seed)
    config = AutoConfig.for_model(
        kind, vocab_size=VOCABULARY, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=32, max_position_embeddings=512, initializer_range=0.2, bos_token_id=None,
        eos_token_id=EOS, pad_token_id=0, **settings,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    model.save_pretrained(folder)
    return model


def test_a_tied_head_that_vllm_does_not_have_is_not_sent(start: Callable[[Path], Any], tmp_path: Path) -> None:
    """Its Gemma multiplies by the embeddings themselves."""
    model = save_variant(tmp_path, "gemma2", 0, tie_word_embeddings=True)
    other = save_variant(tmp_path / "other", "gemma2", 1, tie_word_embeddings=True)
    engine = start(tmp_path)
    assert_logprobs(engine, model)
    engine.sync(other.state_dict())
    assert_logprobs(engine, other)


def assert_logprobs(engine: Any, model: Any) -> None:
    for prompt, (c,) in zip(PROMPTS[:3], generate(engine, PROMPTS[:3], 1, Sampling(20, seed=3)), strict=True):
        torch.testing.assert_close(
            torch.tensor(c.logprobs), reference_logprobs(model, prompt, c, 1.0), rtol=0, atol=1e-4
        )


def test_the_process_groups_outlive_an_engine(engine: Any) -> None:
    assert torch.distributed.is_initialized()  # the tied engine above was closed
    assert generate(engine, PROMPTS[:1], 1, Sampling(2))


def test_a_sync_with_wrapped_names_is_refused(engine: Any, model: Any) -> None:
    wrapped = {f"module.{name}": tensor for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match="without wrappers"):
        engine.sync(wrapped)


HELP = HelpSpelling(token_id=30, prefix_ids=(29,), rest_ids=(31, 32, 33))
LONE = HelpSpelling(token_id=30, rest_ids=(31, 32, 33))


def with_bias(spelling: HelpSpelling, bias: float) -> HelpControl:
    return HelpControl((spelling,), bias)


@pytest.mark.parametrize("temperature", [0.0, 1.0, 0.7])
@pytest.mark.parametrize("control", [with_bias(HELP, 3.0), with_bias(LONE, 1.5), with_bias(LONE, -math.inf)])
def test_help_is_steered_and_logprobs_are_those_before_it(
    engine: Any, model: Any, control: HelpControl, temperature: float
) -> None:
    sampling = Sampling(40, temperature=temperature, seed=4, help=control)
    (spelling,) = control.spellings
    phrase = (*spelling.prefix_ids, spelling.token_id, *spelling.rest_ids)
    k, begun = len(spelling.prefix_ids), 0
    for prompt, completions in zip(PROMPTS, generate(engine, PROMPTS, 8, sampling), strict=True):
        for c in completions:
            expected = reference_logprobs(model, prompt, c, temperature or 1.0)
            torch.testing.assert_close(torch.tensor(c.logprobs), expected, rtol=1e-5, atol=2e-4)
            logits, margins, odds, forced = logits_of(model, prompt, c), [-math.inf], [], 0
            for t, token in enumerate(c.token_ids):
                if forced:
                    assert token == phrase[len(phrase) - forced]
                    forced -= 1
                elif t >= k and c.token_ids[t - k : t] == spelling.prefix_ids:
                    others = logits[t].clone()
                    others[spelling.token_id] = -math.inf
                    margins.append(float(logits[t, spelling.token_id] - others.max()))
                    chances = torch.softmax(logits[t].double() / (temperature or 1.0), -1)
                    odds.append(float(chances[spelling.token_id].logit()))
                    if temperature == 0:
                        assert (token == spelling.token_id) == (margins[-1] + control.bias > 0)
                    if token == spelling.token_id:
                        forced, begun = len(spelling.rest_ids), begun + 1
            assert c.help_margin == pytest.approx(max(margins), abs=2e-4)
            assert c.help_log_odds == pytest.approx(odds, abs=5e-4)
    assert begun == 0 if control.bias < 0 else begun > 0 or spelling.prefix_ids


def test_an_infinite_bias_always_calls(engine: Any) -> None:
    for completions in generate(engine, PROMPTS, 4, Sampling(4, seed=4, help=with_bias(LONE, math.inf))):
        assert {c.token_ids for c in completions} == {(30, 31, 32, 33)}


def test_help_at_a_bias_of_zero_changes_nothing_but_what_is_forced(engine: Any) -> None:
    plain = generate(engine, PROMPTS, 8, Sampling(30, seed=6))
    lone = HelpControl((HelpSpelling(30),))
    steered = generate(engine, PROMPTS, 8, Sampling(30, seed=6, help=lone))
    for a, b in zip(flat(plain), flat(steered), strict=True):
        assert a.token_ids == b.token_ids
        assert a.help_margin is None and b.help_margin is not None
        assert a.logprobs == pytest.approx(b.logprobs, abs=1e-5)


@pytest.mark.parametrize(
    ("prompts", "sampling", "message"),
    [
        ([()], Sampling(4), "prompt 0 is empty"),
        ([LONG], Sampling(200), "max_model_len of 400"),
        ([(5,)], Sampling(4, temperature=3.0), "temperatures"),
    ],
)
def test_what_cannot_be_generated_is_refused(
    engine: Any, prompts: list[tuple[int, ...]], sampling: Sampling, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        next(engine.generate(prompts, 1, sampling))


@pytest.mark.skipif(torch.cuda.is_available(), reason="a limit of the CPU kernels")
def test_small_heads_are_refused_on_the_cpu(start: Callable[[Path], Any], tmp_path: Path) -> None:
    save_model(tmp_path, head_dim=16)
    with pytest.raises(ValueError, match="choose the transformers engine"):
        start(tmp_path)


def test_more_prompts_than_vllm_reads_at_once_change_no_response(engine: Any) -> None:
    """After a part of a prompt vLLM would draw a token in vain, from a generator that no CPU's can be wound back."""
    at_once = engine._llm.llm_engine.vllm_config.scheduler_config.max_num_batched_tokens
    prompts = [tuple(2 + (7 * i * k) % 97 for i in range(300)) for k in range(1, 2 * at_once // 300)]
    sampling = Sampling(max_new_tokens=12, temperature=1.0, seed=5)
    together = generate(engine, prompts, 2, sampling)
    for k in range(0, len(prompts), 5):
        others = [PROMPTS[0]] * k
        assert generate(engine, [*others, prompts[k]], 2, sampling)[k] == together[k]
