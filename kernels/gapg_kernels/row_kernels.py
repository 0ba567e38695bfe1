"""The launches over rows that the two GPU forwards of the fused head share: before and after their pass over [C, V].

``target_logits`` gives each row its l_y, known before any GEMM ends. ``finish_rows`` adds up what the pass left for
every (row, block of columns), in an order that does not depend on C, and repairs the rows whose target lies so far
below the rest that the odds left their range. No atomics, no host sync; the formulas stand in `gapg_kernels.reference`.
"""

# mypy: disable-error-code="untyped-decorator"
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from gapg_kernels.reference import RowOdds

LOG2E = 1.4426950408889634

TARGET_ROWS, TARGET_K = 8, 256
SUM_ROWS, SUM_BLOCKS = 32, 64
REPAIR_V, REPAIR_K = 64, 64


@triton.jit
def odds_of(acc: tl.tensor, logit: tl.tensor, scale: tl.tensor) -> tl.tensor:
    """E and its exponent d = log2(p_j / p_y) from logits and the target's; the subtraction first, so that an offset
    common to a row's logits costs no precision. -inf gives E = 0."""
    d = (acc - logit) * scale
    return tl.exp2(d - 58.0), d


@triton.jit
def capped(logit: tl.tensor, cap: tl.tensor) -> tl.tensor:
    """``cap * tanh(logit / cap)`` and its slope ``1 - tanh^2``; by q = e^(-2 |logit| / cap), which keeps the slope's
    digits where the cap saturates. A logit of -inf, a masked column, stays -inf and has slope 0."""
    q = tl.exp2(tl.abs(logit) / cap * -2.8853900817779268)
    r = 1.0 / (1.0 + q)
    value = tl.where(logit < 0.0, -cap, cap) * (1.0 - q) * r
    return tl.where(logit == float("-inf"), logit, value), 4.0 * q * r * r


@triton.jit
def moment_of(e: tl.tensor, d: tl.tensor) -> tl.tensor:
    """E d, summed for the entropy: 0 where E is 0, although d is -inf in masked rows."""
    return e * tl.maximum(d, -1000.0)


@triton.jit
def target_logit_kernel(
    hidden_ptr: tl.tensor,  # [C, H]
    weight_ptr: tl.tensor,  # [V, H]
    bias_ptr: tl.tensor,  # [V] or None
    target_ptr: tl.tensor,  # [C] int64
    out_ptr: tl.tensor,  # [C] float32, before the temperature; +inf: masked, NaN: target out of range
    C: tl.tensor,
    V: tl.tensor,
    H: tl.tensor,
    BR: tl.constexpr,
    BK: tl.constexpr,
) -> None:
    rows = tl.program_id(0) * BR + tl.arange(0, BR)
    inside = rows < C
    target = tl.load(target_ptr + rows, mask=inside, other=-100)
    valid = (target >= 0) & (target < V)
    y = tl.where(valid, target, 0).to(tl.int64)
    total = tl.zeros((BR,), tl.float32)
    for k in range(0, H, BK):
        cols = k + tl.arange(0, BK)
        mask = inside[:, None] & (cols < H)[None, :]
        h = tl.load(hidden_ptr + rows.to(tl.int64)[:, None] * H + cols[None, :], mask=mask, other=0.0)
        w = tl.load(weight_ptr + y[:, None] * H + cols[None, :], mask=mask, other=0.0)
        total += tl.sum(h.to(tl.float32) * w.to(tl.float32), 1)
    if bias_ptr is not None:
        total += tl.load(bias_ptr + y).to(tl.float32)
    total = tl.where(valid, total, tl.where(target == -100, float("inf"), float("nan")))
    tl.store(out_ptr + rows, total, mask=inside)


@triton.jit
def _log1p(x: tl.tensor) -> tl.tensor:
    """log(1 + x) for x >= 0 to float32 precision: the rounding of 1 + x is divided out (Kahan)."""
    u = 1.0 + x
    return tl.where(u == 1.0, x, tl.where(u == float("inf"), u, tl.log(u) * (x / (u - 1.0))))


@triton.jit
def _block_sums(
    partial_ptr: tl.tensor, rows: tl.tensor, C: tl.tensor, blocks: tl.tensor, BR: tl.constexpr, BB: tl.constexpr
) -> tl.tensor:
    """Sums [BR] of partial sums [blocks, C], BB blocks a load: one at a time would only wait on memory."""
    total = tl.zeros((BB, BR), tl.float32)
    for first in range(0, blocks, BB):
        block = first + tl.arange(0, BB)
        mask = (block < blocks)[:, None] & (rows < C)[None, :]
        total += tl.load(partial_ptr + block.to(tl.int64)[:, None] * C + rows[None, :], mask=mask, other=0.0)
    return tl.sum(total, 0)


# A C of 1, or one that 16 divides, would be compiled by itself, with another layout and so another order of the sums: a
# row's bits would depend on its batch.
@triton.jit(do_not_specialize=["C"])
def row_sum_kernel(
    partial_ptr: tl.tensor,  # [blocks, C]: sums of E
    moment_ptr: tl.tensor,  # [blocks, C]: sums of E d, or None
    logit_ptr: tl.tensor,  # [C]
    logprob_ptr: tl.tensor,  # [C]
    odds_ptr: tl.tensor,  # [C]
    unit_ptr: tl.tensor,  # [C]
    entropy_ptr: tl.tensor,  # [C], or None
    C: tl.tensor,
    blocks: tl.tensor,
    BR: tl.constexpr,
    BB: tl.constexpr,
) -> None:
    rows = tl.program_id(0) * BR + tl.arange(0, BR)
    inside = rows < C
    odds = _block_sums(partial_ptr, rows, C, blocks, BR, BB)
    logit = tl.load(logit_ptr + rows, mask=inside, other=0.0)
    odds = tl.where(logit != logit, logit, odds)  # a target out of range is NaN even where V = 1 left no other column
    # A masked row has S = 0 and log-prob 0 (0 - x, as -x would be -0).
    logprob = 0.0 - _log1p(odds * 288230376151711744.0)  # 2^58
    unit = tl.full((BR,), 3.469446951953614e-18, tl.float32)  # 2^-58
    tl.store(logprob_ptr + rows, logprob, mask=inside)
    tl.store(odds_ptr + rows, odds, mask=inside)
    tl.store(unit_ptr + rows, unit, mask=inside)
    if entropy_ptr is not None:
        mean = _block_sums(moment_ptr, rows, C, blocks, BR, BB) / (odds + unit)
        entropy = 0.0 - logprob - mean * 0.6931471805599453
        tl.store(entropy_ptr + rows, tl.where(entropy < 0.0, 0.0, entropy), mask=inside)


@triton.jit
def _row_logits(
    hidden_ptr: tl.tensor, weight_ptr: tl.tensor, bias_ptr: tl.tensor, cols: tl.tensor, V: tl.tensor, H: tl.tensor,
    BV: tl.constexpr, BK: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """One row's logits [BV] at the given columns, before the temperature; -inf beyond V."""
    inside = cols < V
    total = tl.zeros((BV,), tl.float32)
    for k in range(0, H, BK):
        ks = k + tl.arange(0, BK)
        h = tl.load(hidden_ptr + ks, mask=ks < H, other=0.0).to(tl.float32)
        mask = inside[:, None] & (ks < H)[None, :]
        w = tl.load(weight_ptr + cols.to(tl.int64)[:, None] * H + ks[None, :], mask=mask, other=0.0)
        total += tl.sum(w.to(tl.float32) * h[None, :], 1)
    if bias_ptr is not None:
        total += tl.load(bias_ptr + cols, mask=inside, other=0.0).to(tl.float32)
    return tl.where(inside, total, float("-inf"))


@triton.jit
def repair_kernel(
    hidden_ptr: tl.tensor,  # [C, H]
    weight_ptr: tl.tensor,  # [V, H]
    bias_ptr: tl.tensor,  # [V] or None
    target_ptr: tl.tensor,  # [C] int64
    logit_ptr: tl.tensor,  # [C]
    logprob_ptr: tl.tensor,  # [C]
    odds_ptr: tl.tensor,  # [C]
    unit_ptr: tl.tensor,  # [C]
    entropy_ptr: tl.tensor,  # [C], or None
    e_ptr: tl.tensor,  # [C, V] with row pitch, or None
    pitch: tl.tensor,
    V: tl.tensor,
    H: tl.tensor,
    scale: tl.tensor,
    BV: tl.constexpr,
    BK: tl.constexpr,
) -> None:
    """One program a row; a row with S < 2^60 (or NaN) is left alone, the others take b = max_j l_j - l_y."""
    row = tl.program_id(0).to(tl.int64)
    if tl.load(odds_ptr + row) >= 1152921504606846976.0:  # 2^60
        target = tl.load(target_ptr + row)
        hidden_ptr += row * H
        largest = tl.full((BV,), float("-inf"), tl.float32)
        for v in range(0, V, BV):
            cols = v + tl.arange(0, BV)
            logits = _row_logits(hidden_ptr, weight_ptr, bias_ptr, cols, V, H, BV, BK)
            largest = tl.maximum(largest, logits)
        top = tl.max(largest, 0)
        total = tl.zeros((BV,), tl.float32)
        moment = tl.zeros((BV,), tl.float32)
        for v in range(0, V, BV):
            cols = v + tl.arange(0, BV)
            logits = _row_logits(hidden_ptr, weight_ptr, bias_ptr, cols, V, H, BV, BK)
            d = (logits - top) * scale
            e = tl.where(cols == target, 0.0, tl.exp2(d))
            total += e
            moment += moment_of(e, d)
            if e_ptr is not None:
                tl.store(e_ptr + row * pitch + cols, e.to(e_ptr.dtype.element_ty), mask=cols < V)
        odds = tl.sum(total, 0)
        gap = (top - tl.load(logit_ptr + row)) * scale  # in powers of two
        unit = tl.exp2(0.0 - gap)
        log_total = tl.log2(odds + unit)
        tl.store(odds_ptr + row, odds)
        tl.store(unit_ptr + row, unit)
        tl.store(logprob_ptr + row, (gap + log_total) * -0.6931471805599453)
        if entropy_ptr is not None:  # relative to the largest logit: neither term is negative
            below = tl.where(unit > 0.0, unit * gap, 0.0) - tl.sum(moment, 0)
            tl.store(entropy_ptr + row, (log_total + below / (odds + unit)) * 0.6931471805599453)


def target_logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor) -> Tensor:
    """Each row's logit of its target before the temperature, [C] float32; +inf where masked, NaN out of range."""
    (rows, width), vocab = hidden.shape, weight.shape[0]
    logit = hidden.new_empty(rows, dtype=torch.float32)
    target_logit_kernel[(triton.cdiv(rows, TARGET_ROWS),)](
        hidden, weight, bias, target, logit, rows, vocab, width, TARGET_ROWS, TARGET_K
    )
    return logit


def new_partials(hidden: Tensor, blocks: int, entropy: bool) -> tuple[Tensor, Tensor | None]:
    """Unwritten partial sums of E and, for the entropy, of E d, each [blocks, C] float32."""
    partial = hidden.new_empty(2 if entropy else 1, blocks, hidden.shape[0], dtype=torch.float32)
    return partial[0], partial[1] if entropy else None


def finish_rows(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    temperature: float,
    store: Tensor | None,
    logit: Tensor,
    partial: Tensor,
    moment: Tensor | None,
) -> RowOdds:
    """Log-prob, odds, unit and entropy of every row from the pass's partial sums [blocks, C], then the repair.

    Args:
        hidden: [C, H] contiguous.
        weight: [V, H] contiguous.
        bias: [V] or None.
        target: [C] int64.
        temperature: divides the logits.
        store: E [C, V], rewritten in repaired rows, or None.
        logit: [C] float32, from ``target_logits``.
        partial: [blocks, C] float32 sums of E.
        moment: [blocks, C] float32 sums of E d, or None: no entropy.
    """
    (rows, width), vocab, blocks = hidden.shape, weight.shape[0], partial.shape[0]
    logprob, odds, unit = hidden.new_empty(3, rows, dtype=torch.float32)
    entropy = None if moment is None else torch.empty_like(logprob)
    row_sum_kernel[(triton.cdiv(rows, SUM_ROWS),)](
        partial, moment, logit, logprob, odds, unit, entropy, rows, blocks, SUM_ROWS, SUM_BLOCKS
    )
    pitch = 0 if store is None else store.stride(0)
    repair_kernel[(rows,)](
        hidden, weight, bias, target, logit, logprob, odds, unit, entropy, store, pitch, vocab, width,
        LOG2E / temperature, REPAIR_V, REPAIR_K,
    )  # fmt: skip
    return RowOdds(logprob, odds, unit, entropy, logit, None)
