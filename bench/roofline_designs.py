"""What `bench/roofline.py` assumes: the cards' stated rates, and what every design of the head does for a logit."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace
from typing import NamedTuple


class Shape(NamedTuple):
    """T tokens, hidden width H, vocabulary V."""

    tokens: int
    hidden: int
    vocab: int

    def __str__(self) -> str:
        return f"({self.tokens}, {self.hidden}, {self.vocab})"

    @staticmethod
    def of(text: str) -> Shape:
        """Of T,H,V, with or without parentheses; an argparse type. Raises argparse.ArgumentTypeError."""
        try:
            shape = Shape(*map(int, text.strip("()").split(",")))
        except (TypeError, ValueError):
            raise argparse.ArgumentTypeError(f"{text!r}: give T,H,V, as in 16384,2048,151936") from None
        if shape.tokens % 16 or min(shape) < 1:
            why = "T must be a multiple of 16 (two prompts of 8 responses), H and V 1 or more"
            raise argparse.ArgumentTypeError(f"{text!r}: {why}")
        return shape


class Range(NamedTuple):
    """Seconds, or a rate, for the best and for the worst case."""

    best: float
    worst: float


SHAPES = [
    Shape(4_096, 2_048, 151_936),
    Shape(16_384, 2_048, 151_936),  # Qwen2.5-3B's head
    Shape(32_768, 1_536, 151_936),  # Qwen2.5-1.5B's
    Shape(16_384, 3_072, 128_256),  # Llama-3.2-3B's
]

SCHEDULERS, EXPONENTIALS, TENSOR_FLOPS = 4, 16, 4096
"""Of a multiprocessor, each clock: warps' instructions it issues, threads' ex2 (CUDA programming guide, table of
arithmetic throughput), bf16 flops of its tensor cores (the datasheet's 989e12 at 132 x 1.83 GHz)."""


@dataclass(frozen=True)
class Card:
    """Rates in units a second."""

    name: str
    gemm_flops: float
    """bf16 products as cuBLAS does them, their operands and results included; the datasheet says 989e12"""
    hbm_bytes: float
    """bytes read plus written; the datasheet times the share that a large device-to-device copy reaches"""
    l2_bytes: Range
    """read from L2 by all multiprocessors together"""
    clock: float
    """the highest an SXM card runs at; in the worst case no more than the tensor cores need for ``gemm_flops``"""
    launch: float
    """seconds from one kernel's end to the next one's start"""
    multiprocessors: int = 132

    @property
    def clocks(self) -> Range:
        """Clocks of all multiprocessors together, a second."""
        highest = self.clock * self.multiprocessors
        return Range(highest, min(highest, self.gemm_flops / TENSOR_FLOPS))


COPY_SHARE = 0.9
L2_BYTES = Range(10.25e12, 8.25e12)
"""No vendor states it. Best: the most that loads were seen to read of 8 MiB and more on an H200 (10.25e12 at 8 MiB,
9.7e12 at 16 to 40 MiB: github.com/te42kyfo/gpu-benches, gpu-l2-cache/h200.txt). Worst: what a GEMM like ours has been
seen to draw on an H100 SXM, 704e12 flops at 128x256 without clusters (and 734e12 with them, so L2 was not all of it):
cudaforfun.substack.com/p/outperforming-cublas-on-h100-a-worklog, matmul_7.cuh of github.com/pranjalssh/fast.cu.
Below that lie 6.65e12, which XLA's gpu_dot_fusion_cost_model.cc takes as measured within one partition of an H100, and
6.9e12 in the former place for an H100 PCIe; that GEMM contradicts both for an SXM card. A multiprocessor's port is 64
bytes a clock, just what a pair of 128x128 tiles takes at the tensor cores' full rate: no tile here is held by it.
"""
CARDS = [
    Card("H100", 790e12, 3.35e12 * COPY_SHARE, L2_BYTES, 1.98e9, 4e-6),
    Card("H200", 790e12, 4.8e12 * COPY_SHARE, L2_BYTES, 1.98e9, 4e-6),
]


@dataclass(frozen=True)
class Head:
    """One design. ``gemms``: products of 2THV flops. The rest is bytes for every logit, unless said otherwise."""

    name: str
    gemms: int
    tile: str | None = None
    """of our own GEMM, in `gapg_kernels.tiles.TILES`. None: cuBLAS or clusters with multicast, whose L2 traffic
    is in the rate of their products, and so is an epilogue where the rate is of that very kernel"""
    forwards: int = 1
    """products that our own GEMM makes"""
    flops: Range | None = None
    """a second, where a design's authors publish rates of their products below the card's"""
    exponentials: int = 0
    """not bytes: in the epilogue of a GEMM that is not ours and whose rate is not published; at best they hide"""
    written: float = 0
    """by a GEMM, while it computes"""
    read: float = 0
    """by a GEMM, while it computes"""
    passes: float = 0
    """by kernels of their own between the GEMMs"""
    stored: float = 0
    """held at once, with ``scratch``: the workspace over their sum is the rows of a chunk; 0: one chunk"""
    scratch: float = 0
    weight_sum: float = 0
    """for every element of dW and chunk: its sum in memory, read and written"""
    weight_once: float = 0
    """for every element of dW, once: rounding it"""
    sum_hides: bool = False
    """the sum of dW is added to by stores that the products do not wait for"""
    row_bytes: float = 0
    """of passes over [C, H], for every element of hidden"""
    launches: int = 0
    """a chunk"""
    rows: float = 1.0
    """share of the tokens that enter"""
    fixed_rows: int | None = None
    """rows of a chunk, where a design has its own number"""
    vocab_chunk: int | None = None
    """columns of a chunk, where a design has them: dH is then a float32 sum, read and written once a column chunk"""


# A row pass, in bytes an element of [C, H]: the target's logit reads h and W_y. dH: float32 result scaled in place (8),
# W_y gathered and added (2 + 8), rounded (6). dW: h scaled to float32 (6) and rounded (6), the target rows scaled (6)
# and added in order (4 + 8).
LOGIT, HIDDEN, WEIGHT = 4.0, 24.0, 30.0
BOTH = LOGIT + HIDDEN + WEIGHT

BARE_FORWARD = Head("bare GEMM, forward", 1, written=2, launches=1)
BARE = Head("bare GEMMs, 3", 3, written=2, read=4, weight_once=2, launches=3)
FORWARD = Head("ours, forward only", 1, tile="wide", stored=2, row_bytes=LOGIT, launches=4)
OURS = Head("ours", 3, tile="wide", written=2, read=4, stored=2, weight_sum=8, weight_once=2, row_bytes=BOTH,
            launches=24)  # fmt: skip
HEADS = [
    BARE_FORWARD,
    FORWARD,
    replace(FORWARD, name="ours, forward only, pair tile", tile="pair"),
    # liger-kernel 0.8.5, ops.fused_linear_scaled_cross_entropy.LigerFusedLinearScaledCrossEntropyFunction on sm_90
    # (ops/cutedsl): forward stores no logits; backward makes them again, in one kernel that works 1,024 rows at a
    # time, between two barriers of the whole grid, on a bf16 dW that TMA adds to. Its README measures 706 to 738
    # TFLOP/s forward and, for 8THV, 666 to 698 in all, on an H100 at H = 4,096. At a smaller H its traffic weighs more,
    # so the worst case counts it on top. Its two launches are nothing.
    Head("Liger, sm_90, forward only", 1, flops=Range(738e12, 706e12)),
    BARE,
    OURS,
    replace(OURS, name="ours, pair tile", tile="pair"),
    replace(OURS, name="ours, half the rows zero", rows=0.5),
    replace(OURS, name="ours, frozen weight", gemms=2, read=2, weight_sum=0, weight_once=0, row_bytes=LOGIT + HIDDEN,
            launches=14),
    replace(OURS, name="ours, E recomputed", gemms=4, forwards=2, row_bytes=LOGIT + BOTH, launches=28),
    replace(OURS, name="control: cuBLAS + one pass", tile=None, written=4, passes=6, scratch=4),
    # quack-kernels 0.6.5, linear_cross_entropy.scaled_exp_linear_cross_entropy, which chunked_linear_cross_entropy
    # takes on sm_90 in bf16 where 128 divides V: E with a power of two for every row and 128 columns (8 bytes for 128
    # logits), by which the two other GEMMs multiply it as they load it (2 for 64), after kernels that make both loss
    # and powers (16 for 128). TMA adds to a float32 dW; the first chunk only writes it (-4), backward scales (8) and
    # rounds (6) it. No rates are published for these GEMMs: cuBLAS's stands in, and the multiplying on the way is in no
    # term.
    Head("quack, scaled exp", 3, exponentials=1, written=2 + 8 / 128, read=4 + 4 / 64, passes=16 / 128, weight_sum=8,
         weight_once=10, sum_hides=True, row_bytes=8, launches=5, fixed_rows=4096),
    Head("Liger, sm_90", 4, flops=Range(698e12, 666e12), written=2, read=4, weight_sum=4, sum_hides=True,
         fixed_rows=1024),
    Head("logits, then d(logits)", 3, written=2, read=4, passes=4, stored=2, weight_sum=8, launches=6),
    Head("chunked over V", 4, written=4, read=4, passes=6, fixed_rows=4096, vocab_chunk=32768, weight_sum=8,
         launches=5),
]  # fmt: skip
"""The last two: quack's loss where V is no multiple of 128, and the log-probs of TRL and of Liger's GRPO."""
