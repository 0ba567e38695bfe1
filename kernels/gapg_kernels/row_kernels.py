"""The launches over rows that the two GPU forwards of the fused head share: before and after their pass over [C, V].

``target_logits`` gives each row its l_y, known before any GEMM ends. ``finish_rows`` adds up what the pass left for
every (row, block of columns), in an order that does not depend on C, and has `gapg_kernels.repair` look after the rows
whose target lies so far below the rest that the odds left their range. No atomics, no host sync; the formulas stand in
`gapg_kernels.reference`.
"""

# mypy: disable-error-code="untyped-decorator"
from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from gapg_kernels.elementwise import capped
from gapg_kernels.reference import RowOdds
from gapg_kernels.repair import repair

TARGET_ROWS, TARGET_K = 8, 256
SUM_ROWS, SUM_BLOCKS = 32, 64


@triton.jit
def target_logit_kernel(
    hidden_ptr: tl.tensor,  # [C, H]
    weight_ptr: tl.tensor,  # [V, H]
    bias_ptr: tl.tensor,  # [V] or None
    target_ptr: tl.tensor,  # [C] int64
    out_ptr: tl.tensor,  # [C] float32, before the temperature; +inf: masked, NaN: target out of range
    slope_ptr: tl.tensor,  # [C] float32, or None: no softcap
    C: tl.tensor,
    V: tl.tensor,
    H: tl.tensor,
    cap: tl.tensor,  # the softcap, or None
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
    if cap is not None:
        total, slope = capped(total, cap)
        tl.store(slope_ptr + rows, slope, mask=inside)
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
    masked = logit == float("inf")
    odds = tl.where(masked, 0.0, odds)  # it is 0 but where the hidden state is NaN
    # 0 - x, as -x would be -0
    logprob = 0.0 - _log1p(odds * 288230376151711744.0)  # 2^58
    unit = tl.full((BR,), 3.469446951953614e-18, tl.float32)  # 2^-58
    tl.store(logprob_ptr + rows, logprob, mask=inside)
    tl.store(odds_ptr + rows, odds, mask=inside)
    tl.store(unit_ptr + rows, unit, mask=inside)
    if entropy_ptr is not None:
        mean = _block_sums(moment_ptr, rows, C, blocks, BR, BB) / (odds + unit)
        entropy = 0.0 - logprob - mean * 0.6931471805599453
        tl.store(entropy_ptr + rows, tl.where(masked | (entropy < 0.0), 0.0, entropy), mask=inside)


class TargetLogits(NamedTuple):
    """What is known of each row before the GEMM, [C] float32 each."""

    logit: Tensor
    """the target's logit, after the softcap and before the temperature; +inf: masked, NaN: target out of range"""
    slope: Tensor | None
    """with a softcap, its slope 1 - tanh^2 at the target"""


def target_logits(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, softcap: float | None = None
) -> TargetLogits:
    """Each row's logit of its target, and with a softcap the slope there; arguments as those of `finish_rows`."""
    (rows, width), vocab = hidden.shape, weight.shape[0]
    logit = hidden.new_empty(rows, dtype=torch.float32)
    slope = None if softcap is None else torch.empty_like(logit)
    target_logit_kernel[(triton.cdiv(rows, TARGET_ROWS),)](
        hidden, weight, bias, target, logit, slope, rows, vocab, width, softcap, TARGET_ROWS, TARGET_K
    )
    return TargetLogits(logit, slope)


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
    at: TargetLogits,
    partial: Tensor,
    moment: Tensor | None,
    softcap: float | None = None,
) -> RowOdds:
    """Log-prob, odds, unit and entropy of every row from the pass's partial sums [blocks, C], then the repair.

    Args:
        hidden: [C, H] contiguous.
        weight: [V, H] contiguous.
        bias: [V] or None.
        target: [C] int64.
        temperature: divides the logits.
        store: E [C, V], rewritten in repaired rows, or None.
        at: from ``target_logits``, with the same softcap.
        partial: [blocks, C] float32 sums of E; the repair writes to it.
        moment: [blocks, C] float32 sums of E d, or None: no entropy; the repair writes to it.
        softcap: logits become ``softcap * tanh(logit / softcap)``, before the temperature.
    """
    rows, blocks = hidden.shape[0], partial.shape[0]
    logprob, odds, unit = hidden.new_empty(3, rows, dtype=torch.float32)
    entropy = None if moment is None else torch.empty_like(logprob)
    row_sum_kernel[(triton.cdiv(rows, SUM_ROWS),)](
        partial, moment, at.logit, logprob, odds, unit, entropy, rows, blocks, SUM_ROWS, SUM_BLOCKS
    )
    result = RowOdds(logprob, odds, unit, entropy, at.logit, at.slope)
    repair(result, hidden, weight, bias, target, temperature, store, partial, moment, softcap)
    return result
