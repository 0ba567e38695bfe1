"""One update by ours with each saving switched on in turn, by TRL's and Liger's losses, and by a plain padded loop.

    OMP_NUM_THREADS=1 python bench/update_step.py     # counted, then timed
    python bench/update_step.py --only counted        # Qwen2.5's shapes, on any device: counted.json
    python bench/update_step.py --only timed          # a small model on a CPU, 1.5B on CUDA: <device>.json
    python bench/update_step.py --only timed --case 1.5B-P1024-30 --impl trl,shared --seconds 60
    python bench/update_step.py --only timed --shape 512,2048,16 --prompts 8
    python bench/update_step.py --table docs/benchmarks.md    # the committed counts between that file's markers, no run

What is counted, and how, stands in `update_count`. A micro-batch is eight sequences for the peers and as many
tokens as the cap allows for ours, so its tokens stand beside its bytes. Counts predict no time, and are a file of their
own because they do not depend on what they are made on.

Timed are whole updates with their optimizer step, one of each in turn, of one model and optimizer that all share. On
CUDA the memory plan chooses our token cap; what is out of memory tries again with half as much at once, and how much it
was is a row. Peak memory has weights, gradients and AdamW's moments in it. A peer's micro-batches are padded, sorted by
length and on the device beforehand; ours are packed in the time measured. TFLOP/s are those counted, of the same
micro-batches, over the time measured.
"""

from __future__ import annotations

import argparse
import gc
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

import pictures
import record
import update_step_report as report
from gapg.config import RunConfig
from gapg.model import attention
from gapg.model.memory import fitting_token_cap
from gapg.optim import clip_and_step, make_optimizer
from gapg.update import policy_update
from peers import updates
from record import Row
from update_cases import CASES, IMPLS, QWEN, REAL, SMALL, Case, own_case, parse_shape
from update_count import counted_rows, update_flops
from update_step_report import MARGINAL, OURS

COUNTED = record.RESULTS / "update_step" / "counted.json"
ROUNDS = {"cpu": 3, "cuda": 5}

Device = Literal["cpu", "cuda"]
Step = Callable[[], object]
Save = Callable[[list[Row]], object]


class Trainer:
    """The one model and optimizer with which all implementations update."""

    def __init__(self, case: Case, device: Device) -> None:
        torch.manual_seed(0)
        self.case, self.device = case, torch.device(device)
        make = AutoModelForCausalLM.from_config
        with self.device:
            self.model = make(case.model, attn_implementation=attention.NAME, dtype=torch.float32).train()
        self.optimizer = make_optimizer(self.model, self.config(OURS[0]).optim)
        for p in self.model.parameters():  # so that AdamW's moments are there before the first update
            p.grad = torch.zeros_like(p)
        clip_and_step(self.optimizer, 0.0, 1.0)

    def config(self, name: str) -> RunConfig:
        return self.case.config(name, "bfloat16" if self.device.type == "cuda" else "float32")

    def sizes(self, name: str) -> list[int]:
        """What to have in memory at once, most first: our token cap, or a peer's sequences in a micro-batch."""
        if name in updates.PEERS:
            return halves(updates.MICRO_BATCH, 1)
        return halves(self.token_cap, self.case.longest)

    @cached_property
    def token_cap(self) -> int:
        """Alike for all of ours: the plan's batch puts every position through the head, as the first of them does."""
        if self.device.type == "cpu":
            return self.case.token_cap
        return fitting_token_cap(self.model, self.config(OURS[0]), self.device)

    def step(self, name: str, size: int) -> Step:
        """One update by that implementation."""
        if name not in updates.PEERS:
            examples, table = self.case.data
            masked = None
            if name in MARGINAL:
                examples, masked = self.case.masked(name)
            config = self.config(name).model_copy(update={"token_cap": size})
            return lambda: policy_update(self.model, self.optimizer, config, 0, examples, table, masked=masked)
        batches = sorted(self.case.padded(size), key=lambda batch: -batch.ids.numel())
        return partial(self._peer_step, updates.PEERS[name], [b.tensors(lambda x: x.to(self.device)) for b in batches])

    def _peer_step(self, loss: Callable[[PreTrainedModel, updates.Padded], Tensor], batches: list[Any]) -> None:
        kind = self.device.type
        for batch in batches:
            with torch.autocast(kind, torch.bfloat16, enabled=kind == "cuda"):
                out = loss(self.model, batch)
            out.backward()
        clip_and_step(self.optimizer, updates.LR, 1.0)

    def release(self) -> None:
        """Gives back what others left, a failed update's gradients too."""
        self.model.zero_grad()
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()


def halves(most: int, least: int) -> list[int]:
    return [most >> i for i in range(most.bit_length()) if most >> i >= least]


def first_that_fits(trainer: Trainer, name: str) -> tuple[Step, int]:
    """A step that has made one update, and its size. Raises MemoryError, or whatever else it met."""
    sizes = trainer.sizes(name)
    for size in sizes:
        trainer.release()
        step = trainer.step(name, size)
        try:
            step()
            return step, size
        except Exception as error:
            if not out_of_memory(error):
                raise
    raise MemoryError(f"out of memory, with {metric_of(name)[0]} at {sizes[-1]} too")


def out_of_memory(error: Exception) -> bool:
    """PyTorch's own error, or what drivers and libraries say in theirs."""
    text = str(error).lower()
    return isinstance(error, torch.OutOfMemoryError) or "out of memory" in text or "alloc_failed" in text


def metric_of(name: str) -> tuple[str, str]:
    """Metric and unit of an implementation's size."""
    return report.SEQUENCES if name in updates.PEERS else report.TOKEN_CAP


@dataclass
class Timing:
    """What is known of a case so far, by implementation."""

    case: Case
    sizes: dict[str, int] = field(default_factory=dict)
    peaks: dict[str, int] = field(default_factory=dict)
    seconds: dict[str, list[float]] = field(default_factory=dict)
    flops: dict[str, float] = field(default_factory=dict)
    errors: list[Row] = field(default_factory=list)

    @contextmanager
    def reasons(self, name: str) -> Iterator[None]:
        """A peer may raise anything: the reason is its result, and is kept without the error, whose traceback holds
        tensors."""
        try:
            yield
        except Exception as error:
            self.errors.append(record.error_row(str(self.case), name, error))

    def rows(self) -> list[Row]:
        values: dict[tuple[str, str], dict[str, list[float]]] = {
            ("time", "s"): self.seconds,
            ("given tokens/s", "tokens/s"): {n: [self.case.given / s for s in x] for n, x in self.seconds.items()},
            (report.WORK, "TFLOP/s"): {
                n: [f / s / 1e12 for s in self.seconds[n]] for n, f in self.flops.items() if n in self.seconds
            },
            ("peak memory", "B"): {n: [float(x)] for n, x in self.peaks.items()},
        }
        for name, size in self.sizes.items():
            values.setdefault(metric_of(name), {})[name] = [float(size)]
        found = (record.timing_rows(str(self.case), x, metric, unit) for (metric, unit), x in values.items())
        return [*chain.from_iterable(found), *self.errors]


def time_case(
    case: Case, save: Save, *, impls: Sequence[str], device: Device, rounds: int, seconds: float | None
) -> None:
    """Tries every implementation once, then times one call of each a round; no round begins after so many seconds.

    The host waits after every call: some run ahead of the device and some do not, and all are to pay for their own work
    on the host. `save` gets the case's rows after every trial and round, and once more however this ends.
    """
    timing, trainer = Timing(case), Trainer(case, device)
    steps: dict[str, Step] = {}
    try:
        for name in record.progress(impls, f"trying each: {case}"):
            with timing.reasons(name):
                steps[name], timing.sizes[name] = first_that_fits(trainer, name)
                if device == "cuda":
                    timing.peaks[name] = torch.cuda.max_memory_allocated()
            save(timing.rows())
        trainer.release()
        for name in steps:
            with timing.reasons(name):  # without its count it is timed all the same
                timing.flops[name] = update_flops(case, name, timing.sizes[name])
        begin = time.perf_counter()
        for done in range(rounds):
            if done and seconds is not None and time.perf_counter() - begin >= seconds:
                break
            for name in list(steps):
                step = {name: steps.pop(name)}
                with timing.reasons(name):
                    found = record.interleaved(step, rounds=1, clock=device, warm=False)
                    timing.seconds.setdefault(name, []).extend(found[name])
                    steps |= step
                if name not in steps:
                    trainer.release()
            save(timing.rows())
    finally:
        save(timing.rows())


# --- run -------------------------------------------------------------------------------------------------------------


def measure(cases: list[Case], each: Callable[[Case, Save], object], path: Path, show: Callable[..., str]) -> None:
    """Case by case into the file at ``path``; drawn beside it and shown at the end, however that comes."""
    kept: list[Row] = []
    rows: list[Row] = []

    def save(found: list[Row]) -> None:
        rows[:] = [*kept, *found]
        if rows:
            record.write("update_step", rows, path)

    try:
        for case in cases:
            each(case, save)
            kept = list(rows)
            print(case, file=sys.stderr, flush=True)
    finally:
        pictures.grid(report.panels(rows), path.with_suffix(".png"), "One update")
        print(show(rows), flush=True)


def parse() -> argparse.Namespace:
    parser = record.parser(__doc__, "update_step")
    parser.add_argument("--only", choices=("counted", "timed"), help="one part; both by default")
    which = parser.add_mutually_exclusive_group()
    names, shape = f"of {', '.join(CASES)}", "tokens of a prompt, of a mean response; samples"
    which.add_argument("--case", type=record.pick(CASES), action="extend", metavar="NAMES", help=names)
    which.add_argument("--shape", type=parse_shape, metavar="P,R,G", help=shape)
    parser.add_argument("--prompts", type=record.positive, help="other than the case's")
    impls = "parts of names, as in trl,shared"
    parser.add_argument("--impl", type=record.pick(IMPLS), action="extend", metavar="NAMES", help=impls)
    parser.add_argument("--rounds", type=record.positive, help="updates of each; 3 on a CPU, 5 on CUDA")
    parser.add_argument("--seconds", type=float, help="no round begins after so many, a case")
    parser.add_argument("--table", type=Path, metavar="FILE", help="draw the committed counts into it, and stop")
    given = parser.parse_args()
    if given.table:
        with record.refusing(parser):
            text = report.counted_table(record.read(COUNTED)["rows"], updates.PEERS)
            record.draw_between(given.table, report.MARKERS, text)
        parser.exit()
    return given


def main() -> None:
    given = parse()
    device: Device = "cuda" if torch.cuda.is_available() else "cpu"
    attention.register()
    impls = [name for name in IMPLS if name in (given.impl or IMPLS)]
    chosen = [CASES[key] for key in dict.fromkeys(given.case or ())]
    chosen += [own_case(given.shape, device)] if given.shape else []

    def cases(usual: list[Case]) -> list[Case]:
        return [replace(case, prompts=given.prompts or case.prompts) for case in chosen or usual]

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # how a time limit ends it: what is measured is still drawn
    if given.only != "timed":
        counts = partial(report.counts, peers=updates.PEERS)
        path = given.output / "counted.json"
        measure(cases(REAL), lambda case, save: save(counted_rows(case, impls)), path, counts)
    if given.only != "counted":
        usual = SMALL if device == "cpu" else [case for case in REAL if case.model is QWEN["1.5B"]]
        rounds = given.rounds or ROUNDS[device]
        each = partial(time_case, impls=impls, device=device, rounds=rounds, seconds=given.seconds)
        measure(cases(usual), each, given.output / f"{device}.json", report.summary)


if __name__ == "__main__":
    main()
