"""The counted part of `bench/update_step.py`: flops and live bytes of an update, on tensors without data.

Under autocast: flops of matrix products (PyTorch's FlopCounterMode) and of attention (whole squares of the lengths
attended to, two products forward and five backward, alike for all), and the most bytes alive in the largest micro-batch
beside weights and their gradients; of one layer and of two, from which the rest follows. What an operator holds inside
itself is not in them, but for our fused loss, whose workspace is known from its source; attention is a fused operator
for all.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from functools import partial
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, PreTrainedModel

import record
from gapg.batches.batching import PackedBatch, one_batch
from gapg.batches.decisions import Decisions
from gapg.marginal_loss import MarginalLoss, Masked
from gapg.model import attention
from gapg.model.memory_trace import head_bytes
from gapg.model.policy import response_loss
from gapg_kernels import flash
from gapg_kernels.policy_loss import PolicyLossOptions
from peers import updates
from record import Row
from update_cases import Case
from update_step_report import MARGINAL

ATTENTION = ("attention", "bmm")  # bmm: of scores where there is no fused kernel

_aten = torch.ops.aten
_COUNTED_HERE: dict[Any, Callable[..., int]] = {
    _aten._flash_attention_forward: lambda *_, **__: 0,
    _aten._flash_attention_backward: lambda *_, **__: 0,
    _aten.addmm_: lambda _, a, b, **__: 2 * a[0] * a[1] * b[1],
}
"""Attention's flops are `_pairs`'; torch 2.11's counter refuses grouped heads. Of a product that is added in place
PyTorch's counter knows nothing."""


def counted_rows(case: Case, impls: Sequence[str]) -> list[Row]:
    """flops of the whole update and bytes of its largest micro-batch, by implementation."""
    rows: list[Row] = []
    for name in impls:
        try:
            found = _count(case, name)
        except Exception as error:
            if name not in updates.PEERS:
                raise
            rows.append(record.error_row(str(case), name, error))
            continue
        for metric, (value, unit) in found.items():
            rows += record.timing_rows(str(case), {name: [float(value)]}, metric, unit)
    return rows


def update_flops(case: Case, name: str, size: int) -> float:
    """Of the whole update; `size` is our token cap, or a peer's sequences in a micro-batch."""
    batches = _batches(case, name, size)
    counted = min(batches, key=_tokens)
    return _flops(case, name, batches, counted, *_one_and_two(case, name, counted))


def _count(case: Case, name: str) -> dict[str, tuple[float, str]]:
    batches = _batches(case, name, case.token_cap if name not in updates.PEERS else updates.MICRO_BATCH)
    largest = max(batches, key=_tokens)
    one, two = _one_and_two(case, name, largest)
    given = case.given if name not in updates.PEERS else sum(int(b.mask.sum()) for b in batches)
    return {
        "flops": (_flops(case, name, batches, largest, one, two), "flop"),
        "bytes": (max(extended(one.peaks, two.peaks, case.model.num_hidden_layers)), "B"),
        "tokens of the micro-batch": (_tokens(largest), "tokens"),
        "tokens computed": (sum(map(_tokens, batches)), "tokens"),
        "tokens given": (given, "tokens"),
    }


def _batches(case: Case, name: str, size: int) -> list[Any]:
    return replace(case, token_cap=size).batches(name) if name not in updates.PEERS else case.padded(size)


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


def _flops(case: Case, name: str, batches: list[Any], counted: Any, one: Run, two: Run) -> float:
    """Of all micro-batches, from what one of them has with one layer and with two."""
    layers, width = case.model.num_hidden_layers, case.model.hidden_size
    layer, head = two.flops - one.flops, 2 * one.flops - two.flops
    tokens, rows = (sum(map(part, batches)) / part(counted) for part in (_tokens, lambda b: _rows(name, b)))
    if name in MARGINAL:  # its head's products hang on the places too, of which a batch has more or fewer a row
        whole = one_batch(case.masked(name)[0], torch.device("cpu"), share=True)
        heads = run_layers(case, 1, name, whole).flops - layer * _tokens(whole) / _tokens(counted)
    else:
        heads = head * rows
    return heads + layers * layer * tokens + 14 * layers * width * sum(map(_pairs, batches))


def _tokens(batch: PackedBatch | updates.Padded) -> int:
    return batch.input_ids.numel() if isinstance(batch, PackedBatch) else batch.ids.numel()


def _rows(name: str, batch: PackedBatch | updates.Padded) -> int:
    """Positions that the head sees."""
    if isinstance(batch, PackedBatch):
        return batch.target.numel()
    seen: dict[Any, Tensor] = {updates.full_logits: batch.ids, updates.trl_head: batch.rows}
    return seen.get(updates.PEERS[name], batch.targets).numel()


def _pairs(batch: PackedBatch | updates.Padded) -> int:
    """(query, key) pairs, whole squares, from the lengths that fake tensors do not know."""
    if isinstance(batch, updates.Padded):
        return batch.ids.numel() * batch.ids.shape[1]
    if batch.shared is None:
        return int((batch.cu_seqlens.diff().long() ** 2).sum())
    own, prompts, responses = (x.diff().long() for x in batch.shared[:3])
    return int((own**2).sum() + (prompts * responses).sum())


def _one_and_two(case: Case, name: str, batch: Any) -> tuple[Run, Run]:
    return run_layers(case, 1, name, batch), run_layers(case, 2, name, batch)


def run_layers(case: Case, layers: int, name: str, batch: Any) -> Run:
    """Counts one micro-batch of an implementation through so many layers, on CUDA's route."""
    kind = "sdpa" if name in updates.PEERS else attention.NAME
    loss = partial(marginal_loss, case) if name in MARGINAL else updates.PEERS.get(name, loss_of_ours)
    shape = type(case.model)(**{**case.model.to_dict(), "num_hidden_layers": layers, "layer_types": None})
    on_cuda = mock.patch.object(flash, "has_flash", lambda device: True)
    with on_cuda, torch.random.fork_rng(devices=[]), FakeTensorMode() as fakes:
        model = AutoModelForCausalLM.from_config(shape, attn_implementation=kind, dtype=torch.float32).train()
        for p in model.parameters():
            p.grad = torch.empty_like(p)
        fake = faked(batch, fakes.from_tensor)
        with FlopCounterMode(display=False, custom_mapping=_COUNTED_HERE) as counter, _Live() as live:
            with torch.autocast("cpu", torch.bfloat16, enabled=not isinstance(fake, PackedBatch)):
                out = loss(model, fake)
            out.backward()
    flops = counter.get_flop_counts()["Global"]
    return Run(sum(n for op, n in flops.items() if not any(x in str(op) for x in ATTENTION)), tuple(live.peaks))


def faked(batch: Any, fake: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(batch, updates.Padded):
        return batch.tensors(fake)
    found: dict[str, Any] = {f.name: fake(x) for f in fields(batch) if isinstance(x := getattr(batch, f.name), Tensor)}
    if batch.shared is not None:
        found["shared"] = batch.shared._make(fake(x) if isinstance(x, Tensor) else x for x in batch.shared)
    if batch.decisions is not None:
        found["decisions"] = _faked_decisions(batch.decisions, fake)
    return replace(batch, **found)


def _faked_decisions(decisions: Decisions, fake: Callable[[Tensor], Tensor]) -> Decisions:
    found: dict[str, Any] = {name: fake(getattr(decisions, name)) for name in ("place", "response", "group", "sample")}
    found["parts"] = tuple((tokens, None if rows is None else fake(rows)) for tokens, rows in decisions.parts)
    return replace(decisions, **found)


def loss_of_ours(model: PreTrainedModel, batch: PackedBatch) -> Tensor:
    options = PolicyLossOptions()
    return response_loss(model, batch, torch.empty(1, 2), 1.0, options, compute=torch.bfloat16).loss


def marginal_loss(case: Case, model: PreTrainedModel, batch: PackedBatch) -> Tensor:
    """With the hazards that it needs first."""
    shape = (case.prompts, case.samples)
    known = Masked(torch.empty(shape[0]), torch.empty(shape))
    loss = MarginalLoss(model, case.config(MARGINAL[0]), torch.empty(shape), known)
    loss.look_ahead([batch])
    return loss(batch, 1.0).loss


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
        inside = head_bytes(args[0], args[1], torch.device("cuda"), entropy=False) if fused else 0
        self._phase = 1 if func is torch.ops.aten.embedding_dense_backward.default else self._phase
        self.peaks[self._phase] = max(self.peaks[self._phase], self.live + inside)
        return out

    def _release(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.live -= size
