"""FlashAttention on packed sequences, as a forward and a backward that share the log-sum-exp.

Merging two pieces of an attention by their log-sum-exp (`gapg_kernels.shared_prompt_attention`) needs both halves of a
kernel by themselves: the forward's lse, and a backward that is called with the *merged* out and lse. PyTorch has them
as aten._flash_attention_forward and _backward. It brings FlashAttention 2, and can exchange it
(`torch.nn.attention.activate_flash_attention_impl`); `activate` chooses the first that works here:

| implementation | GPU              | package                                                       |
|----------------|------------------|---------------------------------------------------------------|
| FA4            | sm_90, sm_100    | flash-attn-4; PyTorch 2.13 calls it as before 4.0.0b19        |
| FA3            | sm_90            | flash_attn_interface, built from flash-attention's hopper/    |
| FA2            | sm_80 or newer   | PyTorch                                                       |

Of the packages nothing is assumed: `activate` tries them on the GPU, and compares what they compute with FA2. FA3 and
FA4 ran nowhere yet, FA2 on the meta device only, but for its values, which the tests define on the CPU.

On CUDA the backward adds to d(q) in whatever order its blocks end, so the last bits may differ from run to run; under
torch.use_deterministic_algorithms(True) all three keep an order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.attention import (
    activate_flash_attention_impl,
    current_flash_attention_impl,
    restore_flash_attention_impl,
)

HALVES = (torch.bfloat16, torch.float16)

ROUNDING = 2e-2
"""How far two FlashAttentions may be apart in bfloat16, relatively: each is at some 4e-3 from the exact values."""

_aten = torch.ops.aten


class Lengths(NamedTuple):
    """Which keys each query sees: those of the same entry b, tokens cu_q[b]:cu_q[b + 1] and cu_k[b]:cu_k[b + 1]."""

    cu_q: Tensor
    """[B + 1] int32, contiguous"""
    cu_k: Tensor
    """[B + 1] int32, contiguous"""
    max_q: int
    """no entry has more queries; an upper bound, which sizes the launch"""
    max_k: int
    causal: bool
    """query i of n sees keys 0..i + m - n of its entry's m, so that the last sees all; else each sees all"""
    window: int | None = None
    """a causal query sees no more than so many keys, the last ones; None or 1 and more"""


@cache
def has_flash(device: torch.device) -> bool:
    """Whether a FlashAttention runs on this device at all."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)


def takes(q: Tensor) -> bool:
    """Whether FlashAttention computes with queries of this type and device."""
    return q.dtype in HALVES and has_flash(q.device)


def check_head_dim(head_dim: int) -> None:
    """Raises ValueError for a head size that no FlashAttention has."""
    if head_dim > 256 or head_dim % 8 != 0:
        raise ValueError(
            f"FlashAttention needs a head size that is a multiple of 8 and at most 256, not {head_dim}: "
            "compute in float32, which does not use it"
        )


def check_window(window: int | None) -> None:
    """Raises ValueError for a window in which a token would not see even itself."""
    if window is not None and window < 1:
        raise ValueError(f"a sliding window has at least 1 token, not {window}: pass None for attention without one")


def one_type(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What autocast does to the inputs of scaled_dot_product_attention, and not to the kernels called here.

    Raises ValueError when they are of different types even so.
    """
    kind = q.device.type
    if kind != "meta" and torch.is_autocast_enabled(kind):  # the meta device knows no autocast
        low = torch.get_autocast_dtype(kind)
        q, k, v = (x if x.dtype == torch.float64 else x.to(low) for x in (q, k, v))
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(
            f"queries are {q.dtype}, keys {k.dtype} and values {v.dtype}: run the model under torch.autocast, "
            "or load it in one type"
        )
    return q, k, v


def packed(q: Tensor, k: Tensor, v: Tensor, lengths: Lengths, scale: float) -> Tensor:
    """Attention of packed sequences; differentiable.

    Args:
        q: [Tq, Hq, D] in 16 bits, its last dimension contiguous; D a multiple of 8, at most 256.
        k, v: [Tk, Hkv, D] likewise; query head h reads key head h // (Hq // Hkv).
        lengths: on q's device.
        scale: of the scores.

    Returns:
        [Tq, Hq, D] in q's type.

    Raises:
        ValueError: a head size that no FlashAttention has.
    """
    return forward(q, k, v, lengths, scale)[0]


def forward(q: Tensor, k: Tensor, v: Tensor, lengths: Lengths, scale: float) -> tuple[Tensor, Tensor]:
    """`packed` with the log-sum-exp of each query's scores: (out [Tq, Hq, D], lse [Hq, Tq] float32, contiguous)."""
    check_head_dim(q.shape[-1])
    with _current_device(q):
        out, lse, *_ = _aten._flash_attention_forward(q, k, v, *_where(lengths), False, scale=scale, **_window(lengths))
    return out, lse


def backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, lengths: Lengths, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """d(q), d(k), d(v) in q's type; out and lse may be merged ones, over more keys than are given here.

    With p = exp(score - lse): ds = p * (dout @ v^T - sum(dout * out)) * scale.
    """
    no_dropout = q.new_empty(2, dtype=torch.uint64), q.new_empty((), dtype=torch.uint64)  # their seed, never read
    with _current_device(q):
        grads: tuple[Tensor, Tensor, Tensor] = _aten._flash_attention_backward(
            grad, q, k, v, out, lse, *_where(lengths), *no_dropout, scale=scale, **_window(lengths)
        )
    return grads


def _current_device(x: Tensor) -> AbstractContextManager[Any]:
    """FA4 asks what the current device is. What torch.compile makes sets it by itself."""
    return nullcontext() if torch.compiler.is_compiling() else torch.cuda.device_of(x)


def _where(lengths: Lengths) -> tuple[Tensor, Tensor, int, int, float, bool]:
    # With max_q = 1 and grouped heads, FA2 takes a route that has one query in every entry for granted.
    return lengths.cu_q, lengths.cu_k, max(2, lengths.max_q), lengths.max_k, 0.0, lengths.causal


def _window(lengths: Lengths) -> dict[str, int]:
    """How many keys before a query's own it sees, and how many after."""
    return {} if lengths.window is None else {"window_size_left": lengths.window - 1, "window_size_right": 0}


# --- the choice ------------------------------------------------------------------------------------------------------


def activate(device: torch.device, head_dims: Iterable[int]) -> str:
    """Gives PyTorch the first implementation of the table above that computes what FA2 does on this GPU.

    For the whole process, scaled_dot_product_attention included. One that is active already stays.

    Args:
        head_dims: the model's head sizes; it must work with all of them.

    Returns:
        One line: which is active now, and why no better one.
    """
    if active := current_flash_attention_impl():
        return f"{active}, which was active before"
    expected = {d: tuple(_trial(device, d)) for d in head_dims}
    why = list[str]()
    for name in ("FA4", "FA3"):
        try:
            activate_flash_attention_impl(name)
            _compare(expected, lambda head_dim: _trial(device, head_dim))
            return f"{name} ({'; '.join(why)})" if why else name
        except Exception as error:  # whatever a package says to a PyTorch, a compiler or a GPU that it does not fit
            if current_flash_attention_impl():
                restore_flash_attention_impl()
            why.append(f"{name}: {str(error).strip().partition(chr(10))[0] or type(error).__name__}")
    return f"PyTorch's FA2 ({'; '.join(why)})"


def _compare(expected: dict[int, tuple[Tensor, ...]], found: Callable[[int], Iterable[Tensor]]) -> None:
    for head_dim, values in expected.items():
        for want, got in zip(values, found(head_dim), strict=True):
            error = float((got.float() - want.float()).norm() / want.float().norm())
            if not error < ROUNDING:
                raise ValueError(f"with heads of {head_dim} it is {error:.0e} off what FA2 computes")


def _trial(device: torch.device, head_dim: int) -> Iterator[Tensor]:
    """Results of every way in which the kernels are called: causal or not, within a window, more keys than queries.

    The backward's lse is not its forward's, as where pieces are merged. One entry has no query.
    """
    generator = torch.Generator().manual_seed(0)
    entries = [0, 130, 130, 131, 195], [0, 200, 203, 205, 269]
    own, more = (torch.tensor(cu, dtype=torch.int32, device=device) for cu in entries)
    for lengths in (
        Lengths(own, own, 130, 130, causal=True),
        Lengths(own, more, 130, 200, causal=False),
        Lengths(own, more, 130, 200, causal=True, window=40),
    ):
        keys = int(lengths.cu_k[-1])
        shapes = ((195, 8), (keys, 2), (keys, 2), (195, 8))
        q, k, v, grad = (torch.randn(*s, head_dim, generator=generator).to(device, torch.bfloat16) for s in shapes)
        out, lse = forward(q, k, v, lengths, head_dim**-0.5)
        yield from (out, lse, *backward(grad, q, k, v, out, lse + 0.7, lengths, head_dim**-0.5))
