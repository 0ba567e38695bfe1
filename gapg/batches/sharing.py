"""Does one prompt for all its responses pay? Counted work, and what the merging costs on top.

    what = saving(groups, shape_of(model), RATES["cuda"])
    what.pays, what.tokens_saved, what.speedup

The head is left out: either way it sees the response positions and nothing else.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple

from torch import nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class ModelShape(NamedTuple):
    """What the work of a decoder's forward and backward hangs on, the head aside."""

    layers: int
    weights: int
    """of the matrices that every token is multiplied with, in all layers"""
    heads: int
    """of the queries"""
    head_dim: int


class Rates(NamedTuple):
    """Orders of magnitude, to weigh unlike costs; not measurements. They decide only where sharing gains little."""

    flops: float
    """per second, of matrix products"""
    bandwidth: float
    """bytes per second"""
    launch: float
    """seconds that a kernel, or on the CPU a call, costs whatever its size"""
    launches: int
    """that sharing adds in each layer, forward and backward together"""
    launches_per_group: int
    """and for each prompt"""
    element_bytes: int


RATES = {
    "cuda": Rates(4e14, 2e12, 5e-6, launches=16, launches_per_group=0, element_bytes=2),
    "cpu": Rates(5e10, 1e10, 5e-5, launches=8, launches_per_group=2, element_bytes=4),
}


class Saving(NamedTuple):
    tokens_unshared: int
    tokens_saved: int
    flops_unshared: int
    """of forward and backward, with every response in a sequence of its own"""
    flops_shared: int
    overhead_flops: int
    """what sharing adds in launches and merges, as the flops that could be done in that time"""

    @property
    def pays(self) -> bool:
        return self.flops_shared + self.overhead_flops < self.flops_unshared

    @property
    def speedup(self) -> float:
        """Predicted, of the decoder's forward and backward; below 1 where sharing does not pay. 1 for no groups."""
        return self.flops_unshared / (self.flops_shared + self.overhead_flops) if self.flops_shared else 1.0


NOTHING = Saving(0, 0, 0, 0, 0)
"""Of padded rows, which share no prompts."""


def saving(groups: Iterable[tuple[int, Sequence[int]]], shape: ModelShape, rates: Rates) -> Saving:
    """Of sharing the prompts of one packed row.

    With P the prompt's tokens and r those of each of its G responses, summed over the groups,

        tokens   unshared G P + sum(r),  shared P + sum(r): (G - 1) P saved
        pairs    unshared sum((P + r)(P + r + 1)) / 2,  shared (G - 1) P (P + 1) / 2 fewer (query, key) pairs
        flops    6 weights tokens + 14 layers heads head_dim pairs: two products of a forward, five of a backward
                 that computes its scores again
        overhead layers (launches launch + traffic / bandwidth) flops/s, where the traffic is that of the merge and
                 its backward: 12 passes over a [sum(r), heads, head_dim], half of them in float32

    Args:
        groups: (prompt length, response lengths) of each prompt in the row.
    """
    count = tokens = saved = responses = pairs = fewer = 0
    for prompt, lengths in groups:
        repeats = len(lengths) - 1
        count += 1
        responses += sum(lengths)
        tokens += len(lengths) * prompt + sum(lengths)
        saved += repeats * prompt
        pairs += sum((prompt + r) * (prompt + r + 1) for r in lengths) // 2
        fewer += repeats * prompt * (prompt + 1) // 2
    per_token, per_pair = 6 * shape.weights, 14 * shape.layers * shape.heads * shape.head_dim
    traffic = 6 * (rates.element_bytes + 4) * responses * shape.heads * shape.head_dim
    launches = rates.launches + rates.launches_per_group * count
    overhead = shape.layers * (launches * rates.launch + traffic / rates.bandwidth) * rates.flops
    return Saving(
        tokens_unshared=tokens,
        tokens_saved=saved,
        flops_unshared=per_token * tokens + per_pair * pairs,
        flops_shared=per_token * (tokens - saved) + per_pair * (pairs - fewer),
        overhead_flops=round(overhead) if count else 0,
    )


def shape_of(model: PreTrainedModel) -> ModelShape:
    """Read from the model's modules and config; all experts of a mixture count, which overstates their work."""
    config = model.config.get_text_config()
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    linear = (m for m in model.base_model.modules() if isinstance(m, nn.Linear))
    return ModelShape(config.num_hidden_layers, sum(m.weight.numel() for m in linear), heads, head_dim)
