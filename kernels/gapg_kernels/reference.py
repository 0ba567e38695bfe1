"""The fused head in odds form, in plain PyTorch: what the GPU kernel computes, and the route where it cannot run.

With logits ``l = (h W^T + bias) / temperature``, a target ``y`` and ``b = 58 ln 2`` a row is described by odds
against its target instead of by a softmax::

    E_j = exp(l_j - l_y - b)  (j != y),  E_y = 0        S = sum_j E_j        unit = exp(-b) = 2^-58
    tot = S + unit        logp = -log1p(S / unit)        1 - p_y = S / tot   (no cancellation at any entropy)

and with ``c = d loss / d logp`` the gradient needs row scales only, never another pass over the vocabulary::

    a = c / (temperature * tot)                           t = c (1 - p_y) / temperature
    dH = -a * (E @ W) + t * W[y]        dW = -E^T @ (a * h), plus t * h at row y        dbias = -E^T a, plus t at y

A row whose target lies so far below the rest that ``E`` would leave the range takes ``b = max_j l_j - l_y`` instead.
With logits ``cap tanh(u / cap)`` the gradient by u_j has the slope ``g_j = 1 - tanh^2`` for a factor. It goes into the
stored E, while S sums E without it: then dH = -a * ((E g) @ W) + t g_y * W[y], still with row scales only.
The entropy of the row's distribution needs one more sum, ``Q = sum_j E_j (l_j - l_y)``, and is ``-logp - Q / tot``.
The derivation is written out in docs/kernels.md; the losses built on it are those of arXiv 2509.24050.

float32 and bfloat16 inputs have float32 sums and results, float64 inputs float64 ones (for gradient checks).
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


ENTROPY_BLOCK = 1 << 16
"""Elements of a block of whole rows, of which the passes of entropy and softcap hold up to four beside the workspace;
256 KiB of float32, which a processor keeps in its cache."""


CERTAIN = 0.75
"""Probability above which a token's part of the entropy's gradient is what the others leave; no two tokens have it."""


class RowOdds(NamedTuple):
    """What one forward leaves per row, [C] float32 each (float64 for float64 inputs)."""

    logprob: Tensor
    odds: Tensor
    """S"""
    unit: Tensor
    """exp(-b)"""
    entropy: Tensor | None
    """nats, when asked for"""
    logit: Tensor
    """the target's logit, after the softcap and before the temperature; +inf: masked, NaN: target out of range"""
    slope: Tensor | None
    """with a softcap, its slope 1 - tanh^2 at the target"""


def safe_targets(target: Tensor, vocab: int) -> tuple[Tensor, Tensor]:
    """Split targets [C] int64 into an index that is always in range and which rows may use it ([C] bool)."""
    valid = (target >= 0) & (target < vocab)
    return torch.where(valid, target, 0), valid


def guard_target_logits(logit: Tensor, target: Tensor, valid: Tensor) -> Tensor:
    """Target logits [C] with +inf where the row is masked (then E is 0) and NaN where the target is out of range."""
    other = torch.where(target == IGNORE, float("inf"), float("nan"))
    return torch.where(valid, logit, other)


def matmul_wide(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b`` with float32 result and sums for bfloat16 factors; in their own type for wider ones."""
    if a.dtype != torch.bfloat16:
        return a @ b
    if a.device.type == "cpu":  # the CPU has no 16-bit GEMM with a wider result
        return a.float() @ b.float()
    return torch.mm(a, b, out_dtype=torch.float32)


def scaled_logits(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, temperature: float, out: Tensor | None = None
) -> Tensor:
    """``(hidden @ weight^T + bias) / temperature``, [C, V] in a wide type; in ``out`` if given (not for bfloat16)."""
    scale = 1.0 / temperature
    if hidden.dtype != torch.bfloat16:
        if out is None:
            out = hidden.new_empty(hidden.shape[0], weight.shape[0])
        if bias is None:
            return torch.addmm(out, hidden, weight.t(), beta=0.0, alpha=scale, out=out)
        return torch.addmm(bias.to(hidden.dtype), hidden, weight.t(), beta=scale, alpha=scale, out=out)
    logits = matmul_wide(hidden, weight.t())
    if bias is not None:
        logits.add_(bias)
    return logits if temperature == 1.0 else logits.mul_(scale)


def plain_odds(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    temperature: float,
    store: Tensor | None,
    entropy: bool = False,
    softcap: float | None = None,
) -> RowOdds:
    """One chunk's forward.

    Args:
        hidden: [C, H] bfloat16, float32 or float64.
        weight: [V, H], hidden's dtype.
        bias: [V] or None. -inf takes a column out of E and S, with a softcap too.
        target: [C] int64.
        temperature: divides the logits.
        store: [C, V] of hidden's dtype, any row pitch; receives E, with a softcap times its slope. None: forward only.
        entropy: also return each row's entropy; here it is a sum of two terms of one sign, as good as the logits are
            wherever the target lies.
        softcap: logits become ``softcap * tanh(logit / softcap)``, before the temperature.
    """
    index, valid = safe_targets(target, weight.shape[0])
    column = index[:, None]
    out = None if hidden.dtype == torch.bfloat16 else store
    x = scaled_logits(hidden, weight, bias, 1.0 if softcap else temperature, out=out)
    slope = None
    if softcap:
        slope = softcap_(x, softcap)
        x.mul_(1.0 / temperature)
    target_logit = guard_target_logits(x.gather(1, column)[:, 0], target, valid)
    largest = x.amax(1)
    gap = largest - target_logit
    far = gap > REPAIR_GAP
    unit = torch.where(far, (-gap).exp(), UNIT)
    x.sub_(largest[:, None])
    moment = exp_moment_(x) if entropy else None
    if moment is None:
        x.exp_()
    # The shift to the target's odds is a factor, not part of the exponent, where it would round every element.
    factor = torch.where(far, 1.0, gap.exp() * UNIT)
    x.scatter_(1, column, 0.0)
    odds = torch.where(gap.isnan(), gap, x.sum(1) * factor)  # with V = 1 the column just zeroed was the only NaN
    if store is not None and slope is not None:
        x.mul_(slope)
    if store is not None and x.is_cuda:
        torch.mul(x, factor[:, None], out=store)
    elif store is not None:  # with a narrower `out` the CPU would hold the product a second time, in float32
        store.copy_(x.mul_(factor[:, None]))
    return RowOdds(
        finish_logprob(odds, unit, gap, target),
        odds,
        unit,
        None if moment is None else finish_entropy(moment, odds, unit, gap, target),
        target_logit * temperature,
        None if slope is None else slope.gather(1, column)[:, 0],
    )


def softcap_(x: Tensor, cap: float) -> Tensor:
    """Replace logits ``x`` [C, V] by ``cap * tanh(x / cap)`` and return the slope ``1 - tanh^2``, whose digits survive
    where the cap saturates. A logit of -inf, a masked column, stays -inf and has slope 0."""
    slope, rows = torch.empty_like(x), max(1, ENTROPY_BLOCK // x.shape[1])
    for part, out in zip(x.split(rows), slope.split(rows), strict=True):
        ratio = part / cap
        torch.cosh(ratio, out=out).pow_(-2)
        torch.where(part == -torch.inf, part, ratio.tanh_().mul_(cap), out=part)
    return slope


def exp_moment_(x: Tensor) -> Tensor:
    """Replace ``x`` [C, V] by exp(x) and return ``sum_j exp(x_j) x_j`` [C], to which an x of -inf adds nothing."""
    rows = max(1, ENTROPY_BLOCK // x.shape[1])
    moment = x.new_empty(x.shape[0])
    for part, out in zip(x.split(rows), moment.split(rows), strict=True):
        finite = part.clamp_min(torch.finfo(x.dtype).min)
        torch.sum(finite.mul_(part.exp_()), 1, out=out)
    return moment


def finish_logprob(odds: Tensor, unit: Tensor, gap: Tensor, target: Tensor) -> Tensor:
    """Log-probs [C] float32 from S, exp(-b) and, for rows where b is the gap itself, that gap."""
    near = -torch.log1p(odds * (1.0 / UNIT))
    logprob = torch.where(unit == UNIT, near, -(gap + torch.log(odds + unit)))
    return torch.where(target == IGNORE, 0.0, logprob)


def finish_entropy(moment: Tensor, odds: Tensor, unit: Tensor, gap: Tensor, target: Tensor) -> Tensor:
    """Entropies [C] in nats, from ``moment`` = sum_j exp(l_j - m) (l_j - m) over the whole row, m the largest logit.

    With Z = sum_j exp(l_j - m) the entropy is log Z - moment / Z; neither term is negative, so nothing cancels.
    """
    total = (odds + unit) * torch.where(unit == UNIT, (-gap).exp() * (1.0 / UNIT), 1.0)
    log_total = torch.where(gap > 0, total.log(), torch.log1p(odds * (1.0 / UNIT)))  # log1p: Z - 1 at low entropy
    return torch.where(target == IGNORE, 0.0, (log_total - moment / total).clamp_min(0.0))


class RowScales(NamedTuple):
    """Row factors of the backward, [C]: ``spread`` = -a (on E) and ``pull`` = t (on the target's row)."""

    spread: Tensor
    pull: Tensor


class RankOne(NamedTuple):
    """What the log-odds of masked columns add to the backward: ``columns`` [K] and ``coefficient`` [C, K], d loss by
    their logits."""

    columns: Tensor
    coefficient: Tensor


def row_scales(
    grad: Tensor,
    odds: Tensor,
    unit: Tensor,
    target: Tensor,
    temperature: float,
    slope: Tensor | None = None,
    others: Tensor | None = None,
) -> RowScales:
    """The factors -a and t from ``grad`` = d loss / d logp [C]; masked rows get 0 whatever their gradient.

    Args:
        grad: [C].
        odds, unit, slope: of the row's `RowOdds`.
        target: [C].
        temperature: divides the logits.
        others: [C], the sum of d loss / d log-odds over the masked columns: log-odds fall with the log-sum-exp of the
            other columns, and with nothing else of them.
    """
    masked, scale = target == IGNORE, 1.0 / temperature
    c = torch.where(masked, 0.0, grad) * scale
    if others is None:
        spread = c / (odds + unit)
        pull = spread * odds
    else:
        k = torch.where(masked, 0.0, others) * scale
        spread = (c + k) / (odds + unit)
        pull = (c * odds - k * unit) / (odds + unit)
    return RowScales(-spread, pull if slope is None else pull * slope)


def entropy_scales(
    e: Tensor,
    grad: Tensor,
    grad_entropy: Tensor,
    rows: RowOdds,
    target: Tensor,
    temperature: float,
    out: Tensor,
    others: Tensor | None = None,
) -> RowScales:
    """Row factors where the loss has a gradient by the entropy too; writes to ``out`` what they are factors of.

    With k = d loss / d entropy a logit's gradient is ``-p_j (c + k (log p_j + H))``, which is no factor of E that a row
    shares: so E becomes ``E_j (c + k (log p_j + H)) / tot``, one pass over the chunk, rounded like E.

    Args:
        e: [C, V], E without a softcap's slope.
        grad, grad_entropy: [C], d loss / d logp and d loss / d entropy.
        rows: with the entropy.
        target: [C].
        temperature: divides the logits.
        out: [C, V] of E's dtype; may be ``e``.
        others: as in `row_scales`.
    """
    assert rows.entropy is not None
    given = (grad, grad_entropy, torch.zeros_like(grad) if others is None else others)
    c, k, by_lse = (torch.where(target == IGNORE, 0.0, x) * (1.0 / temperature) for x in given)
    own = torch.where(rows.unit > 0, rows.logprob + rows.entropy, 0.0) * rows.unit  # a log-prob of -inf times 0 is 0
    total, pull = rows.odds + rows.unit, c * rows.odds - by_lse * rows.unit - k * own
    c = c + by_lse
    if e.is_cuda:
        from gapg_kernels.entropy_gradient import spread_entropy  # triton is imported only where it runs

        spread_entropy(e, c, k, total, rows.entropy, own / total, out)
    else:
        plain_spread_entropy(e, c, k, total, rows.entropy, own / total, out)
    return RowScales(torch.full_like(pull, -1.0), pull / total)


def plain_spread_entropy(
    e: Tensor, c: Tensor, k: Tensor, total: Tensor, entropy: Tensor, own: Tensor, out: Tensor
) -> None:
    """``out_j = c p_j + k p_j (log p_j + H)`` with ``p_j = E_j / tot``, 0 where E is 0. e, out: [C, V]; the others [C].

    The k parts of a row, with ``own`` = p_y (log p_y + H) of the target, add up to 0. A token that is nearly certain
    takes what the others leave: a log of its own rounded E would be off by more than it is.
    """
    size = max(1, ENTROPY_BLOCK // e.shape[1])
    columns = (x[:, None].split(size) for x in (c, k, total, entropy, own))
    for part, to, c_, k_, total_, entropy_, own_ in zip(e.split(size), out.split(size), *columns, strict=True):
        p = part.to(total.dtype) / total_
        moment = p.log().clamp_min_(-1e3).add_(entropy_).mul_(p)
        certain = p > CERTAIN
        rest = -moment.masked_fill(certain, 0.0).sum(1, keepdim=True) - own_
        to.copy_(torch.where(certain, rest, moment).mul_(k_).addcmul_(p, c_))


def hidden_gradient(
    e: Tensor, weight: Tensor, index: Tensor, scales: RowScales, dtype: torch.dtype, extra: RankOne | None = None
) -> Tensor:
    """dH [C, H] of one chunk, summed in a wide type and rounded once to ``dtype``; ``e`` is [C, V]."""
    grad = matmul_wide(e, weight).mul_(scales.spread[:, None])
    grad.addcmul_(weight.index_select(0, index).to(grad.dtype), scales.pull[:, None])
    if extra is not None:
        grad.addmm_(extra.coefficient, weight.index_select(0, extra.columns).to(grad.dtype))
    return grad.to(dtype)


def add_weight_gradient(
    total: Tensor | None, e: Tensor, hidden: Tensor, index: Tensor, scales: RowScales, extra: RankOne | None = None
) -> Tensor:
    """Add one chunk to dW [V, H] float32 or float64 (``total``; None starts it) and return it."""
    scaled = (hidden * scales.spread[:, None]).to(hidden.dtype)
    if total is None:
        total = matmul_wide(e.t(), scaled)
    elif hidden.dtype != torch.bfloat16 or hidden.device.type == "cpu":
        total.addmm_(e.t().to(total.dtype), scaled.to(total.dtype))
    else:
        torch.ops.aten.addmm.dtype_out(total, e.t(), scaled, torch.float32, out=total)
    if extra is not None:
        add_rows(total, extra.columns, extra.coefficient.t() @ hidden.to(total.dtype))
    return add_rows(total, index, hidden * scales.pull[:, None])


def add_bias_gradient(
    total: Tensor | None, e: Tensor, index: Tensor, scales: RowScales, extra: RankOne | None = None
) -> Tensor:
    """Add one chunk to dbias [V] float32 or float64 (``total``; None starts it) and return it."""
    spread = matmul_wide(e.t(), scales.spread[:, None].to(e.dtype))[:, 0]
    total = spread if total is None else total.add_(spread)
    if extra is not None:
        add_rows(total, extra.columns, extra.coefficient.sum(0))
    return add_rows(total, index, scales.pull)


def patch_target(e: Tensor, index: Tensor, odds: Tensor) -> None:
    """Write ``E[i, y_i] = -S_i`` into a stored chunk [C, V], for targets ``index`` [C] in range; with a softcap,
    ``odds`` is S times the target's slope.

    Then -a * (E @ W) and -E^T @ (a * h) hold the target's term as well, and the backward is called with ``pull`` = 0:
    -a * -S = t. It saves the row gather and the ordered sum and rounds the term to E's dtype: in bfloat16 at high
    entropy the gradient is then only as good as that of bfloat16 logits.
    """
    e.scatter_(1, index[:, None], -odds[:, None].to(e.dtype))


def add_rows(total: Tensor, index: Tensor, rows: Tensor) -> Tensor:
    """``total[index] += rows`` in an order that does not change from run to run (index_add uses atomics on CUDA)."""
    if total.device.type == "cpu":
        return total.index_add_(0, index, rows)
    return total.index_put_((index,), rows, accumulate=True)  # sorts the index on CUDA
