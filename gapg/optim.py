"""AdamW with one learning-rate schedule: linear warm-up, flat, linear fall; its weights and moments are float32.

A bfloat16 weight has 8 bits: an update below 1/512 of it would round to nothing. So the optimizer of a model with
bfloat16 parameters keeps masters, the same weights in float32 (arXiv 1710.03740): it steps those, and each parameter is
its master, rounded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn
from torch.optim.adamw import adamw

from gapg.model.precision import adapter_tensors, round_parameters

if TYPE_CHECKING:
    from gapg.config_sections import OptimConfig

MASTER = "master"
"""The slot of a parameter's master in the state of `MasterAdamW`."""


def make_optimizer(
    model: nn.Module, config: OptimConfig, parameters: Literal["float32", "bfloat16"] = "float32"
) -> torch.optim.Optimizer:
    """Fused AdamW over every trainable parameter of a float32 model.

    With bfloat16 parameters its masters are the weights as they are now, and the model's are then rounded
    (`gapg.model.precision`); adapters stay float32 and are their own masters.
    """
    params = [p for p in model.parameters() if p.requires_grad]
    rounded = parameters == "bfloat16"
    options: dict[str, Any] = {"lr": config.lr, "betas": config.betas, "weight_decay": config.weight_decay}
    if config.offload or (rounded and not adapter_tensors(model)):
        optimizer: torch.optim.Optimizer = MasterAdamW(params, **options, offload=config.offload)
    else:
        optimizer = torch.optim.AdamW(params, **options, fused=True)
    if rounded:
        round_parameters(model)
    return optimizer


class MasterAdamW(torch.optim.Optimizer):
    """Fused AdamW (arXiv 1711.05101) over float32 masters; after a step each parameter is its master, rounded.

    `state[p]` has `master`, `exp_avg` and `exp_avg_sq`, float32 in p's shape, and `step`, [] float32, from the first
    moment on. Gradients are to be float32. A step is skipped where `found_inf`, [] float32 on their device, is not 0.

    Args:
        params: whose values now are the masters'.
        offload: the state lies in the machine's memory, and the CPU does the step, one parameter after the other: only
            gradients and new values travel. Such a step waits for the device.
    """

    found_inf: torch.Tensor

    def __init__(
        self, params: Iterable[nn.Parameter], lr: float, betas: tuple[float, float], weight_decay: float, *,
        offload: bool = False,
    ) -> None:  # fmt: skip
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})
        self.offload = offload
        for p in (p for group in self.param_groups for p in group["params"]):
            master = p.detach().to("cpu" if offload else p.device, torch.float32, copy=True)
            self.state[p] = {
                "step": torch.zeros((), device=master.device),
                MASTER: master,
                "exp_avg": torch.zeros_like(master),
                "exp_avg_sq": torch.zeros_like(master),
            }

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        if self.offload:  # a copy that does not wait would be read before it is there
            self.found_inf = self.found_inf.cpu()
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            for part in [[p] for p in params] if self.offload else [params]:
                self._step(part, group)

    def _step(self, params: list[nn.Parameter], group: dict[str, Any]) -> None:
        slots = {key: [self.state[p][key] for p in params] for key in ("step", MASTER, "exp_avg", "exp_avg_sq")}
        masters, (beta1, beta2) = slots[MASTER], group["betas"]
        grads = [p.grad.to(m.device) for p, m in zip(params, masters, strict=True) if p.grad is not None]
        adamw(
            masters, grads, slots["exp_avg"], slots["exp_avg_sq"], [], slots["step"], fused=True,
            found_inf=self.found_inf, amsgrad=False, maximize=False, beta1=beta1, beta2=beta2, lr=group["lr"],
            weight_decay=group["weight_decay"], eps=1e-8,
        )  # fmt: skip
        torch._foreach_copy_(list[torch.Tensor](params), masters)


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
