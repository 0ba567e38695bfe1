"""From log-probs and a table of rewards to the policy loss, its gradient and its statistics, one row a token.

The formulas, and the plain PyTorch that defines them, are in `gapg_kernels.policy_loss_reference`. On CUDA in float32
all of it is one Triton launch over the rows (`gapg_kernels.policy_loss_kernel`).

>>> import torch
>>> rewards, row = torch.tensor([[1.0, 0.0]]), torch.tensor([0, 0, 0, 0])  # one prompt, two responses
>>> logprob = torch.tensor([-1.0, -2.0, -3.0, -4.0], requires_grad=True)  # of two tokens each
>>> out = policy_loss(logprob, rewards, group=row, sample=torch.tensor([0, 0, 1, 1]), denominator=2)
>>> out.loss.backward()
>>> logprob.grad
tensor([-0.5000, -0.5000,  0.5000,  0.5000])
>>> summarize(out.stats)["rows"]
4.0
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gapg_kernels.policy_loss_reference import (
    STATS,
    PolicyLossOptions,
    RowLosses,
    Rows,
    group_advantages,
    look_up,
    plain_row_losses,
    rows_with_advantage,
)

__all__ = [
    "DEFAULTS",
    "STATS",
    "PolicyLoss",
    "PolicyLossOptions",
    "RowLosses",
    "group_advantages",
    "policy_loss",
    "row_losses",
    "rows_with_advantage",
    "summarize",
]

DEFAULTS = PolicyLossOptions()


class PolicyLoss(NamedTuple):
    """loss: scalar, the sum over rows, differentiable in logprob. stats: [len(STATS)], not differentiable."""

    loss: Tensor
    stats: Tensor


def row_losses(
    logprob: Tensor,
    rewards: Tensor | None = None,
    group: Tensor | None = None,
    sample: Tensor | None = None,
    *,
    denominator: float,
    options: PolicyLossOptions = DEFAULTS,
    advantage: Tensor | None = None,
    mask: Tensor | None = None,
    coefficient: Tensor | None = None,
    old_logprob: Tensor | None = None,
    rollout_logprob: Tensor | None = None,
    reference_logprob: Tensor | None = None,
    entropy: Tensor | None = None,
) -> RowLosses:
    """Loss and gradient of every row, without autograd and without a host sync.

    A group of equal rewards, and a group with one sample, has advantage exactly 0. A row that points out of the table
    or at a NaN reward gets NaN in loss and grad. The same input gives the same bits from run to run.

    Args:
        logprob: [T] float32; or float64, for checks: then everything is float64. T may be 0.
        rewards: [P, G] float32 or float64. NaN: no such sample (groups of unequal size, dropped responses).
        group, sample: [T] int64 or int32, the row and column of the table that a token belongs to.
        advantage: instead of rewards, advantages of one's own: [T], a token each; or a table [P, G] of the responses',
            into which ``group`` and ``sample`` point. ``options.advantage`` is then without a say.
        denominator: divides the sum of losses; positive.
        options: which loss.
        mask: [T] bool. False: loss 0, grad 0, not in the statistics, whatever the other tensors hold there.
        coefficient: [T], logprob's dtype: a constant factor of each row's whole loss, its KL included.
        old_logprob: [T] before the update, a constant. Makes the surrogate a ratio; ``clip`` needs it.
        rollout_logprob: [T] by the rollout engine, a constant. ``tis_cap`` needs it; alone it feeds the statistics.
            NaN: the engine gave none; such a row has the weight 1 under ``tis_cap``, and is counted.
        reference_logprob: [T] of the reference policy, a constant. ``kl_coef`` needs it; alone: statistics.
        entropy: [T] nats, for the statistics only.

    Raises:
        TypeError: a dtype other than these.
        ValueError: shapes or devices that do not agree; options out of range or without the tensor they need.
    """
    rows = _checked(Rows(
        logprob, rewards, group, sample, mask, coefficient, old_logprob, rollout_logprob, reference_logprob, entropy,
        advantage,
    ))  # fmt: skip
    _check_options(rows, denominator, options)
    with torch.no_grad():
        return _dispatch(rows, denominator, options)


def policy_loss(
    logprob: Tensor,
    rewards: Tensor | None = None,
    group: Tensor | None = None,
    sample: Tensor | None = None,
    *,
    denominator: float,
    options: PolicyLossOptions = DEFAULTS,
    advantage: Tensor | None = None,
    mask: Tensor | None = None,
    coefficient: Tensor | None = None,
    old_logprob: Tensor | None = None,
    rollout_logprob: Tensor | None = None,
    reference_logprob: Tensor | None = None,
    entropy: Tensor | None = None,
) -> PolicyLoss:
    """The sum of `row_losses`, differentiable (once) in ``logprob``; the other tensors are constants.

    Arguments and errors as of `row_losses`. It is the custom op ``gapg::policy_loss``, which torch.compile keeps whole.
    """
    rows = _checked(Rows(
        logprob, rewards, group, sample, mask, coefficient, old_logprob, rollout_logprob, reference_logprob, entropy,
        advantage,
    ))  # fmt: skip
    _check_options(rows, denominator, options)
    loss, _, stats = _policy_loss_op(*rows, denominator, *options)
    return PolicyLoss(loss, stats)


def summarize(stats: Sequence[Tensor] | Tensor) -> dict[str, float]:
    """The statistics of any number of micro-batches or ranks together; the one host sync.

    Args:
        stats: [len(STATS)] tensors, or one tensor of them, [..., len(STATS)].

    Returns:
        ``rows`` (a count) and ``loss`` (a sum); as fractions of rows ``clip_fraction``, its parts ``clip_low_fraction``
        and ``clip_high_fraction``, ``tis_fraction`` (truncated weights) and ``rollout_nan_fraction`` (no log-prob from
        the engine); ``ratio_min``, ``ratio_max``;
        ``ess`` = (sum w)^2 / (n sum w^2), the effective sample size as a fraction; and the means ``kl`` and
        ``entropy`` (nats), which are there only when some row had one. What is over no row is 0.
    """
    if not isinstance(stats, Tensor):
        stats = torch.stack(list(stats)) if stats else torch.zeros(0, len(STATS))
    table = stats.detach().reshape(-1, len(STATS)).tolist()
    parts = {name: [row[i] for row in table] for i, name in enumerate(STATS)}
    total = {name: sum(part, 0.0) for name, part in parts.items()}
    low, high = min(parts["ratio_min"], default=math.inf), max(parts["ratio_max"], default=-math.inf)
    rows, square = total["rows"], total["weight_square"]
    effective = total["weight"] ** 2 / square if square else 1.0  # weights too small to square: the bound, 1 of n
    summary = {
        "rows": rows,
        "loss": total["loss"],
        "clip_fraction": (total["clipped_low"] + total["clipped_high"]) / max(rows, 1),
        "clip_low_fraction": total["clipped_low"] / max(rows, 1),
        "clip_high_fraction": total["clipped_high"] / max(rows, 1),
        "tis_fraction": total["truncated"] / max(rows, 1),
        "rollout_nan_fraction": total["rollout_nan"] / max(rows, 1),
        "ratio_min": low if low <= high else 0.0,
        "ratio_max": high if low <= high else 0.0,
        "ess": effective / total["weight_rows"] if total["weight_rows"] else 0.0,
    }
    return summary | {key: total[key] / total[f"{key}_rows"] for key in ("kl", "entropy") if total[f"{key}_rows"]}


def _dispatch(rows: Rows, denominator: float, options: PolicyLossOptions) -> RowLosses:
    if rows.logprob.is_cuda and rows.logprob.dtype == torch.float32 and rows.logprob.shape[0]:
        from gapg_kernels.policy_loss_kernel import fused_row_losses  # triton is imported only where it runs

        return fused_row_losses(rows, denominator, options)
    return plain_row_losses(rows, denominator, options)


@torch.library.custom_op("gapg::policy_loss", mutates_args=())
def _policy_loss_op(
    logprob: Tensor, rewards: Tensor | None, group: Tensor | None, sample: Tensor | None, mask: Tensor | None,
    coefficient: Tensor | None, old_logprob: Tensor | None, rollout_logprob: Tensor | None,
    reference_logprob: Tensor | None, entropy: Tensor | None, advantage: Tensor | None, denominator: float, kind: str,
    clip: Sequence[float] | None, tis_cap: float | None, kl: str, kl_coef: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Returns (loss scalar, d loss / d logprob [T], stats)."""
    rows = Rows(
        logprob, rewards, group, sample, mask, coefficient, old_logprob, rollout_logprob, reference_logprob, entropy,
        advantage,
    )  # fmt: skip
    options: Any = (kind, clip, tis_cap, kl, kl_coef)
    _, grad, stats = _dispatch(rows, denominator, PolicyLossOptions(*options))
    return stats[STATS.index("loss")].clone(), grad, stats


@_policy_loss_op.register_fake
def _(logprob: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return logprob.new_empty(()), logprob.new_empty(logprob.shape), logprob.new_empty(len(STATS))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    _, grad, stats = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(grad, stats)
    ctx.save_for_backward(grad)


def _backward(ctx: Any, incoming: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    (grad,) = ctx.saved_tensors
    return (None if incoming is None else grad * incoming, *(None,) * (len(Rows._fields) + len(DEFAULTS)))


_policy_loss_op.register_autograd(_backward, setup_context=_setup_context)

_INTEGERS, _FLOATS = (torch.int64, torch.int32), (torch.float32, torch.float64)


def _checked(rows: Rows) -> Rows:
    """The rows of a call, a table of advantages looked up."""
    check_source("policy_loss", rows.rewards, rows.group, rows.sample, rows.advantage)
    table = rows.advantage
    if table is None or rows.group is None or rows.sample is None:
        _check_rows(rows)
        return rows
    _check_rows(rows._replace(rewards=table, advantage=None))
    own = look_up(table.detach(), rows.group, rows.sample).to(rows.logprob.dtype)
    return rows._replace(group=None, sample=None, advantage=own)


def check_source(
    caller: str, rewards: Tensor | None, group: Tensor | None, sample: Tensor | None, advantage: Tensor | None
) -> None:
    """Raises TypeError or ValueError unless there are rewards or advantages, and integers into them where they are a
    table [P, G]."""
    if (rewards is None) == (advantage is None):
        raise ValueError(f"{caller}: pass either rewards or advantage")
    table = advantage if rewards is None else rewards
    assert table is not None
    if [group is not None, sample is not None] != [rewards is not None or table.dim() == 2] * 2:
        raise ValueError(
            f"{caller}: group and sample belong to a table [P, G] of rewards or advantages, and to nothing else"
        )
    if group is None or sample is None:
        return
    name = "advantage" if rewards is None else "rewards"
    for what, x, wanted in ((name, table, _FLOATS), ("group", group, _INTEGERS), ("sample", sample, _INTEGERS)):
        if x.dtype not in wanted:
            raise TypeError(f"{caller}: {what} is {x.dtype}; pass {wanted[0]}")
    if table.dim() != 2:
        raise ValueError(f"{caller}: {name} {tuple(table.shape)} must be [P, G], one row a prompt")
    if group.numel() and not table.numel():
        raise ValueError(f"{caller}: {name} {tuple(table.shape)} is empty; pass the table the rows point into")


def _check_rows(rows: Rows) -> None:
    logprob = rows.logprob
    dtype, shape = logprob.dtype, logprob.shape
    if dtype not in _FLOATS:
        raise TypeError(f"policy_loss: logprob is {dtype}; pass float32 log-probs")
    if len(shape) != 1:
        raise ValueError(f"policy_loss: logprob {tuple(shape)} must be [T], one row a response token; drop the padding")
    kinds = {"rewards": _FLOATS, "group": _INTEGERS, "sample": _INTEGERS, "mask": (torch.bool,)}
    for name, x in zip(Rows._fields, rows, strict=True):
        if x is None:
            continue
        wanted = kinds.get(name, (dtype,))
        if x.dtype not in wanted:
            raise TypeError(f"policy_loss: {name} is {x.dtype}; pass {wanted[0]}")
        if x.device != logprob.device:
            raise ValueError(f"policy_loss: {name} is on {x.device}; move it to {logprob.device}, where logprob is")
        if name != "rewards" and x.shape != shape:
            raise ValueError(f"policy_loss: {name} {tuple(x.shape)} must be [{shape[0]}], one entry a row of logprob")


def _check_options(rows: Rows, denominator: float, options: PolicyLossOptions) -> None:
    advantage, clip, tis_cap, kl, kl_coef = options
    if not 0 < denominator < math.inf:
        raise ValueError(f"policy_loss: denominator must be positive and finite, not {denominator}")
    if advantage not in ("gapg", "grpo"):
        raise ValueError(f"policy_loss: advantage must be 'gapg' or 'grpo', not {advantage!r}")
    if kl not in ("k2", "k3"):
        raise ValueError(f"policy_loss: kl must be 'k2' or 'k3', not {kl!r}")
    if clip is not None and not (len(clip) == 2 and 0 <= clip[0] <= 1 and clip[1] >= 0):
        raise ValueError(f"policy_loss: clip is (low, high) with 0 <= low <= 1 and 0 <= high, not {clip}")
    if tis_cap is not None and not tis_cap > 0:
        raise ValueError(f"policy_loss: tis_cap must be positive, not {tis_cap}")
    if not 0 <= kl_coef < math.inf:
        raise ValueError(f"policy_loss: kl_coef must be finite and not negative, not {kl_coef}")
    if clip is not None and rows.old_logprob is None:
        raise ValueError("policy_loss: clip needs old_logprob, the log-probs before the update; or set clip=None")
    if tis_cap is not None and rows.rollout_logprob is None:
        raise ValueError("policy_loss: tis_cap needs rollout_logprob, the engine's log-probs; or set tis_cap=None")
    if kl_coef and rows.reference_logprob is None:
        raise ValueError("policy_loss: kl_coef needs reference_logprob, the reference policy's; or set kl_coef=0")
