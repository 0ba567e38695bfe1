"""The policy forward: packed responses to log-probs, without padding and without logits."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from gapg import attention
from gapg.batching import PackedBatch
from gapg.config import ConfigError
from gapg.kernels.linear_logprob import linear_logprob


def response_logprobs(
    model: PreTrainedModel, batch: PackedBatch, temperature: float = 1.0, compute: torch.dtype = torch.float32
) -> torch.Tensor:
    """log pi(token) at `temperature` of every response token of a packed batch, [R] float32, differentiable.

    Only the R response positions go through the LM head, and no [R, V] tensor is kept. `compute` is the type of the
    matrix products; weights and their gradients stay float32.
    """
    with torch.autocast(model.device.type, compute, enabled=compute != torch.float32):
        hidden_TH = model.base_model(
            input_ids=batch.input_ids[None],
            position_ids=batch.position_ids[None],
            use_cache=False,
            **attention.packed_arguments(batch.cu_seqlens, batch.max_length),
        ).last_hidden_state[0]
    head = model.get_output_embeddings()
    hidden_RH = hidden_TH.index_select(0, batch.response_index).to(compute)
    bias = None if head.bias is None else head.bias.to(compute)
    return linear_logprob(hidden_RH, head.weight.to(compute), batch.target, bias=bias, temperature=temperature)


def check_supported(model: PreTrainedModel) -> None:
    """Refuses, before anything slow, a model whose log-probs are not a plain linear head's. Raises ConfigError."""
    config = model.config.get_text_config()
    if getattr(config, "final_logit_softcapping", None):
        raise ConfigError(
            f"model {config.model_type}: softcapped logits are not supported; choose a model without them"
        )
    if model.get_output_embeddings() is None:
        raise ConfigError(f"model {config.model_type}: has no LM head; choose a causal language model")
