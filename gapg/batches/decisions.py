"""Where in the rows of a packed batch the help phrase could have begun; for responses sampled with help forbidden."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from gapg_packing.pack import Int64s

Tokens = tuple[int, ...]
"""Those that begin the phrase at some place; () where it cannot begin."""


@dataclass(frozen=True, slots=True)
class Decisions:
    """The N places in a batch's R rows where the phrase could begin, of its B responses; on the model's device.

    parts: the rows of the batch by the tokens that begin the phrase there: (tokens, rows [n] int64, None: all R). The N
    places are the rows of the parts with tokens, part after part. place [B, L] int64: a response's places, and N where
    it has fewer than L. response [N] int64: a place's response. group and sample [B] int64: a response's cell of the
    table. whole: each group of the batch has all its responses here.
    """

    parts: tuple[tuple[Tokens, torch.Tensor | None], ...]
    place: torch.Tensor
    response: torch.Tensor
    group: torch.Tensor
    sample: torch.Tensor
    whole: bool


def lay_out_decisions(
    kinds: Sequence[Tokens],
    kind_R: Int64s,
    response_R: Int64s,
    cells: NDArray[Any],
    whole: bool,
    to: Callable[[NDArray[Any]], torch.Tensor],
) -> Decisions:
    """kind_R: which of `kinds` each row is; response_R: its response, 0 to B - 1; cells [B, 2]: group and sample."""
    present = [kind for kind in range(len(kinds)) if (kind_R == kind).any()] or [kinds.index(())]
    rows = {kind: np.flatnonzero(kind_R == kind) for kind in present}
    deciding = [rows[kind] for kind in present if kinds[kind]]
    response = response_R[np.concatenate(deciding)] if deciding else np.zeros(0, np.int64)
    order, counts = np.argsort(response, kind="stable"), np.bincount(response, minlength=len(cells))
    place = np.full((len(cells), max(1, int(counts.max(initial=0)))), len(response), np.int64)
    within = np.arange(len(order)) - np.repeat(counts.cumsum() - counts, counts)
    place[response[order], within] = order
    parts = tuple((kinds[kind], None if len(present) == 1 else to(rows[kind])) for kind in present)
    return Decisions(parts, to(place), to(response), to(cells[:, 0].copy()), to(cells[:, 1].copy()), whole)
