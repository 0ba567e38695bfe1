"""Both fused heads where inputs are extreme: huge logits, targets far below the rest, masks, duplicates, NaN."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from gapg_kernels.fused_policy_loss import fused_policy_loss
from gapg_kernels.linear_logprob import linear_logprob
from tests.kernels.float64_oracle import Inputs, Result, error, truth

DTYPES = [torch.bfloat16, torch.float32]
WINNER = torch.tensor([[1.0, 0.0]])


def by_linear_logprob(inputs: Inputs) -> Result:
    hidden, weight = inputs.hidden.clone().requires_grad_(), inputs.weight.clone().requires_grad_()
    logprob = linear_logprob(hidden, weight, inputs.target, bias=inputs.bias, temperature=inputs.temperature)
    (logprob * inputs.grad).sum().backward()
    assert hidden.grad is not None and weight.grad is not None
    return Result(logprob.detach(), hidden.grad, weight.grad, None)


def by_fused_policy_loss(inputs: Inputs) -> Result:
    hidden, weight = inputs.hidden.clone().requires_grad_(), inputs.weight.clone().requires_grad_()
    row = torch.zeros(len(inputs.target), dtype=torch.long)
    out = fused_policy_loss(
        hidden, weight, inputs.target, WINNER, row, row, denominator=1.0, coefficient=-inputs.grad, bias=inputs.bias,
        temperature=inputs.temperature,
    )  # fmt: skip
    out.loss.backward()
    assert hidden.grad is not None and weight.grad is not None
    return Result(out.logprob, hidden.grad, weight.grad, None)


HEADS = pytest.mark.parametrize("head", [by_linear_logprob, by_fused_policy_loss])
Head = Callable[[Inputs], Result]


def ramp(gap: float, dtype: torch.dtype) -> Inputs:
    """Four rows; the target of the first is `gap` nats below the best token, of the second and third about that."""
    weight = torch.zeros(300, 16)
    weight[:, 0] = torch.linspace(-1, 1, 300).to(torch.bfloat16)
    weight[:, 1] = torch.linspace(3, -2, 300).to(torch.bfloat16)
    hidden = torch.zeros(4, 16)
    hidden[:, 0] = torch.tensor([gap / 2, gap / 2, -gap / 2, 1.0])
    hidden[:, 1] = torch.tensor([0.0, 1.0, 0.5, 1.0])
    return Inputs(hidden.to(dtype), weight.to(dtype), torch.tensor([0, 0, 299, 7]), torch.tensor([1.0, -1e-4, 3, 2]))


@HEADS
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gap", [60, 81, 83, 125, 127, 1_000, 20_000])
def test_targets_far_below_the_best_token(head: Head, gap: int, dtype: torch.dtype) -> None:
    inputs = ramp(gap, dtype)
    want, got = truth(inputs), head(inputs)
    assert torch.allclose(got.logprob.double(), want.logprob, rtol=1e-6, atol=1e-5)
    # One or two tokens carry each row, so roundings do not average out: E, a * h and the result, 2^-9 each.
    tolerance = max(3 * 2**-9 if dtype == torch.bfloat16 else 1e-5, 1e-6 * gap)
    for row in range(4):
        assert error(got.hidden[row], want.hidden[row]) < tolerance
    assert error(got.weight, want.weight) < tolerance


@HEADS
@pytest.mark.parametrize("dtype", DTYPES)
def test_logits_of_ten_thousand(head: Head, dtype: torch.dtype) -> None:
    """Half of the vocabulary at +10,240, half at -10,240: targets from both halves."""
    weight = torch.ones(64, 16)
    weight[32:] = -1
    hidden = torch.full((4, 16), 640.0)
    hidden[1] *= -1
    inputs = Inputs(hidden.to(dtype), weight.to(dtype), torch.tensor([0, 40, 63, 5]), torch.ones(4))
    assert (inputs.hidden.double() @ inputs.weight.double().t()).abs().unique().tolist() == [10_240]
    want, got = truth(inputs), head(inputs)
    assert torch.allclose(got.logprob.double(), want.logprob, rtol=1e-6, atol=1e-5)
    assert error(got.hidden, want.hidden) < 1e-2 and error(got.weight, want.weight) < 1e-2


@HEADS
@pytest.mark.parametrize("offset", [1e4, -1e4])
def test_a_large_common_offset(head: Head, offset: float) -> None:
    g = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(6, 16, generator=g), torch.randn(300, 16, generator=g)
    target = torch.randint(0, 300, (6,), generator=g)
    inputs = Inputs(hidden, weight, target, torch.randn(6, generator=g), bias=torch.full((300,), offset))
    want, got = truth(inputs), head(inputs)
    assert (got.logprob - want.logprob).abs().max() < 8 * 2**-23 * 1e4  # float32 logits of that size
    assert error(got.hidden, want.hidden) < 1e-2 and error(got.weight, want.weight) < 1e-2


@HEADS
@pytest.mark.parametrize("dtype", DTYPES)
def test_all_rows_masked(head: Head, dtype: torch.dtype) -> None:
    inputs = ramp(60, dtype)._replace(target=torch.full((4,), -100), grad=torch.full((4,), 1e30))
    got = head(inputs)
    assert not got.logprob.any() and not got.hidden.any() and not got.weight.any()


@HEADS
@pytest.mark.parametrize("dtype", DTYPES)
def test_all_coefficients_zero(head: Head, dtype: torch.dtype) -> None:
    inputs = ramp(60, dtype)._replace(grad=torch.zeros(4))
    got = head(inputs)
    assert got.logprob.all() and not got.hidden.any() and not got.weight.any()


@HEADS
@pytest.mark.parametrize("dtype", DTYPES)
def test_duplicated_targets(head: Head, dtype: torch.dtype) -> None:
    """Many rows at one column, some of opposite sign: their terms meet in one row of d(weight)."""
    g = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(64, 16, generator=g).to(dtype), torch.randn(40, 16, generator=g).to(dtype)
    inputs = Inputs(hidden, weight, torch.full((64,), 11), torch.randn(64, generator=g))
    want, got = truth(inputs), head(inputs)
    assert error(got.weight, want.weight) < 1e-2
    assert error(got.weight[11], want.weight[11]) < 1e-2
    inputs = inputs._replace(hidden=hidden.float(), weight=weight.float())
    assert error(head(inputs).weight, truth(inputs).weight) < 1e-5


@HEADS
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [-1, -99, -101, 300, 2**40])
def test_a_target_out_of_range_is_nan_and_spares_the_others(head: Head, bad: int, dtype: torch.dtype) -> None:
    inputs = ramp(60, dtype)
    target = inputs.target.clone()
    target[3] = bad
    got, want = head(inputs._replace(target=target)), head(inputs)
    rest = torch.arange(4) != 3
    assert got.logprob[3].isnan() and got.hidden[3].isnan().all() and got.weight.isnan().any()
    assert torch.equal(got.logprob[rest], want.logprob[rest]) and torch.equal(got.hidden[rest], want.hidden[rest])


@HEADS
def test_nan_in_one_row_spares_the_others(head: Head) -> None:
    inputs = ramp(60, torch.float32)
    hidden = inputs.hidden.clone()
    hidden[2, 3] = float("nan")
    got, want = head(inputs._replace(hidden=hidden)), head(inputs)
    rest = torch.arange(4) != 2
    assert got.logprob[2].isnan() and got.hidden[2].isnan().all()
    assert torch.equal(got.logprob[rest], want.logprob[rest]) and torch.equal(got.hidden[rest], want.hidden[rest])


@HEADS
@pytest.mark.parametrize("dtype", DTYPES)
def test_one_row_and_a_vocabulary_of_one(head: Head, dtype: torch.dtype) -> None:
    one = ramp(60, dtype)._replace(target=torch.tensor([5]))
    one = one._replace(hidden=one.hidden[:1], grad=torch.ones(1))
    assert error(head(one).hidden, truth(one).hidden) < 1e-2
    alone = one._replace(weight=one.weight[:1], target=torch.tensor([0]))
    got = head(alone)
    assert got.logprob.item() == 0 and not got.hidden.any() and not got.weight.any()


def test_float16_is_refused() -> None:
    """It cannot hold E."""
    hidden, weight, target = torch.zeros(3, 4).half(), torch.zeros(5, 4).half(), torch.zeros(3, dtype=torch.long)
    with pytest.raises(TypeError, match="float16 is too narrow"):
        linear_logprob(hidden, weight, target)


def test_the_heads_agree_bit_for_bit_in_what_they_share() -> None:
    def both(dtype: torch.dtype) -> list[Tensor]:
        a, b = by_linear_logprob(ramp(60, dtype)), by_fused_policy_loss(ramp(60, dtype))
        return [a.logprob - b.logprob, a.hidden - b.hidden, a.weight - b.weight]

    for dtype in DTYPES:
        assert not any(difference.any() for difference in both(dtype))
