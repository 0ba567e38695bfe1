"""The fused head in float64, with a softcap or without, and with a gradient by the entropy.

Written out by hand where autograd would lose digits: 1 - p at low entropy, the softcap's slope where it saturates.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.kernels.float64_oracle import Inputs


class Capped(NamedTuple):
    logprob: Tensor
    entropy: Tensor
    gap: Tensor
    """nats from the row's largest logit down to its target's, [T]"""
    logit: Tensor
    """of the target, after the softcap, before the temperature"""
    slope: Tensor
    """there"""
    by_logit: Tensor
    """[T, V], d loss / d logit before softcap and temperature, of loss = sum of grad * logprob"""
    hidden: Tensor
    weight: Tensor
    bias: Tensor


def capped_truth(inputs: Inputs, cap: float | None) -> Capped:
    """For targets in range and -100, whose rows give 0."""
    hidden, weight = inputs.hidden.double(), inputs.weight.double()
    raw = F.linear(hidden, weight, None if inputs.bias is None else inputs.bias.double())
    ratio = torch.zeros_like(raw) if cap is None else raw / cap
    slopes = 1 / ratio.cosh() ** 2
    logits = raw if cap is None else torch.where(raw == -torch.inf, raw, cap * ratio.tanh())
    masked = inputs.target == -100
    column = torch.where(masked, 0, inputs.target)[:, None]
    x = logits / inputs.temperature
    top = x.argmax(1, keepdim=True)
    below = x - x.gather(1, top)
    z = below.exp().scatter(1, top, 0.0)
    log_total = z.sum(1).log1p()
    entropy = log_total - (z * below.clamp_min(-1e300)).sum(1) / (1 + z.sum(1))
    others = (x - x.gather(1, column)).scatter(1, column, -torch.inf).logsumexp(1)
    logprob = torch.where(others > 600, -others, -others.clamp_max(600).exp().log1p())
    shares = (below - log_total[:, None]).exp().scatter(1, column, 0.0)  # p_j of the others; their sum is 1 - p_y
    by_x = (-shares).scatter(1, column, shares.sum(1, keepdim=True))
    by_logit = by_x * slopes * (inputs.grad.double() / inputs.temperature * ~masked)[:, None]
    return Capped(
        torch.where(masked, 0.0, logprob), torch.where(masked, 0.0, entropy),
        x.amax(1) - x.gather(1, column)[:, 0], logits.gather(1, column)[:, 0], slopes.gather(1, column)[:, 0],
        by_logit, by_logit @ weight, by_logit.t() @ hidden, by_logit.sum(0),
    )  # fmt: skip


def entropy_truth(inputs: Inputs, grad_entropy: Tensor) -> Tensor:
    """[T, V], by autograd: d loss / d (logit / temperature), loss = sum of grad * logprob + grad_entropy * entropy."""
    bias = None if inputs.bias is None else inputs.bias.double()
    logits = F.linear(inputs.hidden.double(), inputs.weight.double(), bias) / inputs.temperature
    logits.requires_grad_()
    logp = logits.log_softmax(1)
    masked = inputs.target == -100
    at = logp.gather(1, torch.where(masked, 0, inputs.target)[:, None])[:, 0]
    entropy = -(logp.exp() * logp).sum(1)
    (inputs.grad.double() * at + grad_entropy.double() * entropy)[~masked].sum().backward()
    assert logits.grad is not None
    return logits.grad
