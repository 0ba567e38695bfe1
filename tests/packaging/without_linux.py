"""Import every module and train a step on the CPU, without what macOS lacks and what only some systems have.

    python tests/packaging/without_linux.py FOLDER [gapg's arguments]

The libraries are imported first, on the system as it is. Then triton, fcntl, resource, os.sched_getaffinity, glibc and
/proc are gone, and the system calls itself darwin.
"""

from __future__ import annotations

import builtins
import ctypes
import importlib
import os
import pkgutil
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import datasets  # noqa: F401
import filelock  # noqa: F401
import math_verify  # noqa: F401
import matplotlib.pyplot  # noqa: F401
import openai  # noqa: F401
import psutil  # noqa: F401
import torch.utils.flop_counter  # noqa: F401
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast  # noqa: F401

import gapg
import gapg.__main__
import gapg_kernels
import gapg_packing
import gapg_rollout

GONE = ("triton", "fcntl", "resource", "vllm")
ELSEWHERE = {
    "odds_gemm", "cublas_odds", "row_kernels", "elementwise", "repair", "entropy_gradient", "policy_loss_kernel",
    "_mathworker",
}  # fmt: skip
"""Triton's kernels, imported where they run, which is Linux; and a script that is a process of its own."""


TRL = "gapg.integrations.trl"
"""Imports the package trl, which looks for vllm; whoever asks for it has trl."""


class Without:
    """Finds nothing of what is gone."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        if name.partition(".")[0] in GONE:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


def open_but_proc(path: Any, *args: Any, **kwargs: Any) -> Any:
    if isinstance(path, str | os.PathLike) and os.fspath(path).startswith("/proc"):
        raise FileNotFoundError(path)
    return real_open(path, *args, **kwargs)


def no_glibc(name: str | None, *args: Any, **kwargs: Any) -> Any:
    if name is None or "libc" in name:
        return ModuleType("a C library without GNU's functions")
    return real_library(name, *args, **kwargs)


def modules() -> list[str]:
    """Ours, but those that only Linux, or another process, imports."""
    found = []
    for package in (gapg, gapg_kernels, gapg_packing, gapg_rollout):
        names = (module.name for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."))
        found += [
            name for name in names
            if "vllm" not in name and name != TRL and name.rpartition(".")[2] not in ELSEWHERE
        ]  # fmt: skip
    return found


real_open, real_library = builtins.open, ctypes.CDLL
builtins.open, ctypes.CDLL = open_but_proc, no_glibc  # type: ignore[misc, assignment]
for function in ("sched_getaffinity", "sched_setaffinity", "memfd_create", "pidfd_open"):
    if hasattr(os, function):
        delattr(os, function)
for name in [name for name in sys.modules if name.partition(".")[0] in GONE]:
    del sys.modules[name]
sys.meta_path.insert(0, Without())  # type: ignore[arg-type]
sys.platform = "darwin"

if __name__ == "__main__":
    for name in modules():
        importlib.import_module(name)
    print(len(modules()), "modules")
    sys.argv = ["gapg", *sys.argv[2:], "--output-dir", str(Path(sys.argv[1]) / "run")]
    gapg.__main__.main()
