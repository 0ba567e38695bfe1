"""The threads of a run on a CPU, and glibc told to keep the memory that training frees."""

from __future__ import annotations

import ctypes
import os

import torch

from gapg.config import RunConfig


def cores() -> int:
    """CPUs that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def set_threads(config: RunConfig) -> None:
    """Torch threads of this process, unless there is a GPU: the config's, else OMP_NUM_THREADS, else one a CPU."""
    _keep_freed_memory()
    if not torch.cuda.is_available() and (config.threads or "OMP_NUM_THREADS" not in os.environ):
        torch.set_num_threads(config.threads or cores())


def _keep_freed_memory() -> None:
    """Tells glibc not to give freed blocks back to the kernel: mapping them anew costs time in every small step."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # another C library
        return
    trim_threshold, top_pad, mmap_threshold = -1, -2, -3
    for option in (trim_threshold, top_pad, mmap_threshold):
        mallopt(option, 512 << 20)
