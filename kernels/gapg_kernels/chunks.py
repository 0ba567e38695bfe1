"""How many rows of hidden states the fused head takes at a time, so that E and its scratch fit a workspace."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

DEFAULT_WORKSPACE = 2 << 30
"""Bytes, where the caller names none and the device has twice as much to spare."""

PITCH = 64
"""E's rows are this many elements apart or a multiple of it: an odd V would break TMA stores and slow the GEMMs."""

SUM_TILE = 128
"""The narrowest vocabulary tile whose partial sums the kernels keep, one a row and tile."""


def workspace_for(device: torch.device, given: int | None) -> int:
    """The bytes that the caller names; else 2 GiB, but at most half of what a CUDA device has free.

    Chunks then depend on what else is on the device, and with them the order in which d(weight) is summed. In a graph
    that is being compiled it is 2 GiB: what is free then says nothing about later.
    """
    if given is not None:
        return int(given)  # 2e9 is a number of bytes too
    if device.type != "cuda" or not torch.cuda.is_available() or torch.compiler.is_compiling():
        return DEFAULT_WORKSPACE
    cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return min(DEFAULT_WORKSPACE, (torch.cuda.mem_get_info(device)[0] + cached) // 2)


class ChunkPlan(NamedTuple):
    """``stored``: bytes of a row of E; ``scratch``: bytes a row needs besides while it is worked on; ``bare``: bytes it
    needs where E is not stored."""

    vocab: int
    stored: int
    scratch: int
    bare: int
    workspace: int

    @staticmethod
    def of(
        hidden: Tensor,
        weight: Tensor,
        workspace: int,
        *,
        kernel: bool,
        entropy: bool = False,
        softcap: float | None = None,
    ) -> ChunkPlan:
        """For hidden [T, H] and weight [V, H], by the fused kernel or over a plain GEMM, within ``workspace`` bytes."""
        vocab = weight.shape[0]
        stored = pitch(vocab, hidden.dtype) * hidden.element_size()
        if kernel:
            bare = scratch = 4 * -(-vocab // SUM_TILE) * (2 if entropy else 1)
        else:
            scratch = 4 * vocab if hidden.dtype == torch.bfloat16 else 0  # float32 logits; wider types make E in place
            bare = max(scratch, stored)
            if softcap:
                slopes = sum_dtype(hidden.dtype).itemsize * vocab
                scratch, bare = scratch + slopes, bare + slopes
        return ChunkPlan(vocab, stored, scratch, bare, workspace)

    def with_copy(self) -> ChunkPlan:
        """The same where a backward changes a copy of a chunk's E, as the gradient of the entropy does."""
        return self._replace(scratch=max(self.scratch, self.stored))

    def fits(self, rows: int) -> bool:
        """Whether E for all rows fits, with room left to work on at least 256 of them at a time."""
        return rows * self.stored + min(rows, 256) * self.scratch <= self.workspace

    def require_one_row(self, caller: str, *, grad: bool) -> None:
        """Raises ValueError when the workspace is too small for a single row."""
        need = self.stored + self.scratch if grad else self.bare
        if need > self.workspace:
            raise ValueError(f"{caller}: one row needs {need} bytes, workspace_bytes is {self.workspace}; pass more")

    def chunks(
        self, rows: int, *, kept: bool, store: bool, cuts: Sequence[int] | None = None, caller: str = ""
    ) -> Iterator[slice]:
        """Equal chunks, as few as the workspace allows: a short last chunk would waste the GEMMs' efficiency.

        Args:
            rows: T.
            kept: E of all rows stays in the workspace, so a chunk needs scratch only.
            store: a chunk's E is stored (forward only: it is not).
            cuts: where chunks may end, ascending from 0 to T; None: anywhere.
            caller: who is named where rows between two cuts do not fit. Raises ValueError then.
        """
        room = self.workspace - (rows * self.stored if kept else 0)
        each = self.scratch if kept else self.scratch + self.stored if store else self.bare
        most = max(1, room // each) if each else rows
        if cuts is not None:
            return self._between(cuts, most, each, caller)
        count = -(-rows // most) if rows else 0
        size = -(-rows // count) if count else 0
        if count > 1 and (rounded := -(-size // 256) * 256) <= most:
            size = rounded
        return (slice(at, min(at + size, rows)) for at in range(0, rows, max(size, 1)))

    def _between(self, cuts: Sequence[int], most: int, each: int, caller: str) -> Iterator[slice]:
        """As few chunks as can end at cuts, and of those much the same length where that takes no more of them."""
        longest = max((b - a for a, b in pairwise(cuts)), default=0)
        if longest > most:
            raise ValueError(
                f"{caller}: {longest} rows between two cuts need {longest * each} bytes, workspace_bytes is "
                f"{self.workspace}; pass more, or cuts that are closer"
            )
        fewest = _ends(cuts, most)
        even = _ends(cuts, max(longest, -(-cuts[-1] // max(len(fewest), 1))))
        return (slice(a, b) for a, b in pairwise([0, *min(even, fewest, key=len)]))


def _ends(cuts: Sequence[int], most: int) -> list[int]:
    """Where chunks end that are each as long as cuts and ``most`` rows allow."""
    ends, start = list[int](), 0
    for at, following in pairwise([*cuts, math.inf]):
        if at > start and following - start > most:
            ends.append(int(at))
            start = int(at)
    return ends


def pitch(vocab: int, dtype: torch.dtype) -> int:
    """Elements from one row of E to the next."""
    return -(-vocab // PITCH) * PITCH if dtype == torch.bfloat16 else vocab


def sum_dtype(dtype: torch.dtype) -> torch.dtype:
    """What sums, log-probs, scores and losses are kept in: float32, and float64 for float64 inputs."""
    return torch.float64 if dtype == torch.float64 else torch.float32
