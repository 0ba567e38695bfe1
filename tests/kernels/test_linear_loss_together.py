"""What linear_loss takes, all at once: against float64, where a mistake in one option shows only beside another."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from gapg_kernels.linear_loss import linear_loss
from tests.kernels.float64_oracle import Inputs, error, inputs_at
from tests.kernels.float64_rows import leaves, rows64

DTYPES = [torch.bfloat16, torch.float32]
ROUNDING = {torch.bfloat16: 3e-3, torch.float32: 1e-5}
ROWS, VOCAB = 48, 517
"""A vocabulary whose rows of E lie further apart than they are long."""
MASKED = (3, 516)


def inputs(dtype: torch.dtype) -> Inputs:
    """Rows that are masked, and rows whose target lies 500 nats below the rest, which have a b of their own."""
    base = inputs_at(2.0, rows=ROWS, width=32, vocab=VOCAB, dtype=dtype, bias=True, temperature=0.7)
    assert base.bias is not None
    bias = base.bias.index_fill(0, torch.tensor([10, 11]), -350.0)
    target = torch.where(torch.isin(base.target, torch.tensor([*MASKED, 10, 11])), 5, base.target)
    target[::5], target[2::9] = -100, 10
    return base._replace(bias=bias, target=target)


def everything(logprob: Tensor, log_odds: Tensor, c: Tensor, o: Tensor, entropy: Tensor | None = None) -> Tensor:
    odds = torch.where(log_odds == -torch.inf, 0.0, log_odds)
    value = (c * logprob).sum() + (o * odds).sum()
    return value if entropy is None else value + 0.7 * (c.abs() * entropy).sum()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("softcap", [None, 40.0])
@pytest.mark.parametrize("main", [False, True])
@pytest.mark.parametrize("each", [1, 7])
def test_masked_columns_far_targets_and_softcap_or_entropy(
    each: int, main: bool, softcap: float | None, dtype: torch.dtype
) -> None:
    given = inputs(dtype)
    o = torch.linspace(-2, 1, ROWS * len(MASKED)).view(ROWS, -1)
    double = leaves(given, torch.float64)
    rows = rows64(given, double, softcap, MASKED)
    entropy = rows.entropy if softcap is None else None
    want = torch.autograd.grad(
        everything(rows.logprob, rows.log_odds, given.grad.double(), o.double(), entropy), double
    )
    single = leaves(given)
    bytes_a_row = {torch.bfloat16: 2 * 576 + 4 * VOCAB, torch.float32: 4 * VOCAB}[dtype] + 4 * VOCAB * bool(softcap)
    main_grad = torch.ones(VOCAB, 32) if main else None
    out = linear_loss(
        single[0], single[1], given.target, everything, rows={"c": given.grad, "o": o}, bias=single[2],
        temperature=0.7, softcap=softcap, entropy=softcap is None, mask_columns=MASKED, main_grad=main_grad,
        workspace_bytes=each * bytes_a_row,
    )  # fmt: skip
    out.loss.backward()
    weight = single[1].grad if main_grad is None else main_grad - 1
    assert (out.logprob - rows.logprob.detach()).abs().max() < 1e-4
    for got, exact in zip((single[0].grad, weight, single[2].grad), want, strict=True):
        assert error(got, exact) < ROUNDING[dtype]


def test_a_master_weight_with_everything_under_autocast() -> None:
    """hidden is rounded, the master too; its sum and the bias's gradient are not."""
    given = inputs(torch.float32)
    o = torch.linspace(-2, 1, ROWS * len(MASKED)).view(ROWS, -1)
    low = given._replace(hidden=given.hidden.bfloat16(), weight=given.weight.bfloat16())
    double = leaves(low, torch.float64)
    rows = rows64(low, double, None, MASKED)
    value = everything(rows.logprob, rows.log_odds, given.grad.double(), o.double(), rows.entropy)
    want, single, main_grad = torch.autograd.grad(value, double), leaves(given), torch.zeros(VOCAB, 32)
    with torch.autocast("cpu", torch.bfloat16):
        out = linear_loss(
            single[0], single[1], given.target.int(), everything, rows={"c": given.grad, "o": o}, bias=single[2],
            temperature=0.7, entropy=True, mask_columns=MASKED, main_grad=main_grad, workspace_bytes=20_000,
        )  # fmt: skip
    out.loss.backward()
    for got, exact in zip((single[0].grad, main_grad, single[2].grad), want, strict=True):
        assert error(got, exact) < ROUNDING[torch.bfloat16]


@pytest.mark.parametrize("tied", [False, True])
def test_weights_and_hidden_states_that_are_views(tied: bool) -> None:
    """Transposed ones, and an embedding that is the head as well."""
    base, rows = inputs(torch.float32), torch.arange(ROWS) % VOCAB
    target, found = base.target, []
    for dtype in (torch.float32, torch.float64):
        weight = base.weight.to(dtype).t().contiguous().requires_grad_()
        hidden = (base.hidden.to(dtype).t().contiguous().t() + (weight.t()[rows] if tied else 0)).tanh()
        if dtype == torch.float32:
            loss: Any = linear_loss(hidden, weight.t(), target, lambda logprob: logprob.sin().sum()).loss
        else:
            logp = (hidden @ weight).log_softmax(1).gather(1, target.clamp_min(0)[:, None])[:, 0]
            loss = torch.where(target == -100, 0.0, logp.sin()).sum()
        found.append(torch.autograd.grad(loss, weight)[0])
    assert error(found[0], found[1]) < 1e-5
