"""Which tile of the fused GEMM is the fastest at a shape: every tile of this card beside a bare product, in one run.

    python bench/tiles.py                                            # (16384, 2048, 151936) on this machine's GPU
    python bench/tiles.py --shape 4096,896,151936 --shape 8192,4096,128256   # yours

Two cases a shape: forward only, and with E stored for a backward; each for the first chunk of rows that the default
workspace gives. `torch.mm` is the same product in bfloat16 into a tensor that is there already. A tile's time includes
the small launches before and after its GEMM. Errors are the worst log-prob's and E's against float64; a tile whose
error is too large is not timed. On a CPU an H100's tiles run in Triton's interpreter, in float32, where a time says
nothing about a GPU's. The exit code is 1 where no tile ran. To make a winner the choice for its card and V, change
`gapg_kernels.tiles`; a tile to be tried goes into its table, too.
"""

from __future__ import annotations

import contextlib
import functools
import math
import os
import sys
import warnings
from collections.abc import Callable, Mapping
from typing import Literal, NamedTuple

import torch
from torch import Tensor

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # heeded only before triton is imported, which the next lines do

import heads_report
import problems
import record
from gapg_kernels.chunks import DEFAULT_WORKSPACE, ChunkPlan, pitch
from gapg_kernels.odds_gemm import fused_odds
from gapg_kernels.reference import RowOdds
from gapg_kernels.tiles import TILES, tile_for
from problems import Problem
from record import Row
from roofline_designs import Shape

DEVICE: Literal["cuda", "cpu"] = "cuda" if torch.cuda.is_available() else "cpu"
CARD = torch.cuda.get_device_capability() if DEVICE == "cuda" else (9, 0)
HERE = TILES.get(CARD, {})
DEFAULT_SHAPE = {"cuda": Shape(16_384, 2_048, 151_936), "cpu": Shape(160, 80, 600)}
ROUNDS = {"cuda": 20, "cpu": 1}
DTYPE = {"cuda": torch.bfloat16, "cpu": torch.float32}  # the interpreter's bfloat16 products are wrong
BARE = "torch.mm"
LOGPROB = {"cuda": 1e-3, "cpu": 2e-6}
"""Nats a log-prob may be off, or 8 units in the last place of the largest logit where that is more."""
E_ROUNDING = {"cuda": 2**-8, "cpu": 1e-5}
"""What E may be off, relative, besides those 8 units: bfloat16's rounding, and float32's."""
E_ROWS = 256
"""Rows of E that are held to float64, element by element."""
UNITS = {"logprob_error": "nats", "e_error": "relative"}
PREDICTED = {BARE: "bare GEMM, forward", "wide": "ours, forward only", "pair": "ours, forward only, pair tile"}
"""Names in `roofline` of what is timed, where that is the forward of all T rows."""


def name_of(shape: Shape, store: bool) -> str:
    """The case, as its rows are labelled."""
    where = "" if DEVICE == "cuda" else ", cpu (Triton's interpreter)"
    return f"{shape} {'forward, E stored' if store else 'forward only'}{where}"


class Chunk(NamedTuple):
    """The first rows of a problem: hidden [C, H], weight [V, H], target [C]. ``e``: [C, V], or None: forward only."""

    shape: Shape
    hidden: Tensor
    weight: Tensor
    target: Tensor
    e: Tensor | None

    @staticmethod
    def of(shape: Shape, problem: Problem, store: bool) -> Chunk:
        """As many rows as the default workspace gives."""
        hidden, vocab = problem.hidden, shape.vocab
        plan = ChunkPlan.of(hidden, problem.weight, DEFAULT_WORKSPACE, kernel=True)
        count = next(iter(plan.chunks(shape.tokens, kept=False, store=store))).stop
        e = hidden.new_empty(count, pitch(vocab, torch.bfloat16))[:, :vocab] if store else None
        return Chunk(shape, hidden[:count], problem.weight, problem.target[:count], e)

    @property
    def case(self) -> str:
        """Its name."""
        return name_of(self.shape, self.e is not None)

    def predicted_as(self, impl: str) -> str | None:
        """The name in `roofline` of what an implementation does here."""
        whole = self.e is None and len(self.hidden) == self.shape.tokens
        return PREDICTED.get(impl) if whole else None


def check(chunk: Chunk, want: Tensor) -> tuple[dict[str, Callable[[], object]], list[Row]]:
    """What may be timed, the bare product and every tile that is right; and each tile's errors, or why it is out.

    Args:
        want: log-probs [T] float64.
    """
    logits = chunk.hidden.new_empty(len(chunk.hidden), chunk.shape.vocab)
    runs: dict[str, Callable[[], object]] = {
        BARE: functools.partial(torch.mm, chunk.hidden, chunk.weight.t(), out=logits)
    }
    runs[BARE]()
    rounding = 8 * 2**-23 * max(x.abs().item() for x in logits.aminmax())
    allowed = {"logprob_error": max(LOGPROB[DEVICE], rounding), "e_error": E_ROUNDING[DEVICE] + rounding}
    rows: list[Row] = []
    for name, tile in HERE.items():
        run = functools.partial(fused_odds, chunk.hidden, chunk.weight, None, chunk.target, 1.0, chunk.e, tile=tile)
        try:
            if chunk.e is not None:
                chunk.e.fill_(math.nan)  # what the tile before has left would be right
            found = errors(chunk, want, run())
            for metric, error in found.items():
                if not error <= allowed[metric]:
                    raise ArithmeticError(f"{metric} is {error:.1e} and may be {allowed[metric]:.1e}")
        except Exception as reason:  # of a compiler or a driver: the reason is the result
            rows.append(record.error_row(chunk.case, name, reason))
            continue
        for metric, error in found.items():
            rows += record.timing_rows(chunk.case, {name: [error]}, metric, UNITS[metric])
        runs[name] = run
    return runs, rows


def errors(chunk: Chunk, want: Tensor, found: RowOdds) -> dict[str, float]:
    """The worst log-prob's, in nats; and E's, relative: every row's sum against S, some rows' norm against float64."""
    logprob = (found.logprob.double() - want[: len(chunk.hidden)]).abs().max().item()
    if chunk.e is None:
        return {"logprob_error": logprob}
    sums = chunk.e.sum(1, dtype=torch.float32)
    off = ((sums - found.odds).abs() / found.odds.clamp_min(1e-30)).max()
    at = torch.linspace(0, len(sums) - 1, min(E_ROWS, len(sums)), device=sums.device).long()
    column = chunk.target[at, None]
    logits = chunk.hidden[at].double() @ chunk.weight.double().t()
    exact = (logits - logits.gather(1, column)).exp_().mul_(found.unit[at, None]).scatter_(1, column, 0.0)
    far = (chunk.e[at].double() - exact).norm(dim=1) / exact.norm(dim=1).clamp_min(1e-300)
    return {"logprob_error": logprob, "e_error": torch.maximum(off.double(), far.max()).item()}


def timings(chunk: Chunk, runs: Mapping[str, Callable[[], object]], rounds: int) -> list[Row]:
    """The times of all; what fails meanwhile is left out and says why. (What breaks the device fails everything.)"""
    failed: dict[str, Exception] = {}
    # what `ncu --profile-from-start off` sees
    with torch.cuda.profiler.profile() if DEVICE == "cuda" else contextlib.nullcontext():
        samples = record.interleaved(runs, rounds=rounds, clock=DEVICE, failed=failed)
    times = record.timing_rows(chunk.case, samples)
    count, (_, width, vocab) = len(chunk.hidden), chunk.shape
    for row in times:
        row |= {"shape": str(chunk.shape), "rows": count, "predicted_as": chunk.predicted_as(row["impl"])}
        row["tflops"] = 2 * count * width * vocab / row["median"] / 1e12
        if BARE in samples:
            row["floor_share"] = times[0]["median"] / row["median"]
    return times + [record.error_row(chunk.case, name, reason) for name, reason in failed.items()]


def winner(vocab: int, rows: list[Row]) -> str:
    """Of one case: the fastest tile, and the one that a call takes."""
    times = {row["impl"]: row["median"] for row in rows if row.get("metric") == "time" and row["impl"] in HERE}
    chosen = next(name for name, tile in HERE.items() if tile == tile_for(vocab, CARD))
    return f"{min(times, key=times.__getitem__)} wins; {chosen} is what a call takes" if times else "no tile ran"


def main() -> None:
    parser = record.parser(__doc__, "tiles")
    parser.add_argument("--shape", type=Shape.of, action="append", metavar="T,H,V", help="repeatable")
    parser.add_argument("--rounds", type=record.positive, default=ROUNDS[DEVICE], help="timed calls of each")
    given = parser.parse_args()
    if any(shape.hidden % 16 for shape in given.shape or []):
        parser.error("--shape: the fused GEMM takes an H that is a multiple of 16")
    warnings.filterwarnings("ignore", module=r"triton\.runtime\.interpreter")  # 0 / 0 that a select then drops
    shapes, path = given.shape or [DEFAULT_SHAPE[DEVICE]], given.output / f"tiles-{DEVICE}.json"
    if not HERE:
        *ours, this = (".".join(map(str, version)) for version in (*TILES, CARD))
        reason = f"the tiles are for compute capability {', '.join(ours)}; this card's is {this}"
        cases = [name_of(shape, store) for shape in shapes for store in (False, True)]
        record.write("tiles", [record.error_row(case, "wide", reason) for case in cases], path)
        print(reason)
        return
    rows: list[Row] = []
    for shape in shapes:
        problem = problems.make(*shape, dtype=DTYPE[DEVICE], device=DEVICE, nats=None)
        want = problems.truth(problem, problem.coefficient()).logprob
        for store in (False, True):
            chunk = Chunk.of(shape, problem, store)
            runs, checked = check(chunk, want)
            record.write("tiles", rows + checked, path)  # stays, whatever becomes of the device
            found = timings(chunk, runs, given.rounds) + checked
            rows += found
            record.write("tiles", rows, path)
            print(heads_report.table(chunk.case, found), winner(shape.vocab, found), sep="\n", flush=True)
    if not any(row["impl"] in HERE and row.get("metric") == "time" for row in rows):
        sys.exit("bench/tiles.py: no tile ran; the record says why")


if __name__ == "__main__":
    main()
