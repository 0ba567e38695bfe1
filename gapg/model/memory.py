"""What a run's update will need in memory, before its first step: traced on tensors without data, not guessed.

    announce(model, config, device)         # prints the plan; ConfigError where it cannot fit

Activations and copies come from a trace of `response_loss` and its backward (`gapg.model.memory_trace`), the rest from
the model's parameters. Not in the plan: the CUDA context, an allocator's fragments, and what the transformers engine
holds while it generates, when there are no activations.
"""

from __future__ import annotations

import inspect
import os
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from functools import reduce
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import PreTrainedModel

from gapg.build import make_task
from gapg.config import ConfigError, RunConfig
from gapg.files import size_text
from gapg.model import lora
from gapg.model.load import device as default_device
from gapg.model.load import load_model, load_tokenizer, unloaded_model
from gapg.model.memory_trace import largest_batch, trace_update
from gapg.runs.tracking import console, say

ROOM = 0.95
"""The part of the memory that a suggested setting may fill: what is not in the plan needs some too."""


Settings = dict[str, Any]
"""Values by their dotted key in the config."""


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """Bytes of each part of an update at its fullest moment, in a micro-batch that adds to the gradients of another."""

    weights: int
    """float32 masters, frozen ones included"""
    gradients: int
    optimizer: int
    """AdamW's two moments"""
    reference: int
    engine: int
    """weights that it does not share with the trainer; all that vLLM reserves"""
    copies: int
    """16-bit weights that autocast makes and the graph keeps"""
    activations: int
    """of all layers, as the head finds them"""
    head: int
    """E, its scratch and the float32 temporaries of a chunk"""
    passing: int
    """what forward or backward hold elsewhere beyond the three above, where that is the fullest moment"""
    baseline: int
    """the task-tuned baseline's process, which trains at the same time (`compare`)"""
    tokens: int
    """of the micro-batch; not bytes"""
    capacity: int
    """of the device, or of the machine; not a part"""

    @property
    def parts(self) -> dict[str, int]:
        """Bytes by name, without those of nothing."""
        return {k: v for k, v in asdict(self).items() if k not in ("tokens", "capacity") and v}

    @property
    def total(self) -> int:
        return sum(self.parts.values())

    @property
    def line(self) -> str:
        most = sorted(self.parts.items(), key=lambda part: -part[1])[:3]
        parts = ", ".join(f"{name} {size_text(size)}" for name, size in most)
        need = f"{size_text(self.total)} of {size_text(self.capacity)}"
        return f"memory: {need} for an update of {self.tokens} tokens ({parts})"

    def table(self) -> Table:
        table = Table("memory", f"of an update, micro-batches of {self.tokens} tokens", box=None)
        for name, size in self.parts.items():
            table.add_row(name, size_text(size))
        table.add_row("total", f"{size_text(self.total)} of {size_text(self.capacity)}", style="bold")
        return table


def announce(model: PreTrainedModel, config: RunConfig, device: torch.device) -> None:
    """Prints the plan: a table, or a line where it is far from mattering. Raises ConfigError where it cannot fit."""
    plan = refuse(model, config, device)
    if plan is None:
        return
    if plan.total < plan.capacity / 20:
        say(plan.line)
    else:
        console.print(plan.table())


def refuse(model: PreTrainedModel, config: RunConfig, device: torch.device) -> MemoryPlan | None:
    """The plan, unprinted; None for a model that cannot be traced. Raises ConfigError where it cannot fit."""
    if plan := _plan_if_any(model, config, device):
        check(plan, model, config, device)
    return plan


def _plan_if_any(model: PreTrainedModel, config: RunConfig, device: torch.device) -> MemoryPlan | None:
    try:
        return plan_memory(model, config, device)
    except Exception as error:  # a plan is a help: a model whose code asks for values trains without one
        say(f"memory: no plan for {model.config.model_type}: {' '.join(str(error).split())[:120]}")
        return None


def print_plan(config: RunConfig) -> None:
    """The plan of a run that is not started, whose weights are not loaded. Raises ConfigError."""
    if config.model.path is None:
        model = load_model(config.model, load_tokenizer(config.model, make_task(config)), config.seed)
    else:
        model = unloaded_model(config.model)
    if config.model.lora:
        lora.add_adapters(model, config.model.lora, config.seed)
    if config.update.pack == "auto":
        pack = model.config._attn_implementation != "eager"
        config = config.model_copy(update={"update": config.update.model_copy(update={"pack": pack})})
        if pack:
            say("memory: as if this model packs; a run tries it. --update.pack false shows what padded rows need")
    if plan := _plan_if_any(model, config, default_device()):
        Console(highlight=False, markup=False, emoji=False).print(plan.table())
        check(plan, model, config, default_device())


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
        model: with its adapters, if any.
        available: bytes to plan for; those of the device by default.
    """
    available = capacity(device) if available is None else available
    weights = sum(_bytes(p) for p in model.parameters())
    trainable = sum(_bytes(p) for p in model.parameters() if p.requires_grad)
    batch = largest_batch(config)
    trace = trace_update(model, config, device, batch)
    beyond = max(trace[3:]) - trace.copies - trace.activations - trace.head
    plan = MemoryPlan(
        weights=weights,
        gradients=trainable,
        optimizer=2 * trainable,
        reference=weights if config.loss.kl_coef and not config.model.lora else 0,
        engine=_engine(config, weights, device, available),
        copies=trace.copies,
        activations=trace.activations,
        head=trace.head,
        passing=max(0, beyond),
        baseline=0,
        tokens=len(batch.input_ids),
        capacity=available,
    )
    return replace(plan, baseline=plan.total) if config.compare else plan


def check(plan: MemoryPlan, model: PreTrainedModel, config: RunConfig, device: torch.device) -> None:
    """Raises ConfigError where the plan is over its capacity, naming settings whose own plans are not."""
    if plan.total <= plan.capacity:
        return
    where = "the GPU" if device.type == "cuda" else "the machine"
    need = f"an update needs {size_text(plan.total)} of memory and {where} has {size_text(plan.capacity)}"
    fitting = suggestions(plan, model, config, device)
    if not fitting:
        fixed = plan.weights + plan.gradients + plan.optimizer + plan.reference
        alone = f"weights, gradients and AdamW's state alone take {size_text(fixed)}"
        raise ConfigError(f"{need}; {alone}: train adapters (model.lora.rank) or a smaller model")
    words = (f"{_options(settings)} ({size_text(new.total)})" for settings, new in fitting)
    raise ConfigError(f"{need}; set {', or '.join(words)}")


def suggestions(
    plan: MemoryPlan, model: PreTrainedModel, config: RunConfig, device: torch.device
) -> list[tuple[Settings, MemoryPlan]]:
    """(settings, their plan) that fit with a little room: every single one, or where none does as many as it takes."""
    search = _Search(model, config, device, plan.capacity)
    savings: Settings = {}
    if not config.model.gradient_checkpointing:
        savings["model.gradient_checkpointing"] = True
    if config.model.dtype == "float32" and device.type == "cuda":
        savings["model.dtype"] = "bfloat16"
    attempts: list[Callable[[], list[Settings]]] = [
        lambda: [search.with_cap({}), *({key: value} for key, value in savings.items())],
        lambda: search.with_engine({}),
        lambda: [savings],
        lambda: search.with_engine(savings),
        lambda: [search.with_cap(savings)],
    ]
    found = ([(settings, search.plan(settings)) for settings in make() if search.fits(settings)] for make in attempts)
    return next(filter(None, found), [])


def fitting_token_cap(
    model: PreTrainedModel, config: RunConfig, device: torch.device, available: int | None = None
) -> int:
    """The largest `token_cap` whose plan leaves a little room, in multiples of 1024 where it can be.

    It holds the longest sequence that `config.rollout` allows, and is no larger than a whole step needs; the config's
    own `token_cap` does not matter.

    Args:
        model: as for `plan_memory`; only its shapes are read.
        available: bytes to plan for; those of the device by default.

    Raises:
        ConfigError: not even a micro-batch of the longest sequence alone fits.
    """
    available = capacity(device) if available is None else available
    search, rollout = _Search(model, config, device, available), config.rollout
    below = longest = rollout.max_prompt_tokens + rollout.max_new_tokens
    step = rollout.prompts_per_step * rollout.samples_per_prompt * longest
    while below < step and search.fits({"token_cap": below}):
        below *= 2
    cap = search.largest_cap({}, min(below, step) + 1024)
    plan = search.plan({"token_cap": cap})
    if plan.total > ROOM * available:
        raise ConfigError(
            f"one sequence of {cap} tokens needs {size_text(plan.total)} of memory, of {size_text(available)} there "
            f"are {size_text(ROOM * available)} to plan with: shorten sequences, or train adapters (model.lora.rank)"
        )
    return cap


@dataclass(slots=True)
class _Search:
    """Plans of the same run with other settings."""

    model: PreTrainedModel
    config: RunConfig
    device: torch.device
    capacity: int
    known: dict[str, MemoryPlan] = field(default_factory=dict)

    def plan(self, settings: Settings) -> MemoryPlan:
        key = _options(settings)
        if key not in self.known:
            self.known[key] = plan_memory(self.model, _with(self.config, settings), self.device, self.capacity)
        return self.known[key]

    def fits(self, settings: Settings) -> bool:
        return self.plan(settings).total <= ROOM * self.capacity

    def with_cap(self, settings: Settings) -> Settings:
        """And the largest token_cap that fits."""
        return settings | {"token_cap": self.largest_cap(settings, self.plan({}).tokens)}

    def largest_cap(self, settings: Settings, below: int) -> int:
        """The largest below that bound that fits, in multiples of 1024 where it can be; else the smallest possible."""
        least = self.config.rollout.max_prompt_tokens + self.config.rollout.max_new_tokens
        caps = sorted({least, *range(-(-least // 1024) * 1024, below, 1024)})
        fitting = bisect_left(caps, True, key=lambda cap: not self.fits(settings | {"token_cap": cap}))
        return caps[max(0, fitting - 1)]

    def with_engine(self, settings: Settings) -> list[Settings]:
        """And the part of the GPU for vLLM that the rest leaves: room for its weights and a cache of their size."""
        plan = self.plan(settings)
        left = ROOM * self.capacity - (plan.total - plan.engine)
        weights = plan.weights * getattr(torch, _with(self.config, settings).model.dtype).itemsize // 4
        if self.config.rollout.engine != "vllm" or self.device.type != "cuda" or left < 2 * weights:
            return []
        return [settings | {"rollout.vllm_args.gpu_memory_utilization": int(100 * left / self.capacity) / 100}]


def _with(config: RunConfig, settings: Settings) -> RunConfig:
    tree = config.model_dump()
    for key, value in settings.items():
        *path, last = key.split(".")
        reduce(lambda at, name: at[name], path, tree)[last] = value
    return RunConfig.model_validate(tree)


def _options(settings: Settings) -> str:
    return " ".join(f"{key}={str(value).lower()}" for key, value in settings.items())


def _engine(config: RunConfig, weights: int, device: torch.device, available: int) -> int:
    item = getattr(torch, config.model.dtype).itemsize
    copied = weights * item // 4
    if config.rollout.engine == "transformers":  # in float32 it shares the trainer's, but for merged adapters
        return copied if item < 4 or config.model.lora else 0
    from gapg_rollout.vllm_engine import VLLMEngine

    defaults = {k: p.default for k, p in inspect.signature(VLLMEngine).parameters.items()}
    settings = defaults | config.rollout.vllm_args
    if device.type == "cuda":
        return int(settings["gpu_memory_utilization"] * available)
    return copied + (int(os.environ.get("VLLM_CPU_KVCACHE_SPACE", settings["cpu_cache_gib"])) << 30)


def _bytes(x: Tensor) -> int:
    return x.numel() * x.element_size()
