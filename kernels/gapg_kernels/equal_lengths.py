"""Attention of packed sequences without a varlen kernel: those of equal length lie together as one batch.

    layout = plan(tuple(cu_seqlens.tolist()), tokens, device)
    for q, k, v in zip(layout.split(q), layout.split(k), layout.split(v)):
        out, lse = forward(q, k, v, causal, scale)

On the CPU `forward` and `backward` are PyTorch's FlashAttention for CPUs, which groups heads, takes every head size and
returns the log-sum-exp; elsewhere they are plain PyTorch, right for every type and device. Within a sliding window
there is `banded`, a call for each sequence: those that a window cuts are long, and seldom of equal length.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from gapg_kernels.chunks import sum_dtype

_aten = torch.ops.aten


class Plan(NamedTuple):
    """Packed tokens sorted by their sequence's length, so that equal lengths lie together as one batch."""

    order: Tensor
    """[T] where the sorted tokens come from"""
    inverse: Tensor
    """[T] where the packed tokens went"""
    groups: tuple[tuple[int, int], ...]
    """(sequences, their length), in sorted order"""

    def split(self, x: Tensor) -> list[Tensor]:
        """[T, H, D] as one [sequences, H, length, D] view per group, of a sorted copy."""
        return [
            piece.unflatten(0, group).transpose(1, 2)
            for piece, group in zip(self._pieces(x.index_select(0, self.order)), self.groups, strict=True)
        ]

    def join(self, pieces: Sequence[Tensor]) -> Tensor:
        """Undoes split, and the sorting: [T, H, D], contiguous."""
        flat = [piece.transpose(1, 2).reshape(-1, piece.shape[1], piece.shape[3]) for piece in pieces]
        return torch.cat(flat).index_select(0, self.inverse)

    def split_lse(self, lse: Tensor) -> list[Tensor]:
        """[H, T] as one [sequences, H, length] view per group."""
        return [
            piece.unflatten(0, group).transpose(1, 2)
            for piece, group in zip(self._pieces(lse.T.index_select(0, self.order)), self.groups, strict=True)
        ]

    def join_lse(self, pieces: Sequence[Tensor]) -> Tensor:
        """Undoes split_lse: [H, T], contiguous."""
        flat = [piece.transpose(0, 1).flatten(1) for piece in pieces]
        return torch.cat(flat, dim=1).index_select(1, self.inverse)

    def _pieces(self, x: Tensor) -> tuple[Tensor, ...]:
        # Split, never slice: autograd's backward of a slice fills a whole tensor, once per slice.
        return x.split([count * length for count, length in self.groups])


@lru_cache(maxsize=64)  # keyed by the values, so every layer of a micro-batch finds it, and nothing can go stale
def plan(cu_seqlens: tuple[int, ...], tokens: int, device: torch.device) -> Plan:
    """Raises ValueError when cu_seqlens does not rise from 0 to the number of tokens."""
    lengths = torch.tensor(_checked(cu_seqlens, tokens)).diff()
    by_length = torch.argsort(lengths, stable=True)
    sorted_lengths = lengths[by_length]
    shift = torch.tensor(cu_seqlens)[by_length] - (sorted_lengths.cumsum(0) - sorted_lengths)
    order = torch.arange(tokens) + shift.repeat_interleave(sorted_lengths)
    values, counts = sorted_lengths[sorted_lengths > 0].unique_consecutive(return_counts=True)
    groups = tuple(zip(counts.tolist(), values.tolist(), strict=True)) or ((0, 1),)
    return Plan(order.to(device), torch.argsort(order).to(device), groups)


def forward(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """(q [B, Hq, Tq, D], k [B, Hkv, Tk, D], v) -> (out like q, lse [B, Hq, Tq] in float32, or float64 for float64).

    On the CPU PyTorch's FlashAttention for CPUs; elsewhere `plain_forward`, which holds [B, Hq, Tq, Tk].
    """
    if q.device.type == "cpu":
        out, lse = _aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, scale=scale)
        return out, lse
    return plain_forward(q, k, v, causal, scale)


def backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """d(q), d(k), d(v); out and lse may be merged ones, over more keys than are given here."""
    if q.device.type == "cpu":
        grads: tuple[Tensor, Tensor, Tensor] = _aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad, q, k, v, out, lse, 0.0, causal, scale=scale
        )
        return grads
    return plain_backward(grad, q, k, v, out, lse, causal, scale)


def plain_forward(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """`forward` in plain PyTorch."""
    with _no_autocast(q):
        scores = _scores(q, k, causal, scale)
        lse = scores.logsumexp(-1)
        out = (scores - lse[..., None]).exp() @ _per_query_head(v, q).to(scores.dtype)
    return out.to(q.dtype), lse


def plain_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """`backward` in plain PyTorch: with p = exp(s - lse), ds = p * (dout @ v^T - sum(dout * out)) * scale."""
    with _no_autocast(q):
        scores = _scores(q, k, causal, scale)
        p = (scores - lse[..., None]).exp()
        wide_grad, wide_v = grad.to(p.dtype), _per_query_head(v, q).to(p.dtype)
        centre = (wide_grad * out.to(p.dtype)).sum(-1, keepdim=True)
        ds = p * (wide_grad @ wide_v.mT - centre) * scale
        dq = ds @ _per_query_head(k, q).to(p.dtype)
        shape = (q.shape[0], k.shape[1], -1, *k.shape[2:])
        dk = (ds.mT @ q.to(p.dtype)).view(shape).sum(2)
        dv = (p.mT @ wide_grad).view(shape).sum(2)
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)


def banded(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Sequence[int], cu_k: Sequence[int], window: int, scale: float
) -> Tensor:
    """Causal attention within a sliding window, one sequence after the other; differentiable.

    Args:
        q: [Tq, Hq, D] packed; query i of a sequence's n sees the last `window` of its keys 0..i + m - n of m.
        k, v: [Tk, Hkv, D]; query head h reads key head h // (Hq // Hkv).
        cu_q: where each sequence's queries start, and Tq; cu_k likewise.

    Raises ValueError when one of them does not rise from 0 to the number of tokens.
    """
    counts = [[b - a for a, b in pairwise(_checked(cu, len(x)))] for cu, x in ((cu_q, q), (cu_k, k))]
    outs = [q[:0]]
    for query, key, value in zip(q.split(counts[0]), k.split(counts[1]), v.split(counts[1]), strict=True):
        last = len(key) - len(query)
        seen = torch.ones(len(query), len(key), dtype=torch.bool, device=q.device).tril(last).triu(last - window + 1)
        query, key, value = (x.transpose(0, 1)[None] for x in (query, key, value))
        out = scaled_dot_product_attention(query, key, value, seen, scale=scale, enable_gqa=q.shape[1] != k.shape[1])
        outs.append(out[0].transpose(0, 1))
    return torch.cat(outs)


def _checked(cu_seqlens: Sequence[int], tokens: int) -> Sequence[int]:
    if cu_seqlens[0] != 0 or cu_seqlens[-1] != tokens or any(b < a for a, b in pairwise(cu_seqlens)):
        raise ValueError(f"cu_seqlens must rise from 0 to the number of tokens, {tokens}: got {list(cu_seqlens)[:8]}…")
    return cu_seqlens


def _scores(q: Tensor, k: Tensor, causal: bool, scale: float) -> Tensor:
    wide = sum_dtype(q.dtype)
    scores = (q.to(wide) @ _per_query_head(k, q).to(wide).mT) * scale
    if causal:
        later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
        scores.masked_fill_(later, -torch.inf)
    return scores


def _per_query_head(x: Tensor, q: Tensor) -> Tensor:
    return x.repeat_interleave(q.shape[1] // x.shape[1], 1)


def _no_autocast(x: Tensor) -> torch.autocast:
    available = torch.amp.is_autocast_available(x.device.type)
    return torch.autocast(x.device.type if available else "cpu", enabled=False)
