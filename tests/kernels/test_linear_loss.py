"""linear_loss: chunks and cuts, main_grad, compilers, other tensors' gradients, and what it refuses."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from gapg_kernels.chunks import ChunkPlan
from gapg_kernels.linear_logprob import linear_logprob
from gapg_kernels.linear_loss import LinearLoss, linear_loss
from tests.kernels.float64_oracle import error, inputs_at, truth

V, H = 31, 6


def clipped(logprob: Tensor, old: Tensor, advantage: Tensor) -> Tensor:
    """No sum of independent rows' coefficients: the ratio is clipped and has a gradient of its own."""
    ratio = (logprob - old).exp()
    return -torch.min(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage).sum()


def batch(rows: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> dict[str, Any]:
    """Arguments of a call, with masked rows among them."""
    g = torch.Generator().manual_seed(seed)
    target = torch.randint(V, (rows,), generator=g)
    target[torch.rand(rows, generator=g) < 0.1] = -100
    return {
        "hidden": torch.randn(rows, H, generator=g).to(dtype).requires_grad_(),
        "weight": torch.randn(V, H, generator=g).to(dtype).requires_grad_(),
        "target": target,
        "loss": clipped,
        "rows": {"old": torch.randn(rows, generator=g) - 3, "advantage": torch.randn(rows, generator=g)},
    }


def gradients(call: dict[str, Any], **changed: Any) -> tuple[LinearLoss, Tensor, Tensor]:
    out = linear_loss(**call | changed)
    return out, *torch.autograd.grad(out.loss, [call["hidden"], call["weight"]])


@pytest.mark.parametrize("rows", [0, 1, 50])
def test_it_is_the_loss_of_linear_logprob(rows: int) -> None:
    call = batch(rows)
    logprob = linear_logprob(call["hidden"], call["weight"], call["target"])
    want = clipped(logprob, **call["rows"])
    for room in (2 << 30, V * 4 * 8):
        out, *got = gradients(call, workspace_bytes=room)
        assert not out.logprob.requires_grad and torch.allclose(out.logprob, logprob.detach(), rtol=1e-5, atol=1e-6)
        assert torch.allclose(out.loss, want, rtol=1e-5) and out.entropy is None and out.log_odds is None
        exact = torch.autograd.grad(want, [call["hidden"], call["weight"]], retain_graph=True)
        for a, b in zip(got, exact, strict=True):
            assert torch.allclose(a, b, rtol=1e-4, atol=1e-6)


def test_a_vocabulary_of_one() -> None:
    call = batch(4) | {"weight": torch.randn(1, H, requires_grad=True), "target": torch.tensor([0, 0, -100, 1])}
    out, hidden, _ = gradients(call)
    assert out.logprob.isnan().tolist() == [False, False, False, True] == hidden.isnan().any(1).tolist()
    assert not out.logprob[:3].any() and not hidden[:3].any()


@given(
    lengths=st.lists(st.integers(0, 9), max_size=12), room=st.integers(1, 60), softly=st.booleans(),
    seed=st.integers(0, 99),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_any_cuts_and_any_workspace_give_the_loss_of_one_chunk(
    lengths: list[int], room: int, softly: bool, seed: int
) -> None:
    cuts = [0, *torch.tensor(lengths, dtype=torch.long).cumsum(0).tolist()]
    call, seen = batch(cuts[-1], torch.float64, seed), []
    target, value = call["target"], torch.arange(cuts[-1]).double()

    def loss(logprob: Tensor, value: Tensor, cuts: Tensor) -> Tensor:
        assert cuts[0] == 0 and cuts[-1] == len(logprob) == len(value)
        seen.append((int(value[0]), cuts.tolist()))
        per = torch.segment_reduce(logprob, "sum", offsets=cuts)
        return (per**2).sum() + len(per)  # each sequence counts, an empty one too

    each = V * 8 * (2 if softly else 1)
    options = {"loss": loss, "rows": {"value": value}, "cuts": cuts, "softcap": 3.0 if softly else None}
    whole, *want = gradients(call, **options)
    once, seen = len(seen), []
    most = max(room, *lengths, 1)
    out, *got = gradients(call, **options, workspace_bytes=most * each)
    assert once == (cuts[-1] > 0)
    assert out.loss.item() == pytest.approx(whole.loss.item(), rel=1e-12)
    for a, b in zip(got, want, strict=True):
        assert torch.allclose(a, b, rtol=1e-9, atol=1e-12)
    if cuts[-1]:
        found = [(start + a, start + b) for start, inner in seen for a, b in pairwise(inner)]
        assert found == list(pairwise(cuts))  # every sequence once, in order
        assert len(seen) == fewest(cuts, most)
    assert (out.logprob == 0)[target == -100].all()


def fewest(cuts: list[int], most: int) -> int:
    """Chunks of at most so many rows that end at cuts: as long as each can be."""
    count, start, end = 0, 0, 0
    for at in cuts:
        if at - start > most:
            count, start = count + 1, end
        end = at
    return count + (end > start)


def test_whole_sequences_of_much_the_same_length_make_chunks_of_much_the_same_length() -> None:
    plan = ChunkPlan.of(torch.empty(0, 8), torch.empty(100, 8), 4 * 100 * 1000, kernel=False)
    sizes = [p.stop - p.start for p in plan.chunks(2100, kept=False, store=True, cuts=list(range(0, 2101, 70)))]
    assert sizes == [700, 700, 700]


def test_main_grad_takes_the_weights_gradient_unrounded_over_calls() -> None:
    inputs = inputs_at(2.0, rows=200, width=32, vocab=500)
    want, main_grad = truth(inputs), torch.zeros(500, 32)
    for part in (slice(0, 70), slice(70, 71), slice(71, 200)):
        hidden, weight = inputs.hidden[part].clone().requires_grad_(), inputs.weight.clone().requires_grad_()
        out = linear_loss(
            hidden, weight, inputs.target[part], lambda logprob, c: (c * logprob).sum(),
            rows={"c": inputs.grad[part]}, main_grad=main_grad,
        )  # fmt: skip
        out.loss.backward()
        assert weight.grad is None and hidden.grad is not None and error(hidden.grad, want.hidden[part]) < 3e-3
    assert error(main_grad, want.weight) < 1.5e-3


def test_with_main_grad_only_a_gradient_of_one_may_arrive() -> None:
    call = batch(8)
    hidden = call["hidden"]
    (2 * linear_loss(**call, main_grad=torch.zeros(V, H)).loss).backward()
    assert hidden.grad.isnan().all()
    first = torch.autograd.grad(2 * linear_loss(**call).loss, hidden)[0]
    assert torch.allclose(first, 2 * torch.autograd.grad(linear_loss(**call).loss, hidden)[0], rtol=1e-6)


def test_without_gradients_it_only_looks() -> None:
    call, main_grad = batch(20), torch.zeros(V, H)
    want = linear_loss(**call)
    with torch.no_grad():
        out = linear_loss(**call, main_grad=main_grad)
    assert torch.equal(out.loss, want.loss.detach()) and not out.loss.requires_grad and not main_grad.any()
    frozen = linear_loss(**call | {x: call[x].detach() for x in ("hidden", "weight")})
    assert torch.equal(frozen.loss, want.loss.detach()) and not frozen.loss.requires_grad


@pytest.mark.parametrize("frozen", ["hidden", "weight"])
def test_a_frozen_input_gets_no_gradient_and_changes_nothing_else(frozen: str) -> None:
    call = batch(20)
    other = {"hidden": "weight", "weight": "hidden"}[frozen]
    _, *both = gradients(call)
    linear_loss(**call | {frozen: call[frozen].detach()}).loss.backward()
    assert call[frozen].grad is None and torch.equal(call[other].grad, both[other == "weight"])


def test_a_master_weight_and_autocast() -> None:
    """Rounded once inside; its gradient is not. Under autocast hidden is rounded, as for F.linear."""
    call = batch(20)
    low = call | {"hidden": call["hidden"].detach().bfloat16().requires_grad_()}
    rounded = low | {"weight": call["weight"].detach().bfloat16().requires_grad_()}
    out, hidden, weight = gradients(low)
    plain, plain_hidden, plain_weight = gradients(rounded)
    assert torch.equal(out.logprob, plain.logprob) and torch.equal(hidden, plain_hidden)
    assert weight.dtype == torch.float32 and torch.equal(weight.bfloat16(), plain_weight)
    assert not torch.equal(weight, plain_weight.float())
    with torch.autocast("cpu", torch.bfloat16):
        auto, auto_hidden, auto_weight = gradients(call)
    assert torch.equal(auto.loss, out.loss) and torch.equal(auto_weight, weight)
    assert auto_hidden.dtype == torch.float32 and torch.equal(auto_hidden, hidden.float())


def test_the_same_bits_from_run_to_run() -> None:
    call = batch(50)
    first, second = (gradients(call, workspace_bytes=V * 4 * 8) for _ in range(2))
    assert torch.equal(first[0].loss, second[0].loss)
    assert torch.equal(first[1], second[1]) and torch.equal(first[2], second[2])


def test_the_loss_may_be_compiled_and_linear_loss_may_not() -> None:
    call = batch(20)
    _, *want = gradients(call)
    _, *got = gradients(call, loss=torch.compile(clipped, backend="aot_eager", fullgraph=True), workspace_bytes=V * 32)
    for a, b in zip(got, want, strict=True):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-7)

    def step(hidden: Tensor, weight: Tensor) -> Tensor:
        return linear_loss(**call | {"hidden": hidden * 2, "weight": weight}).loss

    with pytest.raises(Exception, match="linear_loss: it cannot be part of a graph; compile the loss, or call it"):
        torch.compile(step, backend="aot_eager", fullgraph=True)(call["hidden"], call["weight"])
    leaf = [call[x] for x in ("hidden", "weight")]
    broken = torch.autograd.grad(torch.compile(step, backend="aot_eager")(*leaf), leaf)  # the graph breaks around it
    for a, b in zip(broken, torch.autograd.grad(step(*leaf), leaf), strict=True):
        assert torch.equal(a, b)


def test_a_loss_keeps_its_statistics_itself() -> None:
    call, kept = batch(50), list[Tensor]()

    def loss(logprob: Tensor, old: Tensor, advantage: Tensor) -> Tensor:
        kept.append((logprob - old).detach().exp().amax())
        return clipped(logprob, old, advantage)

    out, *_ = gradients(call, loss=loss, workspace_bytes=V * 4 * 20)
    assert len(kept) == 3
    assert torch.stack(kept).amax().item() == pytest.approx((out.logprob - call["rows"]["old"]).exp().amax().item())


def test_a_loss_may_change_what_it_is_given_in_place() -> None:
    call = batch(20) | {"rows": {}, "entropy": True}
    _, *want = gradients(call, loss=lambda logprob, entropy: (logprob.clamp(min=-3) + entropy * 2).sum())
    _, *got = gradients(call, loss=lambda logprob, entropy: logprob.clamp_(min=-3).add_(entropy.mul_(2)).sum())
    assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])


def test_a_second_derivative_is_refused() -> None:
    call = batch(8)
    (grad,) = torch.autograd.grad(linear_loss(**call).loss ** 2, call["hidden"], create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        grad.sum().backward()


CRITIC = nn.Linear(3, 1)


@pytest.mark.parametrize(
    ("kind", "message", "changed"),
    [
        (ValueError, r"cuts must ascend from 0 to 8, the number of rows, not \[0, 5\]", {"cuts": [0, 5]}),
        (ValueError, r"cuts must ascend from 0 to 8, .* not \[1, 8\]", {"cuts": [1, 8]}),
        (ValueError, r"cuts must ascend from 0 to 8, .* not \[0, 6, 3, 8\]", {"cuts": [0, 6, 3, 8]}),
        (ValueError, r"cuts must ascend from 0 to 8, .* not \[\]", {"cuts": []}),
        (TypeError, r"cuts must be host integers, such as", {"cuts": torch.tensor([0, 8])}),
        (TypeError, r"cuts must be host integers, such as", {"cuts": [0, 2.5, 8]}),
        (TypeError, r"rows\['old'\] is list; pass a tensor of 8 rows", {"rows": {"old": [0.0] * 8}}),
        (ValueError, r"rows\['old'\] \(7,\) must be \[8, ...\]", {"rows": {"old": torch.zeros(7)}}),
        (ValueError, r"rows\['old'\] \(\) must be \[8, ...\]", {"rows": {"old": torch.tensor(1.0)}}),
        (ValueError, r"rows\['old'\] is on meta; move it to cpu", {"rows": {"old": torch.zeros(8, device="meta")}}),
        (
            ValueError,
            r"requires a gradient, .* pass its detach\(\)",
            {"rows": {"old": torch.zeros(8).requires_grad_()}},
        ),
        (
            ValueError,
            r"rows\['entropy'\] has the name of what the loss is given",
            {"rows": {"entropy": torch.zeros(8)}},
        ),
        (
            ValueError,
            r"depends on another tensor that requires a gradient, \(1, 3\), .* pass its detach\(\)",
            {"loss": lambda logprob, **_: (logprob * CRITIC(torch.ones(3))).sum()},
        ),
        (
            ValueError,
            r"depends on another tensor that requires a gradient, \(1, 3\)",
            {"loss": torch.compile(lambda logprob, **_: (logprob * CRITIC.weight.sum()).sum(), backend="aot_eager")},
        ),
        (TypeError, r"loss returned a tensor of shape \(8,\); return the chunk's sum", {"loss": lambda lp, **_: lp}),
        (
            TypeError,
            r"linear_loss: the loss is called as loss\(logprob, old\): missing a required argument: 'advantage'",
            {"rows": {"old": torch.zeros(8)}},
        ),
        (TypeError, r"called as loss\(.*, entropy\): got an unexpected keyword argument 'entropy'", {"entropy": True}),
        (TypeError, r"loss returned float; return the chunk's sum", {"loss": lambda lp, **_: lp.sum().item()}),
        (TypeError, r"loss returned NoneType", {"loss": lambda lp, **_: None}),
        (ValueError, r"the loss has no graph; make it of the log-probs", {"loss": lambda lp, **_: lp.detach().sum()}),
        (ValueError, r"softcap must be positive and finite", {"softcap": 0.0}),
        (ValueError, r"temperature must be positive", {"temperature": 0.0}),
        (ValueError, r"one row needs 124 bytes, workspace_bytes is 123", {"workspace_bytes": 123}),
        (
            ValueError,
            r"5 rows between two cuts need 620 bytes, workspace_bytes is 619; pass more, or cuts that are closer",
            {"workspace_bytes": 619, "cuts": [0, 2, 7, 8]},
        ),
        (ValueError, r"main_grad .* must be contiguous \(31, 6\) torch.float32", {"main_grad": torch.zeros(6, 31)}),
        (TypeError, r"linear_loss: float16 is too narrow", {"hidden": torch.zeros(8, H).half()}),
        (TypeError, r"linear_loss: weight is a Linear; pass a tensor, such as lm_head.weight", {"weight": CRITIC}),
        (ValueError, r"target is on meta; move it to cpu", {"target": torch.zeros(8, dtype=torch.long, device="meta")}),
        (ValueError, r"main_grad .* on meta must be .* on cpu", {"main_grad": torch.zeros(V, H, device="meta")}),
        (TypeError, r"bias is torch.bfloat16; pass torch.float32$", {"bias": torch.zeros(V).bfloat16()}),
    ],
)
def test_what_it_refuses_in_one_line(kind: type[Exception], message: str, changed: dict[str, Any]) -> None:
    call = batch(8) | changed
    with pytest.raises(kind, match=message) as raised:
        linear_loss(**call)
    assert "\n" not in str(raised.value)
