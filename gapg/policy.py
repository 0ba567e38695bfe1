"""The policy forward: packed responses to log-probs, or to the policy loss, without padding and without logits."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from gapg import attention
from gapg.batching import Example, PackedBatch, packed_batches
from gapg.config import ConfigError
from gapg.kernels.fused_policy_loss import FusedLoss, fused_policy_loss
from gapg.kernels.linear_logprob import linear_logprob
from gapg.kernels.policy_loss import PolicyLossOptions


def response_logprobs(
    model: PreTrainedModel, batch: PackedBatch, temperature: float = 1.0, compute: torch.dtype = torch.float32
) -> torch.Tensor:
    """log pi(token) at `temperature` of every response token of a packed batch, [R] float32, differentiable.

    Only the R response positions go through the LM head, and no [R, V] tensor is kept. `compute` is the type of the
    matrix products; weights and their gradients stay float32.
    """
    hidden_RH = _response_states(model, batch, compute)
    head = model.get_output_embeddings()
    bias = None if head.bias is None else head.bias.to(compute)
    return linear_logprob(hidden_RH, head.weight.to(compute), batch.target, bias=bias, temperature=temperature)


def response_loss(
    model: PreTrainedModel,
    batch: PackedBatch,
    rewards_PG: torch.Tensor,
    denominator: float,
    options: PolicyLossOptions,
    *,
    temperature: float = 1.0,
    compute: torch.dtype = torch.float32,
    old_logprob: torch.Tensor | None = None,
    reference_logprob: torch.Tensor | None = None,
    with_entropy: bool = False,
) -> FusedLoss:
    """The policy loss of a packed batch, to be followed by ``loss.backward()`` and nothing else.

    The head's share of d(weight) is added to its float32 ``.grad`` here and now, never rounded to `compute`; the rest
    comes with backward. `rewards_PG` is the reward table of the whole step, on the model's device; the other arguments
    are as in `gapg.kernels.fused_policy_loss`.
    """
    head = model.get_output_embeddings()
    weight, main_grad = head.weight, None
    if weight.requires_grad:
        if weight.grad is None:
            weight.grad = torch.zeros_like(weight)
        main_grad = weight.grad
    return fused_policy_loss(
        _response_states(model, batch, compute),
        weight.detach().to(compute),
        batch.target,
        rewards_PG,
        batch.group,
        batch.sample,
        denominator=denominator,
        options=options,
        bias=None if head.bias is None else head.bias.to(compute),
        temperature=temperature,
        coefficient=batch.weight,
        old_logprob=old_logprob,
        rollout_logprob=batch.rollout_logprob,
        reference_logprob=reference_logprob,
        with_entropy=with_entropy,
        main_grad=main_grad,
        drop_zero_rows=False,  # the batch holds what has a gradient
    )


def _response_states(model: PreTrainedModel, batch: PackedBatch, compute: torch.dtype) -> torch.Tensor:
    """The last hidden states that predict a response token, [R, H] in `compute`."""
    if batch.shared is None:
        segments = attention.packed_arguments(batch.cu_seqlens, batch.max_length)
    else:
        segments = attention.shared_arguments(batch.shared)
    with torch.autocast(model.device.type, compute, enabled=compute != torch.float32):
        hidden_TH = model.base_model(
            input_ids=batch.input_ids[None],
            position_ids=batch.position_ids[None],
            use_cache=False,
            **segments,
        ).last_hidden_state[0]
    return hidden_TH.index_select(0, batch.response_index).to(compute)


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
