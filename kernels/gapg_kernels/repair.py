"""Rows whose target lies so far below the rest that odds against it leave float32's range: made again, with b of
their own.

Such a row has S >= 2^60 after the forward, its target about 82 nats below the log-sum-exp, or a logit of -inf for its
target. It takes ``b = max_j l_j - l_y``, whose E lies in [0, 1]. Four launches, three where E is not stored; no host
sync, no atomics:

    which rows   their indices side by side, in order, and how many: a count on the device
    sums         a product over those rows; for each and each span of columns the largest logit m, sum e^(l - m) and
                 the entropy's sum, both referred to m
    finish       the spans brought to the row's largest logit: S, unit, log-prob, entropy
    store        the product again, E from it

The products are as large as the count says: programs with no tile leave at once, and with no such row that is all
of them. The tile depends on neither the count nor C, so a row has the same bits beside any others.
"""

# mypy: disable-error-code="untyped-decorator, no-untyped-call"
from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from gapg_kernels.elementwise import LOG2E, capped, moment_of
from gapg_kernels.reference import RowOdds


class RepairTile(NamedTuple):
    """BM rows, BN columns and BK of H that a program multiplies at a time."""

    bm: int
    bn: int
    bk: int
    warps: int
    stages: int


TILES = {torch.bfloat16: RepairTile(64, 128, 32, 8, 4), torch.float32: RepairTile(32, 64, 16, 4, 3)}
"""By the inputs' dtype; they fit every card's registers and shared memory since sm_80. Not timed on a card yet."""

PROGRAMS = 264
"""Programs that share a product's tiles, on whatever card: twice an H100's processors."""

SPANS = 64
"""Most spans that V is cut into: enough that one tile of rows keeps a card's memory busy."""

WHICH_ROWS, FINISH_ROWS = 1024, 32

LOWEST = tl.constexpr(-3.0e38)
"""Below every logit and finite, so that differences to it are numbers."""


@triton.jit
def _is_far(odds_ptr: tl.tensor, logit_ptr: tl.tensor, rows: tl.tensor, C: tl.tensor) -> tl.tensor:
    """int32, 1 where a row needs its own b: S >= 2^60, or a target of no probability; not where S is NaN otherwise."""
    odds = tl.load(odds_ptr + rows, mask=rows < C, other=0.0)
    logit = tl.load(logit_ptr + rows, mask=rows < C, other=0.0)
    return ((odds >= 1152921504606846976.0) | (logit == float("-inf"))).to(tl.int32)


@triton.jit(do_not_specialize=["C"])
def which_rows_kernel(
    odds_ptr: tl.tensor,  # [C]
    logit_ptr: tl.tensor,  # [C]
    far_ptr: tl.tensor,  # [1 + C] int32: how many rows need it, then which
    C: tl.tensor,
    BC: tl.constexpr,
) -> None:
    """Each program counts the rows before its own once more, instead of waiting for another's count."""
    first = tl.program_id(0) * BC
    before = tl.zeros((BC,), tl.int32)
    for start in range(0, first, BC):
        before += _is_far(odds_ptr, logit_ptr, start + tl.arange(0, BC), C)
    rows = first + tl.arange(0, BC)
    far = _is_far(odds_ptr, logit_ptr, rows, C)
    count = tl.sum(before, 0)
    tl.store(far_ptr + count + tl.cumsum(far, 0), rows, mask=far > 0)  # the first one's place is 1
    if first + BC >= C:
        tl.store(far_ptr, count + tl.sum(far, 0))


@triton.jit
def _logits(
    hidden_ptr: tl.tensor, weight_ptr: tl.tensor, bias_ptr: tl.tensor, rows: tl.tensor, cols: tl.tensor,
    V: tl.tensor, H: tl.tensor, cap: tl.tensor, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """Logits [BM, BN] before the temperature, -inf beyond V, and the softcap's slopes, 1 without one."""
    acc = tl.zeros((BM, BN), tl.float32)
    inside = cols < V
    for k in range(0, H, BK):
        ks = k + tl.arange(0, BK)
        h = tl.load(hidden_ptr + rows.to(tl.int64)[:, None] * H + ks[None, :], mask=(ks < H)[None, :], other=0.0)
        mask = (ks < H)[:, None] & inside[None, :]
        w = tl.load(weight_ptr + cols.to(tl.int64)[None, :] * H + ks[:, None], mask=mask, other=0.0)
        acc = tl.dot(h, w, acc, input_precision="ieee")
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + cols, mask=inside, other=0.0).to(tl.float32)[None, :]
    slope = 1.0
    if cap is not None:
        acc, slope = capped(acc, cap)
    return tl.where(inside[None, :], acc, float("-inf")), slope


@triton.jit
def _tile_of(unit: tl.tensor, far_ptr: tl.tensor, count: tl.tensor, BM: tl.constexpr) -> tl.tensor:
    """A unit's span, its places among the rows to repair and those rows. Units of one span follow each other, so that
    programs side by side read the same of the weight."""
    tiles = tl.cdiv(count, BM)
    places = unit % tiles * BM + tl.arange(0, BM)
    return unit // tiles, places, tl.load(far_ptr + 1 + places, mask=places < count, other=0)


@triton.jit(do_not_specialize=["C"])
def repair_sums_kernel(
    hidden_ptr: tl.tensor,  # [C, H]
    weight_ptr: tl.tensor,  # [V, H]
    bias_ptr: tl.tensor,  # [V] or None
    far_ptr: tl.tensor,  # [1 + C] int32
    largest_ptr: tl.tensor,  # [spans, C]: receives each span's largest logit m, by the row's place in far
    partial_ptr: tl.tensor,  # [spans, C]: the same for sum E, E = e^((l - m) / temperature)
    moment_ptr: tl.tensor,  # [spans, C]: the same for sum E log2(E), or None: no entropy
    C: tl.tensor,
    V: tl.tensor,
    H: tl.tensor,
    spans: tl.tensor,
    width: tl.tensor,  # columns of a span, a multiple of BN
    scale: tl.tensor,  # log2(e) / temperature
    cap: tl.tensor,  # the softcap, or None
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
) -> None:
    count = tl.load(far_ptr)
    for unit in range(tl.program_id(0), tl.cdiv(count, BM) * spans, tl.num_programs(0)):
        span, places, rows = _tile_of(unit, far_ptr, count, BM)
        largest = tl.full((BM,), LOWEST, tl.float32)
        total = tl.zeros((BM,), tl.float32)
        moment = tl.zeros((BM,), tl.float32)
        for first in range(span * width, tl.minimum(V, (span + 1) * width), BN):
            cols = first + tl.arange(0, BN)
            x, _ = _logits(hidden_ptr, weight_ptr, bias_ptr, rows, cols, V, H, cap, BM, BN, BK)
            top = tl.maximum(largest, tl.max(x, 1))
            down = tl.maximum((largest - top) * scale, -1000.0)
            d = (x - top[:, None]) * scale
            e = tl.exp2(d)  # the target's too: under 2^-118 of the sum, or 0
            moment = (moment + down * total) * tl.exp2(down) + tl.sum(moment_of(e, d), 1)
            total = total * tl.exp2(down) + tl.sum(e, 1)
            largest = top
        at = span.to(tl.int64) * C + places
        tl.store(largest_ptr + at, largest, mask=places < count)
        tl.store(partial_ptr + at, total, mask=places < count)
        if moment_ptr is not None:
            tl.store(moment_ptr + at, moment, mask=places < count)


@triton.jit(do_not_specialize=["C"])
def repair_finish_kernel(
    far_ptr: tl.tensor,  # [1 + C] int32
    largest_ptr: tl.tensor,  # [spans, C], by the row's place in far
    partial_ptr: tl.tensor,  # [spans, C]
    moment_ptr: tl.tensor,  # [spans, C], or None
    logit_ptr: tl.tensor,  # [C]: the target logits
    top_ptr: tl.tensor,  # [C], by the row's place: receives the row's largest logit
    logprob_ptr: tl.tensor,  # [C]
    odds_ptr: tl.tensor,  # [C]
    unit_ptr: tl.tensor,  # [C]
    entropy_ptr: tl.tensor,  # [C], or None
    C: tl.tensor,
    spans: tl.tensor,
    scale: tl.tensor,
    BR: tl.constexpr,
    BS: tl.constexpr,
) -> None:
    count = tl.load(far_ptr)
    if tl.program_id(0) * BR < count:
        places = tl.program_id(0) * BR + tl.arange(0, BR)
        inside = places < count
        rows = tl.load(far_ptr + 1 + places, mask=inside, other=0)
        span = tl.arange(0, BS)
        at = span.to(tl.int64)[:, None] * C + places[None, :]
        mask = (span < spans)[:, None] & inside[None, :]
        largest = tl.load(largest_ptr + at, mask=mask, other=LOWEST)
        top = tl.max(largest, 0)
        down = tl.maximum((largest - top[None, :]) * scale, -1000.0)
        partial = tl.load(partial_ptr + at, mask=mask, other=0.0)
        odds = tl.sum(partial * tl.exp2(down), 0)
        gap = (top - tl.load(logit_ptr + rows)) * scale  # in powers of two
        unit = tl.exp2(0.0 - gap)
        log_total = tl.log2(odds + unit)
        tl.store(top_ptr + places, top, mask=inside)
        tl.store(odds_ptr + rows, odds, mask=inside)
        tl.store(unit_ptr + rows, unit, mask=inside)
        tl.store(logprob_ptr + rows, (gap + log_total) * -0.6931471805599453, mask=inside)
        if entropy_ptr is not None:  # relative to the largest logit: neither term is negative
            moment = tl.load(moment_ptr + at, mask=mask, other=0.0)
            moment = tl.sum((moment + down * partial) * tl.exp2(down), 0)
            below = tl.where(unit > 0.0, unit * gap, 0.0) - moment
            tl.store(entropy_ptr + rows, (log_total + below / (odds + unit)) * 0.6931471805599453, mask=inside)


@triton.jit
def repair_store_kernel(
    hidden_ptr: tl.tensor,  # [C, H]
    weight_ptr: tl.tensor,  # [V, H]
    bias_ptr: tl.tensor,  # [V] or None
    target_ptr: tl.tensor,  # [C] int64
    far_ptr: tl.tensor,  # [1 + C] int32
    top_ptr: tl.tensor,  # [C], by the row's place in far
    e_ptr: tl.tensor,  # [C, V] with row pitch
    pitch: tl.tensor,
    V: tl.tensor,
    H: tl.tensor,
    scale: tl.tensor,
    cap: tl.tensor,  # the softcap, or None
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
) -> None:
    count = tl.load(far_ptr)
    for unit in range(tl.program_id(0), tl.cdiv(count, BM) * tl.cdiv(V, BN), tl.num_programs(0)):
        tile, places, rows = _tile_of(unit, far_ptr, count, BM)
        cols = tile * BN + tl.arange(0, BN)
        x, slope = _logits(hidden_ptr, weight_ptr, bias_ptr, rows, cols, V, H, cap, BM, BN, BK)
        top = tl.load(top_ptr + places, mask=places < count, other=0.0)
        target = tl.load(target_ptr + rows)
        d = tl.where(cols[None, :] != target[:, None], (x - top[:, None]) * scale, float("-inf"))
        e = tl.exp2(d) * slope
        mask = (places < count)[:, None] & (cols < V)[None, :]
        tl.store(e_ptr + rows.to(tl.int64)[:, None] * pitch + cols[None, :], e.to(e_ptr.dtype.element_ty), mask=mask)


def repair(
    rows: RowOdds,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    temperature: float,
    store: Tensor | None,
    partial: Tensor,
    moment: Tensor | None,
    softcap: float | None,
) -> None:
    """Rewrites log-prob, odds, unit and entropy in ``rows``, and E in ``store``, of the rows that need their own b.

    Costs two products of as many rows, up to the next multiple of the tile's, one where E is not stored, and nothing
    but the launches where there is no such row. ``partial`` and ``moment``, already summed, are scratch now.
    Arguments as those of `row_kernels.finish_rows`.
    """
    (count, width), vocab = hidden.shape, weight.shape[0]
    tile, scale = TILES[hidden.dtype], LOG2E / temperature
    columns = triton.cdiv(vocab, tile.bn)
    spans = min(SPANS, partial.shape[0], columns)
    tiles = triton.cdiv(count, tile.bm)
    far = hidden.new_empty(1 + count, dtype=torch.int32)
    largest, top = hidden.new_empty(spans, count, dtype=torch.float32), torch.empty_like(rows.odds)
    which_rows_kernel[(triton.cdiv(count, WHICH_ROWS),)](rows.odds, rows.logit, far, count, WHICH_ROWS)
    repair_sums_kernel[(min(PROGRAMS, tiles * spans),)](
        hidden, weight, bias, far, largest, partial, moment, count, vocab, width, spans,
        triton.cdiv(columns, spans) * tile.bn, scale, softcap, tile.bm, tile.bn, tile.bk,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    repair_finish_kernel[(triton.cdiv(count, FINISH_ROWS),)](
        far, largest, partial, moment, rows.logit, top, rows.logprob, rows.odds, rows.unit, rows.entropy,
        count, spans, scale, FINISH_ROWS, SPANS,
    )  # fmt: skip
    if store is not None:
        repair_store_kernel[(min(PROGRAMS, tiles * columns),)](
            hidden, weight, bias, target, far, top, store, store.stride(0), vocab, width, scale, softcap,
            tile.bm, tile.bn, tile.bk, num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
