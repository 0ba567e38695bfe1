"""Run the Triton kernels through Triton's interpreter and save what they return.

    TRITON_INTERPRET=1 python -m tests.kernels.interpreted_cases gemm.pt     # the GEMM with its epilogue
    TRITON_INTERPRET=1 python -m tests.kernels.interpreted_cases pass.pt     # the pass over a plain GEMM's logits
    TRITON_INTERPRET=1 python -m tests.kernels.interpreted_cases softcap.pt  # the GEMM with a softcap

A script of its own, because the variable must be set before triton is first imported. Inputs are float32: the
interpreter's bf16 tl.dot is wrong without a word.
"""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gapg_kernels.cublas_odds import BLOCK, cublas_odds
from gapg_kernels.odds_gemm import fused_odds
from gapg_kernels.tiles import TILES, Tile, tile_for
from tests.kernels.float64_oracle import ENTROPIES, Inputs, inputs_at

ROUTES = {"gemm": fused_odds, "pass": cublas_odds, "softcap": fused_odds}


def cases() -> dict[str, Inputs]:
    """The entropy ladder with bias and temperature, then the shapes, targets and logits that break kernels."""
    f32 = torch.float32
    options: dict[str, Any] = {"rows": 24, "dtype": f32, "bias": True, "temperature": 0.7}
    # The highest entropy needs the larger vocabulary; the widths are one step of a tile through H and two.
    sizes = {nats: {"vocab": 2401 if nats > 4 else 700, "width": 80 if nats == 0.35 else 64} for nats in ENTROPIES}
    ladder = {f"{nats} nats": inputs_at(nats, **sizes[nats], **options) for nats in ENTROPIES}
    one = inputs_at(0.35, rows=1, width=16, vocab=114, dtype=f32)
    narrow = inputs_at(2.0, rows=150, width=72, vocab=600, dtype=f32, temperature=1.3)
    wide = inputs_at(2.0, rows=135, width=72, vocab=2305, dtype=f32)
    low = below_zero(inputs_at(2.0, rows=20, width=72, vocab=600, dtype=f32, temperature=1.3))
    tail = inputs_at(4.0, rows=20, width=64, vocab=1000, dtype=f32)
    long_tail = inputs_at(4.0, rows=6, width=32, vocab=4200, dtype=f32)
    odd = torch.cat([tail.target[:14], torch.tensor([-100, -1, 1000, -101, 2**40, 999])])
    return ladder | {
        "vocabulary of one": Inputs(
            torch.randn(4, 16), torch.randn(1, 16), torch.tensor([0, 1, 2**40, -100]), torch.ones(4)
        ),
        "one row": one,
        "several narrow tiles": narrow,
        "several wide tiles": wide,
        # Each alone in its tile, whose test for targets must see its first and its last column.
        "targets at the ends of narrow tiles": rows_at(narrow, [127, 128, 383]),
        "targets at the ends of wide tiles": rows_at(wide, [255, 256, 767]),
        # Every logit -30: a tail of V that read as logit 0 would carry nearly all of the probability.
        "phantom tail": tail._replace(bias=torch.full((1000,), -30.0)),
        "phantom tail without a bias": low,
        "phantom tail of wide tiles": long_tail._replace(bias=torch.full((4200,), -30.0)),
        "odd targets": tail._replace(target=odd),
        "all masked": tail._replace(target=torch.full((20,), -100)),
        "temperature of 0.3": tail._replace(temperature=0.3),
        "temperature of 4": tail._replace(temperature=4.0),
        "lifted by 250": tail._replace(bias=torch.full((1000,), 250.0)),
        "lifted by 10,000": tail._replace(bias=torch.full((1000,), 1e4)),
        "huge logits": huge(),
        "forbidden tokens": forbidden(tail),
        "every token twice": twins(),
        "far": far(),
    }


def rows_at(inputs: Inputs, targets: list[int]) -> Inputs:
    """The first rows, with these targets."""
    count = len(targets)
    return inputs._replace(hidden=inputs.hidden[:count], target=torch.tensor(targets), grad=inputs.grad[:count])


def below_zero(inputs: Inputs) -> Inputs:
    """The same rows with every logit about 30 lower, by a column that all tokens share."""
    hidden = torch.cat([inputs.hidden, torch.full((len(inputs.hidden), 8), 30.0 * inputs.temperature / 8)], 1)
    return inputs._replace(hidden=hidden, weight=torch.cat([inputs.weight, -torch.ones(len(inputs.weight), 8)], 1))


def forbidden(inputs: Inputs) -> Inputs:
    """Every third token, but no target, has the bias -inf."""
    bias = torch.where(torch.arange(len(inputs.weight)) % 3 == 0, -torch.inf, 0.0)
    bias[inputs.target] = 0.0
    return inputs._replace(bias=bias)


def huge() -> Inputs:
    """Logits between -1e4 and 1e4, a few nats apart near the top, and targets among the best."""
    weight = torch.zeros(400, 16)
    weight[:, 0] = torch.linspace(-1e4, 1e4, 400)
    weight[390:, 0] = 1e4 - torch.arange(10.0)
    hidden = torch.zeros(9, 16)
    hidden[:, 0] = 1.0
    return Inputs(hidden, weight, torch.arange(390, 399), torch.linspace(0.5, 2, 9))


def twins() -> Inputs:
    """Every token has a twin with the same weight row, the targets too."""
    g = torch.Generator().manual_seed(3)
    hidden, weight = torch.randn(6, 16, generator=g), torch.randn(150, 16, generator=g)
    return Inputs(hidden, torch.cat([weight, weight]), torch.arange(6) * 59, torch.linspace(0.5, 2, 6))


def far() -> Inputs:
    """Targets 60 to 20,000 nats below the best token, on both sides of the repair."""
    gaps = torch.tensor([60.0, 70.0, 75.0, 79.0, 81.0, 83.0, 90.0, 125.0, 127.0, 1000.0, 20_000.0])
    weight = torch.zeros(300, 16)
    weight[:, 0] = torch.linspace(-1, 1, 300)
    weight[:, 1] = torch.linspace(3, -2, 300)
    hidden = torch.zeros(11, 16)
    hidden[:, 0], hidden[:, 1] = gaps / 2, torch.linspace(-0.5, 0.5, 11)
    return Inputs(hidden, weight, torch.zeros(11, dtype=torch.long), torch.linspace(0.5, 2, 11))


def tiles() -> dict[str, Tile]:
    """The tiles of every card that are not the same to the interpreter, where warps and stages do not exist; of those
    that differ by PART one, as every PART is a recursion of the same kind."""
    found: dict[Any, tuple[str, Tile]] = {}
    for (major, minor), table in TILES.items():
        for name, tile in table.items():
            found.setdefault(tile._replace(part=0, warps=0, stages=0, programs=0), (f"sm_{major}{minor} {name}", tile))
    return dict(found.values())


def two_tiles(vocab: int) -> dict[str, Tile]:
    """For this V, with TMA and without."""
    return {f"sm_{major}{minor}": tile_for(vocab, (major, minor)) for major, minor in ((8, 0), (9, 0))}


def run(route: str, inputs: Inputs, *, store: bool, entropy: bool, **options: Any) -> dict[str, Tensor]:
    vocab = inputs.weight.shape[0]
    e = torch.full((inputs.hidden.shape[0], -(-vocab // 64) * 64), 7.0)
    view = e[:, :vocab] if store else None
    rows = ROUTES[route](*inputs[:2], inputs.bias, inputs.target, inputs.temperature, view, entropy, **options)
    return {key: value for key, value in rows._asdict().items() if value is not None} | {"e": e}


def results(route: str, inputs: Inputs) -> dict[str, Any]:
    """With and without E, and with and without the entropy, on all rows or on the first three; with the other tiles."""
    part = inputs._replace(hidden=inputs.hidden[:3], target=inputs.target[:3])
    chosen = tile_for(len(inputs.weight), (9, 0))
    # Of the tiles without TMA the one for this V: the interpreter takes its time.
    others = {name: tile for name, tile in tiles().items() if tile.tma and tile != chosen} | two_tiles(
        len(inputs.weight)
    )
    others = {name: tile for name, tile in others.items() if route == "gemm" and tile != chosen}
    return {
        "inputs": inputs._asdict(),
        "stored": run(route, inputs, store=True, entropy=True),
        "forward only": run(route, inputs, store=False, entropy=False),
        "first rows": run(route, part, store=True, entropy=False),
        "first rows, forward only": run(route, part, store=False, entropy=True),
        "others": {name: run(route, inputs, store=True, entropy=True, tile=tile) for name, tile in others.items()},
        "tile": chosen._asdict(),
        "block": BLOCK,
    }


def softcaps() -> dict[str, tuple[Inputs, float]]:
    """A cap of 30 at every entropy; one that saturates; masked columns under it; an odd V; fewer rows than a tile."""
    options: dict[str, Any] = {"rows": 8, "width": 24, "dtype": torch.float32, "bias": True, "temperature": 0.7}
    found = {f"{nats} nats": (inputs_at(nats, vocab=2401 if nats > 4 else 531, **options), 30.0) for nats in ENTROPIES}
    base = inputs_at(2.0, vocab=531, **options)
    # No logit is 30 then: a tail of V that read as logit 0 would carry more than all the others.
    low = base._replace(bias=torch.full((531,), -60.0))
    return found | {
        "saturated": (base._replace(hidden=base.hidden * 3), 3.0),
        "forbidden tokens": (forbidden(base), 3.0),
        "phantom tail": (low, 30.0),
    }


def softcapped(inputs: Inputs, cap: float, every: bool) -> dict[str, Any]:
    """With the two tiles for this V, or with every tile and forward only."""
    by_tile = {
        name: run("softcap", inputs, store=True, entropy=True, softcap=cap, tile=tile)
        for name, tile in (tiles() if every else two_tiles(len(inputs.weight))).items()
    }
    alone = {
        name: run("softcap", inputs, store=False, entropy=False, softcap=cap, tile=tile)
        for name, tile in (two_tiles(len(inputs.weight)) if every else {}).items()
    }
    return {"inputs": inputs._asdict(), "cap": cap, "stored": by_tile, "forward only": alone}


def main() -> None:
    assert os.environ.get("TRITON_INTERPRET") == "1"
    warnings.filterwarnings("ignore", category=RuntimeWarning)  # numpy's, about the NaN and infinities meant here
    path = Path(sys.argv[1])
    if path.stem == "softcap":
        found = {name: softcapped(*case, every="nats" not in name) for name, case in softcaps().items()}
        torch.save(found, path)
    else:
        torch.save({name: results(path.stem, inputs) for name, inputs in cases().items()}, path)


if __name__ == "__main__":
    main()
