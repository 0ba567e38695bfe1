"""The fused head in odds form, in plain PyTorch: what the GPU kernel computes, and the route where it cannot run.

With logits ``l = (h W^T + bias) / temperature``, a target ``y`` and ``b = 58 ln 2`` a row is described by odds
against its target instead of by a softmax::

    E_j = exp(l_j - l_y - b)  (j != y),  E_y = 0        S = sum_j E_j        unit = exp(-b) = 2^-58
    tot = S + unit        logp = -log1p(S / unit)        1 - p_y = S / tot   (no cancellation at any entropy)

and with ``c = d loss / d logp`` the gradient needs row scales only, never another pass over the vocabulary::

    a = c / (temperature * tot)                           t = c (1 - p_y) / temperature
    dH = -a * (E @ W) + t * W[y]        dW = -E^T @ (a * h), plus t * h at row y        dbias = -E^T a, plus t at y

A row whose target lies so far below the rest that ``E`` would leave the range takes ``b = max_j l_j - l_y`` instead.
The derivation is written out in docs/kernels.md; the losses built on it are those of arXiv 2509.24050.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

IGNORE = -100
"""The target that masks a row: log-prob 0, no gradient."""

UNIT = 2.0**-58
"""exp(-b): the target's own share of ``tot`` in the scale of E. A power of two, so scaling by it is exact."""

REPAIR_GAP = 118 * 0.6931471805599453
"""Nats between the largest logit and the target's above which a row takes ``b = gap``: E would pass 2^60."""


class RowOdds(NamedTuple):
    """What one forward leaves per row: ``logprob``, ``odds`` (S) and ``unit`` (exp(-b)), each [C] float32."""

    logprob: Tensor
    odds: Tensor
    unit: Tensor


def safe_targets(target: Tensor, vocab: int) -> tuple[Tensor, Tensor]:
    """Split targets [C] int64 into an index that is always in range and which rows may use it ([C] bool)."""
    valid = (target >= 0) & (target < vocab)
    return torch.where(valid, target, 0), valid


def guard_target_logits(logit: Tensor, target: Tensor, valid: Tensor) -> Tensor:
    """Target logits [C] with +inf where the row is masked (then E is 0) and NaN where the target is out of range."""
    other = torch.where(target == IGNORE, float("inf"), float("nan"))
    return torch.where(valid, logit, other)


def matmul_fp32(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b`` with an fp32 result and fp32 sums, for bf16 or fp32 factors."""
    if a.dtype == torch.float32:
        return a @ b
    if a.device.type == "cpu":  # the CPU has no 16-bit GEMM with a wider result
        return a.float() @ b.float()
    return torch.mm(a, b, out_dtype=torch.float32)


def scaled_logits(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, temperature: float, out: Tensor | None = None
) -> Tensor:
    """``(hidden @ weight^T + bias) / temperature``, [C, V] float32, in ``out`` if given (float32 inputs only)."""
    scale = 1.0 / temperature
    if hidden.dtype == torch.float32:
        if out is None:
            out = hidden.new_empty(hidden.shape[0], weight.shape[0])
        if bias is None:
            return torch.addmm(out, hidden, weight.t(), beta=0.0, alpha=scale, out=out)
        return torch.addmm(bias.float(), hidden, weight.t(), beta=scale, alpha=scale, out=out)
    logits = matmul_fp32(hidden, weight.t())
    if bias is not None:
        logits.add_(bias)
    return logits if temperature == 1.0 else logits.mul_(scale)


def plain_odds(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, temperature: float, store: Tensor | None
) -> RowOdds:
    """One chunk's forward.

    Args:
        hidden: [C, H] float32 or bfloat16.
        weight: [V, H], hidden's dtype.
        bias: [V] or None.
        target: [C] int64.
        temperature: divides the logits.
        store: [C, V] of hidden's dtype, any row pitch; receives E. None: forward only.
    """
    index, valid = safe_targets(target, weight.shape[0])
    column = index[:, None]
    x = scaled_logits(hidden, weight, bias, temperature, out=store if hidden.dtype == torch.float32 else None)
    target_logit = guard_target_logits(x.gather(1, column)[:, 0], target, valid)
    largest = x.amax(1)
    gap = largest - target_logit
    far = gap > REPAIR_GAP
    unit = torch.where(far, (-gap).exp(), UNIT)
    # exp first, then the exact factor 2^-58: subtracting b in the exponent would round every element at b's size.
    x.sub_(torch.where(far, largest, target_logit)[:, None]).exp_().mul_(torch.where(far, 1.0, UNIT)[:, None])
    x.scatter_(1, column, 0.0)
    odds = torch.where(gap.isnan(), gap, x.sum(1))  # with V = 1 the column just zeroed was the only NaN
    if store is not None and store.dtype != x.dtype:
        store.copy_(x)
    return RowOdds(finish_logprob(odds, unit, gap, target), odds, unit)


def finish_logprob(odds: Tensor, unit: Tensor, gap: Tensor, target: Tensor) -> Tensor:
    """Log-probs [C] float32 from S, exp(-b) and, for rows where b is the gap itself, that gap."""
    near = -torch.log1p(odds * (1.0 / UNIT))
    logprob = torch.where(unit == UNIT, near, -(gap + torch.log(odds + unit)))
    return torch.where(target == IGNORE, 0.0, logprob)


class RowScales(NamedTuple):
    """Row factors of the backward, [C] float32: ``spread`` = -a (on E) and ``pull`` = t (on the target's row)."""

    spread: Tensor
    pull: Tensor


def row_scales(grad: Tensor, odds: Tensor, unit: Tensor, target: Tensor, temperature: float) -> RowScales:
    """The factors -a and t from ``grad`` = d loss / d logp [C] float32; masked rows get 0 whatever their gradient."""
    c = torch.where(target == IGNORE, 0.0, grad) * (1.0 / temperature)
    spread = c / (odds + unit)
    return RowScales(-spread, spread * odds)


def hidden_gradient(e: Tensor, weight: Tensor, index: Tensor, scales: RowScales, dtype: torch.dtype) -> Tensor:
    """dH [C, H] of one chunk, summed in float32 and rounded once to ``dtype``; ``e`` is [C, V]."""
    grad = matmul_fp32(e, weight).mul_(scales.spread[:, None])
    return grad.addcmul_(weight.index_select(0, index).float(), scales.pull[:, None]).to(dtype)


def add_weight_gradient(total: Tensor | None, e: Tensor, hidden: Tensor, index: Tensor, scales: RowScales) -> Tensor:
    """Add one chunk to dW [V, H] float32 (``total``; None starts it) and return it."""
    scaled = (hidden * scales.spread[:, None]).to(hidden.dtype)
    if total is None:
        total = matmul_fp32(e.t(), scaled)
    elif hidden.dtype == torch.float32 or hidden.device.type == "cpu":
        total.addmm_(e.t().float(), scaled.float())
    else:
        torch.ops.aten.addmm.dtype_out(total, e.t(), scaled, torch.float32, out=total)
    return add_rows(total, index, hidden * scales.pull[:, None])


def add_bias_gradient(total: Tensor | None, e: Tensor, index: Tensor, scales: RowScales) -> Tensor:
    """Add one chunk to dbias [V] float32 (``total``; None starts it) and return it."""
    spread = matmul_fp32(e.t(), scales.spread[:, None].to(e.dtype))[:, 0]
    return add_rows(spread if total is None else total.add_(spread), index, scales.pull)


def add_rows(total: Tensor, index: Tensor, rows: Tensor) -> Tensor:
    """``total[index] += rows`` in an order that does not change from run to run (index_add uses atomics on CUDA)."""
    if total.device.type == "cpu":
        return total.index_add_(0, index, rows)
    return total.index_put_((index,), rows, accumulate=True)  # sorts the index on CUDA
