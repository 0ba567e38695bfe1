"""Which tile of the fused GEMM is the fastest at a shape: every tile of the table beside a bare product, in one run.

    python bench/tiles.py                                            # (16384, 2048, 151936) on this machine's GPU
    python bench/tiles.py --shape 4096,896,151936 --shape 8192,4096,128256   # yours

Two cases a shape: forward only, and with E stored for a backward; each for the first chunk of rows that the default
workspace gives. `torch.mm` is the same product in bfloat16 into a tensor that is there already. A tile's time includes
the small launches before and after its GEMM. Errors are the worst log-prob's against float64. The kernels are for
compute capability 9.0; on a CPU they run in Triton's interpreter, in float32, where a time says nothing about a GPU's.
Results go to bench/results/tiles/, or to the folder given as --output. To make a winner the choice for its V, change
`gapg.kernels.odds_gemm.tile_for`.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import math
import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Literal

if not __package__:  # run as a script: `kernels.py` beside it would shadow Hugging Face's package `kernels`
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import torch
from torch import Tensor

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # heeded only before triton is imported, which the next lines do

from bench import problems, record
from bench.problems import Problem
from bench.record import Row
from bench.roofline_designs import Shape
from gapg.kernels.chunks import DEFAULT_WORKSPACE, ChunkPlan, pitch
from gapg.kernels.head import KERNEL_CAPABILITY
from gapg.kernels.odds_gemm import TILES, fused_odds, tile_for

DEVICE: Literal["cuda", "cpu"] = "cuda" if torch.cuda.is_available() else "cpu"
RESULTS = record.ROOT / "bench" / "results" / "tiles"
DEFAULT_SHAPE = {"cuda": Shape(16_384, 2_048, 151_936), "cpu": Shape(160, 80, 600)}
ROUNDS = {"cuda": 20, "cpu": 1}
DTYPE = {"cuda": torch.bfloat16, "cpu": torch.float32}  # the interpreter's bfloat16 products are wrong
BARE = "torch.mm"


def name_of(shape: Shape, store: bool) -> str:
    """The case, as its rows are labelled."""
    where = "" if DEVICE == "cuda" else ", cpu (Triton's interpreter)"
    return f"{shape} {'forward, E stored' if store else 'forward only'}{where}"


def measure(shape: Shape, problem: Problem, want: Tensor, store: bool, rounds: int) -> list[Row]:
    """Times and errors of every tile, and the bare product's time; ``want``: log-probs [T] float64."""
    case, weight = name_of(shape, store), problem.weight
    plan = ChunkPlan.of(problem.hidden, weight, DEFAULT_WORKSPACE, kernel=True)
    count = next(iter(plan.chunks(shape.tokens, kept=False, store=store))).stop
    hidden, target = problem.hidden[:count], problem.target[:count]
    logits = hidden.new_empty(count, shape.vocab)
    e = hidden.new_empty(count, pitch(shape.vocab, torch.bfloat16))[:, : shape.vocab] if store else None
    timed: dict[str, Callable[[], object]] = {BARE: functools.partial(torch.mm, hidden, weight.t(), out=logits)}
    rows: list[Row] = []
    for name, tile in TILES.items():
        run = functools.partial(fused_odds, hidden, weight, None, target, 1.0, e, tile=tile)
        try:
            error = (run().logprob.double() - want[:count]).abs().max().item()
            if not math.isfinite(error):
                raise ArithmeticError("a log-prob is not finite")
        except Exception as reason:  # of a compiler or a driver: the reason is the result
            rows.append(record.error_row(case, name, reason))
            continue
        rows += record.timing_rows(case, {name: [error]}, "logprob_error", "nats")
        timed[name] = run
    marked = torch.cuda.profiler.profile() if DEVICE == "cuda" else contextlib.nullcontext()
    with marked:  # what `ncu --profile-from-start off` sees
        times = record.timing_rows(case, record.interleaved(timed, rounds=rounds, clock=DEVICE))
    for row in times:
        row |= {"shape": str(shape), "rows": count}
        row["tflops"] = 2 * count * shape.hidden * shape.vocab / row["median"] / 1e12
        row["floor_share"] = times[0]["median"] / row["median"]
    return times + rows


def table(shape: Shape, case: str, rows: list[Row]) -> str:
    """One case: a line an implementation, the fastest first, and the winner of the tiles."""
    times = sorted((row for row in rows if row.get("metric") == "time"), key=lambda row: row["median"])
    errors = {row["impl"]: row["median"] for row in rows if row.get("metric") == "logprob_error"}
    lines = [
        "",
        case,
        f"{'':10}" + "".join(f"{head:>10}" for head in ("ms", "p20", "p80", "TFLOP/s", "of bare", "logprob")),
    ]
    for row in times:
        cells = [f"{row[key] * 1e3:10.2f}" for key in ("median", "p20", "p80")]
        cells += [f"{row['tflops']:10.2f}", f"{row['floor_share']:10.3f}"]
        cells += [f"{errors[row['impl']]:10.1e}"] if row["impl"] in errors else []
        lines.append(f"{row['impl']:10}{''.join(cells)}")
    lines += [f"{row['impl']:10}  {row['error']}" for row in rows if "error" in row]
    tiles = [row["impl"] for row in times if row["impl"] != BARE]
    chosen = next(name for name, tile in TILES.items() if tile == tile_for(shape.vocab))
    return "\n".join([*lines, *(f"{name} wins; {chosen} is what a call takes" for name in tiles[:1])])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", type=Shape.of, action="append", metavar="T,H,V", help="repeatable")
    parser.add_argument("--rounds", type=int, default=ROUNDS[DEVICE], help="timed calls of each")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder for the JSON")
    given = parser.parse_args()
    if any(shape.hidden % 16 for shape in given.shape or []):
        parser.error("--shape: the fused GEMM takes an H that is a multiple of 16")
    warnings.filterwarnings("ignore", module=r"triton\.runtime\.interpreter")  # 0 / 0 that a select then drops
    shapes, path = given.shape or [DEFAULT_SHAPE[DEVICE]], given.output / f"tiles-{DEVICE}.json"
    if DEVICE == "cuda" and (capability := torch.cuda.get_device_capability()) != KERNEL_CAPABILITY:
        ours, this = (".".join(map(str, version)) for version in (KERNEL_CAPABILITY, capability))
        reason = f"the tiles are for compute capability {ours}; this card's is {this}"
        cases = [name_of(shape, store) for shape in shapes for store in (False, True)]
        record.write("tiles", [record.error_row(case, name, reason) for case in cases for name in TILES], path)
        print(reason)
        return
    rows: list[Row] = []
    for shape in shapes:
        problem = problems.make(*shape, dtype=DTYPE[DEVICE], device=DEVICE, nats=None)
        want = problems.truth(problem, problem.coefficient()).logprob
        for store in (False, True):
            found = measure(shape, problem, want, store, given.rounds)
            rows += found
            record.write("tiles", rows, path)  # what is measured stays, whatever happens to the next case
            print(table(shape, name_of(shape, store), found), flush=True)


if __name__ == "__main__":
    main()
