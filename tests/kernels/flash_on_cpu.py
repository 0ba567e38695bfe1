"""PyTorch's FlashAttention operators on the CPU, where they have no kernel: computed as the CUDA kernels document it.

The contract is checked too, which callers get wrong without a GPU: which tokens each entry has, types, layouts, and
what may be merged. PyTorch's own autograd, argument order and defaults stand before it, as on CUDA.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from gapg_kernels import flash


def check(q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int) -> None:
    assert q.dtype == k.dtype == v.dtype and q.dtype in (torch.bfloat16, torch.float16)
    assert q.ndim == k.ndim == v.ndim == 3 and k.shape == v.shape
    assert q.shape[2] == k.shape[2] <= 256 and q.shape[2] % 8 == 0 and q.shape[1] % k.shape[1] == 0
    assert all(x.stride(-1) == 1 for x in (q, k, v))
    for cu, tensor, longest in ((cu_q, q, max_q), (cu_k, k, max_k)):
        assert cu.dtype == torch.int32 and cu.is_contiguous()
        assert cu[0] == 0 and cu[-1] == len(tensor) and cu.diff().min() >= 0 and cu.diff().max() <= longest
    assert len(cu_q) == len(cu_k) >= 2
    if max_q == 1:  # FA2's route for decoding
        assert len(q) == len(cu_q) - 1, "an entry without a query"


def entries(cu_q: Tensor, cu_k: Tensor) -> list[tuple[slice, slice]]:
    q, k = ([slice(*pair) for pair in zip(cu[:-1].tolist(), cu[1:].tolist(), strict=True)] for cu in (cu_q, cu_k))
    return [(a, b) for a, b in zip(q, k, strict=True) if a.start < a.stop]


def scores(q: Tensor, k: Tensor, causal: bool, scale: float, left: int | None) -> Tensor:
    """[Hq, n, m] in float32; n queries are the last of m keys."""
    n, m = len(q), len(k)
    s = torch.einsum("qhd,khd->hqk", q.float(), k.float().repeat_interleave(q.shape[1] // k.shape[1], 1)) * scale
    allowed = torch.ones(n, m, dtype=torch.bool)
    if causal:
        allowed = allowed.tril(m - n)
    if left is not None:
        allowed = allowed.triu(m - n - left)
    return s.masked_fill(~allowed, -torch.inf)


def forward(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int, dropout: float, causal: bool,
    debug: bool, *, scale: float, window_size_left: int | None = None, window_size_right: int | None = None,
) -> Any:  # fmt: skip
    check(q, k, v, cu_q, cu_k, max_q, max_k)
    assert (dropout, debug, window_size_right) == (0.0, False, None if window_size_left is None else 0)
    out, lse = torch.full_like(q, torch.nan), q.new_full((q.shape[1], len(q)), torch.nan, dtype=torch.float32)
    for rows, keys in entries(cu_q, cu_k):
        s = scores(q[rows], k[keys], causal, scale, window_size_left)
        lse[:, rows] = s.logsumexp(-1)
        values = v[keys].float().repeat_interleave(q.shape[1] // v.shape[1], 1)
        out[rows] = torch.einsum("hqk,khd->qhd", s.softmax(-1), values).to(q.dtype)
    return out, lse, q.new_empty(2, dtype=torch.uint64), q.new_empty((), dtype=torch.uint64), q.new_empty(0)


def backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int,
    max_k: int, dropout: float, causal: bool, seed: Tensor, unused: Tensor, *, scale: float,
    window_size_left: int | None = None, window_size_right: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    check(q, k, v, cu_q, cu_k, max_q, max_k)
    assert (dropout, window_size_right) == (0.0, None if window_size_left is None else 0)
    assert grad.dtype == out.dtype == q.dtype and grad.shape == out.shape == q.shape
    assert grad.stride(-1) == out.stride(-1) == 1
    assert lse.shape == (q.shape[1], len(q)) and lse.dtype == torch.float32 and lse.is_contiguous()
    group = q.shape[1] // k.shape[1]
    dq, dk, dv = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    for rows, keys in entries(cu_q, cu_k):
        p = (scores(q[rows], k[keys], causal, scale, window_size_left) - lse[:, rows, None]).exp()
        wide = grad[rows].float()
        values, key = (x[keys].float().repeat_interleave(group, 1) for x in (v, k))
        centre = (wide * out[rows].float()).sum(-1).T[..., None]
        ds = p * (torch.einsum("qhd,khd->hqk", wide, values) - centre) * scale
        dq[rows] = torch.einsum("hqk,khd->qhd", ds, key).to(q.dtype)
        for whole, part in ((dk, torch.einsum("hqk,qhd->khd", ds, q[rows].float())),
                            (dv, torch.einsum("hqk,qhd->khd", p, wide))):  # fmt: skip
            whole[keys] = part.unflatten(1, (-1, group)).sum(2).to(k.dtype)
    return dq, dk, dv


@contextmanager
def kernels(forward: Any = forward, backward: Any = backward) -> Iterator[None]:
    """The two operators compute so on the CPU."""
    library = torch.library.Library("aten", "IMPL")
    library.impl("_flash_attention_forward", forward, "CPU")
    library.impl("_flash_attention_backward", backward, "CPU")
    try:
        yield
    finally:
        library._destroy()


@contextmanager
def flash_on_cpu() -> Iterator[None]:
    """And FlashAttention is there for 16 bits, as on CUDA."""
    with kernels(), mock.patch.object(flash, "has_flash", lambda device: True):
        yield
