"""What a run's update will need in memory, before its first step: traced on tensors without data, not guessed.

Activations and copies come from a trace of `response_loss` and its backward (`gapg.model.memory_trace`), the rest from
the model's parameters. Not in the plan: the CUDA context, an allocator's fragments, what the transformers engine
holds while it generates, when there are no activations, and up to three more copies of the response positions' last
hidden states under `method: marginal`, whose loss is computed in parts.
"""

from __future__ import annotations

import inspect
import os
from dataclasses import asdict, dataclass

import torch
from transformers import PreTrainedModel

from gapg.config import RunConfig
from gapg.model.memory_trace import largest_batch, trace_update
from gapg.model.precision import bfloat16_parameters


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """Bytes of each part of an update at its fullest moment, in a micro-batch that adds to the gradients of another."""

    weights: int
    """the model's parameters, frozen ones included"""
    gradients: int
    """float32"""
    optimizer: int
    """AdamW's two moments, and the float32 masters of bfloat16 parameters; none where they are offloaded"""
    reference: int
    engine: int
    """weights that it does not share with the trainer; all that vLLM reserves"""
    copies: int
    """16-bit weights that autocast makes and the graph keeps; the head's is in its own part"""
    activations: int
    """of all layers, as the head finds them"""
    head: int
    """E, its scratch, the float32 temporaries of a chunk, and its weight in 16 bits"""
    passing: int
    """what forward or backward hold elsewhere beyond the three above, where that is the fullest moment"""
    tokens: int
    """of the micro-batch; not bytes"""
    capacity: int
    """of the device, or of the machine; not a part"""
    offloaded: int
    """of the machine, beside a GPU: AdamW's moments and masters; not a part"""

    @property
    def parts(self) -> dict[str, int]:
        """Bytes by name, without those of nothing."""
        return {k: v for k, v in asdict(self).items() if k not in ("tokens", "capacity", "offloaded") and v}

    @property
    def total(self) -> int:
        return sum(self.parts.values())


def capacity(device: torch.device) -> int:
    """Bytes of the GPU's memory, or of the machine's."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[1]
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def plan_memory(
    model: PreTrainedModel, config: RunConfig, device: torch.device, available: int | None = None
) -> MemoryPlan:
    """The plan of `config` for a model on `device`, of whose tensors only shapes are read (they may be on meta).

    Args:
        model: in float32, with its adapters, if any.
        available: bytes to plan for; those of the device by default.
    """
    available = capacity(device) if available is None else available
    count = sum(p.numel() for p in model.parameters())
    rounded = config.model.parameters == "bfloat16"
    weights = 4 * count - 2 * sum(p.numel() for p in bfloat16_parameters(model) if rounded)
    trainable = 4 * sum(p.numel() for p in model.parameters() if p.requires_grad)
    offload, masters = config.optim.offload, config.optim.offload or (rounded and not config.model.lora)
    moments = (3 if masters else 2) * trainable
    batch = largest_batch(config)
    trace = trace_update(model, config, device, batch)
    beyond = max(trace[3:]) - trace.copies - trace.activations - trace.head
    return MemoryPlan(
        weights=weights,
        gradients=trainable,
        optimizer=0 if offload else moments,
        reference=weights if config.loss.kl_coef and not config.model.lora else 0,
        engine=_engine(config, count, device, available),
        copies=trace.copies,
        activations=trace.activations,
        head=trace.head,
        passing=max(0, beyond),
        tokens=len(batch.input_ids),
        capacity=available,
        offloaded=moments if offload else 0,
    )


def _engine(config: RunConfig, count: int, device: torch.device, available: int) -> int:
    copied = count * getattr(torch, config.model.dtype).itemsize
    if config.rollout.engine == "transformers":  # in the trainer's type it shares its weights, but for merged adapters
        return 0 if config.model.parameters == config.model.dtype and not config.model.lora else copied
    from gapg_rollout.engines.vllm import VLLMEngine

    defaults = {k: p.default for k, p in inspect.signature(VLLMEngine).parameters.items()}
    settings = defaults | config.rollout.vllm_args
    if device.type == "cuda":
        return int(settings["gpu_memory_utilization"] * available)
    return copied + (int(os.environ.get("VLLM_CPU_KVCACHE_SPACE", settings["cpu_cache_gib"])) << 30)
