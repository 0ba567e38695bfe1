"""The live bytes of a micro-batch's forward and backward, traced on tensors without data.

The meta device has no autocast, and which weights are copied to 16 bits is autocast's decision; fake tensors on the CPU
go through the dispatcher's real autocast and autograd and stop at shapes and types. What an operator holds inside
itself no trace shows, and is added from its source: the head's workspace, the flash backward's sums.

PyTorch's own MemTracker, which is private, counts the same bytes but tells neither copies nor phases apart, and only
with phases can a few layers stand for all. The tests compare the two.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import fields, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AttentionInterface, AttentionMaskInterface, AutoModelForCausalLM, PreTrainedModel
from transformers.masking_utils import sdpa_mask

from gapg.batches.batching import Example, PackedBatch, packed_batches
from gapg.config import RunConfig
from gapg.model import attention, lora
from gapg.model.policy import response_loss
from gapg.model.precision import round_parameters
from gapg_kernels import equal_lengths, flash, reference, routes
from gapg_kernels.chunks import DEFAULT_WORKSPACE, ChunkPlan
from gapg_kernels.policy_loss import PolicyLossOptions

_NAME = "gapg_memory_plan"
_TO_COPY = torch.ops.aten._to_copy.default
_HEAD = torch.ops.gapg.fused_policy_loss.default
_FLASH_BACKWARD = torch.ops.aten._flash_attention_backward.default
_EMBEDDING_BACKWARD = torch.ops.aten.embedding_dense_backward.default
_GROUPED_MM = torch.ops.aten._grouped_mm.default


class Trace(NamedTuple):
    """Live bytes of one micro-batch beside weights and their gradients; see `MemoryPlan` for the first three."""

    copies: int
    activations: int
    head: int
    forward: int
    """the most within the body; so for the others, because the most of all is not linear in the layers, as each is"""
    backward: int
    embedding: int
    """the most from the embedding's gradient on"""


def trace_update(model: PreTrainedModel, config: RunConfig, device: torch.device, batch: PackedBatch) -> Trace:
    """Traces two and three layers, and extends the line to the model's number; all where its layers are not alike."""
    layers = model.config.get_text_config().num_hidden_layers
    if layers <= 3 or not _alike(model, layers):
        return trace_layers(layers, model, config, device, batch)
    two, three = (trace_layers(n, model, config, device, batch) for n in (2, 3))
    return Trace(*(a + (layers - 2) * (b - a) for a, b in zip(two, three, strict=True)))


def _alike(model: PreTrainedModel, layers: int) -> bool:
    """Whether the model has one stack of that many layers, all with parameters of the same shapes."""
    stacks = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == layers]
    return len(stacks) == 1 and len({str([(n, p.shape) for n, p in x.named_parameters()]) for x in stacks[0]}) == 1


def trace_layers(
    layers: int, model: PreTrainedModel, config: RunConfig, device: torch.device, batch: PackedBatch
) -> Trace:
    """The update of the model's first layers, on fake tensors of the CPU: its autocast is CUDA's for these models."""
    shape = copy.deepcopy(model.config)
    shape.get_text_config().num_hidden_layers = layers
    AttentionInterface.register(_NAME, partial(_attention, on_cuda=device.type == "cuda"))
    AttentionMaskInterface.register(_NAME, sdpa_mask)
    own = "eager" if model.config._attn_implementation == "eager" else _NAME
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        model = AutoModelForCausalLM.from_config(shape, attn_implementation=own, dtype=torch.float32).train()
        if config.model.lora:
            lora.add_adapters(model, config.model.lora, config.seed)
        if config.model.parameters == "bfloat16":
            round_parameters(model)
    if config.model.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    with FakeTensorMode() as fakes:
        policy = _on_cpu(model)
        for p in policy.parameters():
            p.grad = torch.empty_like(p, dtype=torch.float32) if p.requires_grad else None
        tensors: dict[str, Any] = {
            f.name: fakes.from_tensor(x) for f in fields(batch) if isinstance(x := getattr(batch, f.name), Tensor)
        }
        live = _Live(policy, partial(head_bytes, device=device, entropy=config.loss.entropy))
        with live:
            compute = getattr(torch, config.model.dtype)
            out = response_loss(
                policy, replace(batch, **tensors), torch.empty(1, 2), 1.0, PolicyLossOptions(), compute=compute,
                with_entropy=config.loss.entropy,
            )  # fmt: skip
            out.loss.backward()
    return Trace(live.copies_at_head, live.at_head - live.copies_at_head, live.head, *live.peaks)


def _on_cpu(model: PreTrainedModel) -> PreTrainedModel:
    """A copy of a model on meta with fake tensors of the CPU."""
    fake: dict[int, Any] = {id(p): _fake_parameter(p) for p in model.parameters()}
    fake |= {id(x): torch.empty(x.shape, dtype=x.dtype) for x in model.buffers()}
    return copy.deepcopy(model, fake)


def _fake_parameter(p: nn.Parameter) -> nn.Parameter:
    fake = nn.Parameter(torch.empty(p.shape, dtype=p.dtype), p.requires_grad)
    if p.requires_grad:
        fake.grad_dtype = p.grad_dtype
    return fake


class _Live(TorchDispatchMode):
    """Counts the bytes of storages made under it and still alive."""

    def __init__(self, model: PreTrainedModel, head_bytes: Callable[[Tensor, Tensor], int]) -> None:
        super().__init__()
        self.live = self.copies = self.at_head = self.copies_at_head = self.head = 0
        self.peaks = [0, 0, 0]
        self._phase, self.head_bytes = 0, head_bytes
        self._weights = {p.untyped_storage()._cdata for p in model.parameters()}
        self._seen: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = _grouped_mm(*args) if func is _GROUPED_MM else func(*args, **(kwargs or {}))
        inputs = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        if func is _EMBEDDING_BACKWARD:
            self._phase = 2
        for x in tree_leaves(out):
            if isinstance(x, Tensor) and (storage := x.untyped_storage())._cdata not in inputs | self._seen:
                self._watch(storage, copy=func is _TO_COPY and bool(inputs & self._weights))
        inside = 0
        if func is _HEAD:
            self._phase, self.at_head, self.copies_at_head = 1, self.live, self.copies
            self.head = self.head_bytes(*args[:2])
        elif func is _FLASH_BACKWARD:
            # float32 sums of dq; dk and dv of every query head, before those of a group are added up (flash_api.cpp)
            _, q, k = args[:3]
            inside = q.numel() * (4 + (0 if k.shape == q.shape else 2 * q.element_size()))
        self.peaks[self._phase] = max(self.peaks[self._phase], self.live + inside)
        return out

    def _watch(self, storage: torch.UntypedStorage, copy: bool) -> None:
        key, size = storage._cdata, storage.nbytes()
        self._seen.add(key)
        self.live += size
        self.copies += size * copy
        weakref.finalize(storage, self._release, key, size, size * copy)

    def _release(self, key: int, size: int, copied: int) -> None:
        self._seen.discard(key)
        self.live -= size
        self.copies -= copied


def _grouped_mm(a: Tensor, b: Tensor, offsets: Tensor) -> Tensor:
    """The product of experts in any type; torch's own shape function has bfloat16 alone."""
    experts = (len(offsets),) if a.dim() == b.dim() == 2 else ()
    return a.new_empty(*experts, *a.shape[:-1], b.shape[-1])


def largest_batch(config: RunConfig) -> PackedBatch:
    """The largest micro-batch: sequences of one length, all response, since a response costs more than a prompt."""
    rollout = config.rollout
    cap = min(config.token_cap, rollout.prompts_per_step * rollout.samples_per_prompt * rollout.longest)
    count = max(1, cap // rollout.longest)
    examples = [Example([0], [0] * (cap // count - 1))] * count
    (batch,) = packed_batches(examples, cap, torch.device("cpu"), padded=config.update.pack is False)
    return batch


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, *, on_cuda: bool,
    cu_seq_lens_q: Tensor | None = None, max_length_q: int | None = None, scaling: float | None = None, **kwargs: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """What `gapg.model.attention` does with a packed row of sequences of one length, which fake tensors cannot tell."""
    if cu_seq_lens_q is None or max_length_q is None:
        return attention.attention_forward(module, query, key, value, mask, scaling=scaling, **kwargs)
    q, k, v = flash.one_type(*(x[0].transpose(0, 1) for x in (query, key, value)))
    if on_cuda and q.dtype in flash.HALVES:
        lengths = flash.Lengths(cu_seq_lens_q, cu_seq_lens_q, max_length_q, max_length_q, causal=True)
        return flash.packed(q, k, v, lengths, q.shape[-1] ** -0.5)[None], None
    index = cu_seq_lens_q.new_empty(len(q), dtype=torch.int64)
    rows = equal_lengths.Plan(index, index, ((len(q) // max_length_q, max_length_q),))
    # CUDA has no float32 kernel that groups heads without the scores in memory
    with sdpa_kernel(SDPBackend.MATH) if on_cuda and k.shape != q.shape else nullcontext():
        return attention._grouped(q, k, v, rows, scaling)[None], None


def head_bytes(hidden: Tensor, weight: Tensor, device: torch.device, entropy: bool) -> int:
    """The most inside the fused loss: E, its scratch and four factors [C, H] of a chunk, and its weight in 16 bits."""
    kernel = device.type == "cuda" and (not torch.cuda.is_available() or routes.uses_kernel(hidden.to(device)))
    plan = ChunkPlan.of(hidden, weight, DEFAULT_WORKSPACE, kernel=kernel, entropy=entropy)
    rows = min(len(hidden), max(1, DEFAULT_WORKSPACE // (plan.stored + plan.scratch)))
    factors = rows * hidden.shape[1] * (3 * 4 + hidden.element_size())
    moments = 4 * min(rows * plan.vocab, reference.ENTROPY_BLOCK) if entropy and not kernel else 0
    rounded = hidden.element_size() * weight.numel() if weight.dtype != hidden.dtype else 0
    widened = 4 * weight.numel() if hidden.dtype == torch.bfloat16 and device.type == "cpu" else 0
    return rows * (plan.stored + plan.scratch) + factors + moments + rounded + widened
