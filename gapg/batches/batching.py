"""From kept groups to packed micro-batches: what is put through the policy, and with which weight."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from gapg.batches.decisions import Decisions, Tokens, lay_out_decisions
from gapg_kernels.shared_layout import SharedPrompts, share_prompts
from gapg_packing.pack import Int64s, PackedArrays, lay_out, pack


@dataclass(frozen=True, slots=True)
class Example:
    """A prompt and one response: the response `sample` of row `group` of the reward table; `weight` scales its loss.

    deciding: for each response token the tokens that could have begun the help phrase there instead (`method:
    marginal`); of all examples or of none.
    """

    prompt_ids: Sequence[int]
    response_ids: Sequence[int]
    weight: float = 1.0
    rollout_logprobs: Sequence[float] = ()
    group: int = 0
    sample: int = 0
    deciding: Sequence[Tokens] = ()

    def __len__(self) -> int:
        return len(self.prompt_ids) + len(self.response_ids)


@dataclass(frozen=True, slots=True)
class PackedBatch:
    """T tokens of whole sequences end to end, R of them predicted response tokens; all on the model's device.

    With `padded` every sequence is `max_length` tokens long, filled up on the right, and a model is given rows
    [B, max_length]: no layer can then mix two sequences, whatever it computes.

    input_ids, position_ids [T] int64; cu_seqlens [n+1] int32; response_index [R] int64: the position whose hidden state
    predicts `target` [R] int64 (-100: none); weight [R] float32; rollout_logprob [R] float32 (NaN where the engine gave
    none); group and sample [R] int64: the row's place in the reward table. With `shared` the segments are prompts, then
    their responses, and the attention must know which belong together. With `decisions` the examples said where
    the help phrase could begin.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    cu_seqlens: torch.Tensor
    max_length: int
    response_index: torch.Tensor
    target: torch.Tensor
    weight: torch.Tensor
    rollout_logprob: torch.Tensor
    group: torch.Tensor
    sample: torch.Tensor
    shared: SharedPrompts | None = None
    padded: bool = False
    decisions: Decisions | None = None


def packed_batches(
    examples: Sequence[Example],
    token_cap: int,
    device: torch.device,
    *,
    share: bool = False,
    padded: bool = False,
    every_position: bool = False,
    whole_groups: bool = False,
) -> list[PackedBatch]:
    """Packs examples into as few micro-batches of at most `token_cap` tokens as best-fit decreasing finds.

    Args:
        examples: in any order; empty gives no batch.
        token_cap: most tokens of a batch.
        device: where the batches are put, all at once: a copy between two micro-batches would wait for the first.
        share: one copy of a prompt for the responses of its group that are in a batch; not with `padded`.
        padded: rows of sequences of like length, each as long as the batch's longest; the padding counts.
        every_position: the positions that predict nothing are rows of the head too, with target -100 (for comparison).
        whole_groups: keep a group in one batch, if it fits (with `share` it is kept anyway; not with `padded`).

    Raises ValueError naming an example that is longer than the cap.
    """
    if not examples:
        return []
    if share and padded:
        raise ValueError("padded rows share no prompts: set share=False")
    lengths = np.array([len(e) for e in examples], np.int64)
    if padded:
        bins, wide = _rows_of_like_length(lengths, token_cap)
    elif share:
        groups, prompts = _groups(examples)
        bins, wide = pack(lengths, token_cap, groups=groups, prompt_lengths=prompts).bins, lengths
    elif whole_groups:
        groups, _ = _groups(examples)
        pack(lengths, token_cap)  # for its errors
        # the packer wants a prompt: one token that is not there for all of a group, and in the cap for one group
        bins = pack(lengths + 1, token_cap + 1, groups=groups, prompt_lengths=np.ones_like(lengths)).bins
        wide = lengths
    else:
        bins, wide = pack(lengths, token_cap).bins, lengths
    return _lay_out(examples, bins, wide, device, share=share, padded=padded, every_position=every_position)


def one_batch(examples: Sequence[Example], device: torch.device, *, share: bool = False) -> PackedBatch:
    """The examples packed in the order given, in one batch whatever its size; those of a group must be adjacent."""
    lengths = np.array([len(e) for e in examples], np.int64)
    (batch,) = _lay_out(examples, [np.arange(len(examples))], lengths, device, share=share)
    return batch


def _lay_out(
    examples: Sequence[Example],
    bins: Sequence[Int64s],
    wide: Int64s,
    device: torch.device,
    *,
    share: bool,
    padded: bool = False,
    every_position: bool = False,
) -> list[PackedBatch]:
    """A batch of each bin's members; `wide` [n] is each sequence's length with its padding."""
    groups, prompts = _groups(examples)
    lengths = np.array([len(e) for e in examples], np.int64)
    offsets = np.concatenate([[0], wide.cumsum()])
    fill = (wide - lengths).tolist()
    parts = (chain(e.prompt_ids, e.response_ids, [0] * pad) for e, pad in zip(examples, fill, strict=True))
    tokens = np.fromiter(chain.from_iterable(parts), np.int64, offsets[-1])
    rows = _Rows(examples, prompts, lengths - prompts, every_position)
    to = partial(torch.as_tensor, device=device)
    batches = []
    for members in bins:
        arrays = lay_out(tokens, offsets, prompts, rows.weight, members, groups if share else None)
        shared = None
        if arrays.cu_responses is not None:
            shared = share_prompts(arrays.cu_seqlens, arrays.cu_prompts, arrays.cu_responses, device)
        places = to(arrays.input_ids), to(arrays.position_ids), to(arrays.cu_seqlens), arrays.max_length
        of_rows, found = rows.of(arrays)
        index, target, weight, logprob, group, sample = map(to, of_rows)
        decisions = None if found is None else lay_out_decisions(*found, to)
        batches.append(PackedBatch(*places, index, target, weight, logprob, group, sample, shared, padded, decisions))
    return batches


def _groups(examples: Sequence[Example]) -> tuple[Int64s, Int64s]:
    """(group, prompt length) of each, both [n]."""
    table = np.array([(e.group, len(e.prompt_ids)) for e in examples], np.int64).reshape(-1, 2)
    return table[:, 0].copy(), table[:, 1].copy()


def _rows_of_like_length(lengths: Int64s, token_cap: int) -> tuple[list[Int64s], Int64s]:
    """(each batch's members, every sequence's length filled up): longest first, as many rows as the cap lets in."""
    pack(lengths, token_cap)  # for its errors
    order = np.argsort(-lengths, kind="stable")
    bins, wide, start = [], lengths.copy(), 0
    while start < len(order):
        longest = max(1, int(lengths[order[start]]))
        members = order[start : start + token_cap // longest]
        wide[members] = longest
        bins.append(members)
        start += len(members)
    return bins, wide


_Found = tuple[list[Tokens], Int64s, Int64s, NDArray[Any], bool]


class _Rows:
    """What the rows of the head carry beside their tokens, by example and by token of its response."""

    def __init__(self, examples: Sequence[Example], prompts: Int64s, responses: Int64s, every_position: bool) -> None:
        self.prompts, self.responses, self.every_position = prompts, responses, every_position
        self.starts = np.concatenate([[0], responses.cumsum()])
        self.weight = np.array([e.weight for e in examples], np.float32)
        self.cell = np.array([(e.group, e.sample) for e in examples], np.int64)
        logprobs = (e.rollout_logprobs or [float("nan")] * len(e.response_ids) for e in examples)
        self.logprob = np.fromiter(chain.from_iterable(logprobs), np.float32, self.starts[-1])
        deciding = list(chain.from_iterable(e.deciding for e in examples))
        self.kinds: list[Tokens] = sorted({(), *deciding})
        number = {kind: i for i, kind in enumerate(self.kinds)}
        self.kind = np.array([number[kind] for kind in deciding], np.int64)
        self.group_sizes = np.bincount(self.cell[responses > 0, 0])  # of responses with rows

    def of(self, arrays: PackedArrays) -> tuple[tuple[NDArray[Any], ...], _Found | None]:
        """A bin's response_index, target, weight, rollout_logprob, group and sample; and what its decisions are of."""
        of, index = arrays.sequence_ids, arrays.response_index
        at = arrays.position_ids[index] + 1 - self.prompts[of]  # within the response
        real = at < self.responses[of]  # beyond it lies padding
        of, at, index, target = of[real], at[real], index[real], arrays.targets[real]
        logprob, weight, cell = self.logprob[self.starts[of] + at], self.weight[of], self.cell[of]
        kind = self.kind[self.starts[of] + at] if len(self.kind) else None
        if self.every_position:
            idle = np.setdiff1d(np.arange(len(arrays.input_ids)), index)
            index = np.concatenate([index, idle])
            target, weight, logprob = (
                np.concatenate([x, np.full(len(idle), fill, x.dtype)])
                for x, fill in ((target, -100), (weight, 0), (logprob, np.nan))
            )
            cell = np.concatenate([cell, np.zeros((len(idle), 2), np.int64)])
        of_rows = index, target, weight, logprob, cell[:, 0].copy(), cell[:, 1].copy()
        return of_rows, None if kind is None else self._decisions(kind, of, len(index) - len(of))

    def _decisions(self, kind: Int64s, of: Int64s, idle: int) -> _Found:
        """Of a bin with so many idle rows at its end: the arguments of `lay_out_decisions` but the last."""
        members, response = np.unique(of, return_inverse=True)
        cells = self.cell[members]
        here = np.bincount(cells[:, 0], minlength=len(self.group_sizes))
        whole = bool(((here == 0) | (here == self.group_sizes)).all())
        kind, response = (np.concatenate([x, np.zeros(idle, np.int64)]) for x in (kind, response))
        return self.kinds, kind, response, cells, whole
