"""The losses of examples/losses.py through linear_loss, against their papers' formulas written out in float64."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from examples import losses
from gapg_kernels.linear_loss import LinearLoss, linear_loss
from tests.kernels.float64_oracle import ENTROPIES, Inputs, error, inputs_at
from tests.kernels.float64_rows import Grads, eager, grads, leaves, rows64

DTYPES = [torch.bfloat16, torch.float32]
ROUNDING = {torch.bfloat16: 3e-3, torch.float32: 1e-5}
CUTS = [0, 7, 20, 21, 40, 52, 64]
"""Six responses, or the pairs of a winner and a loser."""
RESPONSES, TOKENS = len(CUTS) - 1, CUTS[-1]
ROOM = 4096 * 8 * 25
"""Bytes that leave room for fewer than 64 rows, and for the longest response."""


class Case(NamedTuple):
    inputs: Inputs
    old: Tensor
    reference: Tensor
    advantage: Tensor
    """one a response"""
    sign: Tensor


def case_at(nats: float, dtype: torch.dtype) -> Case:
    inputs = inputs_at(nats, dtype=dtype, bias=True, temperature=0.7)
    with torch.no_grad():
        logprob = rows64(inputs, leaves(inputs, torch.float64)).logprob.float()
    g = torch.Generator().manual_seed(3)
    noise = torch.randn(2, TOKENS, generator=g)
    sign = torch.where(torch.rand(TOKENS, generator=g) < 0.5, 1.0, -1.0)
    for start in CUTS[:-1]:
        sign[start] = 0.0  # a prompt's token
    return Case(inputs, logprob + 0.3 * noise[0], logprob + noise[1], torch.randn(RESPONSES, generator=g), sign)


def spread(case: Case, of_response: Callable[[int], float]) -> Tensor:
    """[T] from one number a response."""
    return torch.cat([torch.full((b - a,), of_response(i)) for i, (a, b) in enumerate(pairwise(CUTS))])


def by_linear_loss(case: Case, name: str, **options: Any) -> tuple[LinearLoss, Grads]:
    """As a trainer calls it."""
    lengths = [b - a for a, b in pairwise(CUTS)]
    advantage = spread(case, lambda i: case.advantage[i].item())
    mean = spread(case, lambda i: 1 / (RESPONSES * lengths[i]))
    share = mean if name in ("grpo", "gspo") else torch.full((TOKENS,), 1 / TOKENS)
    rows = {"old": case.old, "advantage": advantage, "share": share}
    loss: Callable[..., Tensor] = getattr(losses, name)
    if name == "grpo":
        rows["reference"] = case.reference
    if name == "dpo":
        rows, loss = {"reference": case.reference, "sign": case.sign}, partial(losses.dpo, pairs=RESPONSES)
    if name == "gspo":
        loss = partial(losses.gspo, responses=RESPONSES)
    given = leaves(case.inputs)
    out = linear_loss(
        given[0], given[1], case.inputs.target, loss, rows=rows, cuts=CUTS if name in ("gspo", "dpo") else None,
        bias=given[2], temperature=case.inputs.temperature, **options,
    )  # fmt: skip
    return out, grads(given, out.loss)


# The papers' formulas, a response at a time.


def grpo(logprob: Tensor, case: Case) -> Tensor:
    total = logprob.new_zeros(())
    for a, (start, end) in zip(case.advantage.double(), pairwise(CUTS), strict=True):
        lp, old, ref = (x[start:end] for x in (logprob, case.old, case.reference))
        ratio, q = (lp - old).exp(), (ref - lp).exp()
        total = total - (torch.min(ratio * a, ratio.clamp(0.8, 1.2) * a) - 0.04 * (q - q.log() - 1)).mean()
    return total / RESPONSES


def dapo(logprob: Tensor, case: Case) -> Tensor:
    total = logprob.new_zeros(())
    for a, (start, end) in zip(case.advantage.double(), pairwise(CUTS), strict=True):
        ratio = (logprob[start:end] - case.old[start:end]).exp()
        total = total - torch.min(ratio * a, ratio.clamp(0.8, 1.28) * a).sum()
    return total / TOKENS


def cispo(logprob: Tensor, case: Case) -> Tensor:
    total = logprob.new_zeros(())
    for a, (start, end) in zip(case.advantage.double(), pairwise(CUTS), strict=True):
        ratio = (logprob[start:end] - case.old[start:end]).exp().detach()
        total = total - (torch.where(ratio > 1.28, 1.28, ratio) * a * logprob[start:end]).sum()
    return total / TOKENS


def gspo(logprob: Tensor, case: Case) -> Tensor:
    total = logprob.new_zeros(())
    for a, (start, end) in zip(case.advantage.double(), pairwise(CUTS), strict=True):
        ratio = (logprob[start:end] - case.old[start:end]).mean().exp()
        total = total - torch.min(ratio * a, ratio.clamp(1 - 3e-4, 1 + 4e-4) * a)
    return total / RESPONSES


def dpo(logprob: Tensor, case: Case) -> Tensor:
    total = logprob.new_zeros(())
    for start, end in pairwise(CUTS):
        gap, sign = (logprob - case.reference)[start:end], case.sign[start:end]
        margin = 0.1 * (gap[sign > 0].sum() - gap[sign < 0].sum())
        total = total + (1 + (-margin).exp()).log()
    return total / RESPONSES


PAPERS = {"grpo": grpo, "dapo": dapo, "cispo": cispo, "gspo": gspo, "dpo": dpo}


@pytest.mark.parametrize("name", PAPERS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("nats", ENTROPIES)
def test_every_paper_at_every_entropy(nats: float, dtype: torch.dtype, name: str) -> None:
    case = case_at(nats, dtype)
    given = leaves(case.inputs, torch.float64)
    value = PAPERS[name](rows64(case.inputs, given).logprob, case)
    want, peer = grads(given, value), eager(case.inputs, lambda logprob: PAPERS[name](logprob, case))
    out, got = by_linear_loss(case, name, workspace_bytes=ROOM)
    assert out.loss.item() == pytest.approx(value.item(), rel=1e-5, abs=1e-6)
    for ours, theirs, exact in zip(got, peer, want, strict=True):
        assert error(ours, exact) <= max(error(theirs, exact), 1e-6)
        assert error(ours, exact) < ROUNDING[dtype]


@pytest.mark.parametrize("name", PAPERS)
def test_the_chunks_do_not_matter(name: str) -> None:
    """In float64, where nothing hides a row that is counted twice, or a sequence that is cut."""
    case = case_at(2.0, torch.float32)
    hidden, weight, bias = leaves(case.inputs, torch.float64)
    case = case._replace(inputs=case.inputs._replace(hidden=hidden, weight=weight, bias=bias))
    whole, want = by_linear_loss(case, name)
    for rows in (19, 30, 52):
        out, got = by_linear_loss(case, name, workspace_bytes=4096 * 8 * rows)
        assert out.loss.item() == pytest.approx(whole.loss.item(), rel=1e-12)
        assert torch.allclose(out.logprob, whole.logprob, rtol=1e-12, atol=0)
        for a, b in zip(got, want, strict=True):
            assert error(a, b) < 1e-12


def test_the_gradients_of_sequence_losses_are_those_of_their_values() -> None:
    """By finite differences: `segment_reduce` among them."""
    g = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(9, 4, generator=g).double(), torch.randn(7, 4, generator=g).double()
    target = torch.randint(7, (9,), generator=g)
    old, one = torch.full((9,), -2.0).double(), torch.ones(9).double()
    calls = [
        (partial(losses.gspo, responses=3, low=9.0, high=9.0), {"old": old, "advantage": one, "share": one / 9}),
        (partial(losses.dpo, pairs=3), {"reference": old, "sign": one}),
    ]
    for loss, rows in calls:
        assert torch.autograd.gradcheck(
            lambda h, w, loss=loss, rows=rows: (
                linear_loss(h, w, target, loss, rows=rows, cuts=[0, 2, 2, 9], workspace_bytes=7 * 8 * 7).loss
            ),
            (hidden.requires_grad_(), weight.requires_grad_()),
        )
