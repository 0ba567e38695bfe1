"""The policy loss by autograd in float64, one row at a time, and inputs that cross every option with every other."""

from __future__ import annotations

import itertools
import math
import statistics
from typing import Any

import torch
from torch import Tensor

from gapg_kernels.policy_loss import DEFAULTS, PolicyLossOptions, RowLosses, group_advantages, row_losses
from gapg_kernels.policy_loss_reference import Rows

CLIP, CAP, DENOMINATOR = (0.2, 0.28), 1.2, 37.5
CHOICES = list(
    itertools.product(
        ["gapg", "grpo"],
        ["no old", "old", "clip"],
        ["no rollout", "rollout", "tis"],
        ["no reference", "reference", "k2", "k3"],
        [False, True],  # mask, coefficient and entropy
    )
)
"""Every option crossed with every other."""


def inputs_for(
    choice: tuple[str, str, str, str, bool],
    *,
    rows: int = 37,
    groups: int = 6,
    samples: int = 5,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> tuple[Rows, PolicyLossOptions]:
    """Random rows for a choice of options. One group is all equal, one is absent but for one sample, and a fifth of the
    rest is absent; no row points there. Log-probs differ enough that the clip and the cap bind on many rows. Rewards
    are exact in binary, so that an advantage which should be 0 is, and its sign never is one of rounding."""
    advantage, old, rollout, kl, extras = choice
    g = torch.Generator().manual_seed(seed)
    rewards = torch.randint(0, 4, (groups, samples), generator=g).to(dtype) * 0.25 - 0.125
    rewards[torch.rand(groups, samples, generator=g) < 0.2] = float("nan")
    rewards[0] = 0.3
    rewards[-1, 1:] = float("nan")
    rewards[-1, 0] = 0.7
    cells = (~rewards.isnan()).nonzero()
    group, sample = cells[torch.randint(0, len(cells), (rows,), generator=g)].unbind(1)
    logprob = -2 * torch.rand(rows, generator=g, dtype=dtype)

    def near() -> Tensor:
        return logprob + 0.3 * torch.randn(rows, generator=g, dtype=dtype)

    tensors = Rows(
        logprob,
        rewards,
        group,
        sample,
        mask=torch.rand(rows, generator=g) < 0.8 if extras else None,
        coefficient=torch.randn(rows, generator=g, dtype=dtype) if extras else None,
        old_logprob=None if old == "no old" else near(),
        rollout_logprob=None if rollout == "no rollout" else near(),
        reference_logprob=None if kl == "no reference" else near(),
        entropy=torch.rand(rows, generator=g, dtype=dtype) if extras else None,
    )
    options: Any = {
        "advantage": advantage,
        "clip": CLIP if old == "clip" else None,
        "tis_cap": CAP if rollout == "tis" else None,
        "kl": "k2" if kl == "k2" else "k3",
        "kl_coef": 0.1 if kl in ("k2", "k3") else 0.0,
    }
    return tensors, PolicyLossOptions(**options)


ALL = ("grpo", "clip", "tis", "k3", True)


GAPS = [0.0, 0.5, 19.5, 20.5, 21.0, 119.0, 200.0, 1e3, 1e4, -19.5, -21.0, -200.0, -1e3, -1e4]
"""Log-ratios, exact in binary, on both sides of where exp goes on along its tangent, and far off."""


def far_apart(choice: tuple[str, str, str, str, bool], dtype: torch.dtype) -> tuple[Rows, PolicyLossOptions]:
    """Log-probs GAPS away from each other, every gap with every other, and an engine that gave some rows none."""
    rows, options = inputs_for(choice, rows=len(GAPS) ** 2, dtype=dtype)
    gaps = torch.tensor(GAPS, dtype=dtype)
    a, b = gaps.repeat(len(GAPS)), gaps.repeat_interleave(len(GAPS))
    behaviour = -1 + b
    behaviour[::9] = float("nan")
    moved = {"old_logprob": -1 - a, "rollout_logprob": behaviour, "reference_logprob": -1 + a + b}
    present = {name: x for name, x in moved.items() if getattr(rows, name) is not None}
    return rows._replace(logprob=torch.full_like(a, -1.0), **present), options


def extremes() -> Rows:
    """Every mix of far and infinite log-probs of the policies, the engine's NaN too: in a good response, in a bad one,
    and in one of a group without an advantage."""
    values = [-1.0, -120.0, -1e30, -3e38, -math.inf]
    cells = torch.tensor(list(itertools.product(range(3), values, values, [*values, math.nan], values)))
    response, logprob, old, rollout, reference = cells.t().contiguous()
    rewards = torch.tensor([[1.0, 0.0], [0.5, 0.5]])
    group, sample = response.long() // 2, response.long() % 2
    return Rows(logprob, rewards, group, sample, None, None, old, rollout, reference)


def crossed() -> dict[str, tuple[Rows, PolicyLossOptions]]:
    """Every choice of options."""
    return {" ".join(map(str, choice)): inputs_for(choice) for choice in CHOICES}


def cases() -> dict[str, tuple[Rows, PolicyLossOptions]]:
    return crossed() | edges()


def edges() -> dict[str, tuple[Rows, PolicyLossOptions]]:
    """The shapes, types and values that break kernels."""
    base, options = inputs_for(ALL, rows=300)
    odd = inputs_for(("gapg", "no old", "no rollout", "no reference", False), rows=8)[0]
    odd = odd._replace(
        group=torch.tensor([0, 5, 6, -1, 0, 0, 2**40, 1]), sample=torch.tensor([0, 1, 0, 0, 5, -1, 0, 0])
    )
    nan = base.logprob.clone()
    nan[::7] = float("nan")
    far = base.logprob - torch.linspace(-200, 200, 300)
    every_second = base.logprob.repeat_interleave(2)[::2]
    assert not every_second.is_contiguous()
    close = base.logprob + torch.logspace(-6, 0, 300)
    return {
        "one row": inputs_for(ALL, rows=1),
        "one sample": inputs_for(ALL, samples=1),
        "one group": inputs_for(ALL, groups=1, samples=8),
        "three samples": inputs_for(ALL, samples=3, rows=129),
        "a large group": inputs_for(ALL, samples=21, groups=2, rows=128),
        "many programs": inputs_for(ALL, rows=8451),
        "all masked": (base._replace(mask=torch.zeros(300, dtype=torch.bool)), options),
        "int32": (base._replace(group=base.group.int(), sample=base.sample.int()), options),
        "float64 rewards": (base._replace(rewards=base.rewards.double()), options),
        "strided": (base._replace(logprob=every_second, rewards=base.rewards.t().contiguous().t()), options),
        "out of the table": (odd, PolicyLossOptions()),
        "out of the table, grpo": (odd, PolicyLossOptions(advantage="grpo")),
        "out of the table, masked": (odd._replace(mask=torch.arange(8) < 1), PolicyLossOptions()),
        "NaN log-probs": (base._replace(logprob=nan), options),
        "NaN rollout": (base._replace(rollout_logprob=nan), options),
        "NaN rollout, only counted": (base._replace(rollout_logprob=nan), options._replace(tis_cap=None)),
        "NaN reference and entropy": (base._replace(reference_logprob=nan, entropy=nan), options._replace(kl_coef=0.0)),
        "far from the old policy": (base._replace(old_logprob=far), options),
        "far from the engine": (base._replace(rollout_logprob=far), options),
        "near the reference": (base._replace(reference_logprob=close), options),
        "far apart": far_apart(("grpo", "clip", "tis", "k3", False), torch.float32),
        "far apart, k2, no old": far_apart(("gapg", "no old", "tis", "k2", False), torch.float32),
        "advantages given": (with_own_advantages(base, options), options),
        "extremes": (extremes(), options),
        "extremes, k2, no old": (extremes()._replace(old_logprob=None), options._replace(kl="k2", clip=None)),
        "extremes, no clip, cap below 1": (extremes(), options._replace(tis_cap=0.5, clip=None)),
    }


def with_own_advantages(rows: Rows, options: PolicyLossOptions) -> Rows:
    """The same rows with a caller's advantages, which are those of the rewards."""
    assert rows.rewards is not None and rows.group is not None and rows.sample is not None
    own = group_advantages(rows.rewards, options.advantage)[rows.group, rows.sample]
    return rows._replace(rewards=None, group=None, sample=None, advantage=own)


def call(rows: Rows, options: PolicyLossOptions = DEFAULTS, denominator: float = DENOMINATOR) -> RowLosses:
    return row_losses(**rows._asdict(), denominator=denominator, options=options)


def assert_close(got: Tensor, want: Tensor, rtol: float = 2e-6, atol: float = 1e-7) -> None:
    """Equal to rounding; equal where infinite or NaN."""
    torch.testing.assert_close(got.double(), want.double(), rtol=rtol, atol=atol, equal_nan=True)


def part(rows: Rows, index: Any) -> Rows:
    return Rows(*(x if x is None or field == "rewards" else x[index] for field, x in rows._asdict().items()))


def the_advantage(rewards: list[float], sample: int, kind: str) -> float:
    present = [r for r in rewards if not math.isnan(r)]
    others = [r for i, r in enumerate(rewards) if i != sample and not math.isnan(r)]
    if not others or min(present) == max(present):
        return 0.0
    if kind == "gapg":
        return rewards[sample] - statistics.fmean(others)
    return (rewards[sample] - statistics.fmean(present)) / (statistics.stdev(present) + 1e-4)


def continued_exp(x: Tensor) -> Tensor:
    """exp up to 20, from there on its tangent."""
    return x.exp() if x < 20 else math.exp(20) * (x - 19)


def truth(rows: Rows, options: PolicyLossOptions) -> tuple[Tensor, Tensor, dict[str, float]]:
    """Loss [T] and its gradient [T] by autograd in float64, one row at a time, and the summary counted along."""
    table = rows.rewards.double().tolist()
    lp_T = rows.logprob.double().requires_grad_()
    losses, kls, weights, ratios, clipped, cut, missing = [], [], [], [], [0, 0], 0, 0

    def at(x: Tensor | None, t: int) -> Tensor | None:
        return None if x is None else x[t].double()

    for t, lp in enumerate(lp_T.unbind()):
        if rows.mask is not None and not rows.mask[t]:
            losses.append(0 * lp)
            continue
        A = the_advantage(table[int(rows.group[t])], int(rows.sample[t]), options.advantage)
        old, rollout, ref = at(rows.old_logprob, t), at(rows.rollout_logprob, t), at(rows.reference_logprob, t)
        objective = A * lp
        if old is not None:
            objective = unclipped = A * continued_exp(lp - old)
            if options.clip is not None:
                inside = continued_exp(lp - old).clamp(1 - options.clip[0], 1 + options.clip[1])
                objective = torch.minimum(unclipped, A * inside)
                if objective < unclipped:
                    clipped[int(A > 0)] += 1
        unknown = rollout is not None and bool(rollout.isnan())
        missing += unknown
        if options.tis_cap is not None and rollout is not None and not unknown:
            w = math.exp(min(((lp if old is None else old) - rollout).item(), 20.0))
            cut += w > options.tis_cap
            objective = objective * min(w, options.tis_cap)
        loss = -objective
        if ref is not None:
            kl = (lp - ref) ** 2 / 2 if options.kl == "k2" else continued_exp(ref - lp) - (ref - lp) - 1
            kls.append(kl.item())
            loss = loss + options.kl_coef * kl
        factor = 1.0 if rows.coefficient is None else float(rows.coefficient[t])
        losses.append(factor * loss / DENOMINATOR)
        behaviour = rollout if rollout is not None else old if old is not None else lp
        weights.append(math.exp(min((lp - behaviour).item(), 20.0)))
        ratios.append(math.exp(min((lp - (old if old is not None else behaviour)).item(), 20.0)))
    loss_T = torch.stack(losses)
    (grad_T,) = torch.autograd.grad(loss_T.sum(), lp_T)
    n = len(weights)
    weights, ratios = ([x for x in xs if not math.isnan(x)] for xs in (weights, ratios))
    summary = {
        "rows": n,
        "loss": loss_T.sum().item(),
        "clip_fraction": sum(clipped) / n,
        "clip_low_fraction": clipped[0] / n,
        "clip_high_fraction": clipped[1] / n,
        "tis_fraction": cut / n,
        "rollout_nan_fraction": missing / n,
        "ratio_min": min(ratios),
        "ratio_max": max(ratios),
        "ess": sum(weights) ** 2 / (len(weights) * sum(w * w for w in weights)),
    }
    if kls:
        summary["kl"] = statistics.fmean(kls)
    if rows.entropy is not None:
        summary["entropy"] = (rows.entropy if rows.mask is None else rows.entropy[rows.mask]).double().mean().item()
    return loss_T.detach(), grad_T, summary
