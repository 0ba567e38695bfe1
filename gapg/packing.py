"""Packing: sequences into micro-batches under a hard token cap, and micro-batches into flat arrays (C++ underneath).

    packing = pack(lengths, cap=16_384)
    for members in packing.bins:
        arrays = lay_out(tokens, offsets, prompt_lengths, coefficients, members)

Packing is best-fit decreasing (Johnson 1974) in linear time; csrc/packing.h says how. Optimal packing is NP-hard: what
is promised is no more bins than textbook best-fit decreasing, never "optimal".
"""

import operator
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

import gapg._csrc as _csrc

Int64s = NDArray[np.int64]
Int32s = NDArray[np.int32]
Floats = NDArray[np.float32]

_LARGEST_CAP = 2**31 - 1  # cu_seqlens is int32, in every varlen attention kernel


@dataclass(frozen=True, eq=False)
class Packing:
    """Bin b holds the sequences order[offsets[b]:offsets[b + 1]]; building lists would cost more than packing."""

    order: Int64s
    """[n] every sequence index once, bin by bin, longest first within a bin"""
    offsets: Int64s
    """[bins + 1] non-decreasing, from 0 to n"""

    @property
    def bins(self) -> list[Int64s]:
        """Each bin's sequence indices, as views into `order`."""
        return [self.order[a:b] for a, b in zip(self.offsets[:-1].tolist(), self.offsets[1:].tolist(), strict=True)]

    def __len__(self) -> int:
        return len(self.offsets) - 1


@dataclass(frozen=True, eq=False)
class PackedArrays:
    """One micro-batch without padding: B sequences end to end, T tokens, of which R are response tokens."""

    input_ids: Int64s
    """[T]"""
    position_ids: Int64s
    """[T] 0, 1, 2, … restarting at every sequence"""
    cu_seqlens: Int32s
    """[B + 1] where each sequence starts, and T"""
    response_index: Int64s
    """[R] the position whose hidden state predicts the response token: one before the token's own"""
    targets: Int64s
    """[R] the response token's id"""
    sequence_ids: Int64s
    """[R] the sequence the response token belongs to, numbered as in the arguments of `lay_out`, not within the bin"""
    coefficients: Floats
    """[R] its sequence's coefficient"""

    @property
    def max_length(self) -> int:
        """The longest sequence's tokens, 0 in an empty bin (varlen attention wants it beside cu_seqlens)."""
        return int(np.diff(self.cu_seqlens).max(initial=0))


def pack(lengths: ArrayLike, cap: int, *, ranks: int = 1) -> Packing:
    """Best-fit decreasing: each sequence, longest first, goes into the fullest bin that still has room for it.

    Args:
        lengths: [n] integers, the tokens of each sequence, each in 1..cap.
        cap: no bin ever holds more tokens than this.
        ranks: the number of bins is a multiple of this. To get there the fullest bins are split in two; empty bins are
            added only when every bin is down to one sequence (always so with fewer sequences than ranks).

    Returns:
        Bins by decreasing token count, so `bins[rank::ranks]` is a fair share, and if a micro-batch runs out of memory
        it is the first. The same lengths always give the same packing.

    Raises:
        ValueError: a length below 1 or above the cap (named, with the fix), non-integer lengths, cap or ranks below 1.
    """
    array = _integers(lengths, "lengths")
    cap, ranks = operator.index(cap), operator.index(ranks)
    if not 1 <= cap <= _LARGEST_CAP:
        raise ValueError(f"the token cap is {cap}; it must lie in 1..2^31-1 (set token_cap)")
    if ranks < 1:
        raise ValueError(f"ranks is {ranks}; it must be at least 1")
    try:
        order, offsets = _csrc.pack(array, cap, ranks)
    except ValueError as error:
        raise ValueError(_misfit(array, cap) or str(error)) from None
    return Packing(order, offsets)


def lay_out(
    tokens: ArrayLike, offsets: ArrayLike, prompt_lengths: ArrayLike, coefficients: ArrayLike, members: ArrayLike
) -> PackedArrays:
    """Lay one bin's sequences end to end as the arrays that a packed forward and its loss need.

    The first four arguments describe all S sequences of a batch and stay the same from bin to bin. Give them as
    contiguous int64 (coefficients: float32) arrays, and no call copies them.

    Args:
        tokens: [N] ids of all sequences, back to back.
        offsets: [S + 1] sequence s is tokens[offsets[s]:offsets[s + 1]].
        prompt_lengths: [S] its first prompt_lengths[s] tokens are the prompt (at least 1), the rest the response.
        coefficients: [S] copied to each of its response tokens, rounded to float32.
        members: [B] the sequences of this bin, in the order they are laid out: one of `Packing.bins`.

    Raises:
        ValueError: arrays of the wrong type or shape; a member that does not exist; a sequence outside the tokens,
            without a prompt, or with a prompt longer than itself (named).
    """
    integers = [
        _integers(value, name)
        for value, name in ((tokens, "tokens"), (offsets, "offsets"), (prompt_lengths, "prompt_lengths"))
    ]
    sequences = (*integers, np.ascontiguousarray(coefficients, dtype=np.float32))
    chosen = _integers(members, "members")
    total, responses = _csrc.measure(*sequences, chosen)
    arrays = PackedArrays(
        input_ids=np.empty(total, np.int64),
        position_ids=np.empty(total, np.int64),
        cu_seqlens=np.empty(len(chosen) + 1, np.int32),
        response_index=np.empty(responses, np.int64),
        targets=np.empty(responses, np.int64),
        sequence_ids=np.empty(responses, np.int64),
        coefficients=np.empty(responses, np.float32),
    )
    _csrc.lay_out(*sequences, chosen, *vars(arrays).values())
    return arrays


def _integers(values: ArrayLike, name: str) -> Int64s:
    """As a contiguous one-dimensional int64 array; without a copy when it is one already."""
    array = np.asarray(values)
    if array.ndim != 1:
        raise ValueError(f"{name} must have one dimension, not shape {array.shape}")
    if array.size == 0:
        return np.empty(0, np.int64)  # an empty list arrives as float64
    if array.dtype.kind not in "iu":
        raise ValueError(f"{name} must be integers, not {array.dtype}")
    return np.ascontiguousarray(array, dtype=np.int64)


def _misfit(lengths: Int64s, cap: int) -> str | None:
    """What is wrong with the first length outside 1..cap, or None when all fit."""
    wrong = np.flatnonzero((lengths < 1) | (lengths > cap))
    if len(wrong) == 0:
        return None
    index, length = int(wrong[0]), int(lengths[wrong[0]])
    if length < 1:
        return f"sequence {index} has {length} tokens; drop empty sequences before packing"
    return (
        f"sequence {index} has {length} tokens, more than the cap of {cap}: "
        "raise token_cap or lower rollout.max_new_tokens"
    )
