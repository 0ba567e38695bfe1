"""One policy update from judged responses: what need not be computed is left out, the rest packed and learned from."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from gapg.batches import sharing
from gapg.batches.batching import Example, PackedBatch, packed_batches
from gapg.config import RunConfig
from gapg.errors import ConfigError
from gapg.examples import equal_once
from gapg.marginal_loss import MarginalBatch, MarginalLoss, Masked
from gapg.model.compiled import within_limit
from gapg.model.policy import response_logprobs, response_loss
from gapg.optim import clip_and_step, learning_rate
from gapg_kernels.fused_policy_loss import FusedLoss
from gapg_kernels.policy_loss import PolicyLossOptions, group_advantages, summarize


@within_limit()
def policy_update(
    model: PreTrainedModel,
    optimizer: torch.optim.Optimizer,
    config: RunConfig,
    step: int,
    examples: Sequence[Example],
    rewards_PG: torch.Tensor,
    reference: PreTrainedModel | None = None,
    masked: Masked | None = None,
) -> dict[str, Any]:
    """The policy loss over packed micro-batches and one optimizer step an epoch; none at all for an empty D.

    A step whose loss or gradient is not finite is skipped. Nothing waits for the device between packed micro-batches.

    Args:
        model: the policy, in training mode.
        optimizer: over its trainable parameters.
        config: `loss`, `update`, `optim`, `token_cap`, `steps`, `model.dtype` and `rollout.temperature` matter here.
            `update.pack` as `choose_route` found it for this model: "auto" is taken for True.
        step: of the learning-rate schedule.
        examples: all responses of D, whose `group` and `sample` place them in the table.
        rewards_PG: [P, G] float32 on the CPU. P counts all prompts of D.
        reference: the frozen policy of the KL term, when `loss.kl_coef` asks for it.
        masked: of responses sampled with help forbidden, whose examples say where the phrase could begin: the marginal
            estimator instead (`gapg.marginal`). The table then says which are right.

    Returns:
        The metrics: learning rate, gradient norm, steps skipped, log-prob gap to the engine (NaN: it gave none), the
        loss's statistics, token counts.

    Raises:
        ConfigError: `loss.tis_cap` without the engine's log-probs; layers that are compiled again and again.
    """
    loss, device = config.loss, model.device
    if loss.tis_cap and any(len(e.rollout_logprobs) != len(e.response_ids) for e in examples):
        raise ConfigError("loss.tis_cap needs the log-probs of the rollout engine, which gave none: leave it empty")
    chosen = examples
    if masked is None:
        chosen = with_gradient(config, examples, rewards_PG)
    elif config.update.skip_zero_advantage:
        chosen, masked = equal_once(examples, rewards_PG, masked)
    padded = config.update.pack is False
    saving = sharing.NOTHING if padded else _sharing(model, chosen)
    share = not padded and {"auto": saving.pays, "always": True, "never": False}[config.update.share_prompts]
    batches = packed_batches(
        chosen, config.token_cap, device, share=share, padded=padded,
        every_position=not config.update.response_positions, whole_groups=masked is not None,
    )  # fmt: skip
    tokens = sum(len(e.response_ids) for e in examples)
    denominator = max(1, tokens if loss.aggregation == "token_mean" else rewards_PG.numel())
    forward = {"temperature": config.rollout.temperature, "compute": getattr(torch, config.model.dtype)}
    with torch.no_grad():
        reference_logprobs = [
            None if reference is None else response_logprobs(reference, b, **forward) for b in batches
        ]
    table = rewards_PG.to(device)
    marginal = None
    if masked is not None:
        marginal = MarginalLoss(model, config, table, masked.to(device))
        marginal.look_ahead(batches)
    old: list[torch.Tensor | None] = [None] * len(batches)
    lr, norms, stats, gaps = learning_rate(config.optim, step, config.steps), [0.0], [], list[torch.Tensor]()
    for epoch in range(loss.epochs if len(rewards_PG) else 0):
        clip = loss.clip if epoch else None  # the first epoch's ratio is 1
        options = PolicyLossOptions(loss.advantage, clip, loss.tis_cap, loss.kl, loss.kl_coef)
        total = table.new_zeros(())
        for i, batch in enumerate(batches):
            out: FusedLoss | MarginalBatch
            if marginal is not None:
                out = marginal(batch, denominator)
            else:
                out = response_loss(
                    model, batch, table, denominator, options, **forward, old_logprob=old[i],
                    reference_logprob=reference_logprobs[i], with_entropy=loss.entropy,
                )  # fmt: skip
                stats.append(out.stats)
            out.loss.backward()
            total += out.loss.detach()
            if epoch == 0:
                old[i] = out.logprob if loss.epochs > 1 else None
                given = (batch.target >= 0) & ~batch.rollout_logprob.isnan()
                gap = (out.logprob - batch.rollout_logprob).abs()
                gaps.append(torch.where(given, gap, -1.0).amax() if len(gap) else total.new_tensor(-1.0))
        for param in model.parameters():
            if param.requires_grad and param.grad is None:  # every advantage was zero: a step with a zero gradient
                param.grad = torch.zeros_like(param, dtype=torch.float32)
        norms.append(float(clip_and_step(optimizer, lr, config.optim.grad_clip, total)))
    taken = [norm for norm in norms if math.isfinite(norm)]
    gap_seen = float(torch.stack(gaps).max()) if gaps else 0.0
    return {
        "lr": lr,
        "grad_norm": norms[-1],
        "skipped": len(norms) - len(taken),
        "clipped": sum(norm > config.optim.grad_clip for norm in taken),
        "logprob_gap": math.nan if gap_seen < 0 else gap_seen,
        **_token_counts(config, examples, chosen, batches),
        "sharing/on": int(share),
        "sharing/predicted_speedup": saving.speedup,
        **(_loss_metrics(config, stats) if marginal is None else marginal.metrics()),
    }


def with_gradient(config: RunConfig, examples: Sequence[Example], rewards_PG: torch.Tensor) -> Sequence[Example]:
    """The responses that have a gradient: all under a KL penalty, else those whose advantage is not exactly 0."""
    if config.loss.kl_coef or not config.update.skip_zero_advantage or not examples:
        return examples
    advantages = group_advantages(rewards_PG, config.loss.advantage).tolist()
    return [e for e in examples if advantages[e.group][e.sample] != 0]


def _sharing(model: PreTrainedModel, examples: Sequence[Example]) -> sharing.Saving:
    """What one copy of a prompt for all its responses would save in this update."""
    groups: dict[int, tuple[int, list[int]]] = {}
    for e in examples:
        groups.setdefault(e.group, (len(e.prompt_ids), []))[1].append(len(e.response_ids))
    rates = sharing.RATES["cuda" if model.device.type == "cuda" else "cpu"]
    return sharing.saving(groups.values(), sharing.shape_of(model), rates)


def _token_counts(
    config: RunConfig, given: Sequence[Example], chosen: Sequence[Example], batches: Sequence[PackedBatch]
) -> dict[str, int]:
    """Tokens of D given, put through the model, and saved by each rule; and the rows of the LM head."""
    all_of_d, trained = sum(map(len, given)), sum(map(len, chosen))
    rule = "equal_responses" if config.method == "marginal" else "zero_advantage"
    computed = sum(b.input_ids.numel() for b in batches)
    longest = max(map(len, chosen), default=0)
    return {
        "tokens/given": all_of_d,
        "tokens/computed": computed,
        f"tokens/saved_{rule}": all_of_d - trained,
        "tokens/saved_shared_prompts": max(0, trained - computed),
        "tokens/saved_padding": 0 if config.update.pack is False else longest * len(chosen) - trained,
        "tokens/head": sum(b.target.numel() for b in batches),
    }


def _loss_metrics(config: RunConfig, stats: Sequence[torch.Tensor]) -> dict[str, float]:
    """Those that say something; ratio and ess are to the engine's log-probs in a step's first epoch."""
    clip = {"clip_fraction"} if config.loss.clip else set()
    tis = {"tis_fraction"} if config.loss.tis_cap else set()
    shown = {"loss", "ratio_min", "ratio_max", "ess", "rollout_nan_fraction", "kl", "entropy"} | clip | tis
    return {f"policy/{name}": value for name, value in summarize(stats).items() if name in shown}
