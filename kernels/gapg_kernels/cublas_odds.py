"""The control: the forward of the fused head as a cuBLAS GEMM and one single-read pass that turns logits into odds.

It is the route of CUDA devices the fused GEMM is not compiled for and of float32 inputs, and what `odds_gemm` has to
beat. A GEMM and the launches around it per chunk of C rows: the target logits, logits [C, V] in float32, one pass that
reads them once and leaves E and one partial sum per (row, column block), the sums in block order, the repair's. No
atomics, no host sync. A row's bits may depend on its batch, because cuBLAS chooses its algorithm by the shape.
"""

# mypy: disable-error-code="untyped-decorator, no-untyped-call"
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from gapg_kernels.elementwise import LOG2E, capped, exponent_of, moment_of, odds_at
from gapg_kernels.reference import RowOdds, matmul_wide
from gapg_kernels.row_kernels import finish_rows, new_partials, target_logits

BLOCK, WARPS = 4096, 8
"""Columns a program takes: 16 KiB of logits, 4 loads of 16 bytes a thread in flight. Not timed on a card yet."""


@triton.jit
def odds_pass_kernel(
    logits_ptr: tl.tensor,  # [C, V] float32 with row pitch, before bias, softcap and temperature
    e_ptr: tl.tensor,  # [C, V] with row pitch, may be the logits: receives E times the slope; or None: forward only
    bias_ptr: tl.tensor,  # [V] or None
    target_ptr: tl.tensor,  # [C] int64
    logit_ptr: tl.tensor,  # [C] float32: the target logits
    partial_ptr: tl.tensor,  # [ceil(V / BLOCK), C] float32: receives each block's row sums of E
    moment_ptr: tl.tensor,  # the same for E d, or None: no entropy
    C: tl.tensor,
    V: tl.tensor,
    logits_pitch: tl.tensor,
    e_pitch: tl.tensor,
    scale: tl.tensor,  # log2(e) / temperature
    cap: tl.tensor,  # the softcap, or None
    BLOCK: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)  # C * V passes 2^31
    block = tl.program_id(1)
    cols = block * BLOCK + tl.arange(0, BLOCK)
    inside = cols < V
    logits = tl.load(logits_ptr + row * logits_pitch + cols, mask=inside, other=0.0)
    if bias_ptr is not None:
        logits += tl.load(bias_ptr + cols, mask=inside, other=0.0).to(tl.float32)
    slope = 1.0
    if cap is not None:
        logits, slope = capped(logits, cap)
    d = exponent_of(logits, tl.load(logit_ptr + row), scale)
    d = tl.where(inside & (cols != tl.load(target_ptr + row)), d, float("-inf"))
    e = odds_at(d)
    if e_ptr is not None:
        tl.store(e_ptr + row * e_pitch + cols, (e * slope).to(e_ptr.dtype.element_ty), mask=inside)
    place = block.to(tl.int64) * C + row
    tl.store(partial_ptr + place, tl.sum(e, 0))
    if moment_ptr is not None:
        tl.store(moment_ptr + place, tl.sum(moment_of(e, d), 0))


def cublas_odds(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    temperature: float,
    store: Tensor | None,
    entropy: bool = False,
    softcap: float | None = None,
) -> RowOdds:
    """One chunk's forward by cuBLAS and the pass; arguments and result as those of `reference.plain_odds`.

    Args:
        hidden: [C, H] bfloat16 or float32, contiguous.
        weight: [V, H], hidden's dtype, contiguous.
        bias: [V] or None; -inf takes a column out, with a softcap too.
        target: [C] int64.
        temperature: divides the logits.
        store: [C, V] of hidden's dtype, any row pitch; receives E, with a softcap times its slope; float32 in place.
            None: forward only.
        entropy: also return each row's entropy; error as that of `odds_gemm.fused_odds`.
        softcap: logits become ``softcap * tanh(logit / softcap)``, before the temperature.

    Besides ``store`` it holds the logits, 4 bytes a row and column, unless float32 logits become E in place.
    """
    rows, vocab = hidden.shape[0], weight.shape[0]
    target, bias = target.contiguous(), None if bias is None else bias.contiguous()
    if store is not None and hidden.dtype == torch.float32:
        logits = torch.mm(hidden, weight.t(), out=store)
    else:
        logits = matmul_wide(hidden, weight.t())
    blocks = triton.cdiv(vocab, BLOCK)
    with torch.cuda.device_of(hidden):  # Triton launches on the current device, wherever the tensors are
        at = target_logits(hidden, weight, bias, target, softcap)
        partial, moment = new_partials(hidden, blocks, entropy)
        odds_pass_kernel[(rows, blocks)](
            logits, store, bias, target, at.logit, partial, moment, rows, vocab,
            logits.stride(0), 0 if store is None else store.stride(0), LOG2E / temperature, softcap, BLOCK,
            num_warps=WARPS,
        )  # fmt: skip
        return finish_rows(hidden, weight, bias, target, temperature, store, at, partial, moment, softcap)
