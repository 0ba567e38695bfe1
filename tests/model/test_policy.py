"""Packed log-probs against plain transformers, one sequence at a time; and what may be left out of a batch."""

import copy
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    GPT2Config,
    GraniteConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Qwen2Config,
    Qwen3Config,
)

from gapg.batches.batching import Example, packed_batches
from gapg.config_sections import ModelConfig
from gapg.errors import ConfigError
from gapg.model import attention
from gapg.model.load import load_model
from gapg.model.policy import response_logprobs, response_loss
from gapg.model.route import choose_route
from gapg_kernels.policy_loss import PolicyLossOptions, group_advantages

CPU = torch.device("cpu")
VOCAB = 60


def random_examples(n: int, seed: int = 0, longest: int = 24) -> list[Example]:
    rng = random.Random(seed)

    def ids() -> list[int]:
        return [rng.randrange(3, VOCAB) for _ in range(rng.randint(1, longest))]

    return [Example(ids(), ids(), rng.uniform(-1, 1)) for _ in range(n)]


def plain_logprobs(model: PreTrainedModel, examples: list[Example], temperature: float = 1.0) -> list[torch.Tensor]:
    """log_softmax of the logits of the same weights with transformers' own eager attention, one by one."""
    plain = AutoModelForCausalLM.from_config(copy.deepcopy(model.config), attn_implementation="eager").eval()
    plain.load_state_dict(model.state_dict())
    found = []
    for e in examples:
        ids = torch.tensor([[*e.prompt_ids, *e.response_ids]])
        logp = torch.log_softmax(plain(input_ids=ids).logits[0].double() / temperature, -1)
        at = torch.arange(len(e.prompt_ids) - 1, ids.shape[1] - 1)
        found.append(logp[at, torch.tensor(e.response_ids)])
    return found


def packed_logprobs(
    model: PreTrainedModel, examples: list[Example], cap: int, temperature: float = 1.0
) -> list[torch.Tensor]:
    """Ours, back in the order of the examples (told apart by their weights, which differ)."""
    found: dict[float, torch.Tensor] = {}
    for batch in packed_batches(examples, cap, CPU):
        logprob = response_logprobs(model, batch, temperature)
        assert logprob.dtype == torch.float32
        for weight in batch.weight.unique().tolist():
            found[weight] = logprob[batch.weight == weight]
    return [found[torch.tensor(e.weight).item()] for e in examples]


@pytest.mark.parametrize("settings", [{}, {"num_key_value_heads": 1}, {"tie_word_embeddings": True}])
@pytest.mark.parametrize("cap", [48, 200, 4000])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_packed_equals_one_by_one(
    make_model: Callable[..., PreTrainedModel], settings: dict[str, object], cap: int, temperature: float
) -> None:
    model = make_model(seed=1, vocab_size=VOCAB, **settings)
    examples = random_examples(20)
    with torch.no_grad():
        ours = packed_logprobs(model, examples, cap, temperature)
        plain = plain_logprobs(model, examples, temperature)
    assert torch.cat(plain).std() > 0.3
    for a, b in zip(ours, plain, strict=True):
        torch.testing.assert_close(a.double(), b, atol=1e-5, rtol=1e-5)


def test_its_gradient_too(make_model: Callable[..., PreTrainedModel]) -> None:
    model = make_model(seed=2, vocab_size=VOCAB)
    twin = copy.deepcopy(model)
    examples = random_examples(12, seed=3)
    for batch in packed_batches(examples, 100, CPU):
        (batch.weight * response_logprobs(model, batch)).sum().backward()
    for e in examples:
        ids = torch.tensor([[*e.prompt_ids, *e.response_ids]])
        logits = twin(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0]
        at = torch.arange(len(e.prompt_ids) - 1, ids.shape[1] - 1)
        (e.weight * torch.log_softmax(logits, -1)[at, torch.tensor(e.response_ids)].sum()).backward()
    assert_same_gradient(model, twin, 1e-5)


def assert_same_gradient(a: PreTrainedModel, b: PreTrainedModel, tolerance: float) -> None:
    """Every parameter's, to a part of the largest entry of any."""
    scale = max(float(p.grad.abs().max()) for p in b.parameters() if p.grad is not None)
    assert scale > 1e-2
    for (name, p), q in zip(a.named_parameters(), b.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, atol=tolerance * scale, rtol=0, msg=lambda m, n=name: f"{n}: {m}")


def graded_batch(seed: int) -> tuple[list[Example], torch.Tensor]:
    """Responses of four groups, two of mixed and two of equal rewards, and their table."""
    rng = random.Random(seed)
    table = torch.tensor([[1.0, 0.0, 0.3, 0.0], [0.3, 0.3, 0.3, 0.3], [0.0] * 4, [1.0, 0.0, 0.5, 0.5]])
    examples = []
    for p in range(4):
        prompt = [rng.randrange(3, VOCAB) for _ in range(6)]
        for i in range(4):
            response = [rng.randrange(3, VOCAB) for _ in range(rng.randint(2, 9))]
            examples.append(Example(prompt, response, group=p, sample=i))
    return examples, table


def accumulate(model: PreTrainedModel, examples: list[Example], table: torch.Tensor, **kwargs: Any) -> None:
    for batch in packed_batches(examples, 60, CPU):
        response_loss(model, batch, table, 16, PolicyLossOptions(), **kwargs).loss.backward()


def test_leaving_out_zero_advantages_changes_no_gradient(make_model: Callable[..., PreTrainedModel]) -> None:
    model = make_model(seed=5, vocab_size=VOCAB)
    every, table = graded_batch(4)
    advantages = group_advantages(table)
    some = [e for e in every if advantages[e.group, e.sample] != 0]
    assert len(some) == 6  # four of the first, and two of the last, whose mean is one of its rewards
    twin = copy.deepcopy(model)
    accumulate(model, some, table)
    accumulate(twin, every, table)
    assert_same_gradient(model, twin, 1e-6)


@pytest.mark.parametrize("tied", [False, True])
def test_the_fused_loss_has_the_gradient_of_weighted_log_probs(tied: bool) -> None:
    """Also where the head is the embedding, whose gradient comes half in the forward call, half in backward."""
    model = tiny(Qwen2Config, tie_word_embeddings=tied)
    twin = copy.deepcopy(model)
    examples, table = graded_batch(7)
    accumulate(model, examples, table)
    advantages = group_advantages(table)
    for batch in packed_batches(examples, 60, CPU):
        weight = -advantages[batch.group, batch.sample] / 16
        (weight * response_logprobs(twin, batch)).sum().backward()
    assert_same_gradient(model, twin, 1e-5)
    assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) == tied


def test_a_frozen_head_gets_no_gradient(make_model: Callable[..., PreTrainedModel]) -> None:
    model = make_model(seed=5, vocab_size=VOCAB)
    twin = copy.deepcopy(model)
    model.get_output_embeddings().requires_grad_(False)
    examples, table = graded_batch(4)
    accumulate(model, examples, table)
    accumulate(twin, examples, table)
    assert model.get_output_embeddings().weight.grad is None
    model.get_output_embeddings().weight.grad = twin.get_output_embeddings().weight.grad
    assert_same_gradient(model, twin, 1e-6)


def test_in_bfloat16_the_heads_gradient_is_summed_unrounded(make_model: Callable[..., PreTrainedModel]) -> None:
    model = make_model(seed=6, vocab_size=VOCAB)
    twin = copy.deepcopy(model)
    examples, table = graded_batch(4)
    accumulate(model, examples, table, compute=torch.bfloat16)
    accumulate(twin, examples, table)
    got, want = (m.get_output_embeddings().weight.grad for m in (model, twin))
    assert got.dtype == torch.float32
    assert (got.bfloat16().float() != got).any()
    assert 0 < (got - want).norm() < 0.05 * want.norm()


def test_in_bfloat16_that_of_log_probs_is_not_rounded_either(
    make_model: Callable[..., PreTrainedModel],
) -> None:
    model = make_model(seed=6, vocab_size=VOCAB)
    (batch,) = packed_batches(random_examples(6), 4000, CPU)
    response_logprobs(model, batch, compute=torch.bfloat16).sum().backward()
    got = model.get_output_embeddings().weight.grad
    assert (got.bfloat16().float() != got).any()


def test_bfloat16_compute_keeps_float32_gradients(make_model: Callable[..., PreTrainedModel]) -> None:
    model = make_model(seed=6, vocab_size=VOCAB)
    (batch,) = packed_batches(random_examples(6), 4000, CPU)
    exact = response_logprobs(model, batch)
    rough = response_logprobs(model, batch, compute=torch.bfloat16)
    assert rough.dtype == torch.float32
    assert 0 < (exact - rough).abs().max() < 0.2
    rough.sum().backward()
    assert {p.grad.dtype for p in model.parameters() if p.grad is not None} == {torch.float32}


def tiny(kind: type[PreTrainedConfig], **settings: object) -> PreTrainedModel:
    attention.register()
    torch.manual_seed(0)
    size = dict(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=128,
        pad_token_id=0,
        initializer_range=0.2,
    )
    config = kind(**{**size, **settings})
    return AutoModelForCausalLM.from_config(config, attn_implementation=attention.NAME)


@pytest.mark.parametrize(
    "model",
    [
        pytest.param(lambda: tiny(Qwen2Config), id="qwen2"),
        pytest.param(lambda: tiny(Qwen3Config), id="qwen3"),
        pytest.param(
            lambda: tiny(GPT2Config, n_embd=32, n_head=2, n_layer=2, n_positions=128, bos_token_id=0, eos_token_id=1),
            id="gpt2",
        ),
        pytest.param(lambda: tiny(GraniteConfig, logits_scaling=8.0), id="granite, scaled logits"),
        pytest.param(lambda: tiny(CohereConfig, logit_scale=0.0625, eos_token_id=1), id="cohere, scaled logits"),
        pytest.param(lambda: tiny(Gemma2Config, final_logit_softcapping=3.0), id="gemma2, softcapped logits"),
    ],
)
def test_a_model_is_either_refused_or_exact(model: Callable[[], PreTrainedModel]) -> None:
    """Whatever a family does to its logits after the head: a wrong log-prob must not pass in silence."""
    policy = model().eval()
    try:
        assert choose_route(policy, True)
    except ConfigError as refusal:
        assert "\n" not in str(refusal)
        assert policy.config.model_type in str(refusal)
        return
    examples = random_examples(5)
    with torch.no_grad():
        for a, b in zip(packed_logprobs(policy, examples, 4000), plain_logprobs(policy, examples), strict=True):
            torch.testing.assert_close(a.double(), b, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("dropout", [{"resid_pdrop": 0.1}, {"attn_pdrop": 0.1}, {"embd_pdrop": 0.1}])
def test_a_model_with_dropout_is_refused_or_trained_without(
    dropout: dict[str, float], tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    """Dropout would make the trained policy another one than the one that was sampled."""
    none = {"resid_pdrop": 0.0, "attn_pdrop": 0.0, "embd_pdrop": 0.0}
    size = {"n_embd": 32, "n_head": 2, "n_layer": 2, "n_positions": 128, "bos_token_id": 0, "eos_token_id": 1}
    tiny(GPT2Config, **size, **{**none, **dropout}).save_pretrained(tmp_path)
    try:
        policy = load_model(ModelConfig(path=str(tmp_path)), tokenizer, seed=0)
        assert choose_route(policy, True)
    except ConfigError as refusal:
        assert "dropout" in str(refusal) or "pdrop" in str(refusal)
        return
    examples = random_examples(5)
    with torch.no_grad():
        for a, b in zip(packed_logprobs(policy, examples, 4000), plain_logprobs(policy, examples), strict=True):
            torch.testing.assert_close(a.double(), b, atol=1e-4, rtol=1e-4)
