"""The policy forward: packed or padded responses to log-probs, or to the policy loss, without [R, V] logits."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from gapg.batches.batching import PackedBatch
from gapg.model import attention
from gapg_kernels.fused_policy_loss import FusedLoss, fused_policy_loss
from gapg_kernels.linear_logprob import linear_logprob
from gapg_kernels.policy_loss import PolicyLossOptions


def response_logprobs(
    model: PreTrainedModel, batch: PackedBatch, temperature: float = 1.0, compute: torch.dtype = torch.float32
) -> torch.Tensor:
    """log pi(token) at `temperature` of every response token of a batch, [R] float32, differentiable.

    Only the R response positions go through the LM head, and no [R, V] tensor is kept. `compute` is the type of the
    matrix products; the gradients of weights are float32.
    """
    return head_logprobs(model, response_states(model, batch, compute), batch.target, temperature)


def head_logprobs(
    model: PreTrainedModel, hidden_RH: torch.Tensor, target_R: torch.Tensor, temperature: float = 1.0
) -> torch.Tensor:
    """The same from last hidden states [R, H], in whose type it computes."""
    head = model.get_output_embeddings()
    return linear_logprob(hidden_RH, head.weight, target_R, bias=head.bias, **logit_arguments(model, temperature))


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
    """The policy loss of a batch, to be followed by ``loss.backward()`` and nothing else.

    The head's share of d(weight) is added to its float32 ``.grad`` here and now, never rounded to `compute`; the rest
    comes with backward. `rewards_PG` is the reward table of the whole step, on the model's device; the other arguments
    are as in `gapg_kernels.fused_policy_loss`.
    """
    weight, main_grad = head_weight(model)
    return fused_policy_loss(
        response_states(model, batch, compute),
        weight,
        batch.target,
        rewards_PG,
        batch.group,
        batch.sample,
        denominator=denominator,
        options=options,
        bias=model.get_output_embeddings().bias,
        **logit_arguments(model, temperature),
        coefficient=batch.weight,
        old_logprob=old_logprob,
        rollout_logprob=batch.rollout_logprob,
        reference_logprob=reference_logprob,
        with_entropy=with_entropy,
        main_grad=main_grad,
    )


def head_weight(model: PreTrainedModel) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(the LM head's weight [V, H], detached; its float32 ``.grad``, where gradients are summed up, None if frozen)."""
    weight: torch.Tensor = model.get_output_embeddings().weight
    if weight.requires_grad and weight.grad is None:
        weight.grad = torch.zeros_like(weight, dtype=torch.float32)
    return weight.detach(), weight.grad if weight.requires_grad else None


class LogitMap(NamedTuple):
    """What a model makes of the products u of its head: ``softcap * tanh(scale * u / softcap)``."""

    scale: float
    softcap: float | None
    """None: ``scale * u``"""


def logit_map(model: PreTrainedModel) -> LogitMap:
    """By the settings that the architectures of transformers have for it; `choose_route` checks the outcome."""
    config = model.config.get_text_config()
    caps = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")  # Gemma, RecurrentGemma, xLSTM
    return LogitMap(_scale(config), next((cap for name in caps if (cap := getattr(config, name, None))), None))


def _scale(config: PreTrainedConfig) -> float:
    if scaling := getattr(config, "logits_scaling", None):  # the Granites divide by it
        return float(scaling if config.model_type == "hyperclovax" else 1 / scaling)
    if width := getattr(config, "logits_mup_width_multiplier", None):
        return float(1 / width)
    for name in ("logit_scale", "lm_head_multiplier"):  # Cohere's, Falcon-H1's
        if isinstance(scale := getattr(config, name, None), float):
            return scale
    return 1.0


def logit_arguments(model: PreTrainedModel, temperature: float) -> dict[str, Any]:
    """Temperature t and softcap c as `gapg_kernels` has them, with the scale s in both: c' = c / s and t' = t / s.

    For ``c tanh(s u / c) / t = c' tanh(u / c') / t'``.
    """
    scale, softcap = logit_map(model)
    return {"temperature": temperature / scale, "softcap": None if softcap is None else softcap / scale}


def response_states(model: PreTrainedModel, batch: PackedBatch, compute: torch.dtype) -> torch.Tensor:
    """The last hidden states that predict a response token, [R, H] in `compute`."""
    with torch.autocast(model.device.type, compute, enabled=compute != torch.float32):
        hidden_BLH = body(model)(**_arguments(batch), use_cache=False).last_hidden_state
    return hidden_BLH.flatten(0, 1).index_select(0, batch.response_index).to(compute)


def body(model: PreTrainedModel) -> torch.nn.Module:
    """The model below its head."""
    body: torch.nn.Module = model.base_model
    if body is model:
        body = model.get_decoder()
    return model.get_submodule("model") if body is model else body  # neither of the two knows Llama 4's


def _arguments(batch: PackedBatch) -> dict[str, Any]:
    """What tells a model where the sequences are.

    Padded rows need no mask: padding is on the right, where no causal layer looks. Positions are the model's own.
    """
    if batch.padded:
        return {"input_ids": batch.input_ids.view(-1, batch.max_length)}
    rows = {"input_ids": batch.input_ids[None], "position_ids": batch.position_ids[None]}
    if batch.shared is not None:
        return rows | attention.shared_arguments(batch.shared)
    return rows | attention.packed_arguments(batch.cu_seqlens, batch.max_length)
