"""What other fused heads got wrong, each by its name: a wrong loss, or a wrong gradient, without a word."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from gapg_kernels.fused_policy_loss import fused_policy_loss
from gapg_kernels.linear_logprob import linear_logprob
from gapg_kernels.policy_loss import PolicyLossOptions
from tests.kernels.float64_oracle import error, inputs_at, truth

WINNER = torch.tensor([[1.0, 0.0]])


def gradients(hidden: Tensor, weight: Tensor, target: Tensor, **kwargs: object) -> tuple[Tensor, Tensor, Tensor]:
    """(logprob, dH, dW) of the sum of log-probs by the fused loss."""
    hidden, weight = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    row = torch.zeros(len(target), dtype=torch.long)
    out = fused_policy_loss(hidden, weight, target, WINNER, row, row, denominator=1.0, **kwargs)  # type: ignore[arg-type]
    grads = torch.autograd.grad(-out.loss, (hidden, weight))
    return out.logprob, *grads


@pytest.mark.parametrize("vocab", [1, 63, 65, 127, 129, 255, 257, 1001])
def test_verl_2656_no_phantom_vocabulary_beyond_v(vocab: int) -> None:
    """Every logit far below 0: a tail read as logit 0 would carry nearly all of the probability."""
    g = torch.Generator().manual_seed(vocab)
    hidden, weight = torch.randn(5, 16, generator=g), torch.randn(vocab, 16, generator=g)
    hidden[:, 0], weight[:, 0] = 5.0, -8.0
    target = torch.randint(0, vocab, (5,), generator=g)
    want = (hidden.double() @ weight.double().t()).log_softmax(-1).gather(1, target[:, None])[:, 0]
    assert torch.allclose(linear_logprob(hidden, weight, target).double(), want, atol=1e-4)
    assert torch.allclose(gradients(hidden, weight, target)[0].double(), want, atol=1e-4)


def test_liger_sm90_the_target_logit_keeps_more_than_16_bits() -> None:
    """Logits of 200 to 300 in bfloat16 are a unit apart: rounded, a log-prob would be off by up to half a nat."""
    inputs = inputs_at(2.0, rows=64, width=64, vocab=512, dtype=torch.bfloat16)
    lift = torch.full((512,), 250.0)
    want = truth(inputs._replace(bias=lift)).logprob
    logprob = linear_logprob(inputs.hidden, inputs.weight, inputs.target, bias=lift)
    assert (logprob - want).abs().max() < 1e-4
    rounded = F.linear(inputs.hidden, inputs.weight, lift.bfloat16()).float().log_softmax(-1)
    assert (rounded.gather(1, inputs.target[:, None])[:, 0] - want).abs().max() > 0.1  # what the failure looks like


def test_dw_is_not_rounded_between_chunks() -> None:
    """256 equal contributions: a bfloat16 running sum stands still once a term is below half of its last bit."""
    rows = 4096
    hidden, weight = torch.ones(rows, 16, dtype=torch.bfloat16), torch.zeros(512, 16, dtype=torch.bfloat16)
    target = torch.zeros(rows, dtype=torch.long)
    room = 512 * 6 * 16  # sixteen rows a chunk
    _, _, got = gradients(hidden, weight, target, workspace_bytes=room)
    want = rows * (1 - 1 / 512)
    assert abs(got[0, 0].item() - want) <= want * 2**-8
    lone = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    linear_logprob(*lone, target, workspace_bytes=room).sum().backward()
    assert lone[1].grad is not None and abs(lone[1].grad[0, 0].item() - want) <= want * 2**-8


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_liger_1294_more_than_65535_rows(dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(0)
    rows = 65_537
    hidden = torch.randn(rows, 16, generator=g).to(dtype)
    weight = torch.randn(40, 16, generator=g).to(dtype)
    target = torch.randint(0, 40, (rows,), generator=g)
    want = (hidden.double() @ weight.double().t()).log_softmax(-1)
    logprob, grad_hidden, _ = gradients(hidden, weight, target)
    assert torch.allclose(logprob.double(), want.gather(1, target[:, None])[:, 0], atol=1e-4)
    exact = weight.double()[target] - want.exp() @ weight.double()
    assert error(grad_hidden, exact) < 3e-3
    assert error(grad_hidden[-1:], exact[-1:]) < 1e-2
    assert torch.equal(linear_logprob(hidden, weight, target), logprob)


@pytest.mark.parametrize("temperature", [0.3, 0.7, 1.5, 4.0])
def test_trl_4159_temperature_reaches_log_prob_and_gradient(temperature: float) -> None:
    inputs = inputs_at(2.0, dtype=torch.float32, temperature=temperature)
    want = truth(inputs._replace(grad=torch.ones(64)))
    logprob, grad_hidden, grad_weight = gradients(
        inputs.hidden, inputs.weight, inputs.target, temperature=temperature
    )  # fmt: skip
    assert (logprob - want.logprob).abs().max() < 1e-5
    assert error(grad_hidden, want.hidden) < 1e-5 and error(grad_weight, want.weight) < 1e-5


@pytest.mark.parametrize("denominator", [0.01, 1.0, 4096.0])
@pytest.mark.parametrize("room", [2 << 30, 40_000])
def test_liger_1082_the_gradients_have_the_scale_of_the_loss(denominator: float, room: int) -> None:
    """The fused gradient norm is that of autograd on the plain loss, whatever the denominator and the chunking."""
    inputs = inputs_at(2.0, dtype=torch.float32, vocab=500)
    hidden, weight = inputs.hidden.clone().requires_grad_(), inputs.weight.clone().requires_grad_()
    row = torch.zeros(64, dtype=torch.long)
    out = fused_policy_loss(
        hidden, weight, inputs.target, WINNER, row, row, denominator=denominator, workspace_bytes=room
    )
    out.loss.backward()
    plain = [x.clone().requires_grad_() for x in (inputs.hidden, inputs.weight)]
    logprob = F.linear(*plain).log_softmax(-1).gather(1, inputs.target[:, None])[:, 0]
    (-logprob.sum() / denominator).backward()
    for ours, theirs in zip((hidden, weight), plain, strict=True):
        assert ours.grad is not None and theirs.grad is not None
        assert ours.grad.norm().item() == pytest.approx(theirs.grad.norm().item(), rel=1e-5)


def test_cce_small_gradients_are_not_filtered_before_the_coefficient() -> None:
    """A row whose probabilities are all tiny counts in full when its coefficient is large."""
    inputs = inputs_at(8.0, dtype=torch.float32)
    big = inputs._replace(grad=torch.where(torch.arange(64) == 0, 1e6, 1e-6))
    hidden, weight = big.hidden.clone().requires_grad_(), big.weight.clone().requires_grad_()
    row = torch.zeros(64, dtype=torch.long)
    out = fused_policy_loss(
        hidden, weight, big.target, WINNER, row, row, denominator=1.0, coefficient=-big.grad
    )  # fmt: skip
    out.loss.backward()
    want = truth(big)
    for at in range(64):  # no row, and no element of the vocabulary, is left out
        assert hidden.grad is not None and error(hidden.grad[at], want.hidden[at]) < 1e-4
    assert weight.grad is not None
    assert error(weight.grad, want.weight) < 1e-5
    small = want.weight.abs() < want.weight.abs().median()
    assert error(weight.grad[small], want.weight[small]) < 1e-4


def test_pytorch_195829_a_large_common_logit_offset() -> None:
    """torch.nn.functional.linear_cross_entropy returned a wrong loss there; a common offset must not matter."""
    inputs = inputs_at(2.0, dtype=torch.float32, vocab=1000)
    offset = torch.full((1000,), 4096.0)
    plain = gradients(inputs.hidden, inputs.weight, inputs.target)
    for sign in (1, -1):
        lifted = gradients(inputs.hidden, inputs.weight, inputs.target, bias=sign * offset)
        assert (lifted[0] - plain[0]).abs().max() < 8 * 2**-23 * 4096
        assert error(lifted[1], plain[1].double()) < 1e-2 and error(lifted[2], plain[2].double()) < 1e-2


def test_a_group_filter_does_not_change_the_coefficients_of_the_others() -> None:
    """Responses that were dropped still count in their group's mean, since the whole reward table is given."""
    g = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(8, 16, generator=g), torch.randn(40, 16, generator=g)
    target, sample = torch.randint(0, 40, (8,), generator=g), torch.arange(8)
    rewards, group = torch.tensor([[1.0, 0, 0, 1, 0, 0, 0, 0.25]]), torch.zeros(8, dtype=torch.long)

    def grad(rows: Tensor) -> Tensor:
        leaf = hidden.clone().requires_grad_()
        options = PolicyLossOptions("grpo")
        out = fused_policy_loss(
            leaf[rows], weight, target[rows], rewards, group[rows], sample[rows], denominator=1.0, options=options
        )
        return torch.autograd.grad(out.loss, leaf)[0]

    whole, part = grad(torch.arange(8)), grad(torch.tensor([1, 3, 7]))
    assert torch.allclose(part[[1, 3, 7]], whole[[1, 3, 7]], rtol=1e-5, atol=1e-7)
