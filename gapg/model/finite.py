"""Whether a model's weights, and what they make of a few tokens, are finite.

A policy whose weights are ruined may look calm: RMSNorm divides by the root of a sum of squares, and where that
overflows every hidden state is 0 and every token equally likely. So the weights are looked at, and what they make of a
few tokens, before an engine or a checkpoint gets them.
"""

from __future__ import annotations

import math

import torch
from torch import nn
from transformers import PreTrainedModel


@torch.no_grad()
def is_finite(model: PreTrainedModel, compute: torch.dtype) -> bool:
    """Whether the norms of the trainable weights, and of all hidden states of a few tokens, are finite in float32.

    A norm overflows where a square does. `compute` is the type of the matrix products. Waits for the device once.
    """
    ids = torch.arange(3, 11, device=model.device) % model.config.get_text_config().vocab_size
    low = torch.autocast(model.device.type, compute, enabled=compute != torch.float32)
    with torch.compiler.set_stance("force_eager"), low:  # eight tokens are not worth a compilation
        out = model(input_ids=ids[None], use_cache=False, output_hidden_states=True)
    states = [x.float() for x in (*(out.hidden_states or ()), out.logits)]
    weights = [p.detach() for p in model.parameters() if p.requires_grad]
    return math.isfinite(float(nn.utils.get_total_norm(weights) + nn.utils.get_total_norm(states)))
