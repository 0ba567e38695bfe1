"""What the Triton forwards do to one logit: the softcap, the odds, the entropy's term. Shared by their epilogues."""

# mypy: disable-error-code="untyped-decorator"
from __future__ import annotations

import triton
import triton.language as tl

LOG2E = 1.4426950408889634


@triton.jit
def exponent_of(logit: tl.tensor, target_logit: tl.tensor, scale: tl.tensor) -> tl.tensor:
    """d = log2(p_j / p_y); the subtraction first, so that an offset common to a row's logits costs no precision."""
    return (logit - target_logit) * scale


@triton.jit
def odds_at(d: tl.tensor) -> tl.tensor:
    """E of an exponent d: 2^-58 of the odds p_j / p_y. -inf gives 0."""
    return tl.exp2(d - 58.0)


@triton.jit
def capped(logit: tl.tensor, cap: tl.tensor) -> tl.tensor:
    """``cap * tanh(logit / cap)`` and its slope ``1 - tanh^2``; by q = e^(-2 |logit| / cap), which keeps the slope's
    digits where the cap saturates. A logit of -inf, a masked column, stays -inf and has slope 0."""
    q = tl.exp2(tl.abs(logit) * (-2.8853900817779268 / cap))
    r = 1.0 / (1.0 + q)
    value = tl.where(logit < 0.0, -cap, cap) * (1.0 - q) * r
    return tl.where(logit == float("-inf"), logit, value), 4.0 * q * r * r


@triton.jit
def moment_of(e: tl.tensor, d: tl.tensor) -> tl.tensor:
    """E d, summed for the entropy: 0 where E is 0, although d is -inf in masked columns."""
    return e * tl.maximum(d, -1000.0)
