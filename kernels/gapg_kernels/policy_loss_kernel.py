"""The policy loss on a GPU: one Triton launch over the rows, and a second of one program that adds up its statistics.

Every program reads its rows' groups from the reward table, so no advantage, ratio or weight is ever written to memory.
No atomics: the partial statistics are added in program order, and the same input gives the same bits.
The formulas are those of `gapg_kernels.policy_loss_reference`, which defines the result.
"""

# mypy: disable-error-code="untyped-decorator, no-untyped-call"
from __future__ import annotations

import torch
import triton
import triton.language as tl

from gapg_kernels import policy_loss_reference
from gapg_kernels.policy_loss_reference import STATS, PolicyLossOptions, RowLosses, Rows

ROWS = 128
"""Rows a program, one a thread: with fewer, triton 3.7.1 fails on masked loads of the reward tile."""

SAMPLES = 8
"""Most samples of a group that are read at a time, so that no group is too large for the registers."""

PITCH = triton.next_power_of_2(len(STATS))
PROGRAMS = 64
"""Programs whose statistics are added at a time."""

LOG_RATIO_BOUND = tl.constexpr(policy_loss_reference.LOG_RATIO_BOUND)
LOGPROB_BOUND = tl.constexpr(policy_loss_reference.LOGPROB_BOUND)


@triton.jit
def _differences(
    rewards_ptr: tl.tensor, own: tl.tensor, first: tl.tensor, valid: tl.tensor, start: tl.tensor, G: tl.tensor,
    BG: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:  # fmt: skip
    """The row's reward minus BG samples of its group, 0 for the absent; and which are present. Both [BR, BG]."""
    cols = start + tl.arange(0, BG)
    mask = valid[:, None] & (cols < G)[None, :]
    others = tl.load(rewards_ptr + first[:, None] + cols[None, :], mask=mask, other=float("nan")).to(tl.float32)
    present = others == others
    return tl.where(present, own[:, None] - others, 0.0), present


@triton.jit
def _advantage(
    rewards_ptr: tl.tensor, group: tl.tensor, sample: tl.tensor, P: tl.tensor, G: tl.tensor,
    GRPO: tl.constexpr, BG: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """[BR]. Differences between rewards are summed, not rewards: equal rewards give exactly 0, and NaN gives NaN."""
    valid = (group >= 0) & (group < P) & (sample >= 0) & (sample < G)
    first = tl.where(valid, group, 0).to(tl.int64) * G
    own = tl.load(rewards_ptr + first + sample, mask=valid, other=float("nan")).to(tl.float32)
    count = tl.zeros_like(own)
    total = tl.zeros_like(own)
    for start in range(0, G, BG):
        difference, present = _differences(rewards_ptr, own, first, valid, start, G, BG)
        count += tl.sum(present.to(tl.float32), 1)
        total += tl.sum(difference, 1)
    pairs = tl.maximum(count - 1.0, 1.0)
    advantage = total / pairs
    if GRPO:
        centred = total / count
        square = tl.zeros_like(own)
        for start in range(0, G, BG):
            difference, present = _differences(rewards_ptr, own, first, valid, start, G, BG)
            deviation = tl.where(present, difference - centred[:, None], 0.0)
            square += tl.sum(deviation * deviation, 1)
        advantage = centred / (tl.sqrt(square / pairs) + 1e-4)
    return tl.where(own == own, advantage, own)


@triton.jit
def _at_most(x: tl.tensor, bound: tl.constexpr) -> tl.tensor:
    """The smaller; NaN stays, for which tl.minimum would give the bound."""
    return tl.where(x > bound, bound, x)


@triton.jit
def _bounded(x: tl.tensor) -> tl.tensor:
    """A log-prob, or the difference of two, within LOGPROB_BOUND."""
    return tl.where(x < -LOGPROB_BOUND, -LOGPROB_BOUND, _at_most(x, LOGPROB_BOUND))


@triton.jit
def _log_ratio(logprob: tl.tensor, other: tl.tensor) -> tl.tensor:
    return _bounded(tl.where(logprob == other, 0.0, logprob - other))


@triton.jit
def _bounded_exp(x: tl.tensor) -> tuple[tl.tensor, tl.tensor]:
    """exp(x), above the bound its tangent there; and the derivative of that."""
    bounded = _at_most(x, LOG_RATIO_BOUND)
    slope = tl.exp(bounded)
    return slope * (1.0 + (x - bounded)), slope


@triton.jit
def _expm1(x: tl.tensor) -> tuple[tl.tensor, tl.tensor]:
    """exp(x) - 1 and exp(x) - 1 - x without cancellation: the series to x^7 near 0 (relative remainder 1e-8 at 1/4)."""
    near = tl.abs(x) < 0.25
    series = 1 / 120 + x * (1 / 720 + x * (1 / 5040))
    series = x * x * (0.5 + x * (1 / 6 + x * (1 / 24 + x * series)))
    expm1 = tl.where(near, x + series, tl.exp(x) - 1.0)
    return expm1, tl.where(near, series, expm1 - x)


@triton.jit
def _penalty(gap: tl.tensor, K2: tl.constexpr) -> tuple[tl.tensor, tl.tensor]:
    """The KL of the gap between reference and policy, and its derivative by the gap."""
    if K2:
        kl = 0.5 * gap * gap
        pull = gap
    else:
        bounded = _at_most(gap, LOG_RATIO_BOUND)
        pull, rest = _expm1(bounded)
        kl = rest + pull * (gap - bounded)
    return kl, pull


@triton.jit
def _store_count_and_sum(out_ptr: tl.tensor, x: tl.tensor, keep: tl.tensor) -> tl.tensor:
    """Over the kept rows that have a value; returns the values, with 0 for the other rows."""
    seen = keep & (x == x)
    x = tl.where(seen, x, 0.0)
    tl.store(out_ptr, tl.sum(seen.to(tl.float32), 0))
    tl.store(out_ptr + 1, tl.sum(x, 0))
    return x


@triton.jit
def _store_statistics(
    out_ptr: tl.tensor, keep: tl.tensor, loss: tl.tensor, low: tl.tensor, high: tl.tensor, truncated: tl.tensor,
    rollout_nan: tl.tensor, kl: tl.tensor, entropy: tl.tensor, weight: tl.tensor, ratio: tl.tensor,
) -> None:  # fmt: skip
    """One program's statistics, in the order of STATS."""
    tl.store(out_ptr, tl.sum(keep.to(tl.float32), 0))
    tl.store(out_ptr + 1, tl.sum(loss, 0))
    tl.store(out_ptr + 2, tl.sum((keep & low).to(tl.float32), 0))
    tl.store(out_ptr + 3, tl.sum((keep & high).to(tl.float32), 0))
    tl.store(out_ptr + 4, tl.sum((keep & truncated).to(tl.float32), 0))
    tl.store(out_ptr + 5, tl.sum((keep & rollout_nan).to(tl.float32), 0))
    _store_count_and_sum(out_ptr + 6, kl, keep)
    _store_count_and_sum(out_ptr + 8, entropy, keep)
    weight = _store_count_and_sum(out_ptr + 10, weight, keep)
    tl.store(out_ptr + 12, tl.sum(weight * weight, 0))
    seen = keep & (ratio == ratio)
    tl.store(out_ptr + 13, tl.min(tl.where(seen, ratio, float("inf")), 0))
    tl.store(out_ptr + 14, tl.max(tl.where(seen, ratio, float("-inf")), 0))


@triton.jit
def policy_loss_kernel(
    logprob_ptr: tl.tensor,  # [T] float32
    rewards_ptr: tl.tensor,  # [P, G], NaN: absent; or None, like the next two, with the advantage given
    group_ptr: tl.tensor,  # [T] int
    sample_ptr: tl.tensor,  # [T] int
    mask_ptr: tl.tensor,  # [T] bool or None, and likewise below: [T] float32 or None
    coefficient_ptr: tl.tensor,
    old_ptr: tl.tensor,
    rollout_ptr: tl.tensor,
    reference_ptr: tl.tensor,
    entropy_ptr: tl.tensor,
    advantage_ptr: tl.tensor,  # None: made of the rewards
    loss_ptr: tl.tensor,  # [T] float32
    grad_ptr: tl.tensor,  # [T] float32
    partial_ptr: tl.tensor,  # [programs, PITCH] float32: receives each program's statistics, in the order of STATS
    T: tl.tensor,
    P: tl.tensor,
    G: tl.tensor,
    denominator: tl.tensor,
    least: tl.tensor,  # 1 - low, or None: no clip
    most: tl.tensor,  # 1 + high, or None
    tis_cap: tl.tensor,  # or None
    kl_coef: tl.tensor,  # or None: the KL, if any, is only counted
    GRPO: tl.constexpr,
    K2: tl.constexpr,
    PITCH: tl.constexpr,
    BR: tl.constexpr,
    BG: tl.constexpr,
) -> None:
    rows = tl.program_id(0) * BR + tl.arange(0, BR)
    inside = rows < T
    keep = inside
    if mask_ptr is not None:
        keep = keep & (tl.load(mask_ptr + rows, mask=inside, other=0) != 0)
    if advantage_ptr is not None:
        advantage = tl.load(advantage_ptr + rows, mask=keep, other=0.0)
    else:
        group = tl.load(group_ptr + rows, mask=keep, other=0)
        sample = tl.load(sample_ptr + rows, mask=keep, other=0)
        advantage = _advantage(rewards_ptr, group, sample, P, G, GRPO, BG)
    logprob = tl.load(logprob_ptr + rows, mask=keep, other=0.0)
    low = tl.zeros((BR,), tl.int1)
    high = low
    truncated = low
    rollout_nan = low
    kl = tl.full((BR,), float("nan"), tl.float32)  # NaN: not counted
    entropy = kl
    ratio = tl.full((BR,), 1.0, tl.float32)  # to old_logprob, for want of it to rollout_logprob
    weight = ratio  # to rollout_logprob, for want of it to old_logprob
    base = logprob

    surrogate = advantage * _bounded(logprob)
    slope = advantage
    if old_ptr is not None:
        base = tl.load(old_ptr + rows, mask=keep, other=0.0)
        value, ratio = _bounded_exp(_log_ratio(logprob, base))
        weight = ratio
        surrogate = value * advantage
        slope = ratio * advantage
        if least is not None:
            low = (advantage < 0) & (value < least)
            high = (advantage > 0) & (value > most)
            surrogate = tl.where(low, least * advantage, tl.where(high, most * advantage, surrogate))
            slope = tl.where(low | high, 0.0, slope)
    if rollout_ptr is not None:
        rollout = tl.load(rollout_ptr + rows, mask=keep, other=0.0)
        rollout_nan = rollout != rollout
        _, weight = _bounded_exp(_log_ratio(logprob, rollout))
        if old_ptr is None:
            ratio = weight
        if tis_cap is not None:
            _, tis = _bounded_exp(_log_ratio(base, rollout))
            truncated = tis > tis_cap
            tis = tl.where(rollout_nan, 1.0, tl.where(truncated, tis_cap, tis))  # a NaN of base stays
            surrogate *= tis
            slope *= tis
    loss = 0.0 - surrogate
    grad = 0.0 - slope
    if reference_ptr is not None:
        reference = tl.load(reference_ptr + rows, mask=keep, other=0.0)
        kl, pull = _penalty(_log_ratio(reference, logprob), K2)
        if kl_coef is not None:
            loss += kl_coef * kl
            grad -= kl_coef * pull
    if coefficient_ptr is not None:
        coefficient = tl.load(coefficient_ptr + rows, mask=keep, other=0.0)
        loss *= coefficient
        grad *= coefficient
    if entropy_ptr is not None:
        entropy = tl.load(entropy_ptr + rows, mask=keep, other=0.0)
    loss = tl.where(keep, loss / denominator, 0.0)
    tl.store(loss_ptr + rows, loss, mask=inside)
    tl.store(grad_ptr + rows, tl.where(keep, grad / denominator, 0.0), mask=inside)
    out_ptr = partial_ptr + tl.program_id(0) * PITCH
    _store_statistics(out_ptr, keep, loss, low, high, truncated, rollout_nan, kl, entropy, weight, ratio)


@triton.jit
def add_statistics_kernel(
    partial_ptr: tl.tensor,  # [N, PITCH] float32
    stats_ptr: tl.tensor,  # [STATS] float32
    N: tl.tensor,
    STATS: tl.constexpr,
    PITCH: tl.constexpr,
    BN: tl.constexpr,
) -> None:
    """One program: sums of all columns but the last two, which are a minimum and a maximum."""
    cols = tl.arange(0, PITCH)
    total = tl.zeros((PITCH,), tl.float32)
    smallest = tl.full((PITCH,), float("inf"), tl.float32)
    largest = tl.full((PITCH,), float("-inf"), tl.float32)
    for first in range(0, N, BN):
        programs = first + tl.arange(0, BN)
        mask = (programs < N)[:, None] & (cols < STATS)[None, :]
        x = tl.load(partial_ptr + programs[:, None] * PITCH + cols[None, :], mask=mask, other=0.0)
        total += tl.sum(x, 0)
        smallest = tl.minimum(smallest, tl.min(tl.where(mask, x, float("inf")), 0))
        largest = tl.maximum(largest, tl.max(tl.where(mask, x, float("-inf")), 0))
    merged = tl.where(cols == STATS - 2, smallest, tl.where(cols == STATS - 1, largest, total))
    tl.store(stats_ptr + cols, merged, mask=cols < STATS)


def fused_row_losses(rows: Rows, denominator: float, options: PolicyLossOptions) -> RowLosses:
    """`plain_row_losses` by the Triton kernels, for float32 log-probs and at least one row."""
    tensors = [None if x is None else x.contiguous() for x in rows]
    count, (prompts, samples) = rows.logprob.shape[0], (1, 1) if rows.rewards is None else rows.rewards.shape
    programs = triton.cdiv(count, ROWS)
    loss, grad = rows.logprob.new_empty(2, count)
    partial, stats = rows.logprob.new_empty(programs, PITCH), rows.logprob.new_empty(len(STATS))
    least, most = (None, None) if options.clip is None else (1 - options.clip[0], 1 + options.clip[1])
    with torch.cuda.device_of(rows.logprob):  # Triton launches on the current device, wherever the tensors are
        policy_loss_kernel[(programs,)](
            *tensors, loss, grad, partial, count, prompts, samples,
            float(denominator), least, most, options.tis_cap, options.kl_coef or None,
            options.advantage == "grpo", options.kl == "k2", PITCH, ROWS, tile_samples(samples),
        )  # fmt: skip
        add_statistics_kernel[(1,)](partial, stats, programs, len(STATS), PITCH, PROGRAMS)
    return RowLosses(loss, grad, stats)


def tile_samples(samples: int) -> int:
    """The kernel's BG for groups of this size."""
    return min(SAMPLES, triton.next_power_of_2(samples))
