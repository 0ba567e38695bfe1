"""The policy loss of policies that are far apart, and of an engine that gave no log-probs."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from gapg_kernels.fused_policy_loss import fused_policy_loss
from gapg_kernels.policy_loss import STATS, PolicyLossOptions, summarize
from gapg_kernels.policy_loss_reference import Rows
from tests.kernels.policy_loss_oracle import CHOICES, assert_close, call, extremes, far_apart, inputs_for, part, truth


@pytest.mark.parametrize("choice", [c for c in CHOICES if not c[4]], ids=lambda c: " ".join(map(str, c)))
def test_policies_far_apart_against_autograd(choice: tuple[str, str, str, str, bool]) -> None:
    """Loss and gradient on both sides of the bound are those of one function, which no log-ratio overflows."""
    for dtype, rtol in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        rows, options = far_apart(choice, dtype)
        got = call(rows, options)
        loss, grad, summary = truth(rows, options)
        assert_close(got.loss, loss, rtol=rtol)
        assert_close(got.grad, grad, rtol=rtol)
        assert summarize(got.stats) == pytest.approx(summary, rel=1e-5)


@pytest.mark.parametrize("advantage", ["gapg", "grpo"])
@pytest.mark.parametrize("clip", [None, (0.2, 0.28)])
@pytest.mark.parametrize("cap", [None, 2.0])
@pytest.mark.parametrize("kl", ["k2", "k3"])
def test_no_log_prob_is_too_far(advantage: Any, clip: tuple[float, float] | None, cap: float | None, kl: Any) -> None:
    rows, options = extremes(), PolicyLossOptions(advantage, clip, cap, kl, 0.1)
    for inputs in (rows, rows._replace(old_logprob=None)):
        if inputs.old_logprob is None:
            options = options._replace(clip=None)
        got = call(inputs, options)
        assert got.loss.isfinite().all() and got.grad.isfinite().all() and got.stats.isfinite().all()
        assert all(math.isfinite(x) for x in summarize(got.stats).values())


@pytest.mark.parametrize("kl", ["k2", "k3"])
def test_the_penalty_pulls_towards_the_reference_from_any_distance(kl: Any) -> None:
    """Where exp overflows, and where a clamp of the log-ratio would leave no gradient."""
    lp = torch.tensor([-120.0, -1e3, -1e4, -1e30, -math.inf, -1.0, -1.0, -1.0, -math.inf])
    ref = torch.tensor([*[-1.0] * 5, -120.0, -1e30, -math.inf, -math.inf])
    table, row = torch.zeros(1, 2), torch.zeros(9, dtype=torch.int64)
    options = PolicyLossOptions(kl=kl, kl_coef=1.0)
    got = call(Rows(lp, table, row, row, reference_logprob=ref), options, denominator=1.0)
    assert (got.grad[:5] < -100).all() and (got.grad[5:8] >= 1).all() and got.grad[8] == got.loss[8] == 0
    assert (got.loss[:8] > 100).all()
    assert (got.loss[:4].diff() > 0).all()  # a policy further off loses more
    if kl == "k3":
        assert_close(got.grad[:5], torch.full((5,), -math.expm1(20)))


def test_a_head_that_all_but_excludes_a_token_has_a_finite_gradient() -> None:
    """Through the fused head, down to a token whose logit is -inf."""
    hidden, weight = torch.ones(2, 4).requires_grad_(), torch.ones(7, 4).requires_grad_()
    for logit in (-120.0, -1e4, -1e30, -math.inf):
        out = fused_policy_loss(
            hidden, weight, torch.tensor([3, 3]), torch.tensor([[1.0, 0.0]]), torch.zeros(2, dtype=torch.int64),
            torch.arange(2), denominator=2.0, bias=torch.zeros(7).index_fill(0, torch.tensor(3), logit),
            options=PolicyLossOptions(kl="k3", kl_coef=0.01, tis_cap=2.0), reference_logprob=torch.full((2,), -1.0),
            rollout_logprob=torch.tensor([-1.0, math.nan]),
        )  # fmt: skip
        grads = torch.autograd.grad(out.loss, (hidden, weight))
        assert out.loss.isfinite() and all(grad.isfinite().all() for grad in grads)
        assert grads[1][3].min() < -1e6  # a step against it raises the token's logit
        assert summarize(out.stats)["rollout_nan_fraction"] == 0.5


@pytest.mark.parametrize("cap", [0.5, 1.2])
def test_a_token_without_the_engines_log_prob_has_weight_1_and_is_counted(cap: float) -> None:
    rows, options = inputs_for(("gapg", "clip", "tis", "k3", False), rows=40)
    assert rows.rollout_logprob is not None
    missing = torch.arange(40) % 4 == 1
    unknown = torch.where(missing, math.nan, rows.rollout_logprob)
    kept = torch.arange(40) < 30
    got = call(rows._replace(rollout_logprob=unknown, mask=kept), options._replace(tis_cap=cap))
    weighted = call(rows._replace(mask=kept), options._replace(tis_cap=cap))
    plain = call(rows._replace(mask=kept), options._replace(tis_cap=None))
    for ours, known, free in zip(got[:2], weighted[:2], plain[:2], strict=True):
        assert torch.equal(ours, torch.where(missing, free, known))
    summary = summarize(got.stats)
    assert summary["rollout_nan_fraction"] == (missing & kept).sum() / 30 and math.isfinite(summary["loss"])
    cut = call(part(rows._replace(mask=kept), ~missing), options._replace(tis_cap=cap)).stats
    assert got.stats[STATS.index("truncated")] == cut[STATS.index("truncated")] > 0
