"""Causal attention within a sliding window, of packed responses that share one copy of their prompt.

The cut that a window makes through a prompt moves on with each token of a response, so the prompt cannot be attended to
by all its responses at once. Here each response gets copies of the keys and values at its prompt's end that its first
token sees, before its own; then prompts and responses are one causal launch, within the window counted from the last
key. Queries are not copied: that is what keeps a layer's work and memory near those of the shared row.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from gapg_kernels import equal_lengths, flash
from gapg_kernels.chunks import sum_dtype
from gapg_kernels.shared_layout import SharedPrompts


def attention(q: Tensor, k: Tensor, v: Tensor, layout: SharedPrompts, scale: float, window: int) -> Tensor:
    """`shared_prompt_attention` within a window that is shorter than some prompt with its response."""
    index, cu_keys = _seen(layout, window)
    # every copy's gradient is added up in float32, and rounded once
    k, v = (x.to(sum_dtype(x.dtype)).index_select(0, index).to(x.dtype) for x in (k, v))
    if q.device.type == "meta" or flash.takes(q):
        sizes = layout.max_segment, min(layout.max_sequence, window - 1 + layout.max_segment)
        lengths = flash.Lengths(layout.cu_segments, cu_keys, *sizes, causal=True, window=window)
        return flash.packed(q, k, v, lengths, scale).contiguous()
    return equal_lengths.banded(q, k, v, layout.cu_segments.tolist(), cu_keys.tolist(), window, scale)


def _seen(layout: SharedPrompts, window: int) -> tuple[Tensor, Tensor]:
    """The keys of every segment, one after the other: where each is in the row, and [prompts + responses + 1] int32.

    A prompt has its own, a response those at its prompt's end that its first token sees, and then its own. Their number
    is known on the host, so nothing waits for the device.
    """
    count = len(layout.cu_prompts) - 1
    lengths, starts = layout.cu_segments.diff(), layout.cu_segments[:-1]
    prompts, responses = lengths[:count], lengths[count:]
    owner = torch.bucketize(starts[count:] - layout.prompt_tokens, layout.cu_responses, right=True).clamp_max(count) - 1
    tails = prompts[owner].clamp_max(window - 1)
    of_responses = torch.stack([layout.cu_prompts[owner + 1] - tails, starts[count:]], 1).flatten()
    begins = torch.cat([starts[:count], of_responses])
    sizes = torch.cat([prompts, torch.stack([tails, responses], 1).flatten()])
    total = layout.tokens + layout.prompts.copies(window)
    shift = (begins - (sizes.cumsum(0) - sizes)).repeat_interleave(sizes, output_size=total)
    ends = torch.cat([prompts, tails + responses]).cumsum(0)
    return torch.arange(total, device=shift.device) + shift, pad(ends, (1, 0)).int()
