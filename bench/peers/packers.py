"""The packers that `bench/packing.py` compares: other projects' own code, called as they call it, and textbook ones.

Each peer comes from its project's package and is a row that names the package where that is not installed; nobody's
code is copied. `pip install --no-deps axolotl skyrl openrlhf verl` beside this project brings them, then what else
their modules import when they are loaded (numba, ray, tensordict, pylatexenc, …).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gapg_packing.pack import pack

Lengths = NDArray[np.int64]
Run = Callable[[], Any]


@dataclass(frozen=True)
class Peer:
    """``prepare(lengths, cap)`` brings the lengths into the form the peer takes, and gives the call to time.

    ``bins(result, lengths)``: each bin's lengths. ``most``: with more lengths than this a call takes minutes.
    ``package``: whose version is recorded.
    """

    name: str
    prepare: Callable[[Lengths, int], Run]
    package: str | None = None
    most: int = 100_000
    bins: Callable[[Any, Lengths], list[Lengths]] = lambda result, lengths: [lengths[np.asarray(b)] for b in result]


def first_fit(lengths: Lengths, cap: int) -> Run:
    run = compiled_first_fit()
    run(lengths[:2], cap)  # compiles
    return lambda: run(lengths, cap)


@cache
def compiled_first_fit() -> Callable[[Lengths, int], tuple[Lengths, Lengths]]:
    """Each sequence, as it comes, into the first bin that holds it: the plainest loops over arrays, compiled by numba.

    Gives what `gapg_packing.pack.pack` gives: order [n] and offsets [bins + 1].
    """
    import numba

    @numba.njit  # type: ignore[untyped-decorator]
    def run(lengths: Lengths, cap: int) -> tuple[Lengths, Lengths]:
        room = np.empty(len(lengths), np.int64)
        bin_of = np.empty(len(lengths), np.int32)
        bins = 0
        for i in range(len(lengths)):
            b = 0
            while b < bins and room[b] < lengths[i]:
                b += 1
            if b == bins:
                room[b] = cap
                bins += 1
            room[b] -= lengths[i]
            bin_of[i] = b
        offsets = np.zeros(bins + 1, np.int64)
        for i in range(len(lengths)):
            offsets[bin_of[i] + 1] += 1
        for b in range(bins):
            offsets[b + 1] += offsets[b]
        order = np.empty(len(lengths), np.int64)
        start = offsets.copy()
        for i in range(len(lengths)):
            order[start[bin_of[i]]] = i
            start[bin_of[i]] += 1
        return order, offsets

    return run


def split(result: tuple[Lengths, Lengths], lengths: Lengths) -> list[Lengths]:
    order, offsets = result
    return np.split(lengths[order], offsets[1:-1])


def axolotl(lengths: Lengths, cap: int) -> Run:
    from axolotl.utils.samplers.multipack import pack_group

    pack_group(lengths[:2], 0, cap, 2, 2)  # compiles
    return lambda: pack_group(lengths, 0, cap, len(lengths), len(lengths))


def skyrl(strategy: str) -> Callable[[Lengths, int], Run]:
    def prepare(lengths: Lengths, cap: int) -> Run:
        from skyrl.train.dataset.bin_packing import make_seq_packer

        packer, values = make_seq_packer(strategy, cap), lengths.tolist()
        return lambda: packer.pack(values)

    return prepare


def trl(lengths: Lengths, cap: int) -> Run:
    import pyarrow as pa
    from trl.data_utils import _pack_bfd

    offsets = np.concatenate([[0], lengths.cumsum()]).astype(np.int32)
    column = pa.ListArray.from_arrays(offsets, np.zeros(offsets[-1], np.int8))
    table = pa.table({"tokens": column})
    return lambda: _pack_bfd(table, cap)


def trl_bins(table: Any, lengths: Lengths) -> list[Lengths]:
    return [np.asarray(row) for row in table["seq_lengths"].to_pylist()]


def openrlhf(lengths: Lengths, cap: int) -> Run:
    from openrlhf.utils.seqlen_balancing import get_minimum_num_micro_batch_size, get_seqlen_balanced_partitions

    values = lengths.tolist()

    def run() -> Sequence[Sequence[int]]:
        return get_seqlen_balanced_partitions(values, get_minimum_num_micro_batch_size(values, cap, 1, 1), False)

    return run


def verl_partitions(lengths: Lengths, cap: int) -> Run:
    from verl.utils.seqlen_balancing import get_seqlen_balanced_partitions

    values = lengths.tolist()
    return lambda: get_seqlen_balanced_partitions(values, -(-sum(values) // cap), equal_size=False)


def verl_micro_batches(lengths: Lengths, cap: int) -> Run:
    import torch
    from tensordict import TensorDict
    from verl.utils.seqlen_balancing import rearrange_micro_batches

    rows = torch.nested.nested_tensor_from_jagged(
        torch.zeros(int(lengths.sum()), dtype=torch.int64), torch.from_numpy(np.concatenate([[0], lengths.cumsum()]))
    )
    batch = TensorDict({"input_ids": rows}, batch_size=[len(lengths)])
    return lambda: rearrange_micro_batches(batch, cap)[1]


OURS = Peer(
    "gapg",
    lambda lengths, cap: lambda: pack(lengths, cap),
    bins=lambda packing, lengths: [lengths[members] for members in packing.bins],
)
"""Best-fit decreasing, in C++."""

PEERS = (
    # first fit in the order given
    Peer("numba first-fit", first_fit, "numba", bins=split),
    Peer("axolotl", axolotl, "axolotl"),
    # the longest into the emptiest, by a heap; first-fit decreasing
    Peer("SkyRL balanced", skyrl("balanced"), "skyrl"),
    Peer("SkyRL FFD", skyrl("first_fit_decreasing"), "skyrl"),
    # best-fit decreasing, moves the tokens too
    Peer("TRL BFD", trl, "trl", bins=trl_bins),
    # first fit counts, Karmarkar-Karp fills
    Peer("OpenRLHF", openrlhf, "openrlhf", 10_000),
    # Karmarkar-Karp: one pass; until it fits
    Peer("verl partitions", verl_partitions, "verl", 10_000),
    Peer("verl micro-batches", verl_micro_batches, "verl", 1_000),
)
