"""Decoder layers through torch.compile (`model.compile`): one compilation serves all layers, and rows of any length.

Attention is left out of it, so that a layer is two graphs: up to its attention, and from there on. A layer is compiled
anew for what changes its code: another dtype, gradients on or off, adapters, shared prompts. There are few of those;
PyTorch's way when there are too many is to go on uncompiled, with a line in a log, which would look like a slow GPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch._dynamo
from torch._dynamo.exc import FailOnRecompileLimitHit
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from gapg.errors import ConfigError

LIMIT = 32
"""Compilations of one function, of which PyTorch's default is 8."""


def compile_layers(model: PreTrainedModel) -> None:
    """Has each decoder layer compiled when it is first called. Sets PyTorch's limit, for the process, to an error.

    Raises ConfigError for a model whose layers cannot be told.
    """
    layers = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]
    inner = {m for layer in layers for m in layer.modules() if m is not layer}
    if not layers:
        raise ConfigError(
            f"model.compile=true: transformers does not mark the layers of {model.config.model_type!r} models; set "
            "model.compile=false"
        )
    torch._dynamo.config.recompile_limit = LIMIT
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    for layer in layers:
        if layer not in inner:
            layer.compile(dynamic=True)


@contextmanager
def within_limit() -> Iterator[None]:
    """Raises ConfigError where a layer was compiled too often."""
    try:
        yield
    except FailOnRecompileLimitHit:
        raise ConfigError(
            f"model.compile=true: this model's layers are compiled anew again and again ({LIMIT} times so far; "
            "TORCH_LOGS=recompiles says why); set model.compile=false"
        ) from None
