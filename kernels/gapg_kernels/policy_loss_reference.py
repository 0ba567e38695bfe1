"""The policy loss of one response token, in plain PyTorch: what the GPU kernel computes, and the route elsewhere.

A row is one response token: of sample ``s`` of group ``g`` (the samples of one prompt) in the table ``rewards`` [P, G].
With ``A`` the group advantage, ``lp`` the token's log-prob and ``ratio = exp(lp - old_logprob)``::

    gapg:  A_i = (r_i - mean) n / (n - 1)  = r_i - mean of the others     (arXiv 2509.24050; RLOO, arXiv 2402.14740)
    grpo:  A_i = (r_i - mean) / (std + 1e-4), std over n - 1              (arXiv 2402.03300, as TRL computes it)
    or an advantage of the caller's own, a token's or a response's
    w      = min(exp(base - rollout_logprob), tis_cap), a constant; base = old_logprob if given, else lp
           = 1 where rollout_logprob is NaN: an engine that gave this token no log-prob
    surrogate = A w lp                                                    without old_logprob (REINFORCE)
              = w min(ratio A, clip(ratio, 1 - low, 1 + high) A)          with it (arXiv 1707.06347)
    kl     = (lp - ref)^2 / 2  (k2)   or   exp(ref - lp) - (ref - lp) - 1 (k3; joschu.net/blog/kl-approx.html)
    loss   = coefficient (-surrogate + kl_coef kl) / denominator

The denominator chooses the aggregation: |D| G for the sum over each response's tokens, the number of response tokens
for the token mean. With gapg, |D| G and no options this is 1/|D| sum_x 1/(G-1) sum_i (r_i - mean) grad log pi(y_i|x).

Loss, gradient and statistics are finite for all log-probs but NaN, also for -inf. Above LOG_RATIO_BOUND = 20, exp goes
on along its tangent: exp(x) is read as e^20 (1 + x - 20). There the ratio and k3 are linear in lp, with slopes of e^20
and e^20 - 1 in size: the gradient is still that of the loss, and k3's still pulls towards the reference. The weight w,
and the ratios and weights of the statistics, which have no gradient, stop at e^20. Equal log-probs differ by 0, -inf
from -inf too. A log-prob, or a difference of two, counts as at most LOGPROB_BOUND = 1e12 in size; beyond it, loss and
gradient are those at that bound. NaN in logprob or old_logprob, or in reference_logprob under kl_coef, shows in both.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor

STATS = (
    "rows",  # how many are not masked; every entry below is over these
    "loss",  # sum
    "clipped_low",  # rows where the clip binds at 1 - low: the min takes its branch, and it differs from the other
    "clipped_high",  # at 1 + high
    "truncated",  # rows whose w is cut to tis_cap
    "rollout_nan",  # rows whose rollout_logprob is NaN
    "kl_rows",
    "kl",  # sum over kl_rows
    "entropy_rows",
    "entropy",  # sum over entropy_rows
    "weight_rows",
    "weight",  # sum of exp(lp - behaviour), each at most e^20; behaviour = rollout_logprob, else old_logprob, else lp
    "weight_square",
    "ratio_min",  # of exp(lp - old_logprob), without it exp(lp - rollout_logprob), without both 1; at most e^20
    "ratio_max",
)
"""The entries of `RowLosses.stats`. A NaN in kl, entropy, weight or ratio is left out of that entry (some engines give
no log-probs); it still shows in ``loss`` where the loss depends on it."""

LOG_RATIO_BOUND = 20.0
"""Nats above which exp of a log-ratio goes on along its tangent. A token's ratio of e^20 = 5e8 only says that the two
policies have little in common; other trainers stop there too. The sum of a batch's squares stays far inside float32."""

LOGPROB_BOUND = 1e12
"""Nats that a log-prob, or the difference of two, is at most in size. No softmax of finite logits in use comes near it,
and its square, and e^20 times it, leave float32 room for the sum over a batch."""


class PolicyLossOptions(NamedTuple):
    """Which loss. The defaults are the paper's estimator.

    advantage: "gapg" or "grpo" (module docstring).
    clip: (low, high) keeps the ratio in [1 - low, 1 + high].
    tis_cap: truncates importance weights against the rollout engine (truncated importance sampling).
    kl, kl_coef: which estimator of the KL to the reference policy is added, and how much of it.
    """

    advantage: Literal["gapg", "grpo"] = "gapg"
    clip: tuple[float, float] | None = None
    tis_cap: float | None = None
    kl: Literal["k2", "k3"] = "k3"
    kl_coef: float = 0.0


class RowLosses(NamedTuple):
    """loss [T], grad [T] = d sum(loss) / d logprob, stats [len(STATS)]; float32 (float64 for float64 log-probs)."""

    loss: Tensor
    grad: Tensor
    stats: Tensor


class Rows(NamedTuple):
    """The tensors of one call, as described at `gapg_kernels.policy_loss.row_losses`."""

    logprob: Tensor
    rewards: Tensor | None
    group: Tensor | None
    sample: Tensor | None
    mask: Tensor | None = None
    coefficient: Tensor | None = None
    old_logprob: Tensor | None = None
    rollout_logprob: Tensor | None = None
    reference_logprob: Tensor | None = None
    entropy: Tensor | None = None
    advantage: Tensor | None = None


def group_advantages(rewards: Tensor, kind: Literal["gapg", "grpo"] = "gapg") -> Tensor:
    """The advantage of every sample, [P, G], from rewards [P, G] floating; NaN (no such sample) stays NaN.

    Rewards are taken relative to their group's smallest before anything is summed: equal rewards then give exactly 0
    (a float mean of equal numbers need not equal them), and an offset common to a group costs no precision.
    """
    present = ~rewards.isnan()
    count = present.sum(1, keepdim=True)
    above = rewards - torch.where(present, rewards, math.inf).amin(1, keepdim=True)
    total = torch.where(present, above, 0.0).sum(1, keepdim=True)
    if kind == "gapg":
        return (above * count - total) / (count - 1).clamp_min(1)
    centred = above - total / count
    square = torch.where(present, centred, 0.0).square().sum(1, keepdim=True)
    return centred / ((square / (count - 1).clamp_min(1)).sqrt() + 1e-4)


def rows_with_advantage(
    rewards: Tensor, group: Tensor, sample: Tensor, kind: Literal["gapg", "grpo"] = "gapg"
) -> Tensor:
    """The rows whose advantage is not 0, [n] int64: all that a loss without a KL needs.

    With the three tensors on the CPU this waits for no device, and a caller that passes on these rows only, of hidden
    states, targets and the rest, spares the head the others. NaN is not 0, nor is a row outside the table: both must
    show in the loss. ``rewards``, ``group`` and ``sample`` as in `gapg_kernels.policy_loss.row_losses`.
    """
    zero = group_advantages(rewards, kind) == 0
    inside = (group >= 0) & (group < rewards.shape[0]) & (sample >= 0) & (sample < rewards.shape[1])
    known = zero.flatten()[torch.where(inside, group * rewards.shape[1] + sample, 0)] & inside
    return (~known).nonzero()[:, 0]


def plain_row_losses(rows: Rows, denominator: float, options: PolicyLossOptions) -> RowLosses:
    """Loss, gradient and statistics of every row, in the dtype of ``rows.logprob``; arguments already checked."""
    lp, old, rollout, ref = rows.logprob, rows.old_logprob, rows.rollout_logprob, rows.reference_logprob
    keep = torch.ones_like(lp, dtype=torch.bool) if rows.mask is None else rows.mask
    advantage = _row_advantages(rows, options)
    low = high = truncated = torch.zeros_like(keep)
    kl: Tensor | None = None

    if old is None:
        surrogate, slope = advantage * lp.clamp(-LOGPROB_BOUND, LOGPROB_BOUND), advantage
    else:
        ratio, rise = _bounded_exp(_log_ratio(lp, old))
        surrogate, slope = ratio * advantage, rise * advantage
        if options.clip is not None:
            least, most = 1 - options.clip[0], 1 + options.clip[1]
            low, high = (advantage < 0) & (ratio < least), (advantage > 0) & (ratio > most)
            surrogate = torch.minimum(surrogate, ratio.clamp(least, most) * advantage)
            slope = torch.where(low | high, 0.0, slope)
    if options.tis_cap is not None and rollout is not None:
        _, weight = _bounded_exp(_log_ratio(lp if old is None else old, rollout))
        truncated = weight > options.tis_cap
        weight = torch.where(rollout.isnan(), 1.0, weight.clamp(max=options.tis_cap))
        surrogate, slope = surrogate * weight, slope * weight
    loss, grad = -surrogate, -slope
    if ref is not None:
        kl, pull = _penalty(_log_ratio(ref, lp), options.kl)
        if options.kl_coef:
            loss, grad = loss + options.kl_coef * kl, grad - options.kl_coef * pull
    if rows.coefficient is not None:
        loss, grad = loss * rows.coefficient, grad * rows.coefficient
    loss, grad = (torch.where(keep, x / denominator, 0.0) for x in (loss, grad))

    nan = torch.zeros_like(keep) if rollout is None else rollout.isnan()
    counts = [x.sum() for x in (keep, loss, *(x & keep for x in (low, high, truncated, nan)))]
    return RowLosses(loss, grad, torch.stack([x.to(lp.dtype) for x in (*counts, *_statistics(rows, keep, kl))]))


def _log_ratio(logprob: Tensor, other: Tensor) -> Tensor:
    return torch.where(logprob == other, 0.0, logprob - other).clamp(-LOGPROB_BOUND, LOGPROB_BOUND)


def _bounded_exp(x: Tensor) -> tuple[Tensor, Tensor]:
    """exp(x), above the bound its tangent there; and the derivative of that."""
    bounded = x.clamp(max=LOG_RATIO_BOUND)
    slope = bounded.exp()
    return slope * (1 + (x - bounded)), slope


def _penalty(gap: Tensor, kind: Literal["k2", "k3"]) -> tuple[Tensor, Tensor]:
    """The KL of ``gap`` = ref - lp, and its derivative by the gap."""
    if kind == "k2":
        return gap.square() / 2, gap
    bounded = gap.clamp(max=LOG_RATIO_BOUND)
    pull = bounded.expm1()
    return pull - bounded + pull * (gap - bounded), pull


def _row_advantages(rows: Rows, options: PolicyLossOptions) -> Tensor:
    """[T]; NaN for a row that points out of the table."""
    if rows.advantage is not None:
        return rows.advantage
    assert rows.rewards is not None and rows.group is not None and rows.sample is not None
    table = group_advantages(rows.rewards.to(rows.logprob.dtype), options.advantage)
    return look_up(table, rows.group, rows.sample)


def look_up(table: Tensor, group: Tensor, sample: Tensor) -> Tensor:
    """``table[group, sample]`` [T] of a table [P, G]; NaN for a row that points out of it."""
    (prompts, samples), group, sample = table.shape, group.long(), sample.long()
    inside = (group >= 0) & (group < prompts) & (sample >= 0) & (sample < samples)
    return torch.where(inside, table.flatten()[torch.where(inside, group * samples + sample, 0)], math.nan)


def _statistics(rows: Rows, keep: Tensor, kl: Tensor | None) -> list[Tensor]:
    """The entries of STATS from kl_rows on."""

    def exp_over(*baselines: Tensor | None) -> Tensor:
        base = next((b for b in baselines if b is not None), None)
        return torch.ones_like(rows.logprob) if base is None else _bounded_exp(_log_ratio(rows.logprob, base))[1]

    def sums(x: Tensor | None) -> list[Tensor]:
        """Count, sum and sum of squares of the rows that have a value."""
        seen = torch.zeros_like(keep) if x is None else keep & ~x.isnan()
        x = torch.zeros_like(rows.logprob) if x is None else torch.where(seen, x, 0.0)
        return [seen.sum(), x.sum(), x.square().sum()]

    weight = exp_over(rows.rollout_logprob, rows.old_logprob)
    ratio = exp_over(rows.old_logprob, rows.rollout_logprob)
    end = ratio.new_tensor([math.nan])  # so that a bound over no row is the identity of min or max
    ratio = torch.cat([torch.where(keep, ratio, math.nan), end])
    least = torch.where(ratio.isnan(), math.inf, ratio).amin()
    most = torch.where(ratio.isnan(), -math.inf, ratio).amax()
    return [*sums(kl)[:2], *sums(rows.entropy)[:2], *sums(weight), least, most]
