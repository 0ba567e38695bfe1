"""Where the prompts and responses of a packed row are, for attention in which responses share their prompt.

Two prompts of 2 and 3 tokens; two responses to the first, of 1 and 2 tokens, and one of 4 to the second:

>>> layout = share_prompts([0, 2, 5, 6, 8, 12], cu_prompts=[0, 2, 5], cu_responses=[0, 3, 7])
>>> layout.tokens, layout.max_sequence
(12, 7)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Prompts:
    """What a row's prompts ask for within a window. Not a plain tuple, for each length of which torch.compile would
    compile a layer anew.
    """

    sizes: tuple[tuple[int, int], ...]
    """each prompt's tokens, and the number of its responses"""

    def copies(self, window: int) -> int:
        """Of prompt tokens, for the responses whose first token sees them."""
        return sum(responses * min(tokens, window - 1) for tokens, responses in self.sizes)


class SharedPrompts(NamedTuple):
    """Where the prompts and responses of a packed row are. Made by `share_prompts`, which checks it."""

    cu_segments: Tensor
    """[prompts + responses + 1] int32: where each segment starts, all prompts before all responses; and T"""
    cu_prompts: Tensor
    """[prompts + 1] int32: where each prompt starts, and the number of prompt tokens"""
    cu_responses: Tensor
    """[prompts + 1] int32: where each prompt's responses start, counted from the first response token; and R"""
    tokens: int
    """T"""
    prompt_tokens: int
    max_segment: int
    max_prompt: int
    max_responses: int
    """the most response tokens of one prompt"""
    max_sequence: int
    """the longest prompt with its longest response"""
    prompts: Prompts


def share_prompts(
    cu_segments: Any, cu_prompts: Any, cu_responses: Any, device: torch.device | str | None = None
) -> SharedPrompts:
    """Checks the arrays of a packed row, measures them on the host, and moves them to the device.

    Args:
        cu_segments: [prompts + responses + 1] integers in host memory, each prompt's and then each response's start,
            and the number of tokens. The responses of prompt p lie before those of prompt p + 1.
        cu_prompts: [prompts + 1] each prompt's start, and the number of prompt tokens: how cu_segments begins.
        cu_responses: [prompts + 1] where each prompt's responses start, counted from the first response token.
        device: of the queries; the CPU by default.

    Raises:
        ValueError: a prompt of no tokens, which has no log-sum-exp to merge; arrays that contradict each other.
    """
    segments, prompts, responses = (torch.as_tensor(x).cpu().long() for x in (cu_segments, cu_prompts, cu_responses))
    if not all(x.dim() == 1 and len(x) for x in (segments, prompts, responses)):
        raise ValueError("cu_segments, cu_prompts and cu_responses are one row of numbers each, from 0 on")
    count, total = len(prompts) - 1, int(prompts[-1])
    if not torch.equal(segments[: count + 1], prompts) or len(responses) != count + 1 or int(prompts[0]) != 0:
        raise ValueError("cu_segments must begin with cu_prompts, from 0 on, and cu_responses be as long as cu_prompts")
    if bool((prompts.diff() < 1).any()):
        raise ValueError("a prompt of no tokens cannot be shared: give it at least one token (such as bos)")
    starts = segments[count:] - total
    if bool((segments.diff() < 0).any()) or not torch.equal(responses, responses.sort().values):
        raise ValueError("cu_segments and cu_responses must not fall")
    if int(responses[0]) != 0 or responses[-1] != starts[-1] or not bool(torch.isin(responses, starts).all()):
        raise ValueError("cu_responses must run from 0 to the number of response tokens, along starts of responses")
    owner = torch.bucketize(starts[:-1], responses, right=True).clamp_max(count) - 1
    sequences = torch.cat([prompts.diff(), prompts.diff()[owner] + starts.diff()])

    def longest(lengths: Tensor) -> int:
        return int(lengths.max()) if len(lengths) else 0

    def put(x: Tensor) -> Tensor:
        return x.to(torch.int32).to(device or "cpu")

    return SharedPrompts(
        cu_segments=put(segments),
        cu_prompts=put(prompts),
        cu_responses=put(responses),
        tokens=int(segments[-1]),
        prompt_tokens=total,
        max_segment=longest(segments.diff()),
        max_prompt=longest(prompts.diff()),
        max_responses=longest(responses.diff()),
        max_sequence=longest(sequences),
        prompts=Prompts(tuple(zip(prompts.diff().tolist(), owner.bincount(minlength=count).tolist(), strict=True))),
    )
