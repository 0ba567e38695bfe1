"""The tiles of the fused GEMM, for every card that it is compiled for."""

from __future__ import annotations

from typing import NamedTuple

Capability = tuple[int, int]
"""A CUDA device's compute capability: (9, 0) is sm_90."""


class Tile(NamedTuple):
    """One GEMM configuration: BM rows, BN vocabulary columns and BK of H a tile, GROUP row tiles to a column tile, PART
    columns of a tile that become odds at a time, and how many programs run on a multiprocessor at the same time.
    ``tma``: TMA moves the tiles; else threads do, by cp.async."""

    bm: int
    bn: int
    bk: int
    group: int
    part: int
    warps: int
    stages: int
    programs: int
    tma: bool


NARROW_VOCAB = 2048
SOFTCAP_PART = 32
AMPERE = {"wide": Tile(bm=128, bn=128, bk=64, group=16, part=64, warps=8, stages=4, programs=1, tma=False)}
SMALL = {"wide": Tile(bm=128, bn=128, bk=64, group=16, part=64, warps=8, stages=3, programs=1, tma=False)}
HOPPER = {
    "wide": Tile(bm=128, bn=256, bk=64, group=16, part=128, warps=8, stages=4, programs=1, tma=True),
    "narrow": Tile(bm=128, bn=128, bk=64, group=16, part=64, warps=8, stages=4, programs=1, tma=True),
    "pair": Tile(bm=128, bn=128, bk=64, group=16, part=64, warps=4, stages=3, programs=2, tma=True),
}
BLACKWELL = {"wide": HOPPER["wide"]._replace(part=64), "narrow": HOPPER["narrow"]}
TILES: dict[Capability, dict[str, Tile]] = {
    (8, 0): AMPERE, (8, 6): SMALL, (8, 9): SMALL, (9, 0): HOPPER, (10, 0): BLACKWELL, (12, 0): SMALL,
}  # fmt: skip
"""The fixed table: A100; RTX 30 and A10; RTX 40 and L4; H100 and H200; B200; RTX 50. `tile_for` chooses by card and V.
None of it has been timed on a card yet: `bench/tiles.py` does. All are compiled, and bounded by what a program may have
of shared memory: 163 KiB on sm_80, 99 KiB on sm_86, 89 and 120, 227 KiB on sm_90 and 100.

wide: the largest tile whose float32 accumulator fits the registers of 8 warps beside an epilogue (sm_100 has memory of
    its own for it; with a part of 128 columns it spills there where 16 does not divide V). On sm_90 four stages of
    48 KiB leave room for half of E's tile and not for a fifth stage. 128 * 16 rows and 256 columns for each of 132
    programs are nearly a square, which reads the least from memory: with groups of 8 the weight is read twice as often.
    The group's hidden states, 16 MiB at H = 4,096, fit L2. Without TMA 128 x 256 spills with triton 3.6.0 (sm_80), or
    leaves nothing of 99 KiB for the epilogue: 128 columns for every V there.
narrow: a vocabulary of up to 2,048 has at most 8 wide tiles, so that most of the 132 processors would stand idle
    below 2,048 rows, and one of 128 or less would waste half of each.
pair: two programs share a multiprocessor, which leaves each 256 registers a thread and 113 KiB of shared memory, and
    the epilogue of one hides behind the products of the other. On the wide tile the tensor cores wait for it:
    888 instructions a thread, 128 of them exponentials (bench/results/sass); those alone keep their unit busy for 2,048
    cycles, beside 32,768 of products at H = 2,048. It may lose all the same: a tile reads (BM + BN) / (BM BN) bytes a
    flop from L2, at 790 TFLOP/s 12.3 TB/s where the wide tile asks for 9.3, and bench/roofline.py predicts that this
    weighs more. Nothing chooses it until a card says so.
H changes the length of the inner loop only, so it does not choose. BK is the same in all, so that a row's logits are
summed in the same steps whatever the tile.
"""


def tile_for(vocab: int, capability: Capability) -> Tile:
    """The configuration for V on a card of the table. It never depends on C: a row's bits would depend on its batch."""
    tiles = TILES[capability]
    return tiles.get("narrow", tiles["wide"]) if vocab <= NARROW_VOCAB else tiles["wide"]


def part_of(tile: Tile, softcap: float | None) -> int:
    """PART. A softcap makes it smaller: an element then needs twice the registers, and more columns would spill."""
    return tile.part if softcap is None else min(tile.part, SOFTCAP_PART)
