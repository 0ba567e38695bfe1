"""The plain reference: entropy, its gradients in float64, the patched target, and what bfloat16 storage costs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from gapg_kernels import reference
from gapg_kernels.reference import RowOdds, RowScales
from tests.kernels.float64_entropy import entropies, gaps
from tests.kernels.float64_oracle import ENTROPIES, Inputs, error, inputs_at, truth

DTYPES = [torch.float32, torch.bfloat16]
FAR = [0.0, 5.0, 40.0, 60.0, 81.0, 83.0, 125.0, 127.0, 1000.0, 20_000.0]


def forward(inputs: Inputs, store: Tensor | None = None, entropy: bool = True) -> RowOdds:
    return reference.plain_odds(*inputs[:2], inputs.bias, inputs.target, inputs.temperature, store, entropy)


def targets_below(nats: float, dtype: torch.dtype) -> Inputs:
    """Targets this many nats below the best of 600 tokens, whose own distribution has some entropy."""
    base = inputs_at(2.0, rows=24, width=32, vocab=600, dtype=dtype, seed=1)
    logits = base.hidden.float() @ base.weight.float().t()
    target = torch.full((24,), 7)
    bias = torch.zeros(600)
    bias[7] = (logits.amax(1) - logits[:, 7]).min() - nats
    return base._replace(target=target, bias=bias)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("nats", ENTROPIES)
def test_entropy_over_the_ladder(nats: float, dtype: torch.dtype) -> None:
    inputs = inputs_at(nats, dtype=dtype, bias=True, temperature=0.7)
    got, want = forward(inputs).entropy, entropies(inputs)
    assert got is not None and got.dtype == torch.float32
    assert (got - want).abs().max() < 1e-5
    best = gaps(inputs) == 0
    assert best.any() or nats > 2
    assert torch.allclose(got[best].double(), want[best], rtol=1e-4, atol=1e-18)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("nats", FAR)
def test_entropy_does_not_depend_on_where_the_target_lies(nats: float, dtype: torch.dtype) -> None:
    inputs = targets_below(nats, dtype)
    rows = forward(inputs)
    assert rows.entropy is not None
    assert (gaps(inputs).min() - nats).abs() < 0.1
    assert (rows.entropy - entropies(inputs)).abs().max() < 1e-5
    assert (rows.unit != reference.UNIT).any() == (gaps(inputs) > reference.REPAIR_GAP).any()


def test_entropy_of_masked_wrong_and_forbidden_targets() -> None:
    base = inputs_at(2.0, rows=6, width=32, vocab=600, dtype=torch.float32)
    bias = torch.where(torch.arange(600) % 3 == 0, -torch.inf, 0.0)
    target = torch.tensor([-100, -1, 600, 2**40, 300, 301])  # 300 is forbidden, 301 is not
    inputs = base._replace(target=target, bias=bias)
    rows = forward(inputs)
    assert rows.entropy is not None
    assert rows.entropy[0] == 0 and rows.entropy[1:4].isnan().all()
    assert (rows.entropy[4:] - entropies(inputs)[4:]).abs().max() < 1e-5
    assert rows.logprob[4] == -torch.inf
    alone = forward(Inputs(torch.ones(1, 4), torch.ones(1, 4), torch.zeros(1, dtype=torch.long), torch.ones(1)))
    assert alone.entropy == 0 and alone.logprob == 0


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_asking_for_the_entropy_changes_no_other_bit(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = inputs_at(0.35, rows=33, width=32, vocab=500, dtype=dtype, bias=True)
    stores = [torch.full((33, 512), 7.0, dtype=dtype) for _ in range(2)]
    without, whole = (forward(inputs, e[:, :500], entropy) for e, entropy in zip(stores, (False, True), strict=True))
    assert without.entropy is None
    for a, b in zip(without[:3], whole[:3], strict=True):
        assert torch.equal(a, b)
    assert torch.equal(*stores) and (stores[0][:, 500:] == 7.0).all()
    monkeypatch.setattr(reference, "ENTROPY_BLOCK", 1500)  # three rows at a time
    blocks, one = forward(inputs).entropy, whole.entropy
    assert blocks is not None and one is not None
    assert torch.equal(blocks, one)


class PlainLogprob(torch.autograd.Function):
    """Log-probs by the reference's forward and its gradient functions, two chunks of rows."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor, target: Tensor, temperature: float, patch: bool
    ) -> Tensor:
        e = hidden.new_empty(hidden.shape[0], weight.shape[0])
        rows = reference.plain_odds(hidden, weight, bias, target, temperature, e)
        ctx.save_for_backward(hidden, weight, target, e, rows.odds, rows.unit)
        ctx.temperature, ctx.patch = temperature, patch
        return rows.logprob

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, target, e, odds, unit = ctx.saved_tensors
        index, _ = reference.safe_targets(target, weight.shape[0])
        scales = reference.row_scales(grad, odds, unit, target, ctx.temperature)
        if ctx.patch:
            e = e.clone()
            reference.patch_target(e, index, odds)
            scales = RowScales(scales.spread, torch.zeros_like(scales.pull))
        grad_hidden = reference.hidden_gradient(e, weight, index, scales, hidden.dtype)
        grad_weight = grad_bias = None
        for part in (slice(0, 3), slice(3, None)):
            chunk = RowScales(*(scale[part] for scale in scales))
            grad_weight = reference.add_weight_gradient(grad_weight, e[part], hidden[part], index[part], chunk)
            grad_bias = reference.add_bias_gradient(grad_bias, e[part], index[part], chunk)
        return grad_hidden, grad_weight, grad_bias, None, None, None


@pytest.mark.parametrize("patch", [False, True])
@pytest.mark.parametrize("temperature", [0.7, 1.0, 3.0])
def test_gradcheck_in_float64(temperature: float, patch: bool) -> None:
    g = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(7, 5, generator=g).double(), torch.randn(11, 5, generator=g).double()
    bias = torch.randn(11, generator=g).double()
    bias[10] = -100.0  # a row of its own b: the target is more than 82 nats below the rest
    target = torch.tensor([3, 0, 9, -100, 10, 3, 2])
    tensors = [x.requires_grad_() for x in (hidden, weight, bias)]
    assert torch.autograd.gradcheck(lambda *x: PlainLogprob.apply(*x, target, temperature, patch), tensors)


def test_float64_is_float64_throughout() -> None:
    base = inputs_at(0.1, rows=40, width=32, vocab=700, dtype=torch.float32, bias=True, temperature=1.7)
    inputs = Inputs(*(x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for x in base))
    want = truth(base)
    rows = forward(inputs)
    assert {x.dtype for x in rows if x is not None} == {torch.float64} and rows.entropy is not None
    assert torch.allclose(rows.logprob, want.logprob, rtol=1e-12, atol=0)
    assert torch.allclose(rows.entropy, entropies(inputs), rtol=1e-10, atol=1e-18)
    tensors = [x.requires_grad_() for x in (inputs.hidden, inputs.weight, inputs.bias) if x is not None]
    logprob = PlainLogprob.apply(*tensors, inputs.target, inputs.temperature, False)
    got = torch.autograd.grad((logprob * inputs.grad).sum(), tensors)
    for mine, exact in zip(got, want[1:], strict=True):
        assert mine.dtype == torch.float64 and error(mine, exact) < 1e-12


@pytest.mark.parametrize("nats", ENTROPIES)
def test_what_storing_e_in_bfloat16_costs(nats: float) -> None:
    """Sums come from E before it is rounded: log-probs and entropies do not feel the storage, the gradients little."""
    inputs = inputs_at(nats, vocab=2000)
    e = torch.empty(64, 2000, dtype=torch.bfloat16)
    rows, want = forward(inputs, e), truth(inputs)
    assert rows.entropy is not None
    assert (rows.logprob - want.logprob).abs().max() < 1e-5
    assert (rows.entropy - entropies(inputs)).abs().max() < 1e-5
    normal = rows.odds > 1e-30
    rounded = (e.double().sum(1) / rows.odds - 1)[normal]
    assert 1e-6 < rounded.abs().max() < 2**-8  # what summing the stored E would have cost
    index, _ = reference.safe_targets(inputs.target, 2000)
    scales = reference.row_scales(inputs.grad, rows.odds, rows.unit, inputs.target, 1.0)
    exact = reference.hidden_gradient(e, inputs.weight, index, scales, torch.float32)
    # a gradient of one dominant token has that token's rounding, others average theirs
    assert error(exact, want.hidden) < (2**-8 if nats == 0 else 1e-3)
    reference.patch_target(e, index, rows.odds)
    patched = RowScales(scales.spread, torch.zeros_like(scales.pull))
    assert error(reference.hidden_gradient(e, inputs.weight, index, patched, torch.float32), want.hidden) < 1.5 * 2**-8


def test_a_patched_target_is_the_negative_sum_of_its_row() -> None:
    inputs = inputs_at(2.0, rows=9, width=32, vocab=500, dtype=torch.float32)
    inputs = inputs._replace(target=torch.cat([inputs.target[:7], torch.tensor([-100, 500])]))
    e = torch.empty(9, 500)
    rows = forward(inputs, e)
    index, _ = reference.safe_targets(inputs.target, 500)
    before = e.clone()
    reference.patch_target(e, index, rows.odds)
    assert torch.equal(e.gather(1, index[:, None])[:, 0].nan_to_num(), -rows.odds.nan_to_num())
    assert rows.odds[8].isnan() and rows.odds[7] == 0
    assert torch.equal(
        e.scatter(1, index[:, None], 0.0).nan_to_num(), before.scatter(1, index[:, None], 0.0).nan_to_num()
    )
