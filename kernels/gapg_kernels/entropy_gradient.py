"""The entropy's gradient on a GPU: one read and one write of a chunk's E, which becomes what the GEMMs are given.

With c = d loss / d logp, k = d loss / d H and p_j = E_j / tot a row's gradient by its logit j, not the target's, is
``-p_j (c + k (log p_j + H))``: from ``d H / d l_j = -p_j (log p_j + H)``. The formula, and what a token that is nearly
certain takes instead, are those of `reference.plain_spread_entropy`; `reference.entropy_scales` has the target's term.
"""

# mypy: disable-error-code="untyped-decorator, no-untyped-call"
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

CERTAIN = 0.75
"""`reference.CERTAIN`, which imports this file."""

BLOCK, WARPS = 2048, 8
"""Columns a program takes at a time. Not timed on a card yet."""


@triton.jit
def spread_entropy_kernel(
    e_ptr: tl.tensor,  # [C, V] with row pitch
    out_ptr: tl.tensor,  # [C, V] with row pitch, E's dtype; may be E
    c_ptr: tl.tensor,  # [C] float32
    k_ptr: tl.tensor,  # [C] float32
    total_ptr: tl.tensor,  # [C] float32: S + unit
    entropy_ptr: tl.tensor,  # [C] float32, nats
    own_ptr: tl.tensor,  # [C] float32: the target's p (log p + H)
    V: tl.tensor,
    e_pitch: tl.tensor,
    out_pitch: tl.tensor,
    CERTAIN: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """One program a row: a token that is nearly certain waits for the sum of the others."""
    row = tl.program_id(0).to(tl.int64)  # C * V passes 2^31
    e_ptr += row * e_pitch
    out_ptr += row * out_pitch
    c, k = tl.load(c_ptr + row), tl.load(k_ptr + row)
    total, entropy = tl.load(total_ptr + row), tl.load(entropy_ptr + row)
    others = tl.zeros((BLOCK,), tl.float32)
    at = tl.full((BLOCK,), -1, tl.int32)  # the column of the certain token, and its p
    largest = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, V, BLOCK):
        cols = first + tl.arange(0, BLOCK)
        p = tl.load(e_ptr + cols, mask=cols < V, other=0.0).to(tl.float32) / total
        # Bounded where E is 0, so that 0 times it is 0.
        log_p = tl.maximum(tl.log2(p), -1000.0, propagate_nan=tl.PropagateNan.ALL) * 0.6931471805599453
        moment = p * (log_p + entropy)
        certain = p > CERTAIN
        others += tl.where(certain, 0.0, moment)
        at = tl.where(certain, cols, at)
        largest = tl.where(certain, p, largest)
        tl.store(out_ptr + cols, (p * c + k * moment).to(out_ptr.dtype.element_ty), mask=(cols < V) & ~certain)
    rest = 0.0 - tl.sum(others, 0) - tl.load(own_ptr + row)  # all loads of the row are done: their sum is here
    column = tl.max(at, 0)
    if column >= 0:
        tl.store(out_ptr + column, (tl.max(largest, 0) * c + k * rest).to(out_ptr.dtype.element_ty))


def spread_entropy(e: Tensor, c: Tensor, k: Tensor, total: Tensor, entropy: Tensor, own: Tensor, out: Tensor) -> None:
    """`reference.plain_spread_entropy` by the Triton kernel, float32 inside.

    Args:
        e: [C, V] bfloat16 or float32, any row pitch; without a softcap's slope, whose factor log p_j would take in.
        c, k: [C] float32, d loss / d logp and d loss / d entropy, each over the temperature; 0 in masked rows.
        total: [C] float32, S + unit.
        entropy: [C] float32, nats.
        own: [C] float32, p_y (log p_y + H) of the target.
        out: [C, V] of E's dtype, any row pitch; may be ``e``.
    """
    rows, vocab = e.shape
    with torch.cuda.device_of(e):  # Triton launches on the current device, wherever the tensors are
        spread_entropy_kernel[(rows,)](
            e, out, c, k, total, entropy, own, vocab, e.stride(0), out.stride(0), CERTAIN, BLOCK, num_warps=WARPS
        )
