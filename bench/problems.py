"""Inputs at a chosen entropy for the heads that are compared, and what they should give, in float64."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

SAMPLES = 8
"""Responses of a prompt."""

LADDER = [8.0, 4.0, 2.0, 0.35, 0.1, 0.0]
"""Entropies in nats. Policies under training live at the low end, which random logits never reach."""


@dataclass(frozen=True)
class Problem:
    """One batch: P prompts of 8 responses, all of the same length, their tokens in order.

    hidden [T, H], weight [V, H], target [T] int64; rewards [P, 8] float32 on the CPU; group, sample [T] int64 on the
    CPU; these three pinned where there is a card. The loss is sum_t coefficient_t * logprob_t with
    coefficient_t = -(r - mean) * 8/7 / (8 P).
    """

    hidden: Tensor
    weight: Tensor
    target: Tensor
    rewards: Tensor
    group: Tensor
    sample: Tensor

    @property
    def sequences(self) -> int:
        """Responses."""
        return self.rewards.numel()

    @property
    def length(self) -> int:
        """Tokens of a response."""
        return self.hidden.shape[0] // self.sequences

    def advantages(self) -> Tensor:
        """[P * 8] float32, hidden's device: the reward against the mean of the other seven."""
        centred = self.rewards - self.rewards.mean(1, keepdim=True)
        equal = (self.rewards == self.rewards[:, :1]).all(1, keepdim=True)
        return torch.where(equal, 0.0, centred * SAMPLES / (SAMPLES - 1)).flatten().to(self.hidden.device)

    def coefficient(self) -> Tensor:
        """[T] float32: d loss / d logprob."""
        return -self.advantages().repeat_interleave(self.length) / self.sequences


def make(
    tokens: int,
    width: int,
    vocab: int,
    *,
    dtype: torch.dtype,
    device: str,
    nats: float | None,
    zero_groups: bool = False,
    seed: int = 0,
) -> Problem:
    """A problem whose next-token distributions have this mean entropy; targets are sampled from them.

    Args:
        tokens: a multiple of 16, so that there are two prompts.
        nats: each hidden state leans towards one token's row of the weight, as strongly as this entropy asks. 0 means
            about 1e-9, where 1 - p is far below float32's resolution at 1. None: random logits of variance 1.
        zero_groups: every second prompt has equal rewards, so half of the rows have coefficient 0.
    """
    g = torch.Generator(device).manual_seed(seed)
    weight = torch.randn(vocab, width, generator=g, device=device)
    if nats is None:
        weight /= math.sqrt(width)
        hidden = torch.randn(tokens, width, generator=g, device=device)
    else:
        lean = torch.randint(0, vocab, (tokens,), generator=g, device=device)
        hidden = weight[lean] + 0.3 * torch.randn(tokens, width, generator=g, device=device)
        hidden *= _scale(hidden[:256], weight, max(nats, 1e-9))
    hidden, weight = hidden.to(dtype), weight.to(dtype)
    prompts = next((n for n in range(max(2, tokens // (SAMPLES * 256)), 1, -1) if tokens % (SAMPLES * n) == 0), None)
    if prompts is None:
        raise ValueError(f"{tokens} tokens do not make two prompts of {SAMPLES} responses: give a multiple of 16")
    rewards = torch.randn(prompts, SAMPLES, generator=torch.Generator().manual_seed(seed))
    if zero_groups:
        rewards[::2] = 1.0
    response = torch.arange(prompts * SAMPLES).repeat_interleave(tokens // (prompts * SAMPLES))
    tables = [rewards, response // SAMPLES, response % SAMPLES]
    if device == "cuda":  # to copy pageable memory to a card waits for it
        tables = [table.pin_memory() for table in tables]
    return Problem(hidden, weight, _sampled(hidden, weight, g), *tables)


def _scale(direction: Tensor, weight: Tensor, nats: float) -> float:
    """The factor of ``direction`` at which its logits have this mean entropy, by bisection."""
    logits = (direction @ weight.t()).double()
    low, high = 1e-4, 1e3
    for _ in range(40):
        middle = math.sqrt(low * high)
        if _entropy(logits * middle) > nats:
            low = middle
        else:
            high = middle
    return high


def _entropy(logits: Tensor) -> float:
    logp = logits.log_softmax(-1)
    return -(logp.exp() * logp).sum(-1).mean().item()


def _sampled(hidden: Tensor, weight: Tensor, generator: torch.Generator) -> Tensor:
    """One token a row; Gumbel noise, since multinomial refuses more than 2^24 categories."""
    parts = []
    for rows in hidden.split(1024):
        logits = rows.float() @ weight.float().t()
        noise = torch.empty_like(logits).exponential_(generator=generator).log_()
        parts.append((logits - noise).argmax(-1))
    return torch.cat(parts)


@dataclass(frozen=True)
class Truth:
    """float64: logprob [T], and for one coefficient dH [T, H] and dW [V, H]; the mean entropy in nats."""

    logprob: Tensor
    hidden: Tensor
    weight: Tensor
    entropy: float


def truth(problem: Problem, coefficient: Tensor, rows: int = 512) -> Truth:
    """The gradients of sum_t coefficient_t logprob_t, on the same rounded inputs, in odds against the target.

    ``1 - p`` is a sum of odds over 1 + that sum, so it keeps its digits where p is 1 to float64.
    """
    weight = problem.weight.double()
    grad_weight = torch.zeros_like(weight)
    logprobs, grads, entropy = [], [], 0.0
    for h, y, c in zip(problem.hidden.split(rows), problem.target.split(rows), coefficient.split(rows), strict=True):
        hidden, column = h.double(), y[:, None]
        x = hidden @ weight.t()
        entropy += _entropy(x) * len(h)
        x -= x.gather(1, column)
        odds = x.exp_().scatter_(1, column, 0.0)
        total = odds.sum(1)
        logprobs.append(-total.log1p())
        scaled = odds.mul_((-c.double() / (1 + total))[:, None])
        scaled.scatter_(1, column, (c.double() * total / (1 + total))[:, None])
        grads.append(scaled @ weight)
        grad_weight.addmm_(scaled.t(), hidden)
    return Truth(torch.cat(logprobs), torch.cat(grads), grad_weight, entropy / len(problem.hidden))


def error(got: Tensor, want: Tensor) -> float:
    """Relative error in the Frobenius norm; infinite where it is not a number."""
    value = ((got.double() - want).norm() / want.norm().clamp_min(1e-300)).item()
    return value if math.isfinite(value) else math.inf
