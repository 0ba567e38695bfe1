"""Columns left out of the softmax, and their log-odds against the rest: exact from p = 1e-12 to 1 - 1e-12."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from gapg_kernels.linear_loss import LinearLoss, linear_loss
from tests.kernels.float64_oracle import ENTROPIES, Inputs, error, inputs_at
from tests.kernels.float64_rows import Grads, grads, leaves, rows64

DTYPES = [torch.bfloat16, torch.float32]
ROUNDING = {torch.bfloat16: 3e-3, torch.float32: 1e-5}
HAND = 7
"""The column whose logit each row's first hidden element sets."""


def with_hand(nats: float, dtype: torch.dtype, odds: Tensor) -> Inputs:
    """Inputs of 64 rows whose other columns have this entropy and where HAND has these log-odds against the others."""
    base = inputs_at(nats, dtype=dtype, bias=True, temperature=0.7)
    hidden, weight = (x.to(torch.float32, copy=True) for x in (base.hidden, base.weight))
    target = torch.where(base.target == HAND, HAND + 1, base.target)
    weight[:, 0] = 0.0
    weight[HAND] = 0.0
    rest = F.linear(hidden, weight, base.bias.float()) / 0.7 if base.bias is not None else hidden
    rest[:, HAND] = -torch.inf
    hidden[:, 0] = (odds + rest.logsumexp(1)) * 0.7
    weight[HAND, 0] = 1.0
    return base._replace(hidden=hidden.to(dtype), weight=weight.to(dtype), target=target)


def kept_or_handed(logprob: Tensor, log_odds: Tensor, c: Tensor) -> Tensor:
    """Each row's log-prob under "do not hand over, then this token", and a bonus on log p of handing over."""
    handed = torch.where(log_odds == -torch.inf, 0.0, -F.softplus(-log_odds))
    return (c * (logprob - F.softplus(log_odds).sum(1)) + 0.3 * c.abs() * handed.sum(1)).sum()


def ours(inputs: Inputs, columns: list[int], **options: object) -> tuple[LinearLoss, Grads]:
    given = leaves(inputs)
    bias = given[2] if len(given) == 3 else None
    out = linear_loss(
        given[0], given[1], inputs.target, kept_or_handed, rows={"c": inputs.grad.to(torch.float32)}, bias=bias,
        temperature=inputs.temperature, mask_columns=columns, **options,
    )  # fmt: skip
    return out, grads(given, out.loss)


def exact(inputs: Inputs, columns: list[int], softcap: float | None = None) -> tuple[Tensor, Tensor, Grads]:
    given = leaves(inputs, torch.float64)
    rows = rows64(inputs, given, softcap, columns)
    found = grads(given, kept_or_handed(rows.logprob, rows.log_odds, inputs.grad.double()))
    return rows.logprob.detach(), rows.log_odds.detach(), found


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("nats", ENTROPIES)
def test_every_entropy_of_the_rest_and_every_probability(nats: float, dtype: torch.dtype) -> None:
    inputs = with_hand(nats, dtype, torch.linspace(-27.63, 27.63, 64))  # p from 1e-12 to 1 - 1e-12
    largest = F.linear(*(x.detach() for x in leaves(inputs, torch.float64))).abs().max().item() / 0.7
    digits = max(1e-5, 8 * 2**-23 * largest)  # a float32 logit has no more
    for columns in ([HAND], [HAND, 100, 4095]):
        if len(columns) > 1:
            inputs = inputs._replace(target=torch.where(inputs.target == 100, 101, inputs.target.clamp_max(4094)))
        logprob, log_odds, want = exact(inputs, columns)
        out, got = ours(inputs, columns, workspace_bytes=4096 * 8 * 25)
        assert out.log_odds is not None and out.log_odds.shape == (64, len(columns))
        assert (out.log_odds - log_odds).abs().max() < digits and (out.logprob - logprob).abs().max() < 1e-5
        for a, b in zip(got, want, strict=True):
            assert error(a, b) < ROUNDING[dtype]
        # log(1 - p) keeps that many digits, where 1 - p itself would be 1 or 0
        stay, want_stay = -F.softplus(out.log_odds[:, 0]).double(), -F.softplus(log_odds[:, 0], threshold=99)
        assert torch.allclose(stay, want_stay, rtol=2 * digits, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("odds", [-1e4, 1e4])
def test_a_decision_that_is_certain_stays_finite(odds: float, dtype: torch.dtype) -> None:
    """log(1 - p) by way of p would be -inf."""
    inputs = with_hand(2.0, dtype, torch.full((64,), odds))
    out, got = ours(inputs, [HAND])
    _, log_odds, want = exact(inputs, [HAND])
    assert out.log_odds is not None and (-F.softplus(out.log_odds)).isfinite().all() and out.loss.isfinite()
    assert torch.allclose(out.log_odds.double(), log_odds, rtol=1e-6)
    for a, b in zip(got, want, strict=True):
        assert error(a, b) < ROUNDING[dtype]


@pytest.mark.parametrize("softcap", [None, 40.0])
def test_with_entropy_or_softcap_and_masked_rows(softcap: float | None) -> None:
    inputs = with_hand(0.35, torch.float32, torch.linspace(-5, 5, 64))
    target = inputs.target.clone()
    target[::3] = -100
    inputs = inputs._replace(target=target, grad=torch.where(target == -100, 1e30, inputs.grad))
    _, log_odds, want = exact(inputs, [HAND, 9], softcap)

    def with_bonus(logprob: Tensor, log_odds: Tensor, entropy: Tensor, c: Tensor) -> Tensor:
        return kept_or_handed(logprob, log_odds, c) + 0.2 * entropy.sum()

    out, got = ours(inputs, [HAND, 9], softcap=softcap)
    assert torch.equal(out.logprob[::3], torch.zeros(22)) and out.log_odds is not None
    assert (out.log_odds[::3] == -torch.inf).all()
    live = target != -100
    assert torch.allclose(out.log_odds[live].double(), log_odds[live], rtol=1e-5, atol=1e-5)
    assert not got.hidden[::3].any()
    for a, b in zip(got, want, strict=True):
        assert error(a, b) < 1e-5
    if softcap is None:
        given, double = leaves(inputs), leaves(inputs, torch.float64)
        both = linear_loss(
            given[0], given[1], target, with_bonus, rows={"c": inputs.grad}, bias=given[2], temperature=0.7,
            mask_columns=[HAND, 9], entropy=True, workspace_bytes=4096 * 8 * 25,
        )  # fmt: skip
        rows = rows64(inputs, double, None, [HAND, 9])
        want = grads(double, with_bonus(rows.logprob, rows.log_odds, rows.entropy, inputs.grad.double()))
        assert both.entropy is not None and (both.entropy - rows.entropy.detach()).abs().max() < 1e-5
        for a, b in zip(grads(given, both.loss), want, strict=True):
            assert error(a, b) < 1e-5


def test_gradcheck() -> None:
    base = inputs_at(0.35, rows=3, width=2, vocab=9, dtype=torch.float32, bias=True)
    target, c = torch.tensor([0, -100, 8]), torch.tensor([1.0, -2.0, 0.5]).double()
    for softcap in (None, 2.0):
        assert torch.autograd.gradcheck(
            lambda h, w, b, cap=softcap: linear_loss(
                h, w, target, kept_or_handed, rows={"c": c}, bias=b, temperature=0.8, softcap=cap, mask_columns=[3, 7],
                workspace_bytes=9 * 8 * 4,
            ).loss,
            leaves(base, torch.float64),
        )  # fmt: skip


def test_without_masked_columns_in_the_loss_they_are_only_left_out() -> None:
    """As if the vocabulary had never had them."""
    inputs = inputs_at(2.0, rows=12, width=8, vocab=300, dtype=torch.float32)
    inputs = inputs._replace(target=torch.where(inputs.target == 299, 0, inputs.target))
    short = inputs._replace(weight=inputs.weight[:299])
    found = []
    for which, columns in ((inputs, (299,)), (short, ())):
        given = leaves(which)
        out = linear_loss(*given, which.target, lambda logprob, **_: logprob.exp().sum(), mask_columns=columns)
        found.append((out.loss, *grads(given, out.loss)))
    (loss, hidden, weight, _), (want_loss, want_hidden, want_weight, _) = found
    assert torch.allclose(loss, want_loss, rtol=1e-6) and error(hidden, want_hidden.double()) < 1e-6
    assert error(weight[:299], want_weight.double()) < 1e-6 and not weight[299].any()


def test_a_masked_target_is_nan_and_spares_the_others() -> None:
    inputs = inputs_at(2.0, rows=6, width=8, vocab=300, dtype=torch.float32)
    target = torch.tensor([1, HAND, 2, -100, 3, 4])
    out, got = ours(inputs._replace(target=target), [HAND])
    assert out.logprob.isnan().tolist() == [False, True, False, False, False, False] and out.loss.isnan()
    assert got.hidden.isnan().any(1).tolist() == out.logprob.isnan().tolist()


@pytest.mark.parametrize("columns", [[300], [-1], [3, 3], list(range(300)), [1.0], [True]])
def test_columns_that_cannot_be_masked(columns: list[int]) -> None:
    inputs = inputs_at(2.0, rows=6, width=8, vocab=300, dtype=torch.float32)
    with pytest.raises(ValueError, match=r"must be different ids in \[0, 300\), and not all of them"):
        ours(inputs, columns)
