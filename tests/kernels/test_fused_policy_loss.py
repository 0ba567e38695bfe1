"""fused_policy_loss against float64 and against its unfused parts: accuracy, edges, options, main_grad, compilers."""

from __future__ import annotations

from copy import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gapg_kernels.fused_policy_loss import FusedLoss, _fused_op, fused_policy_loss
from gapg_kernels.linear_logprob import linear_logprob
from gapg_kernels.policy_loss import STATS, PolicyLossOptions, policy_loss, rows_with_advantage, summarize
from tests.kernels.counting import arguments_of
from tests.kernels.float64_oracle import ENTROPIES, Inputs, Result, error, inputs_at, truth

DTYPES = [torch.bfloat16, torch.float32]
ROUNDING = {torch.bfloat16: 3e-3, torch.float32: 1e-5}
WINNER = torch.tensor([[1.0, 0.0]])
"""One group of two whose first response has the advantage +1 and the second -1."""


def coefficients(inputs: Inputs, **kwargs: Any) -> tuple[FusedLoss, Result]:
    """The fused loss sum_t grad_t logp_t, as coefficients of a response of advantage 1."""
    hidden, weight = inputs.hidden.clone().requires_grad_(), inputs.weight.clone().requires_grad_()
    bias = None if inputs.bias is None else inputs.bias.clone().requires_grad_()
    row = torch.zeros(len(inputs.target), dtype=torch.long)
    out = fused_policy_loss(
        hidden, weight, inputs.target, WINNER, row, row, denominator=1.0, bias=bias, coefficient=-inputs.grad,
        temperature=inputs.temperature, **kwargs,
    )  # fmt: skip
    out.loss.backward()
    assert hidden.grad is not None and weight.grad is not None
    return out, Result(out.logprob, hidden.grad, weight.grad, None if bias is None else bias.grad)


def eager(inputs: Inputs) -> Result:
    hidden, weight = inputs.hidden.clone().requires_grad_(), inputs.weight.clone().requires_grad_()
    bias = None if inputs.bias is None else inputs.bias.clone().requires_grad_()
    logits = F.linear(hidden, weight, bias).float() / inputs.temperature
    logprob = logits.log_softmax(-1).gather(1, inputs.target[:, None])[:, 0]
    (logprob * inputs.grad).sum().backward()
    assert hidden.grad is not None and weight.grad is not None
    return Result(logprob.detach(), hidden.grad, weight.grad, None if bias is None else bias.grad)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("nats", ENTROPIES)
def test_every_entropy_is_at_least_as_exact_as_eager(nats: float, dtype: torch.dtype) -> None:
    inputs = inputs_at(nats, dtype=dtype, bias=True, temperature=0.7)
    want, peer = truth(inputs), eager(inputs)
    out, got = coefficients(inputs)
    assert (got.logprob - want.logprob).abs().max() < 1e-5
    assert abs(out.loss.item() - (want.logprob * inputs.grad.double()).sum().item()) < 1e-4
    for ours, theirs, exact in zip(got[1:], peer[1:], want[1:], strict=True):
        assert error(ours, exact) <= error(theirs, exact)
        assert error(ours, exact) < ROUNDING[dtype]


@pytest.mark.parametrize("nats", ENTROPIES)
def test_a_patched_target_rounds_like_the_rest_of_e(nats: float) -> None:
    inputs = inputs_at(nats, dtype=torch.bfloat16, temperature=0.7)
    want = truth(inputs)
    _, got = coefficients(inputs, target_term="patched")
    tolerance = 3 * 2**-9  # E, the factor and the result are rounded once each
    assert error(got.hidden, want.hidden) < tolerance and error(got.weight, want.weight) < tolerance
    _, exact = coefficients(inputs._replace(hidden=inputs.hidden.float(), weight=inputs.weight.float()))
    _, patched = coefficients(
        inputs._replace(hidden=inputs.hidden.float(), weight=inputs.weight.float()), target_term="patched"
    )
    assert error(patched.hidden, exact.hidden.double()) < 1e-5 and error(patched.weight, exact.weight.double()) < 1e-5


@pytest.mark.parametrize("nats", ENTROPIES)
def test_entropy_at_every_entropy(nats: float) -> None:
    inputs = inputs_at(nats, dtype=torch.bfloat16, bias=True)
    out, _ = coefficients(inputs, with_entropy=True)
    assert inputs.bias is not None and out.entropy is not None
    logp = F.linear(inputs.hidden.double(), inputs.weight.double(), inputs.bias.double()).log_softmax(-1)
    want = -(logp.exp() * logp).sum(-1)
    assert torch.allclose(out.entropy.double(), want, rtol=1e-5, atol=1e-5)
    assert summarize(out.stats)["entropy"] == pytest.approx(want.mean().item(), rel=1e-5, abs=1e-5)
    _, entropy = linear_logprob(inputs.hidden, inputs.weight, inputs.target, bias=inputs.bias, return_entropy=True)
    assert torch.equal(entropy, out.entropy)


class Case:
    """A random batch of P groups of G, of whose responses some are missing, and every per-row tensor."""

    def __init__(self, rows: int, width: int, vocab: int, prompts: int, samples: int, seed: int) -> None:
        g = torch.Generator().manual_seed(seed)
        self.hidden, self.weight = torch.randn(rows, width, generator=g), torch.randn(vocab, width, generator=g)
        self.bias = torch.randn(vocab, generator=g)
        self.target = torch.randint(0, vocab, (rows,), generator=g)
        self.target[torch.rand(rows, generator=g) < 0.1] = -100
        self.rewards = torch.randint(0, 3, (prompts, samples), generator=g) * 0.3
        self.rewards[torch.rand(prompts, generator=g) < 0.4] = 0.7  # groups without a gradient
        self.group = torch.randint(0, prompts, (rows,), generator=g)
        self.sample = torch.randint(0, samples, (rows,), generator=g)
        with torch.no_grad():
            logprob = linear_logprob(self.hidden, self.weight, self.target, bias=self.bias, temperature=0.8)
        noise = torch.randn(3, rows, generator=g) * 0.3
        self.old, self.rollout, self.reference = logprob + noise
        self.coefficient = torch.randn(rows, generator=g)

    def select(self, at: Tensor) -> Case:
        """The rows ``at``."""
        part = copy(self)
        for name in ("hidden", "target", "group", "sample", "old", "rollout", "reference", "coefficient"):
            setattr(part, name, getattr(self, name)[at])
        return part

    def rows(self, options: PolicyLossOptions) -> dict[str, Any]:
        return {
            "denominator": 7.0,
            "options": options,
            "coefficient": self.coefficient,
            "old_logprob": self.old if options.clip else None,
            "rollout_logprob": self.rollout if options.tis_cap else None,
            "reference_logprob": self.reference if options.kl_coef else None,
        }

    def fused(self, options: PolicyLossOptions, **kwargs: Any) -> tuple[FusedLoss, list[Tensor]]:
        leaves = [x.clone().requires_grad_() for x in (self.hidden, self.weight, self.bias)]
        out = fused_policy_loss(
            leaves[0], leaves[1], self.target, self.rewards, self.group, self.sample, bias=leaves[2], temperature=0.8,
            **self.rows(options), **kwargs,
        )  # fmt: skip
        return out, list(torch.autograd.grad(out.loss, leaves))

    def parts(self, options: PolicyLossOptions) -> tuple[Tensor, list[Tensor], dict[str, float]]:
        leaves = [x.clone().requires_grad_() for x in (self.hidden, self.weight, self.bias)]
        logprob = linear_logprob(leaves[0], leaves[1], self.target, bias=leaves[2], temperature=0.8)
        loss, stats = policy_loss(
            logprob, self.rewards, self.group, self.sample, mask=self.target != -100, **self.rows(options)
        )
        return loss, list(torch.autograd.grad(loss, leaves)), summarize(stats)


OPTIONS = [
    PolicyLossOptions(),
    PolicyLossOptions("grpo"),
    PolicyLossOptions("grpo", clip=(0.1, 0.2)),
    PolicyLossOptions("gapg", tis_cap=1.1),
    PolicyLossOptions("gapg", kl="k2", kl_coef=0.3),
    PolicyLossOptions("grpo", clip=(0.2, 0.28), tis_cap=2.0, kl="k3", kl_coef=0.1),
]


@pytest.mark.parametrize("options", OPTIONS)
def test_it_is_the_policy_loss_of_linear_logprob(options: PolicyLossOptions) -> None:
    case = Case(rows=90, width=16, vocab=211, prompts=5, samples=4, seed=1)
    loss, want, stats = case.parts(options)
    for workspace in (2 << 30, 211 * 4 * 20):
        out, got = case.fused(options, workspace_bytes=workspace)
        assert torch.allclose(out.loss, loss, rtol=1e-5, atol=1e-6)
        for ours, theirs in zip(got, want, strict=True):
            assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-6)
        assert summarize(out.stats) == pytest.approx(stats, rel=1e-4, abs=1e-6)


@given(
    rows=st.integers(0, 40), width=st.integers(1, 20), vocab=st.integers(1, 300), prompts=st.integers(1, 4),
    samples=st.integers(1, 5), seed=st.integers(0, 999), at=st.integers(0, len(OPTIONS) - 1), room=st.integers(1, 50),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_any_shape(
    rows: int, width: int, vocab: int, prompts: int, samples: int, seed: int, at: int, room: int
) -> None:
    case = Case(rows, width, vocab, prompts, samples, seed)
    out, got = case.fused(OPTIONS[at], workspace_bytes=room * vocab * 4)
    loss, want, _ = case.parts(OPTIONS[at])
    assert torch.allclose(out.loss, loss, rtol=1e-4, atol=1e-5)
    for ours, theirs in zip(got, want, strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("options", [options for options in OPTIONS if options.kl_coef == 0])
def test_rows_without_an_advantage_can_be_left_out(options: PolicyLossOptions) -> None:
    case = Case(rows=200, width=16, vocab=97, prompts=6, samples=4, seed=3)
    full, (want_hidden, *want) = case.fused(options)
    at = rows_with_advantage(case.rewards, case.group, case.sample, options.advantage)
    out, (got_hidden, *got) = case.select(at).fused(options)
    assert torch.allclose(out.loss, full.loss, rtol=1e-5, atol=1e-6)
    for ours, theirs in zip([got_hidden, *got], [want_hidden[at], *want], strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-6)
    left = torch.ones(200, dtype=torch.bool).index_fill(0, at, False)
    assert 0 < left.sum() < 200 and not want_hidden[left].any()
    equal = case.rewards.amax(1) == case.rewards.amin(1)
    assert left[equal[case.group]].all()
    assert torch.allclose(out.logprob, full.logprob[at], rtol=1e-5, atol=1e-6)


def test_no_row_is_left_out_whose_loss_is_nan() -> None:
    rewards = torch.tensor([[0.5, 0.5], [0.5, torch.nan], [1.0, 0.0]])
    group, sample = torch.tensor([0, 1, 1, 2, 3, 0, -1]), torch.tensor([0, 0, 1, 0, 0, 2, 0])
    assert rows_with_advantage(rewards, group, sample).tolist() == [2, 3, 4, 5, 6]


def test_equal_rewards_or_no_rows_at_all_have_no_loss_and_no_gradient() -> None:
    case = Case(rows=20, width=16, vocab=97, prompts=2, samples=4, seed=3)
    case.rewards.fill_(0.1)
    assert not len(rows_with_advantage(case.rewards, case.group, case.sample))
    main_grad = torch.ones_like(case.weight)
    for chosen in (case, case.select(torch.arange(0))):
        out, got = chosen.fused(PolicyLossOptions())
        assert out.loss == 0 and not any(g.any() for g in got)
        assert out.stats.shape == (len(STATS),) and summarize(out.stats)["rows"] == (chosen.target != -100).sum()
        hidden, target, group, sample = (
            chosen.hidden.clone().requires_grad_(),
            chosen.target,
            chosen.group,
            chosen.sample,
        )
        fused_policy_loss(
            hidden, case.weight, target, case.rewards, group, sample, denominator=1.0, main_grad=main_grad
        ).loss.backward()
        assert torch.equal(main_grad, torch.ones_like(main_grad))


@pytest.mark.parametrize("dtype", DTYPES)
def test_main_grad_takes_the_sum_over_calls_unrounded(dtype: torch.dtype) -> None:
    """Rounding d(weight) to bfloat16 between chunks or micro-batches loses what is small beside the sum so far."""
    inputs = inputs_at(2.0, rows=200, width=32, vocab=500, dtype=dtype)
    want = truth(inputs)
    main_grad = torch.zeros(500, 32)
    for part in (slice(0, 70), slice(70, 71), slice(71, 200)):
        piece = inputs._replace(hidden=inputs.hidden[part], target=inputs.target[part], grad=inputs.grad[part])
        hidden, weight = piece.hidden.clone().requires_grad_(), piece.weight.clone().requires_grad_()
        row = torch.zeros(len(piece.target), dtype=torch.long)
        out = fused_policy_loss(
            hidden, weight, piece.target, WINNER, row, row, denominator=1.0, coefficient=-piece.grad,
            main_grad=main_grad,
        )  # fmt: skip
        out.loss.backward()
        assert weight.grad is None and hidden.grad is not None
        assert error(hidden.grad, want.hidden[part]) < ROUNDING[dtype]
    assert error(main_grad, want.weight) < ROUNDING[dtype] / 2


def test_with_main_grad_only_a_gradient_of_one_may_arrive() -> None:
    inputs = inputs_at(2.0, rows=8, width=16, vocab=50, dtype=torch.float32)
    hidden, row = inputs.hidden.clone().requires_grad_(), torch.zeros(8, dtype=torch.long)
    out = fused_policy_loss(
        hidden, inputs.weight, inputs.target, WINNER, row, row, denominator=1.0, main_grad=torch.zeros(50, 16)
    )
    (2 * out.loss).backward()
    assert hidden.grad is not None and hidden.grad.isnan().all()


def test_the_arriving_gradient_multiplies() -> None:
    case = Case(rows=30, width=16, vocab=97, prompts=3, samples=4, seed=3)
    _, want = case.fused(PolicyLossOptions())
    hidden = case.hidden.clone().requires_grad_()
    again = fused_policy_loss(
        hidden, case.weight, case.target, case.rewards, case.group, case.sample, bias=case.bias, temperature=0.8,
        **case.rows(PolicyLossOptions()),
    )  # fmt: skip
    first = torch.autograd.grad(2 * again.loss, hidden, retain_graph=True)[0]
    assert torch.allclose(first, 2 * want[0], rtol=1e-5, atol=1e-7)
    assert torch.equal(torch.autograd.grad(2 * again.loss, hidden)[0], first)


def test_without_gradients_it_only_looks() -> None:
    case = Case(rows=30, width=16, vocab=97, prompts=3, samples=4, seed=3)
    main_grad = torch.zeros_like(case.weight)
    with torch.no_grad():
        out = fused_policy_loss(
            case.hidden, case.weight.requires_grad_(), case.target, case.rewards, case.group, case.sample,
            denominator=2.0, main_grad=main_grad,
        )  # fmt: skip
    assert not out.loss.requires_grad and not main_grad.any()


def test_a_tied_weight_gets_both_gradients() -> None:
    case = Case(rows=30, width=16, vocab=97, prompts=3, samples=4, seed=3)
    weight, ids = case.weight.clone().requires_grad_(), torch.arange(30) % 97

    def gradient(head: Tensor) -> Tensor:
        out = fused_policy_loss(
            F.embedding(ids, weight), head, case.target, case.rewards, case.group, case.sample, denominator=2.0
        )
        return torch.autograd.grad(out.loss, weight)[0]

    tied, embedding = gradient(weight), gradient(weight.detach())
    head = weight.detach().clone().requires_grad_()
    hidden = F.embedding(ids, weight.detach())
    out = fused_policy_loss(hidden, head, case.target, case.rewards, case.group, case.sample, denominator=2.0)
    assert torch.allclose(tied, embedding + torch.autograd.grad(out.loss, head)[0], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("workspace", [2 << 30, 97 * 8 * 7])
@pytest.mark.parametrize("target_term", ["exact", "patched"])
@pytest.mark.parametrize("options", OPTIONS)
def test_gradcheck_in_float64(options: PolicyLossOptions, target_term: Any, workspace: int) -> None:
    case = Case(rows=9, width=5, vocab=17, prompts=3, samples=4, seed=3)
    case.target[2:4] = case.target[1]  # a duplicate
    row_options = {k: v.double() if isinstance(v, Tensor) else v for k, v in case.rows(options).items()}

    def loss(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return fused_policy_loss(
            hidden, weight, case.target, case.rewards.double(), case.group, case.sample, bias=bias, temperature=0.8,
            target_term=target_term, workspace_bytes=workspace, **row_options,
        ).loss  # fmt: skip

    leaves = [x.double().requires_grad_() for x in (case.hidden, case.weight, case.bias)]
    if options.clip is None and options.tis_cap is None:  # else a constant would move with its argument
        assert torch.autograd.gradcheck(loss, leaves)
    out = loss(*leaves)
    logprob = linear_logprob(leaves[0], leaves[1], case.target, bias=leaves[2], temperature=0.8)
    parts = policy_loss(
        logprob, case.rewards.double(), case.group, case.sample, mask=case.target != -100, **row_options
    )
    for a, b in zip(torch.autograd.grad(out, leaves), torch.autograd.grad(parts.loss, leaves), strict=True):
        assert torch.allclose(a, b, rtol=1e-10, atol=1e-12)


def test_gradcheck_of_linear_logprob_in_float64() -> None:
    case = Case(rows=6, width=5, vocab=17, prompts=3, samples=4, seed=3)
    leaves = [x.double().requires_grad_() for x in (case.hidden, case.weight, case.bias)]
    for workspace in (2 << 30, 17 * 8 * 2):
        assert torch.autograd.gradcheck(
            lambda h, w, b, room=workspace: linear_logprob(
                h, w, case.target, bias=b, temperature=0.8, workspace_bytes=room
            ),
            leaves,
        )


def test_the_same_bits_from_run_to_run() -> None:
    case = Case(rows=300, width=32, vocab=700, prompts=6, samples=4, seed=3)
    for workspace in (2 << 30, 100_000):
        a, first = case.fused(OPTIONS[-1], workspace_bytes=workspace)
        b, second = case.fused(OPTIONS[-1], workspace_bytes=workspace)
        assert torch.equal(a.loss, b.loss) and torch.equal(a.stats, b.stats)
        assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))


@pytest.mark.parametrize("with_main_grad", [False, True])
def test_compiles_into_one_graph(with_main_grad: bool) -> None:
    case = Case(rows=60, width=16, vocab=211, prompts=5, samples=4, seed=1)

    def step(hidden: Tensor, weight: Tensor, main_grad: Tensor | None) -> tuple[Tensor, Tensor]:
        out = fused_policy_loss(
            hidden * 2, weight, case.target, case.rewards, case.group, case.sample, denominator=7.0,
            main_grad=main_grad,
        )  # fmt: skip
        return out.loss, out.stats

    results = []
    for function in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        hidden, weight = case.hidden.clone().requires_grad_(), case.weight.clone().requires_grad_()
        main_grad = torch.zeros_like(case.weight) if with_main_grad else None
        loss, stats = function(hidden, weight, main_grad)
        loss.backward()
        results.append((loss.detach(), stats, hidden.grad, main_grad if with_main_grad else weight.grad))
    for a, b in zip(*results, strict=True):
        assert a is not None and b is not None and torch.equal(a, b)


def test_the_registered_operator_is_sound() -> None:
    case = Case(rows=6, width=8, vocab=30, prompts=2, samples=2, seed=0)
    for main_grad in (None, torch.zeros(30, 8)):
        given = arguments_of(
            _fused_op._opoverload, hidden=case.hidden, weight=case.weight, bias=case.bias, target=case.target,
            rewards=case.rewards, group=case.group, sample=case.sample, coefficient=case.coefficient,
            old_logprob=case.old, main_grad=main_grad, kind="grpo", clip_low=0.1, clip_high=0.2, kl="k3", kl_coef=0.0,
            temperature=1.0, denominator=2.0, workspace_bytes=1 << 20, needs=[True, True, True], with_entropy=True,
            patched=False,
        )  # fmt: skip
        torch.library.opcheck(_fused_op, (), given)


def test_what_it_refuses() -> None:
    case = Case(rows=6, width=8, vocab=30, prompts=2, samples=2, seed=0)

    def call(**changed: Any) -> None:
        names = ("hidden", "weight", "target", "rewards", "group", "sample")
        arguments: dict[str, Any] = {name: getattr(case, name) for name in names} | {"denominator": 1.0}
        fused_policy_loss(**(arguments | changed))

    for error_type, match, changed in [
        (TypeError, "float16 is too narrow", {"hidden": case.hidden.half(), "weight": case.weight.half()}),
        (ValueError, r"group \(5,\) must be \[6\]", {"group": case.group[:5]}),
        (ValueError, r"coefficient .* must be \[6\]", {"coefficient": torch.ones(7)}),
        (ValueError, "on one device", {"rewards": case.rewards.to("meta")}),
        (ValueError, "main_grad", {"main_grad": torch.zeros(30, 8, dtype=torch.bfloat16)}),
        (ValueError, "main_grad", {"main_grad": torch.zeros(8, 30)}),
        (ValueError, "clip needs old_logprob", {"options": PolicyLossOptions(clip=(0.1, 0.1))}),
        (ValueError, "denominator", {"denominator": 0.0}),
        (ValueError, "target_term must be", {"target_term": "rounded"}),
        (ValueError, "one row needs", {"workspace_bytes": 10}),
    ]:
        with pytest.raises(error_type, match=match):
            call(**changed)
