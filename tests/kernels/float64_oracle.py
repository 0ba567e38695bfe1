"""float64 definitions the kernels are held to, and inputs at a chosen entropy."""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

ENTROPIES = [8.0, 4.0, 2.0, 0.35, 0.1, 0.0]
"""Nats. Policies under RL live at the low end, which random test logits never reach."""


class Result(NamedTuple):
    logprob: Tensor
    hidden: Tensor
    weight: Tensor
    bias: Tensor | None


class Inputs(NamedTuple):
    hidden: Tensor
    weight: Tensor
    target: Tensor
    grad: Tensor
    bias: Tensor | None = None
    temperature: float = 1.0


def entropy(inputs: Inputs) -> float:
    logp = _logits64(inputs.hidden.double(), inputs.weight.double(), inputs).log_softmax(-1)
    return -(logp.exp() * logp).sum(-1).mean().item()


@functools.cache
def inputs_at(
    nats: float,
    *,
    rows: int = 64,
    width: int = 64,
    vocab: int = 4096,
    dtype: torch.dtype = torch.bfloat16,
    bias: bool = False,
    temperature: float = 1.0,
    seed: int = 0,
) -> Inputs:
    """Random inputs whose next-token distributions have this mean entropy, and targets sampled from them.

    Each hidden state leans towards one token's row of the weight, more strongly for a lower entropy (found by
    bisection); 0 nats means about 1e-9, where 1 - p is far below float32's resolution at 1.
    """
    g = torch.Generator().manual_seed(seed)
    weight = torch.randn(vocab, width, generator=g)
    lean = torch.randint(0, vocab, (rows,), generator=g)
    direction = weight[lean] + 0.3 * torch.randn(rows, width, generator=g)
    base = Inputs(
        direction,
        weight.to(dtype),
        lean,
        torch.randn(rows, generator=g),
        torch.randn(vocab, generator=g).mul_(0.1).to(dtype) if bias else None,
        temperature,
    )
    low, high = 1e-4, 1e3
    for _ in range(40):
        middle = math.sqrt(low * high)
        if entropy(base._replace(hidden=direction * middle)) > max(nats, 1e-9):
            low = middle
        else:
            high = middle
    at = base._replace(hidden=(direction * high).to(dtype))
    probs = _logits64(at.hidden.double(), at.weight.double(), at).softmax(-1)
    return at._replace(target=torch.multinomial(probs, 1, generator=g)[:, 0])


def _logits64(hidden: Tensor, weight: Tensor, inputs: Inputs) -> Tensor:
    bias = None if inputs.bias is None else inputs.bias.double()
    return F.linear(hidden, weight, bias) / inputs.temperature


def truth(inputs: Inputs) -> Result:
    """Autograd of log_softmax at the target in float64, on the same rounded inputs; masked rows give 0.

    It is written as -log(1 + sum_j exp(l_j - l_y)): plain log_softmax loses 1 - p below 1e-16 even in float64
    (a test compares the two where both resolve).
    """
    hidden, weight = inputs.hidden.double().requires_grad_(), inputs.weight.double().requires_grad_()
    bias = None if inputs.bias is None else inputs.bias.double().requires_grad_()
    logits = F.linear(hidden, weight, bias) / inputs.temperature
    masked = inputs.target == -100
    index = torch.where(masked, 0, inputs.target)[:, None]
    others = (logits - logits.gather(1, index)).scatter(1, index, -math.inf).logsumexp(1)
    far = others > 600  # exp would overflow even in float64, and log1p(exp(x)) is x there
    logprob = torch.where(far, -others, -torch.where(far, 0.0, others).exp().log1p())
    logprob = torch.where(masked, 0.0, logprob)
    (logprob * inputs.grad.double()).sum().backward()
    assert hidden.grad is not None and weight.grad is not None
    return Result(logprob.detach(), hidden.grad, weight.grad, None if bias is None else bias.grad)


def error(got: Tensor | None, want: Tensor | None) -> float:
    """Relative error in the Frobenius norm; any error against a zero truth is huge."""
    assert got is not None and want is not None
    return ((got.double() - want).norm() / want.norm().clamp_min(1e-300)).item()
