"""A caller's own advantages in the place of rewards: a token's or a response's."""

from typing import Any

import pytest
import torch
from torch import Tensor

from gapg_kernels import fused_policy_loss, group_advantages, policy_loss
from gapg_kernels.policy_loss import row_losses
from tests.kernels.policy_loss_oracle import ALL, DENOMINATOR, call, inputs_for, with_own_advantages


def test_own_advantages_give_what_the_rewards_they_are_of_give() -> None:
    rows, options = inputs_for(ALL)
    want = call(rows, options)
    for got in (
        call(with_own_advantages(rows, options), options),
        call(rows._replace(rewards=None, advantage=group_advantages(rows.rewards, options.advantage)), options),
    ):
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_a_tokens_own_advantage_scales_its_gradient() -> None:
    logprob = torch.tensor([-1.0, -2.0, -3.0], requires_grad=True)
    policy_loss(logprob, advantage=torch.tensor([0.5, 0.0, -2.0]), denominator=2.0).loss.backward()
    assert logprob.grad is not None and logprob.grad.tolist() == [-0.25, 0.0, 1.0]


def head(rows: int = 9) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.randn(rows, 8).requires_grad_(), torch.randn(40, 8).requires_grad_(), torch.randint(40, (rows,))


def gradients(**source: Any) -> list[Tensor]:
    hidden, weight, target = head()
    out = fused_policy_loss(hidden, weight, target, **source, denominator=6.0, workspace_bytes=1000)
    out.loss.backward()
    assert hidden.grad is not None and weight.grad is not None
    return [out.loss.detach(), hidden.grad, weight.grad, out.stats]


def test_the_fused_loss_takes_them_too() -> None:
    rewards, group, sample = torch.rand(2, 3), torch.arange(9) % 2, torch.arange(9) % 3
    table = group_advantages(rewards)
    want = gradients(rewards=rewards, group=group, sample=sample)
    for got in (
        gradients(advantage=table, group=group, sample=sample),
        gradients(advantage=table[group, sample]),
    ):
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    outside = gradients(advantage=table, group=group + 1, sample=sample)
    assert outside[0].isnan()


def test_a_table_and_its_indices_have_their_types() -> None:
    logprob, index, table = torch.zeros(3), torch.zeros(3, dtype=torch.int64), torch.zeros(1, 2)
    for caller, arguments in (("policy_loss", (logprob,)), ("fused_policy_loss", head(3))):
        function: Any = fused_policy_loss if caller[0] == "f" else row_losses
        for wrong, why in (
            ({"advantage": table.bfloat16()}, "advantage is torch.bfloat16; pass torch.float32"),
            ({"rewards": table.long()}, "rewards is torch.int64; pass torch.float32"),
            ({"advantage": table, "sample": logprob}, "sample is torch.float32; pass torch.int64"),
            ({"advantage": table[:0]}, r"advantage \(0, 2\) is empty"),
        ):
            with pytest.raises((TypeError, ValueError), match=f"^{caller}: {why}"):
                function(*arguments, **{"group": index, "sample": index} | wrong, denominator=DENOMINATOR)


def test_what_does_not_fit_is_an_error() -> None:
    logprob, index = torch.zeros(3), torch.zeros(3, dtype=torch.int64)
    table = torch.zeros(1, 2)
    for caller, arguments in (("policy_loss", (logprob,)), ("fused_policy_loss", head(3))):
        function: Any = fused_policy_loss if caller[0] == "f" else row_losses
        for wrong, why in (
            ({}, "pass either rewards or advantage"),
            ({"rewards": table, "group": index, "sample": index, "advantage": logprob}, "either"),
            ({"rewards": table, "group": index}, "group and sample"),
            ({"advantage": logprob, "group": index, "sample": index}, "group and sample"),
            ({"advantage": table}, "group and sample"),
            ({"advantage": torch.zeros(2)}, r"advantage \(2,\) must be \[3\]"),
        ):
            with pytest.raises(ValueError, match=f"^{caller}: .*{why}"):
                function(*arguments, **wrong, denominator=DENOMINATOR)
