"""Entropies of the rows in float64, to full relative precision at any entropy."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.kernels.float64_oracle import Inputs


def entropies(inputs: Inputs) -> Tensor:
    """Nats of each row's distribution [T]; masked rows give 0.

    From the largest logit: log Z - sum_j exp(x_j) x_j / Z with Z - 1 summed by itself, as p log p over log_softmax
    would lose the entropies near 0.
    """
    bias = None if inputs.bias is None else inputs.bias.double()
    logits = F.linear(inputs.hidden.double(), inputs.weight.double(), bias) / inputs.temperature
    top = logits.argmax(1, keepdim=True)
    x = logits - logits.gather(1, top)
    others = x.exp().scatter(1, top, 0.0)
    moment = (others * x.clamp_min(-1e300)).sum(1)
    entropy = others.sum(1).log1p() - moment / (1 + others.sum(1))
    return torch.where(inputs.target == -100, 0.0, entropy)


def gaps(inputs: Inputs) -> Tensor:
    """Nats from each row's largest logit down to its target's [T]; 0 for targets that are not tokens."""
    bias = None if inputs.bias is None else inputs.bias.double()
    logits = F.linear(inputs.hidden.double(), inputs.weight.double(), bias) / inputs.temperature
    valid = (inputs.target >= 0) & (inputs.target < inputs.weight.shape[0])
    at = logits.gather(1, torch.where(valid, inputs.target, 0)[:, None])[:, 0]
    return torch.where(valid, logits.amax(1) - at, 0.0)
