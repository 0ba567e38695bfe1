"""From kept groups to packed micro-batches: what is put through the policy, and with which weight."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain

import numpy as np
import torch

from gapg.packing import lay_out, pack


@dataclass(frozen=True, slots=True)
class Example:
    """A prompt and one response: the response `sample` of row `group` of the reward table; `weight` scales its loss."""

    prompt_ids: Sequence[int]
    response_ids: Sequence[int]
    weight: float = 1.0
    rollout_logprobs: Sequence[float] = ()
    group: int = 0
    sample: int = 0


@dataclass(frozen=True, slots=True)
class PackedBatch:
    """T tokens of whole sequences end to end, R of them predicted response tokens; all on the model's device.

    input_ids, position_ids [T] int64; cu_seqlens [n+1] int32; response_index [R] int64: the position whose hidden state
    predicts `target` [R] int64; weight [R] float32; rollout_logprob [R] float32 (NaN where the engine gave none); group
    and sample [R] int64, on the CPU, where the reward table is.
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


def packed_batches(examples: Sequence[Example], token_cap: int, device: torch.device) -> list[PackedBatch]:
    """Packs examples into as few micro-batches of at most `token_cap` tokens as best-fit decreasing finds.

    Raises ValueError naming an example that is longer than the cap.
    """
    if not examples:
        return []
    lengths = np.array([len(e.prompt_ids) + len(e.response_ids) for e in examples], np.int64)
    offsets = np.concatenate([[0], lengths.cumsum()])
    tokens = np.fromiter(
        chain.from_iterable(chain(e.prompt_ids, e.response_ids) for e in examples), np.int64, offsets[-1]
    )
    prompt_lengths = np.array([len(e.prompt_ids) for e in examples], np.int64)
    weights = np.array([e.weight for e in examples], np.float32)
    cells = np.array([(e.group, e.sample) for e in examples], np.int64)
    batches = []
    for members in pack(lengths, token_cap).bins:
        arrays = lay_out(tokens, offsets, prompt_lengths, weights, members)
        logprobs = chain.from_iterable(
            examples[i].rollout_logprobs or [float("nan")] * len(examples[i].response_ids) for i in members.tolist()
        )
        to = partial(torch.as_tensor, device=device)
        group, sample = torch.from_numpy(cells[arrays.sequence_ids]).unbind(1)
        batches.append(
            PackedBatch(
                input_ids=to(arrays.input_ids),
                position_ids=to(arrays.position_ids),
                cu_seqlens=to(arrays.cu_seqlens),
                max_length=arrays.max_length,
                response_index=to(arrays.response_index),
                target=to(arrays.targets),
                weight=to(arrays.coefficients),
                rollout_logprob=to(np.fromiter(logprobs, np.float32, len(arrays.targets))),
                group=group,
                sample=sample,
            )
        )
    return batches
