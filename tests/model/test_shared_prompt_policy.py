"""A policy's loss and every gradient with one prompt for all its responses, against the prompt repeated for each."""

import copy
from collections import defaultdict
from itertools import accumulate
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

from gapg.model import attention
from gapg_kernels.linear_logprob import linear_logprob
from gapg_kernels.shared_layout import Prompts, SharedPrompts, share_prompts
from gapg_kernels.shared_prompt_attention import shared_prompt_attention
from gapg_packing.pack import lay_out
from tests.model.test_attention import SHAPE, error

attention.register()

VOCAB = SHAPE["vocab_size"]
CONFIGS = {"llama": LlamaConfig(**SHAPE), "qwen2": Qwen2Config(**SHAPE), "qwen3": Qwen3Config(**SHAPE)}
GROUPS = [(9, [5, 1, 7, 5]), (1, [4, 2]), (6, [3])]


class Row(NamedTuple):
    """What a packed forward needs, and its response tokens: the position that predicts each, its id, its weight."""

    input_ids: Tensor
    position_ids: Tensor
    arguments: dict[str, Any]
    index: Tensor
    target: Tensor
    weight: Tensor


def cumulative(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *accumulate(lengths)])


def tokens() -> list[tuple[Tensor, list[Tensor], list[float]]]:
    """Each group's prompt, responses and their weights."""
    generator = torch.Generator().manual_seed(1)

    def ids(n: int) -> Tensor:
        return torch.randint(1, VOCAB, (n,), generator=generator)

    return [(ids(p), [ids(r) for r in rs], torch.randn(len(rs), generator=generator).tolist()) for p, rs in GROUPS]


def layout_of(groups: list[tuple[int, list[int]]]) -> SharedPrompts:
    prompts, responses = [p for p, _ in groups], [r for _, rs in groups for r in rs]
    return share_prompts(cumulative(prompts + responses), cumulative(prompts), cumulative([sum(r) for _, r in groups]))


def shared_row() -> Row:
    groups = tokens()
    layout = layout_of(GROUPS)
    ids, positions = [p for p, _, _ in groups], [torch.arange(len(p)) for p, _, _ in groups]
    last = (cumulative([len(p) for p, _, _ in groups])[1:] - 1).tolist()
    index, target, weight, at = [], [], [], layout.prompt_tokens
    for (prompt, responses, weights), end in zip(groups, last, strict=True):
        for response, w in zip(responses, weights, strict=True):
            ids.append(response)
            positions.append(torch.arange(len(prompt), len(prompt) + len(response)))
            index += [end, *range(at, at + len(response) - 1)]
            target.append(response)
            weight += [w] * len(response)
            at += len(response)
    return Row(
        torch.cat(ids),
        torch.cat(positions),
        attention.shared_arguments(layout),
        torch.tensor(index),
        torch.cat(target),
        torch.tensor(weight),
    )


def repeated_row() -> Row:
    sequences = [(p, r, w) for p, responses, weights in tokens() for r, w in zip(responses, weights, strict=True)]
    lengths = [len(p) + len(r) for p, r, _ in sequences]
    starts = cumulative(lengths)
    index = [
        torch.arange(start + len(p) - 1, start + len(p) + len(r) - 1)
        for start, (p, r, _) in zip(starts.tolist(), sequences, strict=False)
    ]
    return Row(
        torch.cat([x for p, r, _ in sequences for x in (p, r)]),
        torch.cat([torch.arange(n) for n in lengths]),
        attention.packed_arguments(starts.int(), max(lengths)),
        torch.cat(index),
        torch.cat([r for _, r, _ in sequences]),
        torch.cat([torch.full((len(r),), w) for _, r, w in sequences]),
    )


def build(config: PreTrainedConfig) -> PreTrainedModel:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(copy.deepcopy(config), attn_implementation=attention.NAME)
    for name, parameter in model.named_parameters():  # biases too, which start at 0; the norms' stay near 1
        torch.nn.init.normal_(parameter, mean=1.0 if "norm" in name else 0.0, std=0.15)
    return model.train()


def outcome(model: PreTrainedModel, row: Row) -> dict[str, Tensor]:
    """The log-probs, the loss, and the gradient of every parameter."""
    states = model.base_model(
        input_ids=row.input_ids[None], position_ids=row.position_ids[None], use_cache=False, **row.arguments
    ).last_hidden_state[0]
    head = model.get_output_embeddings().weight
    logprob = linear_logprob(states.index_select(0, row.index).to(head.dtype), head, row.target)
    loss = (row.weight * logprob).sum()
    model.zero_grad()
    loss.backward()
    grads = {name: p.grad.float() for name, p in model.named_parameters() if p.grad is not None}
    assert grads.keys() == dict(model.named_parameters()).keys()
    return {"logprob": logprob.detach(), "loss": loss.detach(), **grads}


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", CONFIGS)
def test_loss_and_every_gradient_are_those_of_repeated_prompts(name: str, checkpointing: bool) -> None:
    model = build(CONFIGS[name])
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    expected, got = outcome(model, repeated_row()), outcome(model, shared_row())
    assert expected["logprob"].std() > 0.3
    for what, value in expected.items():
        assert error(got[what], value) < 5e-6, what


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", CONFIGS)
def test_in_bfloat16_they_are_as_close_to_float32_as_repeated_prompts_are(name: str, checkpointing: bool) -> None:
    exact = outcome(build(CONFIGS[name]), repeated_row())
    model = build(CONFIGS[name]).to(torch.bfloat16)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    repeated, shared = outcome(model, repeated_row()), outcome(model, shared_row())
    for what in exact.keys() - {"loss"}:  # a sum of both signs, of which little is left
        assert error(shared[what], exact[what]) < 1.5 * error(repeated[what], exact[what]) + 2e-3, what


def test_under_autocast_float32_weights_keep_float32_gradients() -> None:
    exact = outcome(model := build(CONFIGS["qwen2"]), repeated_row())
    with torch.autocast("cpu", torch.bfloat16):
        repeated, shared = outcome(model, repeated_row()), outcome(model, shared_row())
    assert {p.grad.dtype for p in model.parameters() if p.grad is not None} == {torch.float32}
    for what in exact.keys() - {"loss"}:
        assert error(shared[what], exact[what]) < 1.5 * error(repeated[what], exact[what]) + 2e-3, what


def test_one_response_sees_no_other_and_no_other_prompt() -> None:
    model, row = build(CONFIGS["llama"]), shared_row()
    changed = row.input_ids.clone()
    at = sum(p for p, _ in GROUPS)
    changed[at : at + 5] = changed[at : at + 5].roll(1)  # the first response of the first prompt
    with torch.no_grad():
        before, after = (
            model.base_model(
                input_ids=ids[None], position_ids=row.position_ids[None], use_cache=False, **row.arguments
            ).last_hidden_state[0]
            for ids in (row.input_ids, changed)
        )
    moved = (before - after).abs().amax(1) > 0
    assert moved[at : at + 5].any() and not moved[:at].any() and not moved[at + 5 :].any()


def test_the_packer_lays_out_this_row() -> None:
    sequences = [
        (g, p, r, w)
        for g, (p, responses, weights) in enumerate(tokens())
        for r, w in zip(responses, weights, strict=True)
    ]
    arrays = lay_out(
        torch.cat([x for _, p, r, _ in sequences for x in (p, r)]).numpy(),
        cumulative([len(p) + len(r) for _, p, r, _ in sequences]).numpy(),
        [len(p) for _, p, _, _ in sequences],
        [w for *_, w in sequences],
        list(range(len(sequences))),
        [g for g, *_ in sequences],
    )
    row = shared_row()
    found = arrays.input_ids, arrays.position_ids, arrays.response_index, arrays.targets, arrays.coefficients
    expected = row.input_ids, row.position_ids, row.index, row.target, row.weight
    for ours, theirs in zip(expected, found, strict=True):
        assert torch.equal(ours, torch.from_numpy(theirs))
    layout, packed = (
        row.arguments["shared_prompts"],
        share_prompts(arrays.cu_seqlens, arrays.cu_prompts, arrays.cu_responses),
    )
    assert all(torch.equal(a, b) for a, b in zip(layout[:3], packed[:3], strict=True)) and layout[3:] == packed[3:]
    assert packed[4:6] == (16, arrays.max_length)


def test_an_empty_row() -> None:
    nothing = lay_out([], [0], [], [], [], [])
    layout = share_prompts(nothing.cu_seqlens, nothing.cu_prompts, nothing.cu_responses)
    assert layout[3:] == (0, 0, 0, 0, 0, 0, Prompts(()))
    q, k, v = (torch.empty(0, heads, 8, requires_grad=True) for heads in (2, 1, 1))
    shared_prompt_attention(q, k, v, layout).sum().backward()
    assert q.grad is not None and q.grad.shape == q.shape


@pytest.mark.parametrize("window", [2, 3, 9, 14])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_sliding_window_cuts_responses_and_prompts_as_if_repeated(window: int, checkpointing: bool) -> None:
    """transformers' own eager attention, a sequence at a time, is what both rows must be."""
    kinds = ["sliding_attention", "full_attention"]
    config = Qwen2Config(**SHAPE, use_sliding_window=True, sliding_window=window, layer_types=kinds)
    model = build(config)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    repeated, shared, expected = outcome(model, repeated_row()), outcome(model, shared_row()), one_by_one(config)
    unbounded = outcome(build(CONFIGS["qwen2"]), shared_row())
    assert error(unbounded["logprob"], expected["logprob"]) > 1e-3
    for what, value in expected.items():
        assert error(repeated[what], value) < 5e-6 and error(shared[what], value) < 5e-6, what


def one_by_one(config: PreTrainedConfig) -> dict[str, Tensor]:
    """`outcome` of each prompt with each response alone, by "eager"."""
    model = build(config)
    model.set_attn_implementation("eager")
    found, loss = [], torch.zeros(())
    for prompt, responses, weights in tokens():
        for response, weight in zip(responses, weights, strict=True):
            logits = model(torch.cat([prompt, response])[None], use_cache=False).logits[0, len(prompt) - 1 : -1]
            found.append(logits.log_softmax(-1).gather(1, response[:, None])[:, 0])
            loss = loss + weight * found[-1].sum()
    loss.backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"logprob": torch.cat(found).detach(), "loss": loss.detach(), **grads}


# --- what is refused -------------------------------------------------------------------------------------------------


def run(model: PreTrainedModel, row: Row, **arguments: Any) -> Tensor:
    inputs = {"input_ids": row.input_ids[None], "position_ids": row.position_ids[None], "use_cache": False}
    states: Tensor = model.base_model(**{**inputs, **row.arguments, **arguments}).last_hidden_state
    return states


def test_other_refusals_name_the_fix() -> None:
    model, row = build(CONFIGS["llama"]), shared_row()
    cu = row.arguments["shared_prompts"].cu_segments
    with pytest.raises(ValueError, match=r"pass shared_arguments\(...\) alone"):
        run(model, row, cu_seq_lens_q=cu, cu_seq_lens_k=cu, max_length_q=9, max_length_k=9)
    with pytest.raises(ValueError, match=r"pass all of packed_arguments\(...\) or shared_arguments"):
        run(model, row, shared_prompts=None)
    with pytest.raises(ValueError, match="cannot do the model's softcap"):
        run(model, row, softcap=30.0)
    with pytest.raises(ValueError, match=r"set attention_dropout=0\.0"):
        run(build(LlamaConfig(**SHAPE, attention_dropout=0.1)), row)
    with pytest.raises(ValueError, match="one row, not 2"):
        ids, positions = (x[None].expand(2, -1) for x in (row.input_ids, row.position_ids))
        run(model, row, input_ids=ids, position_ids=positions)


# --- the CUDA route at real sizes ------------------------------------------------------------------------------------


class Attentions(TorchDispatchMode):
    """The arguments of the attention operators, below autocast and autograd."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: dict[str, list[tuple[tuple[Any, ...], Any]]] = defaultdict(list)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if "attention" in (name := func.overloadpacket._qualified_op_name):
            self.calls[name].append((args, result))
        return result


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_update_at_real_sizes_under_autocast(checkpointing: bool) -> None:
    """Fake tensors under the CPU's autocast, which treats these operators as CUDA's does (tests/cuda_route)."""
    config = Qwen2Config(
        vocab_size=151_936,
        hidden_size=896,
        intermediate_size=4864,
        num_hidden_layers=4,  # of 24, for the time of it
        num_attention_heads=14,
        num_key_value_heads=2,
    )
    layout = layout_of([(1024, [256] * 8)])
    with FakeTensorMode() as mode:
        model = AutoModelForCausalLM.from_config(config, attn_implementation=attention.NAME, dtype=torch.float32)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
        on_device = layout._replace(**{x: mode.from_tensor(getattr(layout, x)) for x in layout._fields[:3]})
        ids = torch.empty(1, layout.tokens, dtype=torch.int64)
        with Attentions() as attentions:
            with torch.autocast("cpu", torch.bfloat16):
                states = model.base_model(
                    input_ids=ids, position_ids=ids, use_cache=False, **attention.shared_arguments(on_device)
                ).last_hidden_state
            states.sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in model.base_model.parameters())
    assert attentions.calls.keys() == {
        "gapg::shared_prompt_attention",
        "gapg::shared_prompt_attention_backward",
    }
    forwards, backwards = attentions.calls.values()
    assert (len(forwards), len(backwards)) == (4 * (2 if checkpointing else 1), 4)
    tokens = 1024 + 8 * 256
    for (q, k, v, *rest), (out, lse) in forwards:
        assert q.shape == out.shape == (tokens, 14, 64) and k.shape == v.shape == (tokens, 2, 64)
        assert {x.dtype for x in (q, k, v, out)} == {torch.bfloat16} and out.is_contiguous()
        assert (lse.dtype, lse.shape) == (torch.float32, (14, tokens))
        assert rest[:3] == list(on_device[:3]) and rest[3:7] == [1024, 1024, 1024, 2048]
    for (grad, q, k, v, out, lse, *_), grads in backwards:
        assert {x.dtype for x in (grad, q, k, v, out, *grads)} == {torch.bfloat16} and lse.dtype == torch.float32
        assert [g.shape for g in grads] == [q.shape, k.shape, v.shape]
