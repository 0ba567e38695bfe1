"""What the fused head should cost on a card nobody has run it on yet: every term of every design, from stated rates.

    python bench/roofline.py                                   # tables, roofline.json and its picture
    python bench/roofline.py --compare bench/results/X/*/*-cuda.json   # the prediction beside what was measured

Nothing here is measured. A path is the sum of its terms; each is work over a rate. Two sums are given: ``best``, where
what a GEMM can do besides its products hides behind them and the faster of two stated rates holds, and ``worst``, where
nothing hides and the slower rate holds. What a GEMM without multicast reads from L2 is fetched while it multiplies, so
in both sums only what the products do not cover counts. The epilogue of a tile that has a multiprocessor to itself
covers no products in either. A measurement above ``worst`` means the model lacks a term; below ``best``, that an
assumption is too low.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

import record
import roofline_report
from gapg_kernels.chunks import DEFAULT_WORKSPACE, ChunkPlan
from gapg_kernels.tiles import TILES
from roofline_designs import (
    BARE,
    BARE_FORWARD,
    CARDS,
    COPY_SHARE,
    EXPONENTIALS,
    HEADS,
    SCHEDULERS,
    SHAPES,
    Card,
    Head,
    Range,
    Shape,
)

SASS = record.RESULTS / "sass" / "triton-3.7.1.json"


# --- the model -------------------------------------------------------------------------------------------------------

TERMS = {
    "GEMMs": "GEMMs",
    "L2 beyond the products": "L2",
    "epilogue": "epilogue",
    "last waves of dH": "waves",
    "logits or E moved": "moved",
    "passes over [T, V]": "passes",
    "sum of dW": "dW sum",
    "sum of dH": "dH sum",
    "row passes": "rows",
    "launches": "launch",
}
"""Every term, and its heading in the table."""


def terms(head: Head, shape: Shape, card: Card, workspace: int = DEFAULT_WORKSPACE) -> dict[str, Range]:
    """Seconds of a forward (and backward, where the head has one), term by term."""
    rows = round(shape.tokens * head.rows)
    logits, elements, weights = rows * shape.vocab, rows * shape.hidden, shape.vocab * shape.hidden
    chunks = len(chunk_rows(head, shape, workspace))
    column_chunks = -(-shape.vocab // head.vocab_chunk) if head.vocab_chunk else 0
    rates = head.flops or (card.gemm_flops, card.gemm_flops)
    products = Range(*(head.gemms * 2 * rows * weights / min(rate, card.gemm_flops) for rate in rates))
    moved = (head.written + head.read) * logits / card.hbm_bytes
    weight_sum = head.weight_sum * chunks * weights / card.hbm_bytes
    weight_once = head.weight_once * weights / card.hbm_bytes
    least_sum = max(0.0, weight_sum - products.best) if head.sum_hides else weight_sum
    l2, epilogue = own_gemm(head, shape, rows, card)
    exponentials = head.exponentials * logits / EXPONENTIALS / card.clocks.worst
    parts: dict[str, Range | float] = {
        "GEMMs": products,
        "L2 beyond the products": l2,
        "epilogue": Range(epilogue.best, epilogue.worst + exponentials),
        "last waves of dH": Range(0.0, last_waves(head, shape, card, workspace)),
        "logits or E moved": Range(max(0.0, moved - products.best), moved),
        "passes over [T, V]": head.passes * logits / card.hbm_bytes,
        "sum of dW": Range(least_sum + weight_once, weight_sum + weight_once),
        "sum of dH": 8 * elements * column_chunks / card.hbm_bytes,
        "row passes": head.row_bytes * elements / card.hbm_bytes,
        "launches": head.launches * chunks * max(1, column_chunks) * card.launch,
    }
    return {name: part if isinstance(part, Range) else Range(part, part) for name, part in parts.items()}


def own_gemm(head: Head, shape: Shape, rows: int, card: Card) -> tuple[Range, Range]:
    """What our own GEMM waits for its operands, every tile's rows of both read from L2, and its epilogues' time.

    The epilogue is counted in machine code, an instruction a thread. Best: the exponentials take their unit's whole
    time and all else issues meanwhile, or the other way round, and a second program on the multiprocessor hides it
    behind its products. Worst: all else issues before and after the exponentials, an instruction a scheduler and clock:
    what the few warps wait for each other's results is not in it.
    """
    if head.tile is None:
        return Range(0.0, 0.0), Range(0.0, 0.0)
    tile = TILES[9, 0][head.tile]
    tiles = head.forwards * -(-rows // tile.bm) * -(-shape.vocab // tile.bn)
    products = head.forwards * 2 * rows * shape.hidden * shape.vocab / card.gemm_flops
    read = tiles * (tile.bm + tile.bn) * shape.hidden * 2
    counted = machine_code()[f"odds_gemm_{head.tile}{'_store' if head.gemms > 1 else ''}"]
    exponentials = counted["exponentials"] * tile.warps * 32 / EXPONENTIALS
    issued = counted["epilogue_instructions"] * tile.warps / SCHEDULERS
    besides = issued - counted["exponentials"] * tile.warps / SCHEDULERS
    best = tiles * max(issued, exponentials) / card.clocks.best
    worst = tiles * (besides + exponentials) / card.clocks.worst
    l2 = Range(*(max(0.0, read / rate - products) for rate in card.l2_bytes))
    return l2, Range(max(0.0, best - products) if tile.programs > 1 else best, worst)


@functools.cache
def machine_code() -> dict[str, dict[str, int]]:
    """What `bench/compile_report.py` counted, by kernel."""
    counted: dict[str, dict[str, int]] = json.loads(SASS.read_text())
    return counted


def last_waves(head: Head, shape: Shape, card: Card, workspace: int) -> float:
    """Seconds that multiprocessors idle in the last wave of a chunk's dH, whose H columns make few tiles of 128x256.

    At best cuBLAS divides the sums over V among them. Where rates are published they hold it already.
    """
    if head.gemms == 1 or head.flops is not None:
        return 0.0
    found = 0.0
    for rows in chunk_rows(head, shape, workspace):
        tiles = -(-rows // 128) * -(-shape.hidden // 256)
        idle = -tiles % card.multiprocessors / tiles
        found += idle * 2 * rows * shape.hidden * shape.vocab / card.gemm_flops
    return found


def chunk_rows(head: Head, shape: Shape, workspace: int = DEFAULT_WORKSPACE) -> list[int]:
    """Rows of every chunk, as `gapg_kernels.chunks` cuts them."""
    rows = round(shape.tokens * head.rows)
    if head.fixed_rows is not None:
        return [min(head.fixed_rows, rows - at) for at in range(0, rows, head.fixed_rows)]
    if not head.stored:
        return [rows]
    hidden = torch.empty(rows, shape.hidden, dtype=torch.bfloat16, device="meta")
    weight = torch.empty(shape.vocab, shape.hidden, dtype=torch.bfloat16, device="meta")
    plan = ChunkPlan.of(hidden, weight, workspace, kernel=not head.scratch)
    return [part.stop - part.start for part in plan.chunks(rows, kept=False, store=head.gemms > 1)]


def floor(head: Head, shape: Shape, card: Card) -> float:
    """Seconds of the products no design can leave out: forward, dH, dW, of the rows that enter; nothing else."""
    needed = min(head.gemms, 3)
    return needed * 2 * shape.tokens * head.rows * shape.hidden * shape.vocab / card.gemm_flops


def bounds(parts: Mapping[str, Range]) -> Range:
    """Seconds of the whole path."""
    return Range(sum(part.best for part in parts.values()), sum(part.worst for part in parts.values()))


def prediction(head: Head, shape: Shape, card: Card) -> dict[str, Any]:
    """One row: seconds by term, [best, worst] each, their sums, and the ``floor``."""
    parts = terms(head, shape, card)
    best, worst = bounds(parts)
    return {
        "card": card.name, "case": str(shape), "impl": head.name, "chunks": len(chunk_rows(head, shape)),
        "terms": {name: list(part) for name, part in parts.items()}, "floor": floor(head, shape, card), "best": best,
        "worst": worst,
    }  # fmt: skip


def sentence(card: Card, shape: Shape) -> str:
    """What is predicted for our two tiles and for quack, beside the bare products: best by best, worst by worst."""
    found = {head.name: bounds(terms(head, shape, card)) for head in HEADS}

    def ratios(name: str, bare: Head) -> str:
        low, high = sorted(mine / theirs for mine, theirs in zip(found[name], found[bare.name], strict=True))
        return f"{low:.2f} to {high:.2f}"

    wide, pair = found["ours"], found["ours, pair tile"]
    loses = pair.best > wide.best and pair.worst > wide.worst
    return (
        f"{card.name}, T H V = {shape}: a forward is predicted to take {ratios('ours, forward only', BARE_FORWARD)} "
        f"times one bare GEMM with the wide tile and {ratios('ours, forward only, pair tile', BARE_FORWARD)} with the "
        f"pair; forward and backward {ratios('ours', BARE)} times three bare GEMMs with the wide tile and "
        f"{ratios('ours, pair tile', BARE)} with the pair{', which should lose' * loses}; quack's cross entropy "
        f"{ratios('quack, scaled exp', BARE)} times."
    )


# --- files and measurements ------------------------------------------------------------------------------------------


def write(folder: Path) -> dict[str, Any]:
    """roofline.json, whose contents it returns, and roofline.png."""
    found: dict[str, Any] = {
        "bench": "roofline",
        "predicted": True,
        "summary": [sentence(card, SHAPES[1]) for card in CARDS],
        "assumptions": {
            "cards": [asdict(card) for card in CARDS],
            "heads": [asdict(head) for head in HEADS],
            "workspace_bytes": DEFAULT_WORKSPACE,
            "copy_share_of_datasheet": COPY_SHARE,
        },
        "rows": [prediction(head, shape, card) for card in CARDS for shape in SHAPES for head in HEADS],
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "roofline.json").write_text(json.dumps(found, indent=1) + "\n")
    roofline_report.plot(found["rows"], folder / "roofline.png")
    return found


def compare(measured: dict[str, Any]) -> str:
    """The prediction beside a record of bench/heads.py or bench/tiles.py, for the card it ran on: rows that say what
    they are predicted as, at whatever shape; first from the stated rates, then from those that the record measured.

    Raises:
        ValueError: the record's card is not one of `CARDS`.
    """
    card = card_of(measured["machine"])
    device = measured["machine"]["device"]
    lines = [f"{device}, milliseconds predicted from the stated rates of {card.name} and measured"]
    lines += roofline_report.beside(matched(measured["rows"], card))
    rates = {"product": card.gemm_flops, "copy": card.hbm_bytes}
    for row in measured["rows"]:
        if row["case"] == "ceiling" and "median" in row:
            kind = row["impl"].split()[0]
            stated, reached = rates[kind] / 1e12, row["median"] / 1e12
            lines.append(f"{row['impl']}: {stated:.2f} stated, {reached:.2f} measured, in 1e12 {row['unit']}")
            rates[kind] = row["median"]
    own = replace(card, gemm_flops=rates["product"], hbm_bytes=rates["copy"])
    if own != card:
        lines += [
            "",
            "The same from the two rates as measured in this run:",
            *roofline_report.beside(matched(measured["rows"], own)),
        ]
    return "\n".join(lines)


def card_of(machine: dict[str, Any]) -> Card:
    """The card of a record. Raises ValueError where it is not one of `CARDS`."""
    for card in CARDS:
        multiprocessors = machine.get("multiprocessors", card.multiprocessors)
        if card.name in machine["device"] and multiprocessors == card.multiprocessors:
            return card
    known = ", ".join(f"{card.name} with {card.multiprocessors} multiprocessors" for card in CARDS)
    raise ValueError(f"no prediction for {machine['device']!r}: the cards are {known}")


def matched(rows: list[dict[str, Any]], card: Card) -> list[tuple[dict[str, Any], float]]:
    """(prediction, measured seconds) of the rows that say what they are predicted as."""
    heads = {head.name: head for head in HEADS}
    return [
        (prediction(heads[row["predicted_as"]], Shape.of(row["shape"]), card), row["median"])
        for row in rows
        if row.get("metric") == "time" and row.get("predicted_as") in heads and "shape" in row
    ]


def main() -> None:
    parser = record.parser(__doc__, "roofline")
    parser.add_argument("--compare", type=Path, nargs="+", help="records of bench/heads.py or bench/tiles.py")
    given = parser.parse_args()
    if given.compare is None:
        found = write(given.output)
        print("\n".join(found["summary"]), roofline_report.table(found["rows"], TERMS), sep="\n")
        return
    with record.refusing(parser):
        print("\n\n".join(compare(record.read(path)) for path in given.compare))


if __name__ == "__main__":
    main()
