"""A softcap, and the gradient by the entropy, through every fused head: against float64 at every entropy."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from gapg_kernels.fused_policy_loss import fused_policy_loss
from gapg_kernels.linear_logprob import linear_logprob
from gapg_kernels.linear_loss import linear_loss
from tests.kernels.float64_oracle import ENTROPIES, Inputs, error, inputs_at
from tests.kernels.float64_rows import Grads, grads, leaves, rows64

DTYPES = [torch.bfloat16, torch.float32]
ROUNDING = {torch.bfloat16: 3e-3, torch.float32: 1e-5}
ROOM = {torch.bfloat16: 4096 * 10 * 20, torch.float32: 4096 * 8 * 20}
"""Bytes for about 20 of 64 rows: E and float32 logits, or E, and a softcap's slopes."""


def weighted(logprob: Tensor, c: Tensor) -> Tensor:
    return (c * logprob).sum()


def by_linear_logprob(inputs: Inputs, given: list[Tensor], cap: float, room: int) -> tuple[Tensor, Tensor]:
    logprob = linear_logprob(
        given[0], given[1], inputs.target, bias=given[2], temperature=inputs.temperature, softcap=cap,
        workspace_bytes=room,
    )  # fmt: skip
    return logprob, weighted(logprob, inputs.grad)


def by_linear_loss(inputs: Inputs, given: list[Tensor], cap: float, room: int) -> tuple[Tensor, Tensor]:
    out = linear_loss(
        given[0], given[1], inputs.target, weighted, rows={"c": inputs.grad}, bias=given[2],
        temperature=inputs.temperature, softcap=cap, workspace_bytes=room,
    )  # fmt: skip
    return out.logprob, out.loss


def by_fused_policy_loss(inputs: Inputs, given: list[Tensor], cap: float, room: int) -> tuple[Tensor, Tensor]:
    row = torch.zeros(len(inputs.target), dtype=torch.long)
    out = fused_policy_loss(
        given[0], given[1], inputs.target, torch.tensor([[1.0, 0.0]]), row, row, denominator=1.0, bias=given[2],
        coefficient=-inputs.grad, temperature=inputs.temperature, softcap=cap, workspace_bytes=room,
    )  # fmt: skip
    return out.logprob, out.loss


Head = Callable[[Inputs, list[Tensor], float, int], tuple[Tensor, Tensor]]
HEADS: dict[str, Head] = {
    "kept": lambda inputs, given, cap, room: by_linear_logprob(inputs, given, cap, 2 << 30),
    "recomputed": by_linear_logprob,
    "linear_loss": by_linear_loss,
    "fused": by_fused_policy_loss,
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("saturated", [False, True])
@pytest.mark.parametrize("nats", ENTROPIES)
def test_a_softcap_at_every_entropy(nats: float, saturated: bool, dtype: torch.dtype) -> None:
    """Gemma's 30; and a cap that the largest logits pass 20 times, where 1 - tanh^2 is 1e-17: a few tokens then carry
    each row, so that the roundings of E, of the factor and of the result do not average out."""
    inputs = inputs_at(nats, dtype=dtype, bias=True, temperature=0.7)
    largest = F.linear(inputs.hidden.double(), inputs.weight.double()).abs().max().item()
    cap = largest / 20 if saturated else 30.0
    tolerance = 3 * 2**-9 if saturated and dtype == torch.bfloat16 else ROUNDING[dtype]
    given = leaves(inputs, torch.float64)
    exact = rows64(inputs, given, cap)
    want = grads(given, weighted(exact.logprob, inputs.grad))
    for head in HEADS.values():
        given = leaves(inputs)
        logprob, loss = head(inputs, given, cap, ROOM[dtype])
        assert (logprob.detach() - exact.logprob.detach()).abs().max() < 1e-5
        for ours, theirs in zip(grads(given, loss), want, strict=True):
            assert error(ours, theirs) < tolerance


def test_the_slope_keeps_its_digits_where_every_logit_saturates() -> None:
    """Some 15 times the cap: 1 - tanh^2 is 1e-13 there, and 0 if it is computed so in float32."""
    base = inputs_at(4.0, rows=8, dtype=torch.float32)
    inputs = base._replace(bias=torch.full((4096,), 45.0), temperature=0.7)
    double = leaves(inputs, torch.float64)
    assert F.linear(*double).min() > 27
    want = grads(double, weighted(rows64(inputs, double, 3.0).logprob, inputs.grad))
    for head in HEADS.values():
        given = leaves(inputs)
        for ours, theirs in zip(grads(given, head(inputs, given, 3.0, 2 << 30)[1]), want, strict=True):
            assert error(ours, theirs) < 1e-4


@pytest.mark.parametrize("head", HEADS)
def test_gradcheck_with_a_softcap(head: str) -> None:
    base = inputs_at(0.35, rows=4, width=3, vocab=9, dtype=torch.float32, bias=True)
    target = base.target.clone()
    target[2] = -100
    inputs = base._replace(target=target, temperature=0.8, grad=base.grad.double())
    room = 9 * 8 * 2 * 2
    assert torch.autograd.gradcheck(
        lambda *given: HEADS[head](inputs, list(given), 1.5, room)[1], leaves(inputs, torch.float64)
    )


def bonus(logprob: Tensor, entropy: Tensor, c: Tensor, k: Tensor) -> Tensor:
    return (c * logprob).sum() + (k * entropy).sum()


def entropy_by_linear_logprob(inputs: Inputs, given: list[Tensor], k: Tensor, room: int) -> Tensor:
    found = linear_logprob(
        given[0], given[1], inputs.target, bias=given[2], temperature=inputs.temperature, return_entropy=True,
        workspace_bytes=room,
    )  # fmt: skip
    return bonus(*found, inputs.grad, k)


def entropy_by_linear_loss(inputs: Inputs, given: list[Tensor], k: Tensor, room: int) -> Tensor:
    rows = {"c": inputs.grad, "k": k}
    return linear_loss(
        given[0], given[1], inputs.target, bonus, rows=rows, bias=given[2], temperature=inputs.temperature,
        entropy=True, workspace_bytes=room,
    ).loss  # fmt: skip


ENTROPY_HEADS: dict[str, Callable[[Inputs, list[Tensor], Tensor, int], Tensor]] = {
    "kept": lambda inputs, given, k, room: entropy_by_linear_logprob(inputs, given, k, 2 << 30),
    "recomputed": entropy_by_linear_logprob,
    "linear_loss": entropy_by_linear_loss,
}


def by_entropy(inputs: Inputs, k: Tensor, dtype: torch.dtype | None, logprob_too: bool) -> Grads:
    """By autograd, in float64 or, with logits in the inputs' type, in float32."""
    given = leaves(inputs, dtype)
    if dtype == torch.float64:
        logprob, entropy, _ = rows64(inputs, given)
    else:
        logp = (F.linear(*given).float() / inputs.temperature).log_softmax(1)
        logprob, entropy = logp.gather(1, inputs.target[:, None])[:, 0], -(logp.exp() * logp).sum(1)
    return grads(given, bonus(logprob, entropy, inputs.grad * logprob_too, k))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("nats", ENTROPIES)
def test_an_entropy_bonus_at_every_entropy(nats: float, dtype: torch.dtype) -> None:
    """Beside a gradient by the log-prob, and alone: at 0 nats it is 1e-9 of the other."""
    inputs = inputs_at(nats, dtype=dtype, bias=True, temperature=0.7)
    k = torch.randn(64, generator=torch.Generator().manual_seed(1))
    for both in (True, False):
        part = inputs._replace(grad=inputs.grad * both)
        want, peer = by_entropy(inputs, k, torch.float64, both), by_entropy(inputs, k, None, both)
        for head in ENTROPY_HEADS.values():
            given = leaves(inputs)
            got = grads(given, head(part, given, k, ROOM[dtype]))
            for ours, theirs, exact in zip(got, peer, want, strict=True):
                assert error(ours, exact) <= max(error(theirs, exact), 1e-6)
                assert error(ours, exact) < ROUNDING[dtype]


@pytest.mark.parametrize("head", ENTROPY_HEADS)
def test_gradcheck_of_an_entropy_bonus(head: str) -> None:
    base = inputs_at(0.35, rows=4, width=3, vocab=9, dtype=torch.float32, bias=True)
    target = base.target.clone()
    target[2] = -100
    bias = base.bias
    assert bias is not None
    bias = bias.index_fill(0, target[:1], -100.0)  # a row of its own b
    inputs = base._replace(target=target, temperature=0.8, grad=base.grad.double(), bias=bias)
    k = torch.linspace(-1, 2, 4).double()
    run = ENTROPY_HEADS[head]
    assert torch.autograd.gradcheck(
        lambda *given: run(inputs, list(given), k, 9 * 8 * 3), leaves(inputs, torch.float64)
    )


def test_masked_rows_have_no_entropy_and_no_gradient_by_it() -> None:
    inputs = inputs_at(2.0, rows=9, width=16, vocab=300, dtype=torch.float32, bias=True)
    target = inputs.target.clone()
    target[::2] = -100
    inputs, k = inputs._replace(target=target), torch.where(target == -100, 1e30, 2.0)
    for run in ENTROPY_HEADS.values():
        given = leaves(inputs)
        got = grads(given, run(inputs, given, k, 300 * 8 * 4))
        assert not got.hidden[::2].any() and got.hidden[1::2].any() and got.weight.isfinite().all()


def test_with_a_softcap_the_entropy_has_no_gradient_and_says_so() -> None:
    inputs = inputs_at(2.0, rows=9, width=16, vocab=300, dtype=torch.float32)
    given, k = leaves(inputs), torch.ones(9)
    call = partial(
        linear_loss, given[0], given[1], inputs.target, rows={"c": inputs.grad, "k": k}, softcap=5.0, entropy=True
    )
    with pytest.raises(ValueError, match=r"with a softcap the entropy has no gradient; pass entropy.detach\(\)"):
        call(loss=bonus)
    out = call(loss=lambda logprob, entropy, c, k: bonus(logprob, entropy.detach(), c, k))
    want = rows64(inputs, leaves(inputs, torch.float64), 5.0).entropy
    assert out.entropy is not None and (out.entropy - want.detach()).abs().max() < 1e-5
    out.loss.backward()
    logprob, entropy = linear_logprob(*given, inputs.target, softcap=5.0, return_entropy=True)
    assert torch.equal(entropy.detach(), out.entropy)
    with pytest.raises(RuntimeError, match="with a softcap the entropy has no gradient"):
        entropy.sum().backward(retain_graph=True)
    logprob.sum().backward()


@pytest.mark.parametrize("cap", [0.0, -1.0, float("inf"), float("nan")])
def test_a_softcap_is_positive(cap: float) -> None:
    inputs = inputs_at(2.0, rows=9, width=16, vocab=300, dtype=torch.float32, bias=True)
    for head in HEADS.values():
        with pytest.raises(ValueError, match="softcap must be positive and finite, or None for no softcap, not"):
            head(inputs, leaves(inputs), cap, 2 << 30)
