"""Which attention for packed rows: FlashAttention 2, 3 and 4 and cuDNN, forward and backward, at an update's shapes.

    python bench/attention.py                       # on a GPU; elsewhere small shapes, on which nothing is decided
    python bench/attention.py --case 1.5B --seconds 20

Each runs through PyTorch: FA3 and FA4 as `torch.nn.attention.activate_flash_attention_impl` puts them behind the
operators that gapg calls, cuDNN as aten._cudnn_attention_forward, which gapg calls nowhere: it has no window, and
nobody has measured it here. Beside the times stands how far the output and the gradients are from float32's.
What cannot run is a row with the reason.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor
from torch.nn.attention import (
    activate_flash_attention_impl,
    current_flash_attention_impl,
    restore_flash_attention_impl,
)

import record
from gapg.model.attention import packed_attention
from record import Row


@dataclass(frozen=True)
class Case:
    """Packed sequences of half to one and a half times ``length`` tokens."""

    name: str
    sequences: int
    length: int
    heads: int
    kv_heads: int
    head_dim: int
    window: int | None = None

    def __str__(self) -> str:
        window = "" if self.window is None else f", window {self.window}"
        return f"{self.name}: {self.sequences} x {self.length}, {self.heads}/{self.kv_heads} x {self.head_dim}{window}"

    def lengths(self) -> list[int]:
        draw = random.Random(0)
        return [draw.randint(self.length // 2, self.length * 3 // 2) for _ in range(self.sequences)]

    def inputs(self, device: str) -> list[Tensor]:
        """q, k, v and the output's gradient in bfloat16."""
        generator, tokens = torch.Generator().manual_seed(0), sum(self.lengths())
        shapes = [(tokens, n, self.head_dim) for n in (self.heads, self.kv_heads, self.kv_heads, self.heads)]
        return [torch.randn(s, generator=generator).to(device, torch.bfloat16) for s in shapes]

    @property
    def flops(self) -> int:
        """Of the (query, key) pairs that attend: two products forward, five backward."""
        pairs = (min(i + 1, self.window or i + 1) for n in self.lengths() for i in range(n))
        return 7 * 2 * self.heads * self.head_dim * sum(pairs)


CASES = {
    "cuda": [
        Case("1.5B", 16, 1280, 12, 2, 128),
        Case("0.5B", 16, 1280, 14, 2, 64),
        Case("8B", 8, 4096, 32, 8, 128),
        Case("8B-window", 8, 4096, 32, 8, 128, window=1024),
    ],
    "cpu": [Case("tiny", 4, 24, 4, 2, 16), Case("tiny-window", 4, 24, 4, 2, 16, window=8)],
}

Attend = Callable[..., Tensor]
"""(q, k, v, cu_seqlens, longest, window) -> the output, differentiable"""


def ours(q: Tensor, k: Tensor, v: Tensor, cu: Tensor, longest: int, window: int | None) -> Tensor:
    """What gapg computes packed rows with: by the implementation that is active."""
    return packed_attention(q, k, v, cu, longest, window=window)


def cudnn(q: Tensor, k: Tensor, v: Tensor, cu: Tensor, longest: int, window: int | None) -> Tensor:
    if window is not None:
        raise ValueError("aten._cudnn_attention_forward has no window")
    out: Tensor = torch.ops.aten._cudnn_attention_forward(
        q, k, v, None, cu, cu, longest, longest, True, 0.0, True, False, scale=q.shape[-1] ** -0.5
    )[0]
    return out


CANDIDATES: dict[str, tuple[str | None, Attend]] = {
    "FA2": (None, ours),
    "FA3": ("FA3", ours),
    "FA4": ("FA4", ours),
    "cuDNN": (None, cudnn),
}
"""The implementation that PyTorch must have active, and the function."""


def measure(case: Case, device: str, rounds: int, seconds: float | None = None) -> list[Row]:
    """The rows of one case. Elsewhere than on CUDA "FA2" is whatever gapg computes with there."""
    *leaves, grad = case.inputs(device)
    cu = torch.tensor([0, *accumulate(case.lengths())], dtype=torch.int32, device=device)
    longest = max(case.lengths())

    def both_ways(attend: Attend, dtype: torch.dtype) -> list[Tensor]:
        given = [x.to(dtype).requires_grad_() for x in leaves]
        out = attend(*given, cu, longest, case.window)
        return [out.detach(), *torch.autograd.grad(out, given, grad.to(dtype))]

    expected = both_ways(ours, torch.float32)
    clock: record.Clock = "cuda" if device == "cuda" else "cpu"
    rows: list[Row] = []
    for name, (implementation, attend) in CANDIDATES.items():
        try:
            if implementation:
                activate_flash_attention_impl(implementation)
            found = both_ways(attend, torch.bfloat16)
            off = max(float((a.float() - b).norm() / b.norm()) for a, b in zip(found, expected, strict=True))
            run = {name: lambda attend=attend: both_ways(attend, torch.bfloat16)}
            (times,) = record.interleaved(run, rounds=rounds, clock=clock, seconds=seconds).values()
        except Exception as error:
            rows.append(record.error_row(str(case), name, error))
            continue
        finally:
            if current_flash_attention_impl():
                restore_flash_attention_impl()
        rows += record.timing_rows(str(case), {name: times})
        rows += record.timing_rows(str(case), {name: [case.flops / t / 1e12 for t in times]}, "rate", "TFLOP/s")
        rows += record.timing_rows(str(case), {name: [off]}, "distance from float32", "relative, the worst of four")
    return rows


def main() -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    cases = {case.name: case for case in CASES[device]}
    parser = record.parser(__doc__, "attention")
    pick, names = record.pick(cases), f"of {', '.join(cases)}"
    parser.add_argument("--case", type=pick, action="extend", metavar="NAMES", help=names)
    parser.add_argument("--rounds", type=record.positive, default=20)
    parser.add_argument("--seconds", type=float, help="no round begins after so many, a candidate")
    given = parser.parse_args()
    rows: list[Row] = []
    for name, case in cases.items():
        if given.case and name not in given.case:
            continue
        found = measure(case, device, given.rounds, given.seconds)
        rows += found
        record.write("attention", rows, given.output / f"{device}.json")  # stays, whatever happens to the next case
        for row in found:
            what = row.get("error") or f"{row['metric']:22} {row['median']:.4g} {row['unit']}"
            print(f"{row['case']:45} {row['impl']:6} {what}", flush=True)


if __name__ == "__main__":
    main()
