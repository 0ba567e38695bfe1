"""The Triton forward of the fused head: a GEMM whose epilogue turns logits into odds, so no [T, V] logits exist.

A chunk of C rows takes, without a host sync between the launches: the target logits (a dot product a row), the GEMM
with the odds epilogue and one partial sum per (row, vocabulary tile), the sums in tile order with the log-probs, and
the repair of rows whose target is more than about 82 nats below the rest. No atomics and a tile shape that does not
depend on C: the same row gives the same bits in any batch. The formulas stand in `gapg_kernels.reference`.

One kernel serves every card: TMA moves its tiles where there is one, threads with cp.async elsewhere. It runs in
bfloat16 on the cards of `tiles.TILES`; `routes` says what the others take.
"""

# mypy: disable-error-code="untyped-decorator, no-untyped-call"
from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from gapg_kernels.elementwise import LOG2E, capped, moment_of, odds_at
from gapg_kernels.reference import RowOdds
from gapg_kernels.row_kernels import finish_rows, new_partials, target_logits
from gapg_kernels.tiles import Capability, Tile, part_of, tile_for


@triton.jit
def _load(
    x: tl.tensor, row: tl.tensor, k: tl.tensor, rows: tl.tensor, H: tl.tensor, BR: tl.constexpr, BK: tl.constexpr,
    TMA: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """The block [BR, BK] at (row, k) of a matrix [rows, H], zeros beyond it."""
    if TMA:
        return x.load([row, k])
    else:
        at, ks = tl.arange(0, BR), k + tl.arange(0, BK)
        first = x + tl.cast(row, tl.int64) * H  # from there 32 bits reach every element of the block
        mask = (row + at < rows)[:, None] & (ks < H)[None, :]
        return tl.load(first + (at[:, None] * H + ks[None, :]), mask=mask, other=0.0)


@triton.jit
def _store(
    x: tl.tensor, block: tl.tensor, row: tl.tensor, col: tl.tensor, C: tl.tensor, V: tl.tensor, pitch: tl.tensor,
    BM: tl.constexpr, BN: tl.constexpr, TMA: tl.constexpr,
) -> None:  # fmt: skip
    """Write the block [BM, BN] at (row, col) of a matrix [C, V], and nothing beyond it."""
    if TMA:
        x.store([row, col], block.to(x.dtype))
    else:
        rows, cols = tl.arange(0, BM), tl.arange(0, BN)
        first = x + tl.cast(row, tl.int64) * pitch + col
        mask = (row + rows < C)[:, None] & (col + cols < V)[None, :]
        tl.store(first + (rows[:, None] * pitch + cols[None, :]), block.to(x.dtype.element_ty), mask=mask)


@triton.jit
def _odds(
    acc: tl.tensor, e_out: tl.tensor, bias_ptr: tl.tensor, logit: tl.tensor, target: tl.tensor, edge: tl.tensor,
    row: tl.tensor, col: tl.tensor, C: tl.tensor, V: tl.tensor, pitch: tl.tensor, scale: tl.tensor, cap: tl.tensor,
    BM: tl.constexpr, BN: tl.constexpr, PART: tl.constexpr, TMA: tl.constexpr, ENTROPY: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """The epilogue: from the products [BM, BN] at (row, col) to E, PART columns at a time, which is stored, with a
    softcap times its slope. The row sums of E itself, and of E d (with the entropy; else the same)."""
    if BN > PART:
        HALF: tl.constexpr = BN // 2
        left, right = tl.split(tl.permute(tl.reshape(acc, (BM, 2, HALF)), (0, 2, 1)))
        total, moment = _odds(
            left, e_out, bias_ptr, logit, target, edge, row, col, C, V, pitch, scale, cap,
            BM, HALF, PART, TMA, ENTROPY,
        )  # fmt: skip
        more, more_moment = _odds(
            right, e_out, bias_ptr, logit, target, edge, row, col + HALF, C, V, pitch, scale, cap,
            BM, HALF, PART, TMA, ENTROPY,
        )  # fmt: skip
        return total + more, moment + more_moment
    else:
        cols = col + tl.arange(0, BN)
        if bias_ptr is not None:
            acc += tl.load(bias_ptr + cols, mask=cols < V, other=0.0).to(tl.float32)[None, :]
        if cap is not None:
            acc, slope = capped(acc, cap)
        gap = acc - logit[:, None]
        if edge:  # here rather than on E: one register less an element
            gap = tl.where((cols[None, :] != target[:, None]) & (cols < V)[None, :], gap, float("-inf"))
        d = gap * scale
        e = odds_at(d)
        total = tl.sum(e, 1)
        moment = tl.sum(moment_of(e, d), 1) if ENTROPY else total
        if e_out is not None:
            if cap is not None:
                e *= slope
            _store(e_out, e, row, col, C, V, pitch, BM, BN, TMA)
        return total, moment


# A C of 1, or one that 16 divides, would be compiled by itself, and its code might add a row up in another order.
@triton.jit(do_not_specialize=["C"])
def odds_gemm_kernel(
    hidden: tl.tensor,  # [C, H]: with TMA a descriptor of blocks [BM, BK], else a pointer
    weight: tl.tensor,  # [V, H], likewise, [BN, BK]
    e: tl.tensor,  # [C, V], likewise, [BM, PART]; or None: forward only
    bias_ptr: tl.tensor,  # [V] or None
    target_ptr: tl.tensor,  # [C] int64
    logit_ptr: tl.tensor,  # [C] float32: the target logits, after the softcap
    partial_ptr: tl.tensor,  # [ceil(V / BN), C] float32: receives each tile's row sums of E
    moment_ptr: tl.tensor,  # the same for E d, or None: no entropy
    C: tl.tensor,
    V: tl.tensor,
    H: tl.tensor,
    pitch: tl.tensor,  # of E's rows, without TMA
    scale: tl.tensor,  # log2(e) / temperature
    cap: tl.tensor,  # the softcap, or None
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GROUP: tl.constexpr,
    PART: tl.constexpr,
    TMA: tl.constexpr,
) -> None:
    ENTROPY: tl.constexpr = moment_ptr is not None
    tiles_m = tl.cdiv(C, BM)
    tiles_n = tl.cdiv(V, BN)
    steps = tl.cdiv(H, BK)
    programs = tl.num_programs(0)
    # Persistent, and one loop over (tile, step): nested loops would drain the pipeline at every tile, here the loads
    # of a program's next tile are under way during the epilogue.
    tile = tl.program_id(0) - programs
    step = steps - 1
    row, col = 0, 0
    acc = tl.zeros((BM, BN), tl.float32)
    for _ in range(0, tl.cdiv(tiles_m * tiles_n - tl.program_id(0), programs) * steps):
        step = tl.where(step == steps - 1, 0, step + 1)
        if step == 0:
            tile += programs
            first_m = tile // (GROUP * tiles_n) * GROUP
            group_m = tl.minimum(tiles_m - first_m, GROUP)
            row = (first_m + tile % (GROUP * tiles_n) % group_m) * BM
            col = tile % (GROUP * tiles_n) // group_m * BN
        h = _load(hidden, row, step * BK, C, H, BM, BK, TMA)
        w = _load(weight, col, step * BK, V, H, BN, BK, TMA)
        acc = tl.dot(h, w.T, acc)
        if step == steps - 1:
            rows = row + tl.arange(0, BM)
            target = tl.load(target_ptr + rows, mask=rows < C, other=-100).to(tl.int32)
            logit = tl.load(logit_ptr + rows, mask=rows < C, other=float("inf"))
            # Few tiles hold a target of their 128 rows, one a row ends V: the others skip two comparisons and a
            # select an element.
            edge = (tl.max(((target >= col) & (target < col + BN)).to(tl.int32), 0) > 0) | (col + BN > V)
            total, moment = _odds(
                acc, e, bias_ptr, logit, target, edge, row, col, C, V, pitch, scale, cap, BM, BN, PART, TMA, ENTROPY
            )
            place = (col // BN).to(tl.int64) * C + rows
            tl.store(partial_ptr + place, total, mask=rows < C)
            if ENTROPY:
                tl.store(moment_ptr + place, moment, mask=rows < C)
            acc = tl.zeros((BM, BN), tl.float32)


def fused_odds(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    temperature: float,
    store: Tensor | None,
    entropy: bool = False,
    softcap: float | None = None,
    tile: Tile | None = None,
) -> RowOdds:
    """One chunk's forward by the Triton kernels; arguments and result as those of `reference.plain_odds`.

    Args:
        hidden: [C, H] bfloat16, contiguous, C at least 1, H a multiple of 8.
        weight: [V, H] bfloat16, contiguous.
        bias: [V] or None. -inf takes a column out.
        target: [C] int64.
        temperature: divides the logits.
        store: [C, V] bfloat16 with a row pitch of a multiple of 8 elements, receives E, with a softcap times its slope.
            None: forward only.
        entropy: also return each row's entropy. Its absolute error is at most 1e-6 * (1 + nats between the target
            and the best token), as it is a difference of two numbers of that size; repaired rows are exact.
        softcap: logits become ``softcap * tanh(logit / softcap)``, before the temperature.
        tile: the GEMM's configuration. None: what `tile_for` has for this card.
    """
    (rows, width), vocab = hidden.shape, weight.shape[0]
    tile = tile_for(vocab, _capability(hidden.device)) if tile is None else tile
    tiles, part = triton.cdiv(vocab, tile.bn), part_of(tile, softcap)
    hidden, weight = _aligned(hidden), _aligned(weight)
    target, bias = target.contiguous(), None if bias is None else bias.contiguous()
    grid = min(tile.programs * _multiprocessors(hidden.device), triton.cdiv(rows, tile.bm) * tiles)
    operands = (hidden, [tile.bm, tile.bk]), (weight, [tile.bn, tile.bk]), (store, [tile.bm, part])
    with torch.cuda.device_of(hidden):  # Triton launches on the current device, wherever the tensors are
        at = target_logits(hidden, weight, bias, target, softcap)
        partial, moment = new_partials(hidden, tiles, entropy)
        odds_gemm_kernel[(grid,)](
            *(TensorDescriptor.from_tensor(x, block) if tile.tma and x is not None else x for x, block in operands),
            bias, target, at.logit, partial, moment, rows, vocab, width, 0 if store is None else store.stride(0),
            LOG2E / temperature, softcap, tile.bm, tile.bn, tile.bk, tile.group, part, tile.tma,
            num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
        return finish_rows(hidden, weight, bias, target, temperature, store, at, partial, moment, softcap)


def _aligned(x: Tensor) -> Tensor:
    """``x``, contiguous, as TMA takes it: its rows H apart, at an address of whole 16 bytes; else a copy."""
    x = x.view(-1).view(x.shape)  # a single row is contiguous whatever its stride
    return x if x.data_ptr() % 16 == 0 else x.clone()


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    if device.type == "cpu":  # the interpreter: few, but enough to divide the tiles unevenly
        return 3
    return torch.cuda.get_device_properties(device).multi_processor_count


def _capability(device: torch.device) -> Capability:
    """Where there is no card, in the interpreter and on the meta device, that of an H100."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (9, 0)
