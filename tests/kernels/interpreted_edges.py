"""Run both GPU forwards through Triton's interpreter on tensors as callers have them; save what they return.

    TRITON_INTERPRET=1 python -m tests.kernels.interpreted_edges edges.pt

A script of its own for the reasons of `interpreted_cases`. The GEMM takes both ways to move its tiles.
"""

from __future__ import annotations

import functools
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from gapg_kernels import repair
from gapg_kernels.cublas_odds import cublas_odds
from gapg_kernels.entropy_gradient import spread_entropy
from gapg_kernels.odds_gemm import fused_odds
from gapg_kernels.reference import RowOdds
from gapg_kernels.tiles import tile_for
from tests.kernels.float64_oracle import Inputs, inputs_at

FORWARDS: dict[str, Callable[..., RowOdds]] = {
    "cp.async": functools.partial(fused_odds, tile=tile_for(100, (8, 0))),
    "TMA": functools.partial(fused_odds, tile=tile_for(100, (9, 0))),
    "cuBLAS": cublas_odds,
}
PITCH = (1 << 24) + 64
"""From row 128 on, 2^31 elements and more lie before a row of E."""


def strided(x: Tensor) -> Tensor:
    """A vector that is every third element of a tensor."""
    return torch.stack([x, x + 1, x + 2], 1)[:, 0]


def shifted(x: Tensor) -> Tensor:
    """A contiguous matrix at an odd address."""
    return torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape)


def one_column(x: Tensor) -> Tensor:
    """The first row, [1, H], as a column of H that is transposed: contiguous, as PyTorch has it, with a stride of 1."""
    return x[:1].t().contiguous().t()


def cases() -> dict[str, tuple[Inputs, Inputs]]:
    """Tensors, and the same as a caller may have them."""
    base = inputs_at(2.0, rows=5, width=48, vocab=140, dtype=torch.float32, bias=True)
    assert base.bias is not None
    one = Inputs(base.hidden[:1], base.weight, base.target[:1], base.grad[:1], base.bias)
    single = Inputs(base.hidden, base.weight[:1], torch.zeros(5, dtype=torch.long), base.grad, base.bias[:1])
    masked = base._replace(target=torch.where(torch.arange(5) == 2, -100, base.target))
    hidden = masked.hidden.clone()
    hidden[2] = torch.nan
    return {
        "target and bias with strides": (base, base._replace(target=strided(base.target), bias=strided(base.bias))),
        "one target for all": (base._replace(target=base.target[:1].repeat(5)),
                               base._replace(target=base.target[:1].expand(5))),
        "an odd address": (base, base._replace(hidden=shifted(base.hidden), weight=shifted(base.weight))),
        "one row with a stride of 1": (one, one._replace(hidden=one_column(base.hidden))),
        "one token with a stride of 1": (single, single._replace(weight=one_column(base.weight))),
        "a masked row of NaN": (masked, masked._replace(hidden=hidden)),
    }  # fmt: skip


def run(forward: Callable[..., RowOdds], x: Inputs, e: Tensor) -> dict[str, Tensor]:
    rows = forward(x.hidden, x.weight, x.bias, x.target, x.temperature, e, True)
    return {name: value for name, value in rows._asdict().items() if value is not None} | {"e": e.clone()}


def offsets(folder: str) -> dict[str, list[dict[str, Tensor]]]:
    """E beyond 2^31 elements, in a file of holes, and the same where it is small; a far row on each side of them."""
    base = inputs_at(2.0, rows=130, width=16, vocab=60, dtype=torch.float32)
    bias = torch.zeros(60)
    bias[7] = -500.0
    x = base._replace(bias=bias, target=torch.where(torch.arange(130) % 100 == 29, 7, (base.target % 7)))
    large = torch.from_file(f"{folder}/e", shared=True, size=130 * PITCH).view(130, PITCH)[:, :60]
    found = {}
    for name, forward in FORWARDS.items():
        large.fill_(7.0)
        found[name] = [run(forward, x, torch.full((130, 64), 7.0)[:, :60]), run(forward, x, large)]
    rows = found["cuBLAS"][0]
    c, total = torch.linspace(-1, 1, 130), rows["odds"] + rows["unit"]
    spread = []
    for e in (rows["e"].clone(), large):
        spread_entropy(e, c, 1 - c, total, rows["entropy"], c, e)
        spread.append({"e": e.clone()})
    return found | {"entropy's gradient": spread}


def main() -> None:
    warnings.filterwarnings("ignore", category=RuntimeWarning)  # numpy's, about the NaN and infinities meant here
    repair.PROGRAMS = 4  # the interpreter runs them one by one
    found = {
        f"{name}, {route}": [run(forward, x, torch.empty(len(x.hidden), 192)[:, : len(x.weight)]) for x in pair]
        for name, pair in cases().items()
        for route, forward in FORWARDS.items()
    }
    with tempfile.TemporaryDirectory() as folder:
        found |= {f"beyond 2^31 elements, {name}": pair for name, pair in offsets(folder).items()}
    torch.save(found, Path(sys.argv[1]))


if __name__ == "__main__":
    main()
