"""The Triton forward of the fused head: a GEMM whose epilogue turns logits into odds, so no [T, V] logits exist.

Four launches per chunk of C rows, without a host sync between them: the target logits (a dot product a row), the
GEMM with the odds epilogue and one partial sum per (row, vocabulary tile), the sums in tile order with the log-probs,
and the repair of rows whose target is more than about 82 nats below the rest. No atomics and a tile shape that does
not depend on C: the same row gives the same bits in any batch. The formulas stand in `gapg.kernels.definition`.

It runs on CUDA devices of compute capability 9.0 in bfloat16. Other CUDA devices, and float32, take
`definition.plain_odds` over cuBLAS.
"""

# mypy: disable-error-code="untyped-decorator"
from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from gapg.kernels.definition import RowOdds

LOG2E = 1.4426950408889634


class Tile(NamedTuple):
    """One GEMM configuration. ``split``: the epilogue takes its BN columns in this many parts (smaller E buffer)."""

    bm: int
    bn: int
    bk: int
    group: int
    warps: int
    stages: int
    split: int


TILES = {
    False: Tile(bm=128, bn=256, bk=64, group=8, warps=8, stages=4, split=1),
    True: Tile(bm=128, bn=256, bk=64, group=8, warps=8, stages=4, split=2),
}
"""The fixed table, by whether E is stored. Shared memory for sm_90 (limit 232,448 bytes) is held by the compile test.

128x256 is the largest tile whose float32 accumulator fits the registers of two warpgroups; four 48 KiB stages leave
room for half of E's tile but not for all of it, hence ``split`` with the store.
"""

TARGET_ROWS, TARGET_K = 8, 256
SUM_ROWS = 128
REPAIR_V, REPAIR_K = 64, 128


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
def _odds(
    acc: tl.tensor, base: tl.tensor, target: tl.tensor, first: tl.tensor, V: tl.tensor, scale: tl.tensor,
    BN: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """exp2(acc * scale - base), 0 at the target and beyond V: one fused multiply-add and one exp2 per element."""
    cols = first + tl.arange(0, BN)
    keep = (cols[None, :] != target[:, None]) & (cols < V)[None, :]
    return tl.where(keep, tl.exp2(acc * scale - base[:, None]), 0.0)


@triton.jit
def _add_bias(acc: tl.tensor, bias_ptr: tl.tensor, first: tl.tensor, V: tl.tensor, BN: tl.constexpr) -> tl.tensor:
    cols = first + tl.arange(0, BN)
    return acc + tl.load(bias_ptr + cols, mask=cols < V, other=0.0).to(tl.float32)[None, :]


@triton.jit
def odds_gemm_kernel(
    hidden_desc: tl.tensor_descriptor,  # [C, H] in blocks [BM, BK]
    weight_desc: tl.tensor_descriptor,  # [V, H] in blocks [BN, BK]
    e_desc: tl.tensor_descriptor,  # [C, V] in blocks [BM, BN / SPLIT], or None: forward only
    bias_ptr: tl.tensor,  # [V] or None
    target_ptr: tl.tensor,  # [C] int64
    logit_ptr: tl.tensor,  # [C] float32: the target logits
    partial_ptr: tl.tensor,  # [ceil(V / BN), C] float32: receives each tile's row sums
    C: tl.tensor,
    V: tl.tensor,
    H: tl.tensor,
    scale: tl.tensor,  # log2(e) / temperature
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GROUP: tl.constexpr,
    SPLIT: tl.constexpr,
) -> None:
    tiles_m = tl.cdiv(C, BM)
    tiles_n = tl.cdiv(V, BN)
    # Persistent: each program walks its tiles, GROUP row tiles to a column tile, so that both operands stay in L2.
    for tile in range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0)):
        first_m = tile // (GROUP * tiles_n) * GROUP
        group_m = tl.minimum(tiles_m - first_m, GROUP)
        tile_m = first_m + tile % (GROUP * tiles_n) % group_m
        tile_n = tile % (GROUP * tiles_n) // group_m
        row, col = tile_m * BM, tile_n * BN

        acc = tl.zeros((BM, BN), tl.float32)
        for k in range(0, H, BK):  # beyond H and V the descriptors read zeros
            h = hidden_desc.load([row, k])
            w = weight_desc.load([col, k])
            acc = tl.dot(h, w.T, acc)

        rows = row + tl.arange(0, BM)
        inside = rows < C
        target = tl.load(target_ptr + rows, mask=inside, other=-100).to(tl.int32)
        base = tl.load(logit_ptr + rows, mask=inside, other=float("inf")) * scale + 58.0
        if bias_ptr is not None:
            acc = _add_bias(acc, bias_ptr, col, V, BN)
        if SPLIT == 1:
            e = _odds(acc, base, target, col, V, scale, BN)
            total = tl.sum(e, 1)
            if e_desc is not None:
                e_desc.store([row, col], e.to(e_desc.dtype))
        else:
            HALF: tl.constexpr = BN // 2
            left, right = tl.split(tl.permute(tl.reshape(acc, (BM, 2, HALF)), (0, 2, 1)))
            e = _odds(left, base, target, col, V, scale, HALF)
            total = tl.sum(e, 1)
            e_desc.store([row, col], e.to(e_desc.dtype))
            e = _odds(right, base, target, col + HALF, V, scale, HALF)
            total += tl.sum(e, 1)
            e_desc.store([row, col + HALF], e.to(e_desc.dtype))
        tl.store(partial_ptr + tile_n * C + rows, total, mask=inside)


@triton.jit
def _log1p(x: tl.tensor) -> tl.tensor:
    """log(1 + x) for x >= 0 to float32 precision: the rounding of 1 + x is divided out (Kahan)."""
    u = 1.0 + x
    return tl.where(u == 1.0, x, tl.where(u == float("inf"), u, tl.log(u) * (x / (u - 1.0))))


@triton.jit
def row_sum_kernel(
    partial_ptr: tl.tensor,  # [tiles, C]
    logit_ptr: tl.tensor,  # [C]
    logprob_ptr: tl.tensor,  # [C]
    odds_ptr: tl.tensor,  # [C]
    unit_ptr: tl.tensor,  # [C]
    C: tl.tensor,
    tiles: tl.tensor,
    BR: tl.constexpr,
) -> None:
    rows = tl.program_id(0) * BR + tl.arange(0, BR)
    inside = rows < C
    odds = tl.zeros((BR,), tl.float32)
    for tile in range(0, tiles):
        odds += tl.load(partial_ptr + tile * C + rows, mask=inside, other=0.0)
    logit = tl.load(logit_ptr + rows, mask=inside, other=0.0)
    odds = tl.where(logit != logit, logit, odds)  # a target out of range is NaN even where V = 1 left no other column
    # A masked row has S = 0 and log-prob 0 (0 - x, as -x would be -0).
    logprob = 0.0 - _log1p(odds * 288230376151711744.0)  # 2^58
    tl.store(logprob_ptr + rows, logprob, mask=inside)
    tl.store(odds_ptr + rows, odds, mask=inside)
    tl.store(unit_ptr + rows, tl.full((BR,), 3.469446951953614e-18, tl.float32), mask=inside)  # 2^-58


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
        for v in range(0, V, BV):
            cols = v + tl.arange(0, BV)
            logits = _row_logits(hidden_ptr, weight_ptr, bias_ptr, cols, V, H, BV, BK)
            e = tl.where(cols == target, 0.0, tl.exp2((logits - top) * scale))
            total += e
            if e_ptr is not None:
                tl.store(e_ptr + row * pitch + cols, e.to(e_ptr.dtype.element_ty), mask=cols < V)
        odds = tl.sum(total, 0)
        gap = (top - tl.load(logit_ptr + row)) * scale  # in powers of two
        unit = tl.exp2(0.0 - gap)
        tl.store(odds_ptr + row, odds)
        tl.store(unit_ptr + row, unit)
        tl.store(logprob_ptr + row, (gap + tl.log2(odds + unit)) * -0.6931471805599453)


def fused_odds(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, temperature: float, store: Tensor | None
) -> RowOdds:
    """One chunk's forward by the Triton kernels; arguments and result as those of `definition.plain_odds`.

    Args:
        hidden: [C, H] bfloat16, contiguous, H a multiple of 8.
        weight: [V, H] bfloat16, contiguous.
        bias: [V] or None.
        target: [C] int64.
        temperature: divides the logits.
        store: [C, V] bfloat16 with a row pitch of a multiple of 8 elements, receives E. None: forward only.
    """
    (rows, width), vocab = hidden.shape, weight.shape[0]
    tile = TILES[store is not None]
    tiles = triton.cdiv(vocab, tile.bn)
    hidden, weight = _aligned(hidden), _aligned(weight)
    scale = LOG2E / temperature
    logit, logprob, odds, unit = hidden.new_empty(4, rows, dtype=torch.float32)
    partial = hidden.new_empty(tiles, rows, dtype=torch.float32)

    target_logit_kernel[(triton.cdiv(rows, TARGET_ROWS),)](
        hidden, weight, bias, target, logit, rows, vocab, width, TARGET_ROWS, TARGET_K
    )
    grid = min(_programs(hidden.device), triton.cdiv(rows, tile.bm) * tiles)
    odds_gemm_kernel[(grid,)](
        TensorDescriptor.from_tensor(hidden, [tile.bm, tile.bk]),
        TensorDescriptor.from_tensor(weight, [tile.bn, tile.bk]),
        None if store is None else TensorDescriptor.from_tensor(store, [tile.bm, tile.bn // tile.split]),
        bias, target, logit, partial, rows, vocab, width, scale,
        tile.bm, tile.bn, tile.bk, tile.group, tile.split, num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    row_sum_kernel[(triton.cdiv(rows, SUM_ROWS),)](partial, logit, logprob, odds, unit, rows, tiles, SUM_ROWS)
    pitch = 0 if store is None else store.stride(0)
    repair_kernel[(rows,)](
        hidden, weight, bias, target, logit, logprob, odds, unit, store, pitch, vocab, width, scale,
        REPAIR_V, REPAIR_K,
    )  # fmt: skip
    return RowOdds(logprob, odds, unit)


def _aligned(x: Tensor) -> Tensor:
    """``x`` itself when its address suits TMA (16 bytes), else a copy."""
    return x if x.data_ptr() % 16 == 0 else x.clone()


@functools.cache
def _programs(device: torch.device) -> int:
    if device.type == "cpu":  # the interpreter
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count
