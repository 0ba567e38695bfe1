"""Packing: sequences into micro-batches under a hard token cap, and micro-batches into flat arrays (C++ underneath).

    packing = pack(lengths, cap=16_384)
    for members in packing.bins:
        arrays = lay_out(tokens, offsets, prompt_lengths, coefficients, members)

    packing = pack(lengths, cap=16_384, groups=groups, prompt_lengths=prompt_lengths)  # one copy of each prompt
    for members in packing.bins:
        arrays = lay_out(tokens, offsets, prompt_lengths, coefficients, members, groups)

Packing is best-fit decreasing (Johnson 1974) in linear time; csrc/best_fit.h says how. Optimal packing is NP-hard: what
is promised is no more bins than textbook best-fit decreasing, never "optimal".
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

import gapg_packing._csrc as _csrc

Int64s = NDArray[np.int64]
Int32s = NDArray[np.int32]
Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Cost:
    """The modelled cost of a sequence of n tokens: linear * n + quadratic * n**2; only the ratio of the two matters.

    A bin costs the sum over its sequences. A shared prompt of P tokens counts once, and each response adds what it adds
    to the prompt: cost(P + R) - cost(P). The forward's floating-point operations of a causal transformer with N weights
    in its matrices, L layers and width H are Cost(linear=2 * N, quadratic=2 * L * H); the backward's have that ratio.
    """

    linear: float = 1.0
    quadratic: float = 0.0

    def __call__(self, tokens: ArrayLike) -> NDArray[np.float64]:
        """The cost of sequences of so many tokens, elementwise."""
        count = np.asarray(tokens, dtype=np.float64)
        return count * (self.linear + self.quadratic * count)


@dataclass(frozen=True, eq=False)
class Packing:
    """Bin b holds the sequences order[offsets[b]:offsets[b + 1]]; building lists would cost more than packing."""

    order: Int64s
    """[n] every sequence index once, bin by bin, longest first within a bin (or within a group in a bin)"""
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
    """One micro-batch without padding: T tokens in segments end to end, of which R are response tokens.

    A segment is a sequence. Where prompts are shared, the segments are P prompts, then B responses: a response's tokens
    attend to their own segment and to the whole of their prompt. Prompt p has the response tokens
    cu_responses[p]:cu_responses[p + 1] of the R, which start at position cu_prompts[-1] of the T.
    """

    input_ids: Int64s
    """[T]"""
    position_ids: Int64s
    """[T] 0, 1, 2, … restarting at every sequence; in a response that shares its prompt from the prompt's length on"""
    cu_seqlens: Int32s
    """[segments + 1] where each segment starts, and T; a shared prompt's response of no tokens is an empty segment"""
    response_index: Int64s
    """[R] the position whose hidden state predicts the response token: one before its own, or its prompt's last"""
    targets: Int64s
    """[R] the response token's id"""
    sequence_ids: Int64s
    """[R] the sequence the response token belongs to, numbered as in the arguments of `lay_out`, not within the bin"""
    coefficients: Floats
    """[R] its sequence's coefficient"""
    cu_responses: Int32s | None = None
    """[P + 1] the response tokens before each prompt's first: 0, …, R; None where no prompts are shared"""

    @property
    def max_length(self) -> int:
        """The longest segment's tokens, 0 in an empty bin (varlen attention wants it beside cu_seqlens)."""
        return int(np.diff(self.cu_seqlens).max(initial=0))

    @property
    def cu_prompts(self) -> Int32s:
        """[P + 1] where each shared prompt starts, and where the responses do: the first part of cu_seqlens."""
        return self.cu_seqlens[: 0 if self.cu_responses is None else len(self.cu_responses)]


def pack(
    lengths: ArrayLike,
    cap: int,
    *,
    ranks: int = 1,
    groups: ArrayLike | None = None,
    prompt_lengths: ArrayLike | None = None,
    cost: Cost | None = None,
) -> Packing:
    """Best-fit decreasing: each sequence, longest first, goes into the fullest bin that still has room for it.

    Args:
        lengths: [n] integers, the tokens of each sequence, prompt and response, each in 1..cap.
        cap: no bin ever holds more tokens than this.
        ranks: the number of bins is the next multiple of this, and `bins[rank::ranks]` are rank's. To get there, bins
            are filled less, or the fullest are split in two; empty bins are added only when every bin is down to one
            sequence or part of a group (always so with fewer of them than ranks).
        groups: [n] any integers: sequences of one group have the same prompt, and those of one bin share a copy of it.
            A group is kept whole, P + sum of R tokens, unless that is over the cap: then best-fit decreasing splits its
            responses into parts, each with a copy. A part's sequences are adjacent in its bin.
        prompt_lengths: [n] the first so many tokens of a sequence are its prompt, in 1..length; given with groups only.
        cost: what the ranks are balanced by; None: by tokens.

    Returns:
        With one rank, bins by decreasing cost, so a micro-batch that is too slow or too large is the first.
        With more, the ranks' total costs are balanced: bins and sequences are exchanged between ranks until the dearest
        is within 0.1% of the mean, or no exchange found in linear time helps. Each rank's bins come by decreasing
        cost, so bins that run at the same time, `bins[i * ranks : (i + 1) * ranks]`, are alike, within no set bound.
        The same input always gives the same packing.

    Raises:
        ValueError: a length below 1 or above the cap, a prompt that is empty, longer than its sequence or of another
            length than its group's (each names the sequence and the fix); arguments of the wrong type or shape;
            ranks outside 1..2^20.
    """
    weights = (1.0, 0.0) if cost is None else (cost.linear, cost.quadratic)
    array = _integers(lengths, "lengths")
    if groups is None and prompt_lengths is None:
        return Packing(*_csrc.pack(array, cap, ranks, *weights))
    if groups is None or prompt_lengths is None:
        raise ValueError("give groups and prompt_lengths together: only groups share prompts")
    prompts, ids = _integers(prompt_lengths, "prompt_lengths"), _integers(groups, "groups")
    return Packing(*_csrc.pack_groups(array, prompts, ids, cap, ranks, *weights))


def lay_out(
    tokens: ArrayLike,
    offsets: ArrayLike,
    prompt_lengths: ArrayLike,
    coefficients: ArrayLike,
    members: ArrayLike,
    groups: ArrayLike | None = None,
) -> PackedArrays:
    """Lay one bin's sequences end to end as the arrays that a packed forward and its loss need.

    All arguments but `members` describe all S sequences of a batch and stay the same from bin to bin. Give them as
    contiguous int64 (coefficients: float32) arrays, and no call copies them.

    Args:
        tokens: [N] ids of all sequences, back to back.
        offsets: [S + 1] sequence s is tokens[offsets[s]:offsets[s + 1]].
        prompt_lengths: [S] its first prompt_lengths[s] tokens are the prompt (at least 1), the rest the response.
        coefficients: [S] copied to each of its response tokens, rounded to float32.
        members: [B] the sequences of this bin, in the order they are laid out: one of `Packing.bins`.
        groups: [S] adjacent members of the same group share one copy of the prompt, which must be the same tokens: all
            prompts come first, then all responses, in order. None: no prompts are shared.

    Raises:
        ValueError: arrays of the wrong type or shape; a member that does not exist; a sequence outside the tokens,
            without a prompt, or with a prompt longer than itself; adjacent members of one group whose prompts differ
            (named).
    """
    arrays = (
        _integers(tokens, "tokens"),
        _integers(offsets, "offsets"),
        _integers(prompt_lengths, "prompt_lengths"),
        np.require(np.asarray(coefficients), np.float32, ["C", "A"]),
        _integers(members, "members"),
    )
    return PackedArrays(*_csrc.lay_out(*arrays, None if groups is None else _integers(groups, "groups")))


def _integers(values: ArrayLike, name: str) -> Int64s:
    """As a contiguous, aligned one-dimensional int64 array; without a copy when it is one already."""
    array = np.asarray(values)
    if array.ndim != 1:
        raise ValueError(f"{name} must have one dimension, not shape {array.shape}")
    if array.size and array.dtype.kind not in "iu":  # an empty list arrives as float64
        raise ValueError(f"{name} must be integers, not {array.dtype}")
    return np.require(array, np.int64, ["C", "A"])
