"""Qwen2.5's shapes without data, what reaches the kernels, and what must hold of it whatever the update."""

from collections import defaultdict
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen2Config

from gapg.model import attention

HALF, FULL = torch.bfloat16, torch.float32
VOCAB = 151_936
SHAPES = {"0.5B": (896, 4864, 24, 14), "1.5B": (1536, 8960, 28, 12), "3B": (2048, 11_008, 36, 16)}
"""Hidden size, size within the MLP, layers, query heads; all have two key heads and tied embeddings."""


def qwen(name: str, layers: int | None = None) -> Qwen2Config:
    """The shape of that name with all its layers, or with fewer for the time of it."""
    hidden, inner, all_layers, heads = SHAPES[name]
    return Qwen2Config(
        vocab_size=VOCAB, hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers or all_layers,
        num_attention_heads=heads, num_key_value_heads=2, tie_word_embeddings=True,
    )  # fmt: skip


def fake_policy(config: Qwen2Config, checkpointing: bool = False) -> PreTrainedModel:
    """float32 weights, as load_model gives them. Call within a FakeTensorMode."""
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention.NAME, dtype=FULL)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model.train()


class Call(NamedTuple):
    """One operator that ran."""

    args: tuple[Any, ...]
    result: Any
    backward: bool
    """within autograd's backward, what checkpointing computes again included"""


class Operators(TorchDispatchMode):
    """What reaches the kernels, below autocast and autograd: every operator's arguments and result, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: dict[str, list[Call]] = defaultdict(list)
        self.order: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket._qualified_op_name.replace("::", ".")
        self.order.append(name)
        result = func(*args, **(kwargs or {}))
        self.calls[name].append(Call(args, result, torch._C._current_autograd_node() is not None))
        return result


def tensors(values: Any) -> list[torch.Tensor]:
    """All tensors in nested tuples and lists."""
    found: list[torch.Tensor] = []
    for value in values if isinstance(values, tuple | list) else [values]:
        if isinstance(value, torch.Tensor):
            found.append(value)
        elif isinstance(value, tuple | list):
            found += tensors(value)
    return found


# --- what must hold of every update ----------------------------------------------------------------------------------

MOVES = ["_to_copy", "view", "_unsafe_view", "t", "transpose", "select", "slice", "unsqueeze", "detach"]
PRODUCTS = ["mm", "addmm", "_scaled_dot_product_flash_attention_for_cpu"]  # in 16 bits under either autocast
UNLISTED = ["add", "mul", "neg", "silu", "_flash_attention_forward", "index_select"]  # they compute in what they get
EQUAL = ["cat"]  # the CPU's autocast would make different types one; here they are the same
OURS = {"gapg.linear_logprob", "gapg.fused_policy_loss", "gapg.shared_prompt_attention"}
ALIKE = {f"aten.{name}" for name in MOVES + PRODUCTS + UNLISTED + EQUAL} | OURS | {"prim.device"}
"""Operators of the forward that may see a 16-bit tensor: those that CUDA's and the CPU's autocast treat alike.

They differ in what each computes in float32 (aten/src/ATen/autocast_mode.h), which changes no float32 tensor.
"""


def check_autocast_is_cudas(operators: Operators) -> None:
    """The CPU's autocast did what CUDA's does."""
    for name, calls in operators.calls.items():
        sees_half = any(x.dtype == HALF for call in calls if not call.backward for x in tensors(call.args))
        assert not sees_half or name in ALIKE, name
    for call in operators.calls["aten.cat"]:
        assert len({x.dtype for x in tensors(call.args)}) == 1


def check_products(operators: Operators, *, padded: bool = False) -> None:
    """Every product of the body is in 16 bits, each way, and every attention of packed rows a varlen kernel."""
    for name in ("aten.mm", "aten.addmm", "aten.bmm"):
        for call in operators.calls[name]:
            assert {x.dtype for x in tensors(call.args)} == {HALF}, name
    assert padded == any("scaled_dot_product" in name for name in operators.calls)


def check_flash_forward(call: Call) -> None:
    """What the CUDA kernel demands of its arguments."""
    q, k, v, cu_q, cu_k, longest_q, longest_k, dropout, _causal, debug = call.args
    out, logsumexp, *_ = call.result
    assert {x.dtype for x in (q, k, v, out)} == {HALF} and all(x.stride(-1) == 1 for x in (q, k, v))
    assert q.shape == out.shape and k.shape == v.shape and q.shape[::2][1] == k.shape[2]
    assert (logsumexp.dtype, logsumexp.shape) == (FULL, (q.shape[1], q.shape[0])) and logsumexp.is_contiguous()
    for cu in (cu_q, cu_k):
        assert cu.dtype == torch.int32 and cu.dim() == 1 and cu.is_contiguous()
    assert cu_q.shape == cu_k.shape and min(longest_q, longest_k) > 0 and (dropout, debug) == (0.0, False)


def check_flash_backward(call: Call) -> None:
    """Likewise; the log-sum-exp's rows must be as far apart as there are queries."""
    grad, q, k, v, out, logsumexp, cu_q, cu_k, *_ = call.args
    assert {x.dtype for x in (grad, q, k, v, out, *call.result)} == {HALF}
    assert all(x.stride(-1) == 1 for x in (grad, q, k, v, out)) and grad.shape == out.shape == q.shape
    assert (logsumexp.dtype, logsumexp.shape) == (FULL, (q.shape[1], q.shape[0])) and logsumexp.is_contiguous()
    assert cu_q.dtype == cu_k.dtype == torch.int32
    assert [g.shape for g in call.result] == [q.shape, k.shape, v.shape]
