"""The entropy's gradient on a GPU: one read and one write of a chunk's E, which becomes what the GEMMs are given.

With c = d loss / d logp, k = d loss / d H and p_j = E_j / tot a row's gradient by its logit j, not the target's, is
``-p_j (c + k (log p_j + H))``: from ``d H / d l_j = -p_j (log p_j + H)``. The formula is that of
`reference.plain_spread_entropy`, and `reference.entropy_scales` has the target's term.
"""

# mypy: disable-error-code="untyped-decorator, no-untyped-call"
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK, WARPS = 4096, 8
"""Columns a program takes, as `cublas_odds` does. Not timed on a card yet."""


@triton.jit
def spread_entropy_kernel(
    e_ptr: tl.tensor,  # [C, V] with row pitch
    out_ptr: tl.tensor,  # [C, V] with row pitch, E's dtype; may be E
    c_ptr: tl.tensor,  # [C] float32
    k_ptr: tl.tensor,  # [C] float32
    total_ptr: tl.tensor,  # [C] float32: S + unit
    entropy_ptr: tl.tensor,  # [C] float32, nats
    V: tl.tensor,
    e_pitch: tl.tensor,
    out_pitch: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)  # C * V passes 2^31
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    e = tl.load(e_ptr + row * e_pitch + cols, mask=cols < V, other=0.0).to(tl.float32)
    p = e / tl.load(total_ptr + row)
    # Bounded where E is 0, so that 0 times it is 0.
    log_p = tl.maximum(tl.log2(p), -1000.0, propagate_nan=tl.PropagateNan.ALL) * 0.6931471805599453
    out = p * (tl.load(c_ptr + row) + tl.load(k_ptr + row) * (log_p + tl.load(entropy_ptr + row)))
    tl.store(out_ptr + row * out_pitch + cols, out.to(out_ptr.dtype.element_ty), mask=cols < V)


def spread_entropy(e: Tensor, c: Tensor, k: Tensor, total: Tensor, entropy: Tensor, out: Tensor) -> None:
    """``out_j = p_j (c + k (log p_j + H))`` with ``p_j = E_j / tot``, 0 where E is 0; float32 inside.

    Args:
        e: [C, V] bfloat16 or float32, any row pitch; without a softcap's slope, whose factor log p_j would take in.
        c, k: [C] float32, d loss / d logp and d loss / d entropy, each over the temperature; 0 in masked rows.
        total: [C] float32, S + unit.
        entropy: [C] float32, nats.
        out: [C, V] of E's dtype, any row pitch; may be ``e``.
    """
    rows, vocab = e.shape
    with torch.cuda.device_of(e):  # Triton launches on the current device, wherever the tensors are
        spread_entropy_kernel[(rows, triton.cdiv(vocab, BLOCK))](
            e, out, c, k, total, entropy, vocab, e.stride(0), out.stride(0), BLOCK, num_warps=WARPS
        )
