"""One update by ours with each saving switched on in turn, by TRL's and Liger's losses, and by a plain padded loop.

    OMP_NUM_THREADS=1 python bench/update_step.py     # counted, then timed
    python bench/update_step.py --only counted        # Qwen2.5's shapes, on any device: counted.json
    python bench/update_step.py --only timed          # a small model on a CPU, 1.5B on CUDA: <device>.json
    python bench/update_step.py --table README.md     # the counts as Markdown, between the markers in that file

Counted on fake tensors under autocast: flops of matrix products (PyTorch's FlopCounterMode) and of attention (whole
squares of the lengths attended to, two products forward and five backward, alike for all), and the most bytes alive in
the largest micro-batch beside weights and their gradients; of one layer and of two, from which the rest follows. A
micro-batch is eight sequences for the peers and as many tokens as the cap allows for ours, so its tokens stand beside
its bytes. What an operator holds inside itself is not in them, but for our fused loss, whose workspace is known from
its source; attention is a fused operator for all. Counts predict no time, and are a file of their own because they do
not depend on what they are made on. Results are in bench/results/update_step.
"""

from __future__ import annotations

import argparse
import functools
import random
import sys
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, NamedTuple

if not __package__:  # run as a script: bench/kernels.py would shadow Hugging Face's package `kernels`
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedConfig, PreTrainedModel, Qwen2Config

from bench import record
from bench import update_step_report as report
from bench.peers import updates
from bench.record import Row
from gapg import attention
from gapg.batching import Example, PackedBatch, packed_batches
from gapg.config import RunConfig, load_config
from gapg.kernels import flash
from gapg.kernels.policy_loss import PolicyLossOptions, group_advantages
from gapg.memory_trace import head_bytes
from gapg.optim import clip_and_step, make_optimizer
from gapg.policy import response_loss
from gapg.update import policy_update, with_gradient

RESULTS = record.ROOT / "bench" / "results" / "update_step"
SETTINGS = ("pack", "response_positions", "skip_zero_advantage", "share_prompts")
OURS = ("gapg, no saving", "+ packing", "+ response positions", "+ zero-advantage skipping", "+ shared prompt")
"""Each has its saving and those before it."""
ATTENTION = ("attention", "bmm")  # bmm: of scores where there is no fused kernel

VOCAB = 151_936
QWEN = {
    name: Qwen2Config(
        vocab_size=VOCAB, hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=2, tie_word_embeddings=True,
    )
    for name, hidden, inner, layers, heads in (
        ("0.5B", 896, 4864, 24, 14), ("1.5B", 1536, 8960, 28, 12), ("3B", 2048, 11_008, 36, 16),
    )
}  # fmt: skip
TOY = LlamaConfig(
    vocab_size=2048, hidden_size=128, intermediate_size=384, num_hidden_layers=3, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=4096, pad_token_id=0,
)  # fmt: skip


@dataclass(frozen=True)
class Case:
    """`prompts` groups of `samples` responses of lognormal lengths; `equal`: the part whose rewards are all equal."""

    name: str
    model: PreTrainedConfig
    prompt: int
    equal: float
    prompts: int = 32
    samples: int = 8
    response: int = 256
    token_cap: int = 16_384

    def __str__(self) -> str:
        shape = f"{self.prompts} x P={self.prompt} mean R={self.response} G={self.samples}"
        return f"{self.name}, {shape}, {self.equal:.0%} all equal"

    def data(self) -> tuple[list[Example], Tensor]:
        draw, sigma = random.Random(0), 0.6
        table = torch.tensor([[0.0, 1.0] * (self.samples // 2)] * self.prompts)
        table[: round(self.equal * self.prompts)] = 1.0
        vocab, examples = self.model.vocab_size, []
        for group in range(self.prompts):
            prompt = [draw.randrange(1, vocab) for _ in range(self.prompt)]
            for sample in range(self.samples):
                length = round(self.response * draw.lognormvariate(-(sigma**2) / 2, sigma))
                length = min(max(length, 1), 4 * self.response)
                ids = [draw.randrange(1, vocab) for _ in range(length)]
                examples.append(Example(prompt, ids, rollout_logprobs=[-1.0] * length, group=group, sample=sample))
        return examples, table

    def config(self, savings: int, dtype: str = "bfloat16") -> RunConfig:
        on = [i < savings for i in range(len(SETTINGS))]
        values = [str(x).lower() for x in on[:3]] + ["always" if on[3] else "never"]
        switches = {f"update.{name}": value for name, value in zip(SETTINGS, values, strict=True)}
        return load_config("quickstart", {"token_cap": str(self.token_cap), "model.dtype": dtype, **switches})

    def batches(self, savings: int) -> list[PackedBatch]:
        """As `policy_update` makes them."""
        examples, table = self.data()
        config = self.config(savings)
        return packed_batches(
            with_gradient(config, examples, table), config.token_cap, torch.device("cpu"), share=savings > 3,
            padded=not config.update.pack, every_position=not config.update.response_positions,
        )  # fmt: skip

    def padded(self) -> list[updates.Padded]:
        examples, table = self.data()
        advantages = group_advantages(table)
        weights = [float(advantages[e.group, e.sample]) for e in examples]
        return list(updates.padded(examples, weights, float(table.numel())))


REAL = [Case(name, QWEN[name], p, equal) for name in QWEN for p in (256, 1024) for equal in (0.0, 0.3)]
SMALL = [Case("toy", TOY, p, equal, prompts=4, response=64, token_cap=2048) for p in (64, 128) for equal in (0.0, 0.5)]


# --- counted ---------------------------------------------------------------------------------------------------------


def counted_rows(case: Case) -> list[Row]:
    """flops of the whole update and bytes of its largest micro-batch, by implementation."""
    rows: list[Row] = []
    given = sum(map(len, case.data()[0]))
    for savings, name in enumerate(OURS):
        batches = case.batches(savings)
        computed = sum(b.input_ids.numel() for b in batches)
        rows += _count(case, name, batches, _loss_of_ours, attention.NAME, _pairs)
        rows += record.timing_rows(str(case), {name: [float(computed)]}, "tokens computed", "tokens")
        rows += record.timing_rows(str(case), {name: [float(given)]}, "tokens given", "tokens")
    for name, loss in updates.PEERS.items():
        parts = case.padded()
        seen = sum(int(b.mask.sum()) for b in parts)
        try:
            rows += _count(case, name, parts, loss, "sdpa", lambda b: b.ids.numel() * b.ids.shape[1])
        except Exception as error:
            rows.append(record.error_row(str(case), name, error))
            continue
        computed = sum(map(_tokens, parts))
        rows += record.timing_rows(str(case), {name: [float(computed)]}, "tokens computed", "tokens")
        rows += record.timing_rows(str(case), {name: [float(seen)]}, "tokens given", "tokens")
    return rows


def _tokens(batch: PackedBatch | updates.Padded) -> int:
    return batch.input_ids.numel() if isinstance(batch, PackedBatch) else batch.ids.numel()


def _count(
    case: Case, name: str, batches: list[Any], loss: Callable[[PreTrainedModel, Any], Tensor], implementation: str,
    pairs: Callable[[Any], int],
) -> list[Row]:  # fmt: skip
    shape = case.model
    layers, width = shape.num_hidden_layers, shape.hidden_size
    largest = max(batches, key=_tokens)
    one, two = (_run(case, n, largest, loss, implementation) for n in (1, 2))
    layer, head = two.flops - one.flops, 2 * one.flops - two.flops
    tokens, rows = (sum(map(part, batches)) / part(largest) for part in (_tokens, lambda b: _rows(loss, b)))
    products = head * rows + layers * layer * tokens
    squares = 14 * layers * width * sum(map(pairs, batches))
    found = {
        "flops": (products + squares, "flop"),
        "bytes": (max(extended(one.peaks, two.peaks, layers)), "B"),
        "tokens of the micro-batch": (_tokens(largest), "tokens"),
    }
    return [r for m, (x, unit) in found.items() for r in record.timing_rows(str(case), {name: [float(x)]}, m, unit)]


class Run(NamedTuple):
    """What was counted of one micro-batch."""

    flops: int
    """of all products but attention's: linear in the tokens below the head, in the head's rows, and in the layers"""
    peaks: tuple[int, ...]
    """the most bytes alive before the embedding's gradient, and from there on, when the layers' are gone: linear in the
    layers each, which the larger of the two is not"""


def extended(one: Sequence[int], two: Sequence[int], layers: int) -> list[int]:
    """What so many layers have, of what is linear in them."""
    return [a + (layers - 1) * (b - a) for a, b in zip(one, two, strict=True)]


def _rows(loss: Callable[[PreTrainedModel, Any], Tensor], batch: PackedBatch | updates.Padded) -> int:
    """Positions that the head sees."""
    if isinstance(batch, PackedBatch):
        return batch.target.numel()
    return {updates.full_logits: batch.ids, updates.trl_head: batch.rows}.get(loss, batch.targets).numel()


def _pairs(batch: PackedBatch) -> int:
    """(query, key) pairs, whole squares, from the lengths that fake tensors do not know."""
    if batch.shared is None:
        return int((batch.cu_seqlens.diff().long() ** 2).sum())
    own, prompts, responses = (x.diff().long() for x in batch.shared[:3])
    return int((own**2).sum() + (prompts * responses).sum())


def _run(case: Case, layers: int, batch: Any, loss: Callable[[PreTrainedModel, Any], Tensor], name: str) -> Run:
    """Counts one micro-batch through so many layers, on CUDA's route."""
    shape = type(case.model)(**{**case.model.to_dict(), "num_hidden_layers": layers, "layer_types": None})
    with _flash_everywhere(), torch.random.fork_rng(devices=[]), FakeTensorMode() as fakes:
        model = AutoModelForCausalLM.from_config(shape, attn_implementation=name, dtype=torch.float32).train()
        for p in model.parameters():
            p.grad = torch.empty_like(p)
        fake = _faked(batch, fakes.from_tensor)
        with FlopCounterMode(display=False) as counter, _Live() as live:
            with torch.autocast("cpu", torch.bfloat16, enabled=not isinstance(fake, PackedBatch)):
                out = loss(model, fake)
            out.backward()
    flops = counter.get_flop_counts()["Global"]
    return Run(sum(n for op, n in flops.items() if not any(x in str(op) for x in ATTENTION)), tuple(live.peaks))


def _faked(batch: Any, fake: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(batch, updates.Padded):
        return batch.tensors(fake)
    found = {f.name: fake(x) for f in fields(batch) if isinstance(x := getattr(batch, f.name), Tensor)}
    if batch.shared is not None:
        found["shared"] = batch.shared._make(fake(x) if isinstance(x, Tensor) else x for x in batch.shared)
    return replace(batch, **found)


@contextmanager
def _flash_everywhere() -> Iterator[None]:
    """Packed rows take CUDA's route: every device has PyTorch's FlashAttention."""
    kept = flash.has_flash, flash.best
    flash.has_flash, flash.best = lambda device: True, lambda device, head_dim: flash.ATEN
    try:
        yield
    finally:
        flash.has_flash, flash.best = kept


def _loss_of_ours(model: PreTrainedModel, batch: PackedBatch) -> Tensor:
    options = PolicyLossOptions()
    return response_loss(model, batch, torch.empty(1, 2), 1.0, options, compute=torch.bfloat16).loss


class _Live(TorchDispatchMode):
    """The most bytes alive of storages made under it; inside the fused loss, its workspace as its source has it."""

    def __init__(self) -> None:
        super().__init__()
        self.live, self.peaks, self._phase = 0, [0, 0], 0
        self._seen: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        old = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        for x in tree_leaves(out):
            if isinstance(x, Tensor) and (storage := x.untyped_storage())._cdata not in old | self._seen:
                self._seen.add(storage._cdata)
                self.live += storage.nbytes()
                weakref.finalize(storage, self._release, storage._cdata, storage.nbytes())
        fused = func is torch.ops.gapg.fused_policy_loss.default
        inside = head_bytes(*args[:2], device=torch.device("cuda"), entropy=False) if fused else 0
        self._phase = 1 if func is torch.ops.aten.embedding_dense_backward.default else self._phase
        self.peaks[self._phase] = max(self.peaks[self._phase], self.live + inside)
        return out

    def _release(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.live -= size


# --- timed -----------------------------------------------------------------------------------------------------------


def timed_rows(case: Case, rounds: int, device: str) -> list[Row]:
    """Seconds of one update with its optimizer step, and given tokens a second, interleaved."""
    torch.manual_seed(0)
    examples, table = case.data()
    dtype = "bfloat16" if device == "cuda" else "float32"
    impls: dict[str, Callable[[], object]] = {}
    rows: list[Row] = []
    model = AutoModelForCausalLM.from_config(case.model, attn_implementation=attention.NAME, dtype=torch.float32)
    model = model.to(device).train()
    optimizer = make_optimizer(model, case.config(0, dtype).optim)
    for savings, name in enumerate(OURS):
        config = case.config(savings, dtype)
        impls[name] = lambda config=config: policy_update(model, optimizer, config, 0, examples, table)
    for name, loss in updates.PEERS.items():
        impls[name] = lambda loss=loss: _peer_step(model, optimizer, case, loss, device)
    peaks = {}
    for name in list(impls):
        try:
            if device == "cuda":
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
            impls[name]()
            peaks[name] = [float(torch.cuda.max_memory_allocated())] if device == "cuda" else []
        except Exception as error:
            rows.append(record.error_row(str(case), name, error))
            del impls[name]
            model.zero_grad()
    samples = record.interleaved(impls, rounds=rounds, clock="cuda" if device == "cuda" else "cpu")
    rows += record.timing_rows(str(case), samples)
    given = sum(map(len, examples))
    rates = {name: [given / s for s in seconds] for name, seconds in samples.items()}
    rows += record.timing_rows(str(case), rates, "given tokens/s", "tokens/s")
    if device == "cuda":
        rows += record.timing_rows(str(case), {k: peaks[k] for k in samples}, "peak memory", "B")
    return rows


def _peer_step(model: PreTrainedModel, optimizer: Any, case: Case, loss: Any, device: str) -> None:
    for batch in case.padded():
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            out = loss(model, batch.tensors(lambda x: x.to(device)))
        out.backward()
    clip_and_step(optimizer, 1e-6, 1.0)


# --- run -------------------------------------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=("counted", "timed"), help="one part; both by default")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--table", type=Path, help="draw the committed counts between this file's markers; run nothing")
    arguments = parser.parse_args()
    if arguments.table:
        report.draw_into(arguments.table, record.read(RESULTS / "counted.json")["rows"], OURS, list(updates.PEERS))
        return
    device = "cuda" if torch.cuda.is_available() else "cpu"
    attention.register()
    timed = SMALL if device == "cpu" else [case for case in REAL if case.model is QWEN["1.5B"]]
    parts: dict[str, tuple[str, list[Case], Callable[[Case], list[Row]]]] = {
        "counted": ("counted", REAL, counted_rows),
        "timed": (device, timed, functools.partial(timed_rows, rounds=arguments.rounds, device=device)),
    }
    for part in [arguments.only] if arguments.only else parts:
        stem, cases, measure = parts[part]
        rows: list[Row] = []
        for case in cases:  # written case by case: a run that is stopped leaves what it had
            rows += measure(case)
            record.write("update_step", rows, arguments.output / f"{stem}.json")
            report.plot(rows, OURS, arguments.output / f"{stem}.png")
            print(part, case, file=sys.stderr, flush=True)
        print(report.table(rows, OURS), report.goal(rows, OURS), sep="\n\n")


if __name__ == "__main__":
    main()
