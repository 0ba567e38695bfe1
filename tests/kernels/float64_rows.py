"""What `linear_loss` gives a loss, in float64 and differentiable: log-probs, entropies, log-odds of masked columns."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.kernels.float64_oracle import Inputs


class Rows64(NamedTuple):
    logprob: Tensor
    entropy: Tensor
    log_odds: Tensor


class Grads(NamedTuple):
    hidden: Tensor
    weight: Tensor
    bias: Tensor | None


def leaves(inputs: Inputs, dtype: torch.dtype | None = None) -> list[Tensor]:
    """hidden, weight and, where there is one, bias, each wanting a gradient."""
    given = [x for x in (inputs.hidden, inputs.weight, inputs.bias) if x is not None]
    return [x.detach().to(dtype or x.dtype, copy=True).requires_grad_() for x in given]


def grads(given: Sequence[Tensor], value: Tensor) -> Grads:
    value.backward()  # type: ignore[no-untyped-call]
    found = [x.grad for x in given]
    assert all(x is not None for x in found)
    return Grads(*found, *[None] * (3 - len(found)))  # type: ignore[arg-type]


def rows64(
    inputs: Inputs, given: Sequence[Tensor], softcap: float | None = None, columns: Sequence[int] = ()
) -> Rows64:
    """Of the leaves ``given``; each in the form whose digits survive in autograd where probabilities near 1 and where a
    softcap saturates. Masked rows give 0, and -inf for the log-odds."""
    x = F.linear(*given)
    if softcap is not None:  # tanh a = 1 - 2 sigmoid(-2a), whose slope does not vanish before it should
        finite = torch.where(x == -torch.inf, 0.0, x)
        capped = softcap * finite.sign() * (1 - 2 * torch.sigmoid(finite.abs() * (-2 / softcap)))
        x = torch.where(x == -torch.inf, x, capped)
    x = x / inputs.temperature
    masked = inputs.target == -100
    index = torch.where(masked, 0, inputs.target)[:, None]
    kept = x.index_fill(1, torch.tensor(columns, dtype=torch.long), -torch.inf)
    others = (kept - kept.gather(1, index)).scatter(1, index, -torch.inf).logsumexp(1)
    top = kept.argmax(1, keepdim=True)
    below = (kept - kept.gather(1, top)).clamp_min(-1e300)
    z = below.exp().scatter(1, top, 0.0)
    log_odds = x[:, list(columns)] - kept.logsumexp(1, keepdim=True)
    return Rows64(
        torch.where(masked, 0.0, -F.softplus(others, threshold=600)),
        torch.where(masked, 0.0, z.sum(1).log1p() - (z * below).sum(1) / (1 + z.sum(1))),
        torch.where(masked[:, None], -torch.inf, log_odds),
    )


def eager(inputs: Inputs, loss: Callable[[Tensor], Tensor]) -> Grads:
    """Of a loss over log-probs, as PyTorch has it in the inputs' type."""
    given = leaves(inputs)
    logits = F.linear(*given).float() / inputs.temperature
    return grads(given, loss(logits.log_softmax(-1).gather(1, inputs.target[:, None])[:, 0]))
