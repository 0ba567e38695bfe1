"""How many rows of hidden states the fused head takes at a time, so that E and its scratch fit a workspace."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

DEFAULT_WORKSPACE = 2 << 30
PITCH = 64
"""E's rows are this many elements apart or a multiple of it: an odd V would break TMA stores and slow the GEMMs."""

SUM_TILE = 128
"""The narrowest vocabulary tile whose partial sums the kernels keep, one a row and tile."""


class ChunkPlan(NamedTuple):
    """``stored``: bytes of a row of E; ``scratch``: bytes a row needs besides while it is worked on; ``bare``: bytes it
    needs where E is not stored."""

    vocab: int
    stored: int
    scratch: int
    bare: int
    workspace: int

    @staticmethod
    def of(hidden: Tensor, weight: Tensor, workspace: int, *, kernel: bool, entropy: bool = False) -> ChunkPlan:
        """For hidden [T, H] and weight [V, H], by the fused kernel or over a plain GEMM, within ``workspace`` bytes."""
        vocab = weight.shape[0]
        stored = pitch(vocab, hidden.dtype) * hidden.element_size()
        if kernel:
            bare = scratch = 4 * -(-vocab // SUM_TILE) * (2 if entropy else 1)
        else:
            scratch = 4 * vocab if hidden.dtype == torch.bfloat16 else 0  # float32 logits; wider types make E in place
            bare = max(scratch, stored)
        return ChunkPlan(vocab, stored, scratch, bare, workspace)

    def fits(self, rows: int) -> bool:
        """Whether E for all rows fits, with room left to work on at least 256 of them at a time."""
        return rows * self.stored + min(rows, 256) * self.scratch <= self.workspace

    def require_one_row(self, caller: str, *, grad: bool) -> None:
        """Raises ValueError when the workspace is too small for a single row."""
        need = self.stored + self.scratch if grad else self.bare
        if need > self.workspace:
            raise ValueError(f"{caller}: one row needs {need} bytes, workspace_bytes is {self.workspace}")

    def chunks(self, rows: int, *, kept: bool, store: bool) -> Iterator[slice]:
        """Equal chunks, as few as the workspace allows: a short last chunk would waste the GEMMs' efficiency.

        Args:
            rows: T.
            kept: E of all rows stays in the workspace, so a chunk needs scratch only.
            store: a chunk's E is stored (forward only: it is not).
        """
        room = self.workspace - (rows * self.stored if kept else 0)
        each = self.scratch if kept else self.scratch + self.stored if store else self.bare
        most = max(1, room // each) if each else rows
        count = -(-rows // most) if rows else 0
        size = -(-rows // count) if count else 0
        if count > 1 and (rounded := -(-size // 256) * 256) <= most:
            size = rounded
        return (slice(at, min(at + size, rows)) for at in range(0, rows, max(size, 1)))


def pitch(vocab: int, dtype: torch.dtype) -> int:
    """Elements from one row of E to the next."""
    return -(-vocab // PITCH) * PITCH if dtype == torch.bfloat16 else vocab


def sum_dtype(dtype: torch.dtype) -> torch.dtype:
    """What sums, log-probs, scores and losses are kept in: float32, and float64 for float64 inputs."""
    return torch.float64 if dtype == torch.float64 else torch.float32
