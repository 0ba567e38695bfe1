"""Padded rows, for models whose layers carry state along a row: log-probs and gradients of one sequence at a time."""

import random
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    AutoModelForCausalLM,
    FalconH1Config,
    GraniteMoeHybridConfig,
    Lfm2Config,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen3_5TextConfig,
)

from gapg.batches.batching import Example, PackedBatch, packed_batches
from gapg.model import attention
from gapg.model.policy import response_logprobs, response_loss
from gapg.model.route import choose_route
from gapg_kernels.policy_loss import PolicyLossOptions, group_advantages

CPU = torch.device("cpu")
CAP = 60
SIZE: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_chunk_size": 8}
CONFIGS: dict[str, Callable[[], PreTrainedConfig]] = {
    "lfm2": lambda: Lfm2Config(**SIZE, layer_types=["conv", "full_attention"]),
    "qwen3.5": lambda: Qwen3_5TextConfig(
        **SIZE,
        layer_types=["linear_attention", "full_attention"],
        linear_key_head_dim=8,
        linear_value_head_dim=8,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
    ),
    "falcon-h1": lambda: FalconH1Config(**SIZE, **MAMBA, mamba_d_ssm=64, lm_head_multiplier=0.5),
    "granite-4-h": lambda: GraniteMoeHybridConfig(
        **SIZE,
        **MAMBA,
        layer_types=["mamba", "attention"],
        num_local_experts=4,
        shared_intermediate_size=32,
        logits_scaling=8.0,
    ),
}


def hybrid(name: str, implementation: str = attention.NAME) -> PreTrainedModel:
    attention.register()
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(CONFIGS[name](), attn_implementation=implementation).train()


def graded() -> tuple[list[Example], torch.Tensor]:
    """Nine responses of 1 to 17 tokens to three prompts, of which none is as long as another; and their rewards."""
    draw = random.Random(5)

    def ids(n: int) -> list[int]:
        return [draw.randrange(3, 64) for _ in range(n)]

    lengths = [(2, [9, 1, 17]), (11, [3, 12, 4]), (6, [2, 14, 5])]
    found = []
    for group, (prompt, responses) in enumerate(lengths):
        prompt_ids = ids(prompt)
        for i, n in enumerate(responses):
            found.append(Example(prompt_ids, ids(n), draw.uniform(-1, 1), group=group, sample=i))
    return found, torch.tensor([[1.0, 0.0, 0.3], [0.3, 1.0, 0.0], [0.0, 0.0, 1.0]])


def own_logprobs(model: PreTrainedModel, example: Example, temperature: float = 1.0) -> torch.Tensor:
    """By the model's own logits of this sequence alone."""
    ids = torch.tensor([[*example.prompt_ids, *example.response_ids]])
    logprob = torch.log_softmax(model(input_ids=ids, use_cache=False).logits[0] / temperature, -1)
    at = torch.arange(len(example.prompt_ids) - 1, ids.shape[1] - 1)
    return logprob[at, torch.tensor(example.response_ids)]


def assert_same_gradient(a: PreTrainedModel, b: PreTrainedModel) -> None:
    """Every parameter's, and all together to a part of 1e-5."""
    off = total = 0.0
    for (name, p), q in zip(a.named_parameters(), b.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None), name
        if p.grad is not None and q.grad is not None:
            off += float((p.grad - q.grad).double().square().sum())
            total += float(q.grad.double().square().sum())
    assert total > 1e-4
    assert (off / total) ** 0.5 < 1e-5


@pytest.mark.parametrize("name", CONFIGS)
def test_the_loss_has_the_gradient_of_one_sequence_at_a_time(name: str) -> None:
    model, twin = hybrid(name), hybrid(name, "eager")
    examples, rewards = graded()
    batches = packed_batches(examples, CAP, CPU, padded=True)
    assert len(batches) > 2
    assert all(batch.input_ids.numel() <= CAP for batch in batches)
    for batch in batches:
        response_loss(model, batch, rewards, 9, PolicyLossOptions()).loss.backward()
    advantages = group_advantages(rewards)
    for e in examples:
        (-e.weight * advantages[e.group, e.sample] / 9 * own_logprobs(twin, e).sum()).backward()
    assert_same_gradient(model, twin)


@pytest.mark.parametrize("name", CONFIGS)
def test_so_have_the_log_probs(name: str) -> None:
    model, twin = hybrid(name), hybrid(name, "eager")
    examples, _ = graded()
    of = {(e.group, e.sample): e for e in examples}
    seen = 0
    for batch in packed_batches(examples, CAP, CPU, padded=True):
        logprob = response_logprobs(model, batch)
        (batch.weight * logprob).sum().backward()
        for cell in cells(batch).unique(dim=0):
            own = own_logprobs(twin, of[tuple(cell.tolist())])
            torch.testing.assert_close(logprob[(cells(batch) == cell).all(-1)], own, atol=1e-5, rtol=0)
            seen += len(own)
    assert seen == sum(len(e.response_ids) for e in examples)
    for e in examples:
        (e.weight * own_logprobs(twin, e).sum()).backward()
    assert_same_gradient(model, twin)


@pytest.mark.parametrize("name", CONFIGS)
def test_they_are_padded_because_packing_is_not_that(name: str) -> None:
    model = hybrid(name)
    assert not choose_route(hybrid(name), longest=24)  # which may exchange the attention
    examples, _ = graded()
    with torch.no_grad():
        (batch,) = packed_batches(examples, 1000, CPU)
        packed = response_logprobs(model, batch)
        own = torch.cat([own_logprobs(model, examples[3 * g + s]) for g, s in first_cells(batch)])
    assert (packed - own).abs().max() > 1e-2


def cells(batch: PackedBatch) -> torch.Tensor:
    """[R, 2]: group and sample of each response token."""
    return torch.stack([batch.group, batch.sample], -1)


def first_cells(batch: PackedBatch) -> list[tuple[int, int]]:
    """(group, sample) of each sequence, in the order of the row."""
    return list(dict.fromkeys((g, s) for g, s in cells(batch).tolist()))


@given(st.lists(st.tuples(st.integers(1, 20), st.integers(1, 20)), min_size=1, max_size=12), st.integers(40, 200))
def test_every_response_token_is_in_one_batch_under_the_cap(lengths: list[tuple[int, int]], cap: int) -> None:
    draw = random.Random(0)
    examples = [
        Example([draw.randrange(64) for _ in range(p)], [draw.randrange(64) for _ in range(r)], sample=i)
        for i, (p, r) in enumerate(lengths)
    ]
    found: Counter[tuple[int, int]] = Counter()
    for batch in packed_batches(examples, cap, CPU, padded=True):
        assert batch.padded
        assert batch.input_ids.numel() <= cap
        rows = batch.input_ids.view(-1, batch.max_length)
        used = (batch.response_index // batch.max_length).unique()
        assert len(used) == len(rows) == len(batch.sample.unique())
        for row, sample in zip(rows, batch.sample.unique_consecutive().tolist(), strict=True):
            e = examples[sample]
            assert row[: len(e)].tolist() == [*e.prompt_ids, *e.response_ids]
            target = batch.target[batch.sample == sample].tolist()
            assert target == list(e.response_ids)
            found[sample, len(target)] += 1
    assert found == Counter((i, r) for i, (_, r) in enumerate(lengths))


@pytest.mark.parametrize("name", CONFIGS)
@settings(max_examples=5)
@given(seed=st.integers(0, 2**31))
def test_what_stands_in_the_padding_changes_nothing(name: str, seed: int) -> None:
    model = hybrid(name)
    examples, _ = graded()
    batch = max(packed_batches(examples, 2 * CAP, CPU, padded=True), key=lambda b: len(padding(b)))
    at = padding(batch)
    assert len(at) > 3
    draw = torch.Generator().manual_seed(seed)
    found = []
    for ids in (torch.zeros(len(at), dtype=torch.int64), torch.randint(1, 64, (len(at),), generator=draw)):
        batch.input_ids[at] = ids
        model.zero_grad(set_to_none=True)
        logprob = response_logprobs(model, batch)
        (batch.weight * logprob).sum().backward()
        found.append([logprob.detach(), *(p.grad for p in model.parameters() if p.grad is not None)])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def padding(batch: PackedBatch) -> torch.Tensor:
    """The positions behind each row's last token, which is the one after the last that predicts."""
    position = torch.arange(batch.input_ids.numel())
    last = torch.zeros(len(position) // batch.max_length, dtype=torch.int64)
    last.scatter_reduce_(0, batch.response_index // batch.max_length, batch.response_index + 1, "amax")
    return position[position > last[position // batch.max_length]]
