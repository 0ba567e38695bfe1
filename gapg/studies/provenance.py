"""What made a result: the code's revision, the machine, the versions."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("gapg", "torch", "transformers", "numpy")
ROOT = Path(__file__).resolve().parents[2]
CODE = ("gapg", "kernels", "rollout", "csrc")


def revision() -> str:
    """The checkout's commit, "+dirty" where its code differs from it; "unknown" where there is no checkout."""
    try:
        commit = _git("rev-parse", "HEAD")
        changed = _git("status", "--porcelain", "--", *CODE)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return commit + ("+dirty" if changed else "")


def machine() -> dict[str, Any]:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    cpu = names[0] if names else platform.machine()
    return {"device": device, "cpu": cpu, "cores": len(os.sched_getaffinity(0))}


def versions() -> dict[str, str]:
    return {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in PACKAGES}


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=ROOT, check=True, capture_output=True, text=True)
    return done.stdout.strip()
