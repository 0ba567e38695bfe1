"""The Triton forward of the fused head: a GEMM whose epilogue turns logits into odds, so no [T, V] logits exist.

Four launches per chunk of C rows, without a host sync between them: the target logits (a dot product a row), the
GEMM with the odds epilogue and one partial sum per (row, vocabulary tile), the sums in tile order with the log-probs,
and the repair of rows whose target is more than about 82 nats below the rest. No atomics and a tile shape that does
not depend on C: the same row gives the same bits in any batch. The formulas stand in `gapg_kernels.reference`.

It runs on CUDA devices of compute capability 9.0 in bfloat16. Other CUDA devices, and float32, take
`cublas_odds.cublas_odds`.
"""

# mypy: disable-error-code="untyped-decorator, no-untyped-call"
from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from gapg_kernels.reference import RowOdds
from gapg_kernels.row_kernels import LOG2E, finish_rows, moment_of, new_partials, odds_of, target_logits


class Tile(NamedTuple):
    """One GEMM configuration: BM rows, BN vocabulary columns and BK of H a tile, GROUP row tiles to a column tile, and
    how many programs run on a multiprocessor at the same time."""

    bm: int
    bn: int
    bk: int
    group: int
    warps: int
    stages: int
    programs: int


NARROW_VOCAB = 2048
TILES = {
    "wide": Tile(bm=128, bn=256, bk=64, group=16, warps=8, stages=4, programs=1),
    "narrow": Tile(bm=128, bn=128, bk=64, group=16, warps=8, stages=4, programs=1),
    "pair": Tile(bm=128, bn=128, bk=64, group=16, warps=4, stages=3, programs=2),
}
"""The fixed table for sm_90; `tile_for` chooses by V. None of it has been timed on a card yet: `bench/tiles.py` does.

wide: the largest tile whose float32 accumulator fits the registers of two warpgroups; four stages of 48 KiB leave
    room for half of E's tile, which the epilogue therefore makes in two halves, and not for a fifth stage.
    128 * 16 rows and 256 columns for each of 132 programs are nearly a square, which reads the least from memory:
    with groups of 8 the weight is read twice as often. The group's hidden states, 16 MiB at H = 4,096, fit L2.
narrow: a vocabulary of up to 2,048 has at most 8 wide tiles, so that most of the 132 processors would stand idle
    below 2,048 rows, and one of 128 or less would waste half of each.
pair: two programs share a multiprocessor, which leaves each 256 registers a thread and 113 KiB of shared memory, and
    the epilogue of one hides behind the products of the other. On the wide tile the tensor cores wait for it:
    888 instructions a thread, 128 of them exponentials (bench/results/sass); those alone keep their unit busy for 2,048
    cycles, beside 32,768 of products at H = 2,048. It may lose all the same: a tile reads (BM + BN) / (BM BN) bytes a
    flop from L2, at 790 TFLOP/s 12.3 TB/s where the wide tile asks for 9.3, and bench/roofline.py predicts that this
    weighs more. Nothing chooses it until a card says so.
H changes the length of the inner loop only, so it does not choose.
"""


def tile_for(vocab: int) -> Tile:
    """The configuration for V. It must not depend on C: a row's bits would depend on its batch."""
    return TILES["narrow" if vocab <= NARROW_VOCAB else "wide"]


@triton.jit
def _half(
    acc: tl.tensor, bias_ptr: tl.tensor, logit: tl.tensor, target: tl.tensor, first: tl.tensor, V: tl.tensor,
    scale: tl.tensor, edge: tl.tensor, BN: tl.constexpr, ENTROPY: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """E [BM, BN] of the columns from ``first``, its row sums, and those of E d (with the entropy; else the same)."""
    cols = first + tl.arange(0, BN)
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + cols, mask=cols < V, other=0.0).to(tl.float32)[None, :]
    e, d = odds_of(acc, logit[:, None], scale)
    if edge:
        e = tl.where((cols[None, :] != target[:, None]) & (cols < V)[None, :], e, 0.0)
    total = tl.sum(e, 1)
    if ENTROPY:
        return e, total, tl.sum(moment_of(e, d), 1)
    else:
        return e, total, total


@triton.jit
def odds_gemm_kernel(
    hidden_desc: tl.tensor_descriptor,  # [C, H] in blocks [BM, BK]
    weight_desc: tl.tensor_descriptor,  # [V, H] in blocks [BN, BK]
    e_desc: tl.tensor_descriptor,  # [C, V] in blocks [BM, BN / 2], or None: forward only
    bias_ptr: tl.tensor,  # [V] or None
    target_ptr: tl.tensor,  # [C] int64
    logit_ptr: tl.tensor,  # [C] float32: the target logits
    partial_ptr: tl.tensor,  # [ceil(V / BN), C] float32: receives each tile's row sums of E
    moment_ptr: tl.tensor,  # the same for E d, or None: no entropy
    C: tl.tensor,
    V: tl.tensor,
    H: tl.tensor,
    scale: tl.tensor,  # log2(e) / temperature
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GROUP: tl.constexpr,
) -> None:
    HALF: tl.constexpr = BN // 2
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
        h = hidden_desc.load([row, step * BK])  # beyond H and V the descriptors read zeros
        w = weight_desc.load([col, step * BK])
        acc = tl.dot(h, w.T, acc)
        if step == steps - 1:
            rows = row + tl.arange(0, BM)
            target = tl.load(target_ptr + rows, mask=rows < C, other=-100).to(tl.int32)
            logit = tl.load(logit_ptr + rows, mask=rows < C, other=float("inf"))
            # Few tiles hold a target of their 128 rows, one a row ends V: the others skip two comparisons and a
            # select an element.
            edge = (tl.max(((target >= col) & (target < col + BN)).to(tl.int32), 0) > 0) | (col + BN > V)
            left, right = tl.split(tl.permute(tl.reshape(acc, (BM, 2, HALF)), (0, 2, 1)))
            e, total, moment = _half(left, bias_ptr, logit, target, col, V, scale, edge, HALF, ENTROPY)
            if e_desc is not None:
                e_desc.store([row, col], e.to(e_desc.dtype))
            e, more, more_moment = _half(right, bias_ptr, logit, target, col + HALF, V, scale, edge, HALF, ENTROPY)
            if e_desc is not None:
                e_desc.store([row, col + HALF], e.to(e_desc.dtype))
            place = (col // BN).to(tl.int64) * C + rows
            tl.store(partial_ptr + place, total + more, mask=rows < C)
            if ENTROPY:
                tl.store(moment_ptr + place, moment + more_moment, mask=rows < C)
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
        hidden: [C, H] bfloat16, contiguous, H a multiple of 8.
        weight: [V, H] bfloat16, contiguous.
        bias: [V] or None.
        target: [C] int64.
        temperature: divides the logits.
        store: [C, V] bfloat16 with a row pitch of a multiple of 8 elements, receives E. None: forward only.
        entropy: also return each row's entropy. Its absolute error is at most 1e-6 * (1 + nats between the target
            and the best token), as it is a difference of two numbers of that size; repaired rows are exact.
        tile: the GEMM's configuration. None: `tile_for`'s.
    """
    (rows, width), vocab = hidden.shape, weight.shape[0]
    tile = tile_for(vocab) if tile is None else tile
    tiles = triton.cdiv(vocab, tile.bn)
    hidden, weight = _aligned(hidden), _aligned(weight)
    grid = min(tile.programs * _multiprocessors(hidden.device), triton.cdiv(rows, tile.bm) * tiles)
    with torch.cuda.device_of(hidden):  # Triton launches on the current device, wherever the tensors are
        logit = target_logits(hidden, weight, bias, target)
        partial, moment = new_partials(hidden, tiles, entropy)
        odds_gemm_kernel[(grid,)](
            TensorDescriptor.from_tensor(hidden, [tile.bm, tile.bk]),
            TensorDescriptor.from_tensor(weight, [tile.bn, tile.bk]),
            None if store is None else TensorDescriptor.from_tensor(store, [tile.bm, tile.bn // 2]),
            bias, target, logit, partial, moment, rows, vocab, width, LOG2E / temperature,
            tile.bm, tile.bn, tile.bk, tile.group, num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
        return finish_rows(hidden, weight, bias, target, temperature, store, logit, partial, moment)


def _aligned(x: Tensor) -> Tensor:
    """``x`` itself when its address suits TMA (16 bytes), else a copy."""
    return x if x.data_ptr() % 16 == 0 else x.clone()


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    if device.type == "cpu":  # the interpreter: few, but enough to divide the tiles unevenly
        return 3
    return torch.cuda.get_device_properties(device).multi_processor_count
