"""Run the Triton kernels through Triton's interpreter and save what they return.

    TRITON_INTERPRET=1 python tests/kernels/interpreted_cases.py results.pt

A script of its own, because the variable must be set before triton is first imported. Inputs are float32: the
interpreter's bf16 tl.dot is wrong without a word.
"""

from __future__ import annotations

import os
import sys
from typing import Any

import torch
from float64_oracle import ENTROPIES, Inputs, inputs_at

from gapg.kernels.odds_gemm import TILES, fused_odds


def cases() -> dict[str, Inputs]:
    """The entropy ladder with bias and temperature, then the shapes and targets that break kernels."""
    f32 = torch.float32
    ladder = {
        f"{nats} nats": inputs_at(nats, rows=70, width=80, vocab=4001, dtype=f32, bias=True, temperature=0.7)
        for nats in ENTROPIES
    }
    one = inputs_at(0.35, rows=1, width=16, vocab=114, dtype=f32)
    tiles = inputs_at(2.0, rows=300, width=72, vocab=600, dtype=f32, temperature=1.3)
    tail = inputs_at(4.0, rows=20, width=64, vocab=1000, dtype=f32)
    # Every logit -30: a tail of V that read as logit 0 would carry nearly all of the probability.
    phantom = tail._replace(bias=torch.full((1000,), -30.0))
    targets = torch.cat([tail.target[:14], torch.tensor([-100, -1, 1000, -101, 2**40, 999])])
    odd = tail._replace(target=targets)
    single = Inputs(torch.randn(4, 16), torch.randn(1, 16), torch.tensor([0, 1, 2**40, -100]), torch.ones(4))
    return ladder | {
        "vocabulary of one": single,
        "one row": one,
        "several tiles": tiles,
        "phantom tail": phantom,
        "odd targets": odd,
        "far": far(),
    }


def far() -> Inputs:
    """Targets 60 to 20,000 nats below the best token, on both sides of the repair."""
    gaps = torch.tensor([60.0, 81.0, 82.0, 83.0, 90.0, 128.0, 200.0, 20_000.0])
    weight = torch.zeros(300, 16)
    weight[:, 0] = torch.linspace(-1, 1, 300)
    weight[:, 1] = torch.linspace(3, -2, 300)
    hidden = torch.zeros(8, 16)
    hidden[:, 0], hidden[:, 1] = gaps / 2, torch.linspace(-0.5, 0.5, 8)
    return Inputs(hidden, weight, torch.zeros(8, dtype=torch.long), torch.linspace(0.5, 2, 8))


def run(inputs: Inputs, store: bool) -> dict[str, Any]:
    vocab = inputs.weight.shape[0]
    e = torch.full((inputs.hidden.shape[0], -(-vocab // 64) * 64), 7.0)
    view = e[:, :vocab] if store else None
    rows = fused_odds(inputs.hidden, inputs.weight, inputs.bias, inputs.target, inputs.temperature, view)
    return rows._asdict() | {"e": e}


def main() -> None:
    assert os.environ.get("TRITON_INTERPRET") == "1"
    results = {}
    for name, inputs in cases().items():
        part = inputs._replace(hidden=inputs.hidden[:3], target=inputs.target[:3])
        results[name] = {
            "inputs": inputs._asdict(),
            "stored": run(inputs, store=True),
            "forward only": run(inputs, store=False),
            "first rows": run(part, store=True),
            "tile columns": TILES[True].bn,
        }
    torch.save(results, sys.argv[1])


if __name__ == "__main__":
    main()
