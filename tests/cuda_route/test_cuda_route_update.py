"""`policy_update` as CUDA gets it, at real sizes and without a GPU: what it computes, in which types, and how much.

The policy's tensors are fake (see test_cuda_route.py), what the host packs is real: so the update runs as it is, and
the work that the real lengths ask for is counted exactly. It runs until something needs a value that only a GPU would
know. That must be the gradient norm, behind the optimizer's step: nothing before it waits.
"""

import copy
import random
from collections import defaultdict
from collections.abc import Collection
from dataclasses import fields, replace
from typing import Any, NamedTuple

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel, Qwen2Config

from gapg.batches.batching import Example, packed_batches
from gapg.config import RunConfig, load_config
from gapg.model import lora
from gapg.model.policy import response_loss
from gapg.optim import make_optimizer
from gapg.update import policy_update, with_gradient
from gapg_kernels.policy_loss import PolicyLossOptions
from gapg_kernels.shared_prompt_attention import Pieces, varlen_backward, varlen_forward
from tests.cuda_route.real_sizes import (
    FULL,
    HALF,
    VOCAB,
    Call,
    Operators,
    check_autocast_is_cudas,
    check_flash_backward,
    check_flash_forward,
    check_products,
    fake_policy,
    qwen,
    tensors,
)

CAP = 8192
SAVINGS = ("pack", "response_positions", "skip_zero_advantage", "share_prompts")
ALONE = [(), *((name,) for name in SAVINGS[:3])]
BUT_ONE = [tuple(name for name in SAVINGS if name not in (other, "share_prompts" if other == "pack" else ""))
           for other in SAVINGS]  # fmt: skip
"""Padded rows share no prompts."""
PROMPTS = (256, 128, 512, 384, 320, 192)
MIXED = [0.0, 1.0] * 4
REWARDS = torch.tensor([MIXED, [1.0] * 8, [0.0, 1.0] + [0.5] * 6, [0.0] * 7 + [1.0], MIXED, MIXED])
TRAINED = (range(8), range(0), range(2), range(8), range(8), range(8))
"""Of each group the responses whose reward is not its mean."""


def responses() -> list[list[int]]:
    """How long each group's responses are."""
    draw = random.Random(0)
    return [[draw.randrange(64, 400) for _ in range(8)] for _ in PROMPTS]


def examples() -> list[Example]:
    return [
        Example([1] * prompt, [1] * length, group=group, sample=sample)
        for group, (prompt, lengths) in enumerate(zip(PROMPTS, responses(), strict=True))
        for sample, length in enumerate(lengths)
    ]


def settings(on: Collection[str], **overrides: str) -> RunConfig:
    switches = {f"update.{name}": str(name in on).lower() for name in SAVINGS[:3]}
    switches["update.share_prompts"] = "always" if "share_prompts" in on else "never"
    return load_config("quickstart", {"token_cap": str(CAP), "model.dtype": "bfloat16"} | switches | overrides)


class Work(NamedTuple):
    """What an update with these savings has to compute, from the lengths alone."""

    tokens: int
    rows: int
    """of the head"""
    pairs: int
    """(query, key), the masked half of a square included, as PyTorch counts them"""


def work(on: Collection[str]) -> Work:
    groups = [
        (prompt, [lengths[i] for i in (trained if "skip_zero_advantage" in on else range(8))])
        for prompt, lengths, trained in zip(PROMPTS, responses(), TRAINED, strict=True)
    ]
    tokens = rows = pairs = 0
    if "pack" not in on:
        widths = padded_to(sorted((prompt + n for prompt, lengths in groups for n in lengths), reverse=True))
        responses_only = sum(n for _, lengths in groups for n in lengths)
        return Work(
            sum(widths), responses_only if "response_positions" in on else sum(widths), sum(n**2 for n in widths)
        )
    for prompt, lengths in groups:
        if "share_prompts" in on and lengths:
            computed = prompt + sum(lengths)
            assert computed <= CAP  # so the group is in one micro-batch, and its prompt computed once
            pairs += prompt**2 + sum(n**2 for n in lengths) + prompt * sum(lengths)
            positions = computed + len(lengths) - 1  # a shared prompt's last position predicts every first token
        else:
            computed = positions = sum(prompt + n for n in lengths)
            pairs += sum((prompt + n) ** 2 for n in lengths)
        tokens += computed
        rows += sum(lengths) if "response_positions" in on else positions
    return Work(tokens, rows, pairs)


def padded_to(lengths: list[int]) -> list[int]:
    """The rows' lengths: as many of the longest as the cap lets in, each as long as the first of them."""
    if not lengths:
        return []
    fit = CAP // lengths[0]
    return [lengths[0]] * len(lengths[:fit]) + padded_to(lengths[fit:])


def layer_weights(config: Qwen2Config) -> dict[str, int]:
    """Elements of one layer's matrices."""
    hidden, inner, heads = config.hidden_size, config.intermediate_size, config.num_attention_heads
    keys = hidden // heads * config.num_key_value_heads
    attention = {"q": hidden * hidden, "k": hidden * keys, "v": hidden * keys, "o": hidden * hidden}
    return attention | {name: hidden * inner for name in ("gate", "up", "down")}


def fake_model(config: Qwen2Config, checkpointing: bool = False) -> PreTrainedModel:
    with FakeTensorMode(allow_non_fake_inputs=True):  # the batch is real
        return fake_policy(config, checkpointing)


def with_adapters(config: Qwen2Config, settings: RunConfig) -> PreTrainedModel:
    """Made on meta, since peft moves its tensors, which fake ones cannot be."""
    assert settings.model.lora
    with torch.device("meta"):
        model = fake_policy(config)
        lora.add_adapters(model, settings.model.lora, 0)
    with FakeTensorMode(allow_non_fake_inputs=True):
        made: dict[int, Any] = {id(x): torch.empty(x.shape, dtype=x.dtype) for x in model.buffers()}
        made |= {id(p): torch.nn.Parameter(torch.empty(p.shape), p.requires_grad) for p in model.parameters()}
        return copy.deepcopy(model, made)


def update(
    model: PreTrainedModel, config: RunConfig, reference: PreTrainedModel | None = None
) -> tuple[Operators, dict[str, int]]:
    """What an update of the groups above calls until it reads the gradient norm, and its flops by operator."""
    optimizer = make_optimizer(model, config.optim)
    unknown = pytest.raises(DataDependentOutputException)
    with unknown, FlopCounterMode(display=False) as counter, Operators() as operators:
        policy_update(model, optimizer, config, 0, examples(), REWARDS, reference)
    flops: dict[str, int] = defaultdict(int)
    for operator, count in counter.get_flop_counts()["Global"].items():
        flops[str(operator)] += count
    return operators, flops


def check_optimizer(operators: Operators, model: PreTrainedModel, *, padded: bool = False) -> None:
    """One step, on float32 weights, gradients and moments of every trainable parameter; then the norm is read.

    Of padded rows transformers reads, once a micro-batch, whether their positions start anew somewhere.
    """
    (step,) = operators.calls["aten._fused_adamw_"]
    shapes = [p.shape for p in model.parameters() if p.requires_grad]
    for values in step.args[:4]:
        assert [x.shape for x in values] == shapes and {x.dtype for x in values} == {FULL}
    assert operators.order[-1] == "aten._local_scalar_dense"
    waits = operators.order[operators.order.index("aten.embedding") : -1].count("aten._local_scalar_dense")
    assert bool(waits) == padded


def check_attention(operators: Operators, config: Qwen2Config, tokens: int, times: int) -> int:
    """A varlen kernel a layer and micro-batch, each way (forward `times`): the number of micro-batches."""
    layers, heads = config.num_hidden_layers, config.num_attention_heads
    forward, backward = (operators.calls[f"aten._flash_attention_{way}"] for way in ("forward", "backward"))
    assert len(forward) == times * len(backward)
    for call in forward:
        check_flash_forward(call)
        q, k, _, cu_q, cu_k, longest_q, longest_k, _, causal, _ = call.args
        assert q.shape[1:] == (heads, config.hidden_size // heads) and k.shape[1] == 2
        assert cu_q is cu_k and causal and longest_q == longest_k == int(cu_q.diff().max()) and cu_q[-1] == len(q)
    for call in backward:
        check_flash_backward(call)
    assert sum(len(call.args[1]) for call in backward) == layers * tokens
    return len(backward) // layers


def check_padded_attention(operators: Operators, config: Qwen2Config, tokens: int, times: int) -> int:
    """PyTorch's own choice of a kernel for rows, which on these tensors is the CPU's: causal, and without a mask."""
    layers, heads = config.num_hidden_layers, config.num_attention_heads
    forward, backward = (
        operators.calls[f"aten._scaled_dot_product_flash_attention_for_cpu{way}"] for way in ("", "_backward")
    )
    assert len(forward) == times * len(backward) and not operators.calls["aten._flash_attention_forward"]
    for call in forward:
        q, k, v, dropout, causal = call.args[:5]
        assert {x.dtype for x in (q, k, v)} == {HALF} and (q.shape[1], k.shape[1]) == (heads, 2)
        assert causal and not dropout and len(call.args) < 6
    assert sum(call.args[0].shape[0] * call.args[0].shape[2] for call in forward) == times * layers * tokens
    return len(backward) // layers


def check_shared_attention(operators: Operators, config: Qwen2Config, tokens: int, times: int) -> int:
    """The same where prompts are shared: an operator a layer, in which there are two kernels each way.

    Fake tensors take the operator's word for its results, so its CUDA code runs here by itself on what each was given.
    """
    layers, heads = config.num_hidden_layers, config.num_attention_heads
    forward = operators.calls["gapg.shared_prompt_attention"]
    backward = operators.calls["gapg.shared_prompt_attention_backward"]
    assert len(forward) == times * len(backward)
    assert sum(len(call.args[1]) for call in backward) == layers * tokens
    assert not operators.calls["aten._flash_attention_forward"]
    for calls, at_query, kernel in ((forward, 0, "forward"), (backward, 1, "backward")):
        check_kernel = check_flash_forward if kernel == "forward" else check_flash_backward
        for call in calls:
            q, k = call.args[at_query : at_query + 2]
            *_, cu_segments, cu_prompts, cu_responses, at, _, _, _, _ = call.args
            assert q.shape[1:] == (heads, config.hidden_size // heads) and k.shape[1:] == (2, q.shape[2])
            for cu, end in ((cu_segments, len(q)), (cu_prompts, at), (cu_responses, len(q) - at)):
                assert cu.dtype == torch.int32 and cu.is_contiguous() and cu[-1] == end
            own, cross = run_again(call, kernel == "forward").calls[f"aten._flash_attention_{kernel}"]
            for one in (own, cross):
                check_kernel(one)
            assert len(own.args[at_query]) == len(q) and len(cross.args[at_query]) == len(q) - at
            assert len(cross.args[at_query + 1]) == at
    return len(backward) // layers


def run_again(call: Call, forward: bool) -> Operators:
    """What an operator's CUDA code calls; its results must be those that its fake implementation promised."""
    count = 3 if forward else 6
    given, (*pieces, scale) = call.args[:count], call.args[count:]
    run: Any = varlen_forward if forward else varlen_backward
    with torch.no_grad(), Operators() as inner:
        results = run(*given, Pieces(*pieces), scale)
    described = [[(x.dtype, x.shape, x.is_contiguous()) for x in tensors(xs)] for xs in (results, call.result)]
    assert described[0] == described[1]
    return inner


def check(
    operators: Operators, flops: dict[str, int], config: Qwen2Config, on: Collection[str], *, again: bool = False
) -> None:
    """All of an update but the optimizer: types and shapes of what matters, and its work exactly."""
    tokens, rows, pairs = work(on)
    shared, hidden = "share_prompts" in on, config.hidden_size
    padded = "pack" not in on
    check_types = check_padded_attention if padded else check_shared_attention if shared else check_attention
    micro_batches = check_types(operators, config, tokens, 2 if again else 1)
    assert micro_batches > 1
    check_products(operators, padded=padded)
    check_autocast_is_cudas(operators)

    heads = operators.calls["gapg.fused_policy_loss"]
    assert len(heads) == micro_batches and sum(len(call.args[0]) for call in heads) == rows
    schema = torch.ops.gapg.fused_policy_loss.default._schema.arguments
    given = [dict(zip((x.name for x in schema), call.args, strict=False)) for call in heads]
    for call, named in zip(heads, given, strict=True):
        states, weight, target, main_grad = (named[x] for x in ("hidden", "weight", "target", "main_grad"))
        assert {states.dtype, call.result[4].dtype} == {HALF} and named["bias"] is None
        assert weight.shape == main_grad.shape == (VOCAB, hidden) and states.shape == (len(target), hidden)
        assert {weight.dtype, named["rewards"].dtype, main_grad.dtype} == {FULL} and target.dtype == torch.int64
        assert main_grad is given[0]["main_grad"]  # all micro-batches add to one gradient

    layer, layers = layer_weights(config), config.num_hidden_layers
    expected = 6 * layers * sum(layer.values()) * tokens
    if again:  # computed again, but for each layer's last product, which no backward needs
        expected += 2 * layers * (sum(layer.values()) - layer["down"]) * tokens
    assert flops.pop("aten.mm") + flops.pop("aten.addmm") == expected
    square = 2 * layers * hidden * pairs  # of a product: two products forward, five backward
    if padded:  # PyTorch does not count the CPU's kernel
        rows_of = operators.calls["aten._scaled_dot_product_flash_attention_for_cpu"]
        assert sum(call.args[0].shape[0] * call.args[0].shape[2] ** 2 for call in rows_of) == layers * pairs
    else:
        kernel = "gapg.shared_prompt_attention" if shared else "aten._flash_attention"
        forward, backward = (kernel, f"{kernel}_backward") if shared else (f"{kernel}_forward", f"{kernel}_backward")
        assert flops.pop(forward) == square * (4 if again else 2)
        assert flops.pop(backward) == square * 5
    assert flops.pop("gapg.fused_policy_loss") == 6 * rows * hidden * VOCAB
    assert not flops


@pytest.mark.parametrize(
    ("name", "on"),
    [
        *(("0.5B", on) for on in (*ALONE, *BUT_ONE, SAVINGS)),
        *((name, on) for name in ("1.5B", "3B") for on in ((), SAVINGS)),
    ],
    ids=lambda value: value if isinstance(value, str) else "+".join(value) or "no saving",
)
@pytest.mark.usefixtures("flash_everywhere")
def test_an_update_with_each_saving_on_and_off(name: str, on: tuple[str, ...]) -> None:
    shape = qwen(name, layers=2)
    model = fake_model(shape)
    operators, flops = update(model, settings(on))
    check(operators, flops, shape, on)
    check_optimizer(operators, model, padded="pack" not in on)


def test_each_saving_is_one() -> None:
    """So the sums above are not all alike: with it there is less to compute, alone and beside the others."""
    for name, others in zip(SAVINGS, BUT_ONE, strict=True):
        alone, none = (("pack", name), ("pack",)) if name == "share_prompts" else ((name,), ())
        for less, more in ((work(alone), work(none)), (work(SAVINGS), work(others))):
            assert all(a <= b for a, b in zip(less, more, strict=True)) and less != more, name


@pytest.mark.slow
@pytest.mark.usefixtures("flash_everywhere")
def test_an_update_of_all_layers() -> None:
    shape = qwen("3B")
    model = fake_model(shape)
    operators, flops = update(model, settings(SAVINGS))
    check(operators, flops, shape, SAVINGS)
    check_optimizer(operators, model)


@pytest.mark.parametrize("on", [SAVINGS[:3], SAVINGS], ids=["repeated prompts", "shared prompts"])
@pytest.mark.usefixtures("flash_everywhere")
def test_with_checkpointing_the_body_is_computed_again(on: tuple[str, ...]) -> None:
    shape = qwen("1.5B", layers=2)
    model = fake_model(shape, checkpointing=True)
    operators, flops = update(model, settings(on))
    check(operators, flops, shape, on, again=True)
    check_optimizer(operators, model)


@pytest.mark.usefixtures("flash_everywhere")
def test_adapters_skip_the_gradients_of_frozen_weights() -> None:
    rank, shape = 8, qwen("3B", layers=2)
    config = settings(SAVINGS, **{"model.lora.rank": str(rank)})
    model = with_adapters(shape, config)
    operators, flops = update(model, config)
    check_optimizer(operators, model)
    check_products(operators)

    tokens, rows, _ = work(SAVINGS)
    sizes = {name: (p.shape[0], p.shape[1]) for name, p in model.named_parameters() if "lora_" in name}
    assert {n for n, p in model.named_parameters() if p.requires_grad} == set(sizes) and len(sizes) == 2 * 7 * 2
    layer = layer_weights(shape)
    first_in = layer["q"] + layer["k"] + layer["v"] + 3 * rank * shape.hidden_size  # their input has no gradient
    adapters = sum(a * b for a, b in sizes.values())
    expected = (4 * 2 * sum(layer.values()) + 6 * adapters - 2 * first_in) * tokens
    assert flops["aten.mm"] + flops["aten.addmm"] == expected
    assert flops["gapg.fused_policy_loss"] == 4 * rows * shape.hidden_size * VOCAB


@pytest.mark.usefixtures("flash_everywhere")
def test_a_penalty_adds_the_references_forward() -> None:
    """It has no gradient and keeps no E; under it every response has a gradient, so none is skipped."""
    shape, on = qwen("0.5B", layers=2), tuple(name for name in SAVINGS if name != "skip_zero_advantage")
    model, reference = fake_model(shape), fake_model(shape)
    reference.requires_grad_(False)
    operators, flops = update(model, settings(SAVINGS, **{"loss.kl_coef": "0.1"}), reference)
    check_optimizer(operators, model)
    tokens, rows, pairs = work(on)
    assert flops["aten.mm"] + flops["aten.addmm"] == (6 + 2) * 2 * sum(layer_weights(shape).values()) * tokens
    assert flops["gapg.shared_prompt_attention"] == 2 * (2 * 2) * 2 * shape.hidden_size * pairs
    assert flops["gapg.linear_logprob"] == 2 * rows * shape.hidden_size * VOCAB
    assert flops["gapg.fused_policy_loss"] == 6 * rows * shape.hidden_size * VOCAB


@pytest.mark.parametrize("on", [(), SAVINGS[:3], SAVINGS], ids=lambda on: "+".join(on) or "no saving")
@pytest.mark.usefixtures("flash_everywhere")
def test_a_micro_batch_asks_its_batch_for_no_value(on: tuple[str, ...]) -> None:
    """Reading a length, say, would wait for the GPU; above, where batches are real, it would not have shown."""
    config = settings(on)
    chosen = with_gradient(config, examples(), REWARDS)
    batch, *_ = packed_batches(
        chosen, CAP, torch.device("cpu"), share="share_prompts" in on, padded="pack" not in on,
        every_position="response_positions" not in on,
    )  # fmt: skip
    with FakeTensorMode() as fakes:
        model = fake_policy(qwen("1.5B", layers=1))
        fake: dict[str, Any] = {
            f.name: fakes.from_tensor(x) for f in fields(batch) if isinstance(x := getattr(batch, f.name), torch.Tensor)
        }
        if batch.shared is not None:
            layout = (fakes.from_tensor(x) if isinstance(x, torch.Tensor) else x for x in batch.shared)
            fake["shared"] = batch.shared._make(layout)
        rewards = fakes.from_tensor(REWARDS)
        out = response_loss(model, replace(batch, **fake), rewards, 48.0, PolicyLossOptions(), compute=HALF)
        out.loss.backward()
    assert (out.logprob.dtype, out.logprob.shape) == (FULL, batch.target.shape)
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and (parameter.grad.dtype, parameter.grad.shape) == (FULL, parameter.shape), (
            name
        )
