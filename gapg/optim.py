"""AdamW with one learning-rate schedule: linear warm-up, flat, linear fall."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

if TYPE_CHECKING:
    from gapg.config_sections import OptimConfig


def make_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.AdamW:
    """Fused AdamW over every trainable parameter."""
    params = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.AdamW(params, lr=config.lr, betas=config.betas, weight_decay=config.weight_decay, fused=True)


def learning_rate(config: OptimConfig, step: int, steps: int) -> float:
    """Learning rate of step `step` of `steps`, from 0: up over `warmup_steps`, flat until `flat`, to `final_lr`.

    Not by transformers' `get_wsd_schedule`, whose first step has a learning rate of 0 and learns nothing.
    """
    if step < config.warmup_steps:
        return config.lr * (step + 1) / (config.warmup_steps + 1)
    start = max(config.warmup_steps, int(config.flat * steps))
    if step <= start:
        return config.lr
    done = (step - start) / max(1, steps - 1 - start)
    return config.lr * (1 - (1 - config.final_lr) * min(1.0, done))


def clip_and_step(
    optimizer: torch.optim.Optimizer, lr: float, max_norm: float, loss: torch.Tensor | None = None
) -> torch.Tensor:
    """One step of a fused optimizer at `lr`, skipped where the gradient or `loss` [] is not finite; drops the gradient.

    Returns the gradient norm before clipping, [] float32; not finite exactly where the step was skipped: weights and
    moments are then as they were. Does not wait for the device.
    """
    for group in optimizer.param_groups:
        group["lr"] = lr
    params = [p for group in optimizer.param_groups for p in group["params"]]
    norm = nn.utils.clip_grad_norm_(params, max_norm)
    if loss is not None:
        norm = torch.where(loss.isfinite(), norm, torch.nan)
    # where gradient scaling tells a fused optimizer not to step, on the device itself
    optimizer.found_inf = 1.0 - norm.isfinite().float()  # type: ignore[attr-defined]
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm
