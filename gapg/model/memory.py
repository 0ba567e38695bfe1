"""Whether a run's update fits in memory, said before its first step; where it does not, the settings that would fit."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import reduce
from typing import Any

import torch
from rich.table import Table
from transformers import PreTrainedModel

from gapg.config import RunConfig
from gapg.console import console, say
from gapg.errors import ConfigError
from gapg.files import size_text
from gapg.model.memory_plan import MemoryPlan, capacity, plan_memory

ROOM = 0.95
"""The part of the memory that a suggested setting may fill: what is not in the plan needs some too."""

Settings = dict[str, Any]
"""Values by their dotted key in the config."""


def announce(model: PreTrainedModel, config: RunConfig, device: torch.device) -> None:
    """Prints the plan: a table, or a line where it is far from mattering. Raises ConfigError where it cannot fit."""
    plan = checked_plan(model, config, device)
    if plan is not None and plan.total < plan.capacity / 20:
        most = sorted(plan.parts.items(), key=lambda part: -part[1])[:3]
        parts = ", ".join(f"{name} {size_text(size)}" for name, size in most)
        say(f"memory: {_of_capacity(plan)} for an update of {plan.tokens} tokens ({parts})")
    elif plan is not None:
        console.print(plan_table(plan))


def checked_plan(model: PreTrainedModel, config: RunConfig, device: torch.device) -> MemoryPlan | None:
    """The plan; None for a model that cannot be traced. Raises ConfigError where it cannot fit."""
    if plan := plan_if_any(model, config, device):
        check(plan, model, config, device)
    return plan


def plan_if_any(model: PreTrainedModel, config: RunConfig, device: torch.device) -> MemoryPlan | None:
    """The plan, unchecked; None, with the reason said, for a model that cannot be traced."""
    try:
        return plan_memory(model, config, device)
    except Exception as error:  # a plan is a help: a model whose code asks for values trains without one
        say(f"memory: no plan for {model.config.model_type}: {' '.join(str(error).split())[:120]}")
        return None


def check_offload(config: RunConfig, device: torch.device) -> None:
    """Raises ConfigError where AdamW's state is to leave a GPU that is not there; that of the warm start too."""
    warm = {"warm_start.optim": config.warm_start.optim} if config.warm_start else {}
    for key, optim in ({"optim": config.optim} | warm).items():
        if optim.offload and device.type == "cpu":
            raise ConfigError(
                f"{key}.offload=true: the model is on the CPU, so AdamW's state is in the machine's memory already; "
                f"set {key}.offload=false"
            )


def plan_table(plan: MemoryPlan) -> Table:
    table = Table("memory", f"of an update, micro-batches of {plan.tokens} tokens", box=None)
    for name, size in plan.parts.items():
        table.add_row(name, size_text(size))
    table.add_row("total", _of_capacity(plan), style="bold")
    if plan.offloaded:
        table.add_row("in the machine's memory", size_text(plan.offloaded))
    return table


def _of_capacity(plan: MemoryPlan) -> str:
    return f"{size_text(plan.total)} of {size_text(plan.capacity)}"


def check(plan: MemoryPlan, model: PreTrainedModel, config: RunConfig, device: torch.device) -> None:
    """Raises ConfigError where the plan is over its capacity, naming settings whose own plans are not.

    Also where `check_offload` does.
    """
    check_offload(config, device)
    if plan.offloaded > (machine := capacity(torch.device("cpu"))):
        raise ConfigError(
            f"optim.offload=true puts {size_text(plan.offloaded)} into the machine's memory, which has "
            f"{size_text(machine)}; train adapters (model.lora.rank) or a smaller model"
        )
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
    warm = {"warm_start.optim.offload": True} if config.warm_start else {}
    offloaded = savings | {"optim.offload": True} | warm
    attempts: list[Callable[[], list[Settings]]] = [
        lambda: [search.with_cap({}), *({key: value} for key, value in savings.items())],
        lambda: search.with_engine({}),
        lambda: [savings],
        lambda: search.with_engine(savings),
        lambda: [search.with_cap(savings)],
        *([lambda: [offloaded], lambda: [search.with_cap(offloaded)]] if device.type == "cuda" else []),
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
    below = rollout.longest
    step = rollout.prompts_per_step * rollout.samples_per_prompt * below
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
        least = self.config.rollout.longest
        caps = sorted({least, *range(-(-least // 1024) * 1024, below, 1024)})
        fitting = bisect_left(caps, True, key=lambda cap: not self.fits(settings | {"token_cap": cap}))
        return caps[max(0, fitting - 1)]

    def with_engine(self, settings: Settings) -> list[Settings]:
        """And the part of the GPU for vLLM that the rest leaves: room for its weights and a cache of their size."""
        plan = self.plan(settings)
        left = ROOM * self.capacity - (plan.total - plan.engine)
        count = sum(p.numel() for p in self.model.parameters())
        weights = count * getattr(torch, _with(self.config, settings).model.dtype).itemsize
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
