"""A varlen FlashAttention for tests on the CPU: the contract that the CUDA kernels document, checked and computed.

It is what their callers get wrong without a GPU: which tokens each entry has, types, layouts, and what may be merged.
"""

import torch
from torch import Tensor

from gapg_kernels.equal_lengths import plain_backward, plain_forward
from gapg_kernels.flash import Lengths, Varlen


def check(q: Tensor, k: Tensor, v: Tensor, lengths: Lengths) -> None:
    assert q.dtype == k.dtype == v.dtype and q.dtype in (torch.bfloat16, torch.float16)
    assert q.ndim == k.ndim == v.ndim == 3 and k.shape == v.shape
    assert q.shape[2] == k.shape[2] <= 256 and q.shape[2] % 8 == 0 and q.shape[1] % k.shape[1] == 0
    assert all(x.stride(-1) == 1 for x in (q, k, v))
    for cu, tensor, longest in ((lengths.cu_q, q, lengths.max_q), (lengths.cu_k, k, lengths.max_k)):
        assert cu.dtype == torch.int32 and cu.is_contiguous()
        assert cu[0] == 0 and cu[-1] == len(tensor) and cu.diff().min() >= 0 and cu.diff().max() <= longest
    assert len(lengths.cu_q) == len(lengths.cu_k) >= 2
    if lengths.causal:
        assert torch.equal(lengths.cu_q, lengths.cu_k)
    if lengths.max_q == 1:  # the decoding route of flash-attn 2 and PyTorch
        assert len(q) == len(lengths.cu_q) - 1, "an entry without a query"


def entries(lengths: Lengths) -> list[tuple[slice, slice]]:
    q, k = ([slice(*pair) for pair in zip(cu[:-1].tolist(), cu[1:].tolist(), strict=True)] for cu in lengths[:2])
    return [(a, b) for a, b in zip(q, k, strict=True) if a.start < a.stop]


def batch(x: Tensor, rows: slice) -> Tensor:
    return x[rows].transpose(0, 1)[None]


def forward(q: Tensor, k: Tensor, v: Tensor, lengths: Lengths, scale: float) -> tuple[Tensor, Tensor]:
    check(q, k, v, lengths)
    out, lse = torch.full_like(q, torch.nan), q.new_full((q.shape[1], len(q)), torch.nan, dtype=torch.float32)
    for rows, keys in entries(lengths):
        piece, piece_lse = plain_forward(batch(q, rows), batch(k, keys), batch(v, keys), lengths.causal, scale)
        out[rows], lse[:, rows] = piece[0].transpose(0, 1), piece_lse[0]
    return out, lse


def backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, lengths: Lengths, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    check(q, k, v, lengths)
    assert grad.dtype == out.dtype == q.dtype and grad.shape == out.shape == q.shape
    assert grad.stride(-1) == out.stride(-1) == 1
    assert lse.shape == (q.shape[1], len(q)) and lse.dtype == torch.float32 and lse.is_contiguous()
    dq, dk, dv = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    for rows, keys in entries(lengths):
        inputs = [batch(x, at) for x, at in ((grad, rows), (q, rows), (k, keys), (v, keys), (out, rows))]
        parts = plain_backward(*inputs, lse[None, :, rows], lengths.causal, scale)
        for whole, part in zip((dq[rows], dk[keys], dv[keys]), parts, strict=True):
            whole.copy_(part[0].transpose(0, 1))
    return dq, dk, dv


FLASH_ON_CPU = Varlen("flash on the CPU", lambda capability, head_dim: True, forward, backward)
