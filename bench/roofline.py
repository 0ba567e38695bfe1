"""What the fused head should cost on a card nobody has run it on yet: every term of every design, from stated rates.

    python bench/roofline.py                                   # prints the table, writes bench/results/roofline/
    python bench/roofline.py --compare bench/results/X/kernels.json   # the prediction beside what was measured

Nothing here is measured. A path is the sum of its terms; each is work over a rate. Two sums are given: ``best``, where
everything a GEMM can do besides its products (writing and reading E, the exponentials of its epilogue) hides behind
them, and ``worst``, where nothing does. A measurement above ``worst`` means the model lacks a term.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

if not __package__:  # run as a script: bench/kernels.py would shadow Hugging Face's package `kernels`
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import matplotlib
import torch

from bench import record
from gapg.kernels.chunks import DEFAULT_WORKSPACE, ChunkPlan

matplotlib.use("agg")
from matplotlib import pyplot as plt

RESULTS = record.ROOT / "bench" / "results" / "roofline"


class Shape(NamedTuple):
    """T tokens, hidden width H, vocabulary V."""

    tokens: int
    hidden: int
    vocab: int

    def __str__(self) -> str:
        return f"({self.tokens}, {self.hidden}, {self.vocab})"


# --- assumptions -----------------------------------------------------------------------------------------------------

SHAPES = [
    Shape(4_096, 2_048, 151_936),
    Shape(16_384, 2_048, 151_936),  # Qwen2.5-3B's head
    Shape(32_768, 1_536, 151_936),  # Qwen2.5-1.5B's
    Shape(16_384, 3_072, 128_256),  # Llama-3.2-3B's
]


@dataclass(frozen=True)
class Card:
    """Rates in units a second."""

    name: str
    gemm_flops: float
    """bf16 products as cuBLAS does them, their operands and results included; the datasheet says 989e12"""
    hbm_bytes: float
    """bytes read plus written; the datasheet times the share that a large device-to-device copy reaches"""
    exponentials: float
    """ex2 instructions: 16 a clock and multiprocessor (CUDA programming guide, arithmetic throughput table)"""
    launch: float
    """seconds from one kernel's end to the next one's start"""


COPY_SHARE = 0.9
CARDS = [
    Card("H100", 790e12, 3.35e12 * COPY_SHARE, 16 * 132 * 1.755e9, 4e-6),
    Card("H200", 790e12, 4.8e12 * COPY_SHARE, 16 * 132 * 1.755e9, 4e-6),
]


@dataclass(frozen=True)
class Head:
    """One design. ``gemms``: products of 2THV flops. The rest is bytes for every logit, unless said otherwise."""

    name: str
    gemms: int
    exponentials: int = 0
    """in a GEMM's epilogue, for every logit"""
    written: float = 0
    """by a GEMM, while it computes"""
    read: float = 0
    """by a GEMM, while it computes"""
    passes: float = 0
    """by kernels of their own between the GEMMs"""
    stored: float = 0
    """held at once, with ``scratch``: the workspace over their sum is the rows of a chunk; 0: one chunk"""
    scratch: float = 0
    weight_sum: bool = True
    """dW is a float32 sum, read and written once a chunk"""
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

HEADS = [
    Head("bare GEMMs, 3", 3, written=2, read=4, weight_sum=False, launches=3),
    Head("bare GEMM, forward", 1, written=2, weight_sum=False, launches=1),
    Head("ours, forward only", 1, exponentials=1, stored=2, weight_sum=False, row_bytes=LOGIT, launches=4),
    Head("ours", 3, exponentials=1, written=2, read=4, stored=2, row_bytes=BOTH, launches=24),
    Head("ours, half the rows zero", 3, exponentials=1, written=2, read=4, stored=2, row_bytes=BOTH, launches=24,
         rows=0.5),
    Head("ours, frozen weight", 2, exponentials=1, written=2, read=2, stored=2, weight_sum=False,
         row_bytes=LOGIT + HIDDEN, launches=14),
    Head("ours, E recomputed", 4, exponentials=2, written=2, read=4, stored=2, row_bytes=LOGIT + BOTH, launches=28),
    Head("control: cuBLAS + one pass", 3, written=4, read=4, passes=6, stored=2, scratch=4, row_bytes=BOTH,
         launches=24),
    Head("logits, then d(logits)", 3, written=2, read=4, passes=4, stored=2, launches=6),
    Head("chunked over V", 4, written=4, read=4, passes=6, fixed_rows=4096, vocab_chunk=32768, launches=5),
]  # fmt: skip
"""The last two are what peers do: quack's chunked loss (base pipeline), and TRL's and Liger's log-probs."""

# --- the model -------------------------------------------------------------------------------------------------------


TERMS = {
    "GEMMs": "GEMMs",
    "exponentials": "exp",
    "logits or E written": "written",
    "logits or E read": "read",
    "passes over [T, V]": "passes",
    "sum of dW": "dW sum",
    "sum of dH": "dH sum",
    "row passes": "rows",
    "launches": "launch",
}
"""Every term, and its heading in the table."""

HIDDEN_TERMS = ("exponentials", "logits or E written", "logits or E read")


def terms(head: Head, shape: Shape, card: Card, workspace: int = DEFAULT_WORKSPACE) -> dict[str, float]:
    """Seconds of a forward (and backward, where the head has one), term by term."""
    rows = round(shape.tokens * head.rows)
    logits, elements, weights = rows * shape.vocab, rows * shape.hidden, shape.vocab * shape.hidden
    chunks = chunk_count(head, shape, workspace)
    column_chunks = -(-shape.vocab // head.vocab_chunk) if head.vocab_chunk else 0
    weight_bytes = 8 * weights * chunks if head.weight_sum else 2 * weights * (head.gemms == 3)
    return {
        "GEMMs": head.gemms * 2 * rows * weights / card.gemm_flops,
        "exponentials": head.exponentials * logits / card.exponentials,
        "logits or E written": head.written * logits / card.hbm_bytes,
        "logits or E read": head.read * logits / card.hbm_bytes,
        "passes over [T, V]": head.passes * logits / card.hbm_bytes,
        "sum of dW": weight_bytes / card.hbm_bytes,
        "sum of dH": 8 * elements * column_chunks / card.hbm_bytes,
        "row passes": head.row_bytes * elements / card.hbm_bytes,
        "launches": head.launches * chunks * max(1, column_chunks) * card.launch,
    }


def chunk_count(head: Head, shape: Shape, workspace: int = DEFAULT_WORKSPACE) -> int:
    """Chunks of rows, as `gapg.kernels.chunks` cuts them."""
    rows = round(shape.tokens * head.rows)
    if head.fixed_rows is not None:
        return -(-rows // head.fixed_rows)
    if not head.stored:
        return 1
    hidden = torch.empty(rows, shape.hidden, dtype=torch.bfloat16, device="meta")
    weight = torch.empty(shape.vocab, shape.hidden, dtype=torch.bfloat16, device="meta")
    plan = ChunkPlan.of(hidden, weight, workspace, kernel=not head.scratch)
    return sum(1 for _ in plan.chunks(rows, kept=False, store=head.gemms > 1))


def floor(head: Head, shape: Shape, card: Card) -> float:
    """Seconds of the products no design can leave out: forward, dH, dW, of the rows that enter; nothing else."""
    needed = min(head.gemms, 3)
    return needed * 2 * shape.tokens * head.rows * shape.hidden * shape.vocab / card.gemm_flops


def bounds(parts: Mapping[str, float]) -> tuple[float, float]:
    """(best, worst) seconds: what can hide behind the GEMMs hides as far as they last, or not at all."""
    total = sum(parts.values())
    return total - min(sum(parts[name] for name in HIDDEN_TERMS), parts["GEMMs"]), total


def predictions() -> list[dict[str, Any]]:
    """One row for each card, shape and head."""
    rows = []
    for card in CARDS:
        for shape in SHAPES:
            for head in HEADS:
                parts = terms(head, shape, card)
                best, worst = bounds(parts)
                rows.append({
                    "card": card.name, "case": str(shape), "impl": head.name, "chunks": chunk_count(head, shape),
                    "terms": parts, "floor": floor(head, shape, card), "best": best,
                    "worst": worst,
                })  # fmt: skip
    return rows


# --- what one sees ---------------------------------------------------------------------------------------------------


def table(rows: list[dict[str, Any]]) -> str:
    """One block for each card and shape, in milliseconds."""
    lines = []
    ends = ("best", "worst", "floor")
    heading = f"{'':28}{'chunks':>7}" + "".join(f"{name:>8}" for name in (*TERMS.values(), *ends))
    for card, case in dict.fromkeys((row["card"], row["case"]) for row in rows):
        lines += ["", f"{card}, T H V = {case}: predicted milliseconds, nothing measured", heading]
        for row in rows:
            if (row["card"], row["case"]) == (card, case):
                seconds = [row["terms"][name] for name in TERMS] + [row[key] for key in ends]
                lines.append(f"{row['impl']:28}{row['chunks']:7}" + "".join(f"{s * 1e3:8.2f}" for s in seconds))
    return "\n".join(lines)


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Stacked terms of every head: solid what adds up in the best case, pale what may hide behind the GEMMs."""
    figure, axes = plt.subplots(len(SHAPES), len(CARDS), figsize=(13, 13), sharex="row", sharey=True, squeeze=False)
    colours = dict(zip(TERMS, plt.get_cmap("tab10").colors, strict=False))  # type: ignore[attr-defined]
    for i, shape in enumerate(SHAPES):
        for j, card in enumerate(CARDS):
            axis = axes[i][j]
            here = [row for row in rows if (row["card"], row["case"]) == (card.name, str(shape))]
            for y, row in enumerate(here):
                left = 0.0
                for name in sorted(TERMS, key=lambda name: name in HIDDEN_TERMS):
                    width = row["terms"][name] * 1e3
                    alpha = 0.35 if name in HIDDEN_TERMS else 1.0
                    axis.barh(y, width, left=left, color=colours[name], alpha=alpha, label=name if y == 0 else None)
                    left += width
                axis.plot([row["floor"] * 1e3] * 2, [y - 0.45, y + 0.45], color="black", linewidth=1)
            axis.set_title(f"{card.name}, T H V = {shape}", fontsize=9)
            axis.set_yticks(range(len(here)), [row["impl"] for row in here], fontsize=8)
            axis.set_xlabel("predicted ms", fontsize=8)
            axis.tick_params(axis="x", labelsize=8)
    axes[0][0].invert_yaxis()
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.suptitle("Predicted, not measured. Pale: may hide behind the GEMMs. Black mark: the products alone.")
    figure.legend(handles, labels, loc="lower center", ncols=len(TERMS), fontsize=8)
    figure.tight_layout(rect=(0, 0.03, 1, 0.98))
    figure.savefig(path, dpi=90)
    plt.close(figure)


def write(folder: Path) -> list[dict[str, Any]]:
    """roofline.json and roofline.png."""
    rows = predictions()
    assumptions = {
        "cards": [asdict(card) for card in CARDS],
        "heads": [asdict(head) for head in HEADS],
        "workspace_bytes": DEFAULT_WORKSPACE,
        "copy_share_of_datasheet": COPY_SHARE,
    }
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"bench": "roofline", "predicted": True, "assumptions": assumptions, "rows": rows}, indent=1)
    (folder / "roofline.json").write_text(text + "\n")
    plot(rows, folder / "roofline.png")
    return rows


def compare(measured: dict[str, Any]) -> str:
    """The prediction beside a record of bench/kernels.py, for the card it ran on: rows that both have.

    Raises:
        ValueError: the record's card is not one of `CARDS`.
    """
    device = measured["machine"]["device"]
    card = next((card for card in CARDS if card.name in device), None)
    if card is None:
        raise ValueError(f"no prediction for {device!r}: the cards are {', '.join(card.name for card in CARDS)}")
    found = {
        (row["shape"], row["predicted_as"]): row["median"]
        for row in measured["rows"]
        if row.get("metric") == "time" and row.get("predicted_as")
    }
    lines = [f"{device}: predicted from the rates of {card.name}, milliseconds"]
    lines.append(f"{'':30}{'':30}{'best':>9}{'worst':>9}{'measured':>10}{'of worst':>10}")
    for row in predictions():
        seconds = found.get((row["case"], row["impl"]))
        if row["card"] == card.name and seconds is not None:
            figures = f"{row['best'] * 1e3:9.2f}{row['worst'] * 1e3:9.2f}{seconds * 1e3:10.2f}"
            lines.append(f"{row['case']:30}{row['impl']:30}{figures}{seconds / row['worst']:10.2f}")
    for row in measured["rows"]:
        if row["case"] == "ceiling" and "median" in row:
            stated = card.gemm_flops if "product" in row["impl"] else card.hbm_bytes
            rates = f"stated {stated / 1e12:.2f}, measured {row['median'] / 1e12:.2f}"
            lines.append(f"{row['impl']}: {rates}, in 1e12 {row['unit']}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--compare", type=Path, help="a record of bench/kernels.py")
    record_path = parser.parse_args().compare
    if record_path is not None:
        print(compare(record.read(record_path)))
    else:
        print(table(write(RESULTS)))


if __name__ == "__main__":
    main()
