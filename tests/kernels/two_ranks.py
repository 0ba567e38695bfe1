"""Runs a module of this folder as two ranks, processes that find each other through a folder."""

import os
import subprocess
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]


def on_two_ranks(module: str, folder: Path) -> list[dict[str, list[Tensor]]]:
    """What each rank of `python -m tests.kernels.MODULE RANK FOLDER` saved as FOLDER/RANK.pt."""
    command = [sys.executable, "-m", f"tests.kernels.{module}"]
    ranks = [
        subprocess.Popen([*command, rank, str(folder)], stderr=subprocess.PIPE, text=True, cwd=ROOT)
        for rank in ("0", "1")
    ]
    try:
        complaints = [process.communicate(timeout=120)[1] for process in ranks]
    finally:
        for process in ranks:
            process.kill()
    assert [process.returncode for process in ranks] == [0, 0], complaints
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in (0, 1)]


def save_and_end(found: dict[str, list[Tensor]], rank: int, folder: Path) -> None:
    """What a rank leaves, once both have it. Ends the process at once: torch's own threads, which are still there when
    an interpreter ends, abort it now and then on a busy machine."""
    torch.save(found, folder / f"{rank}.pt")
    dist.barrier()
    os._exit(0)
