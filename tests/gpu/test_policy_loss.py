"""The policy loss's one launch against the plain reference on the CPU, for every option crossed with every other."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from gapg_kernels.policy_loss import PolicyLossOptions, policy_loss, row_losses, summarize
from gapg_kernels.policy_loss_reference import Rows, plain_row_losses
from tests.kernels.policy_loss_oracle import ALL, DENOMINATOR, cases, inputs_for

DEVICE = "cuda"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def on_device(rows: Rows) -> Rows:
    return Rows(*(None if x is None else x.to(DEVICE) for x in rows))


CASES = cases()


@pytest.mark.parametrize("name", CASES)
def test_the_launch_is_the_reference(name: str) -> None:
    rows, options = CASES[name]
    want = plain_row_losses(rows, DENOMINATOR, options)
    got = row_losses(**on_device(rows)._asdict(), denominator=DENOMINATOR, options=options)
    for ours, exact in ((got.loss, want.loss), (got.grad, want.grad)):
        torch.testing.assert_close(ours.cpu(), exact, rtol=1e-4, atol=1e-6, equal_nan=True)
    torch.testing.assert_close(got.stats.cpu(), want.stats, rtol=1e-4, atol=1e-4, equal_nan=True)


def test_every_run_gives_the_same_bits() -> None:
    rows, options = inputs_for(ALL, rows=66_001)
    rows = on_device(rows)
    first = row_losses(**rows._asdict(), denominator=DENOMINATOR, options=options)
    for _ in range(5):
        again = row_losses(**rows._asdict(), denominator=DENOMINATOR, options=options)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert summarize(first.stats)["rows"] > 0


def test_the_host_never_waits(request: pytest.FixtureRequest) -> None:
    rows, options = inputs_for(ALL, rows=300)
    rows = on_device(rows)

    def work(options: PolicyLossOptions) -> Tensor:
        logprob = rows.logprob.clone().requires_grad_()
        loss = policy_loss(**rows._replace(logprob=logprob)._asdict(), denominator=DENOMINATOR, options=options).loss
        return torch.autograd.grad(loss, logprob)[0]

    work(options)
    request.getfixturevalue("no_sync")
    work(options)
