"""Which parameters of a model are bfloat16 under `model.parameters: bfloat16`, and how they become so.

The layers then hand bfloat16 to each other, where under autocast alone the embeddings, the residual stream, norms and
rotary embeddings of a float32 model are float32. The weights that an optimizer steps are `gapg.optim.MasterAdamW`'s.
"""

from __future__ import annotations

import re

import torch
from torch import nn

ADAPTER = "default"
"""peft's own name for an only adapter; part of the adapters' parameter names."""


def adapter_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """The adapters' parameters under their names in `model`, as they are; empty for a model without adapters."""
    marks = (f".lora_A.{ADAPTER}.", f".lora_B.{ADAPTER}.")
    return {name: p.detach() for name, p in model.named_parameters() if any(mark in name for mark in marks)}


def bfloat16_parameters(model: nn.Module) -> list[nn.Parameter]:
    """All, but adapters and those for which transformers says that bfloat16 is not enough (a router's bias, say)."""
    strict = getattr(model, "_keep_in_fp32_modules_strict", None) or ()
    kept = [re.compile(rf"(^|\.){re.escape(name)}(\.|$)") for name in strict]
    adapters = adapter_tensors(model)
    return [
        p
        for name, p in model.named_parameters()
        if name not in adapters and not any(pattern.search(name) for pattern in kept)
    ]


@torch.no_grad()
def round_parameters(model: nn.Module) -> None:
    """Rounds them in place; their gradients stay float32, and are summed over micro-batches unrounded."""
    for p in bfloat16_parameters(model):
        p.data = p.data.bfloat16()
        if p.requires_grad:
            p.grad_dtype = torch.float32
