"""Tensors on one card while another is the current device."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from gapg_kernels.flash import Lengths, packed
from gapg_kernels.fused_policy_loss import fused_policy_loss
from gapg_kernels.linear_logprob import linear_logprob
from tests.kernels.float64_oracle import Inputs, error, inputs_at, truth

OTHER = "cuda:1"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices"),
]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("table", ["cpu", OTHER])
def test_the_heads(table: str, dtype: torch.dtype) -> None:
    inputs = inputs_at(2.0, rows=300, width=64, vocab=1500, dtype=dtype)
    want = truth(inputs)
    x = Inputs(*(x.to(OTHER) if isinstance(x, Tensor) else x for x in inputs))
    row, rewards = torch.zeros(300, dtype=torch.long, device=table), torch.tensor([[1.0, 0.0]], device=table)
    with torch.cuda.device(0):
        for fused in (False, True):
            hidden, weight = x.hidden.clone().requires_grad_(), x.weight.clone().requires_grad_()
            if fused:
                out = fused_policy_loss(
                    hidden, weight, x.target, rewards, row, row, denominator=1.0, coefficient=-x.grad
                )
                out.loss.backward()
                logprob = out.logprob
            else:
                logprob = linear_logprob(hidden, weight, x.target)
                (logprob * x.grad).sum().backward()
            assert torch.cuda.current_device() == 0 and logprob.device == torch.device(OTHER)
            assert hidden.grad is not None and weight.grad is not None
            assert (logprob.detach().cpu() - want.logprob).abs().max() < 1e-3
            assert error(hidden.grad.cpu(), want.hidden) < 3 * 2**-9
            assert error(weight.grad.cpu(), want.weight) < 3 * 2**-9


def test_attention() -> None:
    cu = torch.tensor([0, 3, 100, 164], dtype=torch.int32)
    q, k, v, grad = (torch.randn(164, 4, 64, generator=torch.Generator().manual_seed(i)).bfloat16() for i in range(4))
    found = []
    with torch.cuda.device(0):
        for device in ("cuda:0", OTHER):
            lengths = Lengths(cu.to(device), cu.to(device), 97, 97, True)
            leaves = [x.to(device).requires_grad_() for x in (q, k, v)]
            out = packed(*leaves, lengths, 0.125)
            found.append([out, *torch.autograd.grad(out, leaves, grad.to(device))])
    for here, there in zip(*found, strict=True):
        assert there.device == torch.device(OTHER)
        assert error(there.detach().cpu(), here.detach().cpu().double()) < 2**-7
