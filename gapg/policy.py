"""The policy forward: packed responses to log-probs, without padding and without logits."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from gapg import attention
from gapg.batching import Example, PackedBatch, packed_batches
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


@torch.no_grad()
def check_supported(model: PreTrainedModel) -> None:
    """Refuses a model whose log-probs are not those of a plain linear head (scaled or softcapped logits, …).

    Compares a few tokens' log-probs here with those of the model's own logits. Raises ConfigError.
    """
    name = model.config.model_type
    if model.get_output_embeddings() is None:
        raise ConfigError(f"model {name}: has no LM head; choose a causal language model")
    ids = [i % model.config.get_text_config().vocab_size for i in range(3, 11)]
    (batch,) = packed_batches([Example(ids[:1], ids[1:], 1.0)], len(ids), model.device)
    try:
        ours = response_logprobs(model, batch)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"model {name}: {error}") from None
    logits = model(input_ids=batch.input_ids[None], use_cache=False).logits[0, :-1].float()
    theirs = torch.log_softmax(logits, -1).gather(1, batch.target[:, None]).squeeze(1)
    if not torch.allclose(ours, theirs, atol=1e-2, rtol=1e-2):
        raise ConfigError(f"model {name}: does something to its logits after the LM head, which is not supported")
