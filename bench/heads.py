"""The fused head against every peer: time, share of the floor, peak memory and error against float64, in one run.

    python bench/heads.py                       # on this machine's GPU, or small shapes on the CPU
    python bench/heads.py --shape 8192,4096,128256 --case train,forward --impl gapg,quack   # yours, beside one peer
    python bench/heads.py --case train,low --workspace 256 --name small     # ours in 256 MiB, into small-*.json
    python bench/heads.py --only-errors         # errors over a ladder of entropies, without timing
    python bench/heads.py --table docs/benchmarks.md    # the committed errors between that file's markers, no run

The floor of a case is the time of the bare products it cannot do without (torch.mm, preallocated, whole T at once) in
the same run. Times are medians of round-robin calls, by device events or, on a CPU, in processor time. What a peer
computes, and whether it is the same thing, stands in `peers.losses`.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import gc
import math
import os
import signal
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler would say so each time it starts and stops

import torch
from torch import Tensor

import heads_report
import problems
import record
from peers import losses
from peers.losses import Outcome, Peer
from problems import Problem, Truth
from record import Row
from roofline_designs import SHAPES, Shape

RESULTS = record.RESULTS / "kernels"
DEVICE: Literal["cuda", "cpu"] = "cuda" if torch.cuda.is_available() else "cpu"

CPU_SHAPE = Shape(256, 256, 8_192)
ERROR_SHAPES = {"cpu": Shape(192, 512, 16_384), "cuda": Shape(2_048, 2_048, 151_936)}
ROUNDS = {"cpu": 5, "cuda": 11}
SLOW, SLOW_ROUNDS = 5, 3
"""What takes more than this many times the floor is called this often only."""

PEAKED = 0.35
"""nats: a policy well into its training"""

FORWARDS = {
    heads_report.FLOOR: "bare GEMM, forward",
    "gapg linear_logprob": "ours, forward only",
    "Liger scaled cross entropy": "Liger, sm_90, forward only",
}
"""Names in `roofline` of what is timed forward only."""


@dataclass(frozen=True)
class Case:
    """``nats``: None for random logits. ``zero``: every second prompt has advantage 0. ``cold``: L2 is emptied.
    ``low``: bfloat16 on a CPU too, where nobody trains in 16 bits."""

    shape: Shape
    nats: float | None = None
    zero: bool = False
    trained: bool = True
    cold: bool = False
    forward: bool = False
    low: bool = False

    def __str__(self) -> str:
        parts = ["random" if self.nats is None else f"{self.nats} nats"]
        parts += ["half the rows zero"] * self.zero + ["frozen weight"] * (not self.trained)
        parts += ["cold L2"] * self.cold + ["forward only"] * self.forward + ["bfloat16"] * self.low
        return f"{self.shape} {', '.join(parts)}"

    @property
    def products(self) -> int:
        """GEMMs of 2THV flops that nothing can leave out."""
        return 1 if self.forward else 2 + self.trained

    def predicted_as(self, impl: str, peer: Peer | None) -> str | None:
        """The name in `roofline` of what a peer, or without one the bare products, does in this case."""
        if self.nats is not None or self.cold or self.low:
            return None
        if self.forward:
            return FORWARDS.get(impl)
        if peer is not None and peer.predicted_as == "ours":
            return "ours, half the rows zero" if self.zero else "ours" if self.trained else "ours, frozen weight"
        if self.zero or not self.trained:
            return None
        if peer is None:
            return "bare GEMMs, 3"
        stores_logits = peer.predicted_as == "quack, scaled exp" and self.shape.vocab % 128
        return "logits, then d(logits)" if stores_logits else peer.predicted_as


CASES: dict[str, dict[str, Any]] = {
    "train": {},
    "forward": {"forward": True},
    "peaked": {"nats": PEAKED},
    "zero": {"zero": True},
    "frozen": {"trained": False},
    "cold": {"cold": True},
    "low": {"low": True},
}
"""What `--case` names."""


def cases(shapes: Sequence[Shape], names: Sequence[str]) -> list[Case]:
    """What is timed: the named cases at every shape; by default all of them at the first, train and forward at others.

    (An empty L2 means nothing on a CPU, nor bfloat16 on a card that always has it: there the default leaves them out.)
    """
    first, *others = shapes or ([CPU_SHAPE] if DEVICE == "cpu" else [*SHAPES[1:], SHAPES[0]])
    if names:
        return [Case(shape, **CASES[name]) for shape in (first, *others) for name in names]
    everything = [name for name in CASES if name not in ("cold", "low") or (DEVICE == "cuda" and name == "cold")]
    found = [Case(first, **CASES[name]) for name in everything]
    return found + [Case(shape, **CASES[name]) for shape in others for name in ("train", "forward")]


# --- one case --------------------------------------------------------------------------------------------------------


def measure(case: Case, chosen: Sequence[Peer]) -> list[Row]:
    """Errors, peak memory and times of every peer, and of the bare products."""
    dtype = torch.bfloat16 if DEVICE == "cuda" or case.low else torch.float32
    problem = problems.make(*case.shape, dtype=dtype, device=DEVICE, nats=case.nats, zero_groups=case.zero)
    name, rows, truths = str(case), list[Row](), dict[str, Truth]()
    timed: dict[str, Callable[[], object]] = {heads_report.FLOOR: bare(problem, case)}
    peers = {
        peer.name: peer
        for peer in chosen
        if (case.trained or not peer.trained_only) and (peer.load is not None or not case.forward)
    }
    for peer in record.progress(list(peers.values()), f"trying each peer: {case}"):
        try:
            run = peer.forward(problem) if case.forward else peer.prepare(problem, case.trained)
            found = error_rows(name, peer, run(), problem, truths)
            rows += found + record.timing_rows(name, {peer.name: [float(peak_bytes(run))]}, "peak_memory", "B")
            timed[peer.name] = run
        except Exception as error:  # a peer may raise anything: its reason is the result
            rows.append(record.error_row(name, peer.name, error))
            release()
    failed: dict[str, Exception] = {}
    times = record.timing_rows(name, timings(timed, flush() if case.cold else None, failed))
    lost = timed.keys() if heads_report.FLOOR in failed else failed.keys()  # a peer's illegal access fails all others
    rows = [row for row in rows if row["impl"] not in lost]
    rows += [record.error_row(name, impl, error) for impl, error in failed.items()]
    if heads_report.FLOOR in failed:
        return rows
    live = int(problem.coefficient().count_nonzero())
    flops = 2 * case.products * live * case.shape.hidden * case.shape.vocab
    for row in times:
        row |= {"shape": str(case.shape), "tflops": flops / row["median"] / 1e12}
        row["floor_share"] = times[0]["median"] / row["median"]
        peer = peers.get(row["impl"])
        row |= {"predicted_as": case.predicted_as(row["impl"], peer)} | ({"computes": peer.computes} if peer else {})
    return times + rows


def timings(
    timed: dict[str, Callable[[], object]], before: Callable[[], object] | None, failed: dict[str, Exception]
) -> dict[str, list[float]]:
    """Seconds by implementation, the bare products first. One call of each decides which are slow."""
    clocked = functools.partial(record.interleaved, clock=DEVICE, before=before, failed=failed)
    once = clocked(timed, rounds=1)
    if heads_report.FLOOR in failed:
        return {}
    slow = {name for name, (seconds,) in once.items() if seconds > SLOW * once[heads_report.FLOOR][0]}
    found: dict[str, list[float]] = {}
    for group, rounds in ((once.keys() - slow, ROUNDS[DEVICE]), (slow, SLOW_ROUNDS)):
        found |= clocked({name: timed[name] for name in once if name in group}, rounds=rounds, warm=False)
    return found


def bare(problem: Problem, case: Case) -> Callable[[], object]:
    """The products alone, in the inputs' type, on the rows whose coefficient is not 0."""
    rows = problem.coefficient().nonzero()[:, 0]
    hidden, weight = problem.hidden[rows].contiguous(), problem.weight
    logits = hidden.new_empty(len(rows), len(weight))
    grad_hidden, grad_weight = torch.empty_like(hidden), torch.empty_like(weight)

    def run() -> None:
        torch.mm(hidden, weight.t(), out=logits)
        if not case.forward:
            torch.mm(logits, weight, out=grad_hidden)
        if not case.forward and case.trained:
            torch.mm(logits.t(), hidden, out=grad_weight)

    return run


def error_rows(case: str, peer: Peer, found: Outcome | Tensor, problem: Problem, truths: dict[str, Truth]) -> list[Row]:
    """Relative errors of the gradients, and the worst error of a log-prob among rows that have a coefficient.

    ``truths``: those of the problem that are known, by what a peer computes; the one that is missing is added.
    """
    if peer.computes not in truths:
        truths[peer.computes] = problems.truth(problem, peer.coefficient(problem))
    truth = truths[peer.computes]
    errors: dict[str, tuple[float, str]] = {}
    logprob = found if isinstance(found, Tensor) else found.logprob
    if not isinstance(found, Tensor):
        errors["dH_error"] = (problems.error(found.hidden, truth.hidden), "1")
        if found.weight is not None:
            errors["dW_error"] = (problems.error(found.weight, truth.weight), "1")
    if logprob is not None:
        live = slice(None) if isinstance(found, Tensor) else peer.coefficient(problem) != 0
        errors["logprob_error"] = ((logprob.double() - truth.logprob)[live].abs().max().item(), "nats")
    wrong = [name for name, (value, _) in errors.items() if not math.isfinite(value)]
    if wrong:
        raise ArithmeticError(f"{', '.join(wrong)} is not finite")
    return [
        row | {"entropy": truth.entropy, "computes": peer.computes}
        for name, (value, unit) in errors.items()
        for row in record.timing_rows(case, {peer.name: [value]}, name, unit)
    ]


def peak_bytes(run: Callable[[], object]) -> int:
    """The most bytes alive during a call beyond those alive before it, its results included.

    CUDA: torch.cuda.max_memory_allocated. CPU: every event of PyTorch's CPU allocator, from its profiler, which sees
    inside custom operators too, but not the scratch that BLAS libraries allocate themselves.
    """
    gc.collect()
    if DEVICE == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        result = run()
    del result
    now = most = 0
    events = profile.profiler.kineto_results.events()
    for event in sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most


def release() -> None:
    """Give back what a failed peer left."""
    gc.collect()
    if DEVICE == "cuda":
        with contextlib.suppress(RuntimeError):  # a device that a peer has broken refuses this too
            torch.cuda.empty_cache()


def flush() -> Callable[[], object]:
    """Overwrites twice the L2."""
    size = torch.cuda.get_device_properties(0).L2_cache_size
    return torch.empty(2 * size, dtype=torch.int8, device="cuda").zero_


def ceilings() -> list[Row]:
    """What this card reaches on one large product and one large copy: the two rates every prediction rests on."""
    a, b, c = (torch.randn(8192, 8192, dtype=torch.bfloat16, device="cuda") for _ in range(3))
    source = torch.randint(-128, 127, (4 << 30,), dtype=torch.int8, device="cuda")
    target = torch.empty_like(source)
    work = {"product of 8192^3, bf16": (2 * 8192**3, "FLOP/s"), "copy of 4 GiB": (2 * source.numel(), "B/s")}
    calls = (lambda: torch.mm(a, b, out=c)), (lambda: target.copy_(source))
    samples = record.interleaved(dict(zip(work, calls, strict=True)), rounds=20, clock="cuda")
    rates = {name: [work[name][0] / seconds for seconds in values] for name, values in samples.items()}
    return [row for name in work for row in record.timing_rows("ceiling", {name: rates[name]}, "rate", work[name][1])]


def ladder(peers: Sequence[Peer], shape: Shape, path: Path) -> list[Row]:
    """Errors of bf16 heads, entropy by entropy; what is known is in the file at ``path`` after each."""
    rows: list[Row] = []
    for nats in record.progress(problems.LADDER, "errors by entropy"):
        problem = problems.make(*shape, dtype=torch.bfloat16, device=DEVICE, nats=nats)
        case, truths = f"{nats} nats", dict[str, Truth]()
        for peer in peers:
            try:
                rows += error_rows(case, peer, peer.prepare(problem, True)(), problem, truths)
            except Exception as error:  # as above
                rows.append(record.error_row(case, peer.name, error))
                release()
        record.write("kernels: errors by entropy", rows, path)
    return rows


# --- run -------------------------------------------------------------------------------------------------------------


def arguments() -> argparse.Namespace:
    parser = record.parser(__doc__, "kernels")
    everyone = {peer.name: peer for peer in [*losses.PEERS, losses.DESIGN]}
    parser.add_argument("--name", default="kernels", help="of the record of times, NAME-cpu.json or NAME-cuda.json")
    parser.add_argument("--workspace", type=int, default=2048, metavar="MIB", help="what ours may take for [T, V]")
    parser.add_argument("--shape", type=Shape.of, action="append", metavar="T,H,V", help="repeatable")
    parser.add_argument("--case", type=record.pick(CASES), metavar="NAMES", help=f"of {', '.join(CASES)}")
    parser.add_argument("--impl", type=record.pick(everyone), metavar="NAMES", help="parts of names, as in gapg,eager")
    parser.add_argument("--only-errors", action="store_true", help="errors over the ladder of entropies, no timing")
    parser.add_argument("--table", type=Path, metavar="FILE", help="draw the committed CPU's errors into it, and stop")
    given = parser.parse_args()
    if given.table:
        with record.refusing(parser):
            text = heads_report.error_table(record.read(RESULTS / "errors-cpu.json")["rows"])
            record.draw_between(given.table, heads_report.MARKERS, text)
        parser.exit()
    usual = [peer.name for peer in losses.PEERS] + [losses.DESIGN.name] * given.only_errors
    everyone |= {peer.name: peer for peer in losses.ours(given.workspace << 20)}
    given.peers = [everyone[name] for name in given.impl or usual]
    return given


def main() -> None:
    given = arguments()
    warnings.filterwarnings("ignore", module="trl|torch._inductor|torch.profiler")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # how a time limit ends it: what is measured is still drawn
    if given.only_errors:
        shape = given.shape[0] if given.shape else ERROR_SHAPES[DEVICE]
        rows = ladder(given.peers, shape, given.output / f"errors-{DEVICE}.json")
        print(heads_report.error_table(rows))
        sys.exit(heads_report.ours_failed(rows))
    path = given.output / f"{given.name}-{DEVICE}.json"
    rows = ceilings() if DEVICE == "cuda" else []
    try:
        for case in cases(given.shape or [], given.case or []):
            found = measure(case, given.peers)
            rows += found
            record.write("kernels", rows, path)  # what is measured stays, whatever happens to the next case
            print(heads_report.table(str(case), found), flush=True)
            release()
    finally:
        if path.exists():
            heads_report.plot(record.read(path), path.with_suffix(".png"))
            print(heads_report.summary(rows))
    sys.exit(heads_report.ours_failed(rows))


if __name__ == "__main__":
    main()
