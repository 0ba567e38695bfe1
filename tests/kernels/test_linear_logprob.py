"""linear_logprob against float64: accuracy where policies live, edges, memory, work counted, compilers."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from gapg_kernels import reference
from gapg_kernels.chunks import ChunkPlan
from gapg_kernels.linear_logprob import _forward_op, linear_logprob
from gapg_kernels.routes import describe
from tests.kernels.counting import beyond_torch_2_11
from tests.kernels.float64_oracle import ENTROPIES, Inputs, Result, entropy, error, inputs_at, truth

DTYPES = [torch.bfloat16, torch.float32]
ROUNDING = {torch.bfloat16: 3e-3, torch.float32: 1e-5}
"""Relative gradient error from rounding the factors and the result once."""

LogprobFn = Callable[[Tensor, Tensor, Tensor, Tensor | None, float], Tensor]


def fused(workspace: int = 2 << 30) -> LogprobFn:
    def run(hidden: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None, temperature: float) -> Tensor:
        return linear_logprob(
            hidden, weight, target, bias=bias, temperature=temperature, workspace_bytes=workspace
        )  # fmt: skip

    return run


def eager(hidden: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None, temperature: float) -> Tensor:
    logits = F.linear(hidden, weight, bias).float() / temperature
    return logits.log_softmax(-1).gather(1, target[:, None])[:, 0]


def run(fn: LogprobFn, inputs: Inputs) -> Result:
    hidden, weight = inputs.hidden.clone().requires_grad_(), inputs.weight.clone().requires_grad_()
    bias = None if inputs.bias is None else inputs.bias.clone().requires_grad_()
    logprob = fn(hidden, weight, inputs.target, bias, inputs.temperature)
    (logprob * inputs.grad).sum().backward()
    assert hidden.grad is not None and weight.grad is not None
    return Result(logprob.detach(), hidden.grad, weight.grad, None if bias is None else bias.grad)


def assert_same(a: Result, b: Result) -> None:
    for x, y in zip(a, b, strict=True):
        assert (x is None and y is None) or (x is not None and y is not None and torch.equal(x, y))


def test_the_oracle_is_log_softmax_where_that_resolves() -> None:
    inputs = inputs_at(2.0, dtype=torch.float32, bias=True, temperature=0.7)
    double = inputs._replace(
        hidden=inputs.hidden.double(),
        weight=inputs.weight.double(),
        bias=None if inputs.bias is None else inputs.bias.double(),
        grad=inputs.grad.double(),
    )

    def plain(hidden: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None, temperature: float) -> Tensor:
        return (F.linear(hidden, weight, bias) / temperature).log_softmax(-1).gather(1, target[:, None])[:, 0]

    for got, want in zip(run(plain, double), truth(inputs), strict=True):
        assert error(got, want) < 1e-12


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("nats", ENTROPIES)
def test_every_entropy_is_at_least_as_exact_as_eager(nats: float, dtype: torch.dtype) -> None:
    inputs = inputs_at(nats, dtype=dtype, bias=True, temperature=0.7)
    assert abs(entropy(inputs) - nats) < 0.02 * nats + 1e-8
    want, got, peer = truth(inputs), run(fused(), inputs), run(eager, inputs)
    assert (got.logprob - want.logprob).abs().max() < 1e-5
    assert got.logprob.dtype == torch.float32
    for ours, theirs, exact in zip(got[1:], peer[1:], want[1:], strict=True):
        assert error(ours, exact) <= error(theirs, exact)
        assert error(ours, exact) < ROUNDING[dtype]


def test_certain_tokens_keep_a_relative_log_prob() -> None:
    """At 1e-9 nats log p is about -1e-10: absolute closeness would be met by returning 0."""
    inputs = inputs_at(0.0, dtype=torch.bfloat16)
    want, got = truth(inputs), run(fused(), inputs)
    assert error(got.logprob, want.logprob) < 1e-4


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("rows", "width", "vocab", "bias", "temperature"),
    [(1, 16, 114, False, 1.0), (37, 48, 1000, True, 1.3), (300, 24, 257, False, 0.5), (5, 7, 1, True, 1.0)],
)
def test_odd_shapes(
    rows: int, width: int, vocab: int, bias: bool, temperature: float, dtype: torch.dtype
) -> None:  # fmt: skip
    nats = 0.5 if vocab > 1 else 0.0
    inputs = inputs_at(
        nats, rows=rows, width=width, vocab=vocab, bias=bias, temperature=temperature, dtype=dtype
    )  # fmt: skip
    want, got = truth(inputs), run(fused(), inputs)
    assert torch.allclose(got.logprob.double(), want.logprob, atol=1e-5)
    for ours, exact in zip(got[1:], want[1:], strict=True):
        assert (ours is None and exact is None) or error(ours, exact) < ROUNDING[dtype]


def test_no_rows() -> None:
    hidden, weight = torch.empty(0, 8, requires_grad=True), torch.randn(5, 8, requires_grad=True)
    out = linear_logprob(hidden, weight, torch.empty(0, dtype=torch.long))
    out.sum().backward()
    assert out.shape == (0,)
    assert hidden.grad is not None and hidden.grad.shape == (0, 8)
    assert weight.grad is not None and torch.equal(weight.grad, torch.zeros(5, 8))


def test_more_rows_than_a_16_bit_index() -> None:
    g = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(65_537, 8, generator=g), torch.randn(6, 8, generator=g)
    target = torch.randint(0, 6, (65_537,), generator=g)
    want = (hidden @ weight.t()).log_softmax(-1).gather(1, target[:, None])[:, 0]
    assert torch.allclose(linear_logprob(hidden, weight, target, workspace_bytes=100_000), want, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
def test_masked_rows_give_zero_and_no_gradient(dtype: torch.dtype) -> None:
    inputs = inputs_at(2.0, rows=40, vocab=500, bias=True, dtype=dtype)
    target, grad = inputs.target.clone(), inputs.grad.clone()
    target[::3], grad[::3] = -100, float("nan")  # whatever the caller's loss does with a masked row
    got = run(fused(), inputs._replace(target=target, grad=torch.where(target == -100, 1e30, grad)))
    rest = target != -100
    kept = inputs._replace(hidden=inputs.hidden[rest], target=target[rest], grad=grad[rest])
    want = truth(kept)
    assert not got.logprob[~rest].any() and not got.hidden[~rest].any()
    assert torch.allclose(got.logprob[rest].double(), want.logprob, atol=1e-5)
    assert error(got.hidden[rest], want.hidden) < ROUNDING[dtype]
    assert error(got.weight, want.weight) < ROUNDING[dtype]
    assert error(got.bias, want.bias) < ROUNDING[dtype]


@pytest.mark.parametrize("bad", [-1, -99, -101, 500, 2**40])
def test_a_target_out_of_range_is_nan_and_spares_the_others(bad: int) -> None:
    inputs = inputs_at(2.0, rows=8, vocab=500, dtype=torch.bfloat16)
    target = inputs.target.clone()
    target[3] = bad
    got, want = run(fused(), inputs._replace(target=target)), run(fused(), inputs)
    rest = torch.arange(8) != 3
    assert got.logprob[3].isnan() and got.hidden[3].isnan().all()
    assert torch.equal(got.logprob[rest], want.logprob[rest])
    assert torch.equal(got.hidden[rest], want.hidden[rest])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gap", [40, 78, 81, 82, 84, 88, 120, 128, 200, 2_000, 20_000])
def test_targets_far_below_the_rest(gap: int, dtype: torch.dtype) -> None:
    """Logits up to 1e4. Where E would leave float32's range a row is rescaled, and its gradient must not vanish."""
    top = gap / 2
    weight = torch.zeros(300, 16)
    weight[:, 0] = torch.linspace(-1, 1, 300).to(torch.bfloat16)
    weight[:, 1] = torch.linspace(3, -2, 300).to(torch.bfloat16)
    hidden = torch.zeros(4, 16)
    hidden[:, 0] = torch.tensor([top, top, -top, 1.0])
    hidden[:, 1] = torch.tensor([0.0, 1.0, 0.5, 1.0])
    inputs = Inputs(hidden.to(dtype), weight.to(dtype), torch.tensor([0, 0, 299, 7]), torch.tensor([1.0, -1e-4, 3, 2]))
    want, got = truth(inputs), run(fused(), inputs)
    assert torch.allclose(got.logprob.double(), want.logprob, rtol=1e-6, atol=1e-5)
    # One or two tokens carry each row, so roundings do not average out: E, a * h and the result, 2^-9 each.
    tolerance = max(3 * 2**-9 if dtype == torch.bfloat16 else 1e-5, 1e-6 * gap)
    for row in range(4):
        assert error(got.hidden[row], want.hidden[row]) < tolerance
    assert error(got.weight, want.weight) < tolerance


def bytes_for(inputs: Inputs, rows: int, *, grad: bool = True) -> int:
    """The workspace that admits ``rows`` rows at a time and not one more."""
    plan = ChunkPlan.of(inputs.hidden, inputs.weight, 0, kernel=False)
    return rows * (plan.stored + plan.scratch if grad else max(plan.stored, plan.scratch))


@pytest.mark.parametrize("dtype", DTYPES)
def test_kept_and_recomputed_odds_agree(dtype: torch.dtype) -> None:
    inputs = inputs_at(0.35, rows=600, width=32, vocab=700, dtype=dtype, bias=True, temperature=0.8)
    plan = ChunkPlan.of(inputs.hidden, inputs.weight, 0, kernel=False)
    want, kept = truth(inputs), run(fused(), inputs)
    assert plan._replace(workspace=2 << 30).fits(600)
    for rows in (1, 100, 257, 599):
        workspace = bytes_for(inputs, rows)
        assert dtype == torch.bfloat16 or not plan._replace(workspace=workspace).fits(600)
        got = run(fused(workspace), inputs)
        assert torch.allclose(got.logprob, kept.logprob, rtol=1e-6, atol=1e-6)
        for ours, other, exact in zip(got[1:], kept[1:], want[1:], strict=True):
            assert error(ours, exact) < ROUNDING[dtype]
            assert error(ours, other.double() if other is not None else None) < ROUNDING[dtype]


@pytest.mark.parametrize("rows", [1, 255, 256, 257, 5_000, 70_000])
@pytest.mark.parametrize("kernel", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_chunks_cover_the_rows_once_within_the_workspace(rows: int, kernel: bool, dtype: torch.dtype) -> None:
    hidden, weight = torch.empty(rows, 8, dtype=dtype, device="meta"), torch.empty(1000, 8, dtype=dtype, device="meta")
    for megabytes in (0.01, 1, 3, 50, 400):
        plan = ChunkPlan.of(hidden, weight, int(megabytes * 1e6), kernel=kernel)
        for kept, store in [(True, True)] * plan.fits(rows) + [(False, True), (False, False)]:
            chunks = list(plan.chunks(rows, kept=kept, store=store))
            assert chunks[0].start == 0 and chunks[-1].stop == rows
            assert all(a.stop == b.start for a, b in itertools.pairwise(chunks))
            sizes = [c.stop - c.start for c in chunks]
            stored = rows * plan.stored if kept else max(sizes) * plan.stored * store
            assert stored + max(sizes) * plan.scratch <= plan.workspace
            if len(sizes) > 1:
                assert max(sizes) - min(sizes) < 256 * len(sizes)  # no needlessly short last chunk


def test_no_tensor_outgrows_the_workspace() -> None:
    inputs = inputs_at(2.0, rows=512, width=8, vocab=4000, dtype=torch.float32)
    workspace = bytes_for(inputs, 64)
    with torch.profiler.profile(profile_memory=True) as profile:
        run(fused(workspace), inputs)
    largest = max(event.self_cpu_memory_usage for event in profile.events() or [])
    assert 4 * inputs.weight.numel() <= largest <= workspace
    assert workspace * 4 < 4 * 512 * 4000


@pytest.mark.parametrize("workspace", [2 << 30, 100_000])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_same_bits_from_run_to_run(dtype: torch.dtype, workspace: int) -> None:
    inputs = inputs_at(0.35, rows=300, width=32, vocab=700, dtype=dtype, bias=True)
    assert_same(run(fused(workspace), inputs), run(fused(workspace), inputs))


def test_backward_twice_gives_the_same() -> None:
    inputs = inputs_at(0.35, rows=30, width=32, vocab=700, dtype=torch.float32)
    hidden, weight = inputs.hidden.clone().requires_grad_(), inputs.weight.clone().requires_grad_()
    out = (linear_logprob(hidden, weight, inputs.target) * inputs.grad).sum()
    first = torch.autograd.grad(out, (hidden, weight), retain_graph=True)
    second = torch.autograd.grad(out, (hidden, weight))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("workspace", [2 << 30, 20_000])
def test_autocast_rounds_hidden_and_reaches_no_further(workspace: int) -> None:
    """As F.linear has it; the weight is then a master, whose gradient is not rounded."""
    inputs = inputs_at(0.35, rows=30, width=32, vocab=700, dtype=torch.float32, bias=True)
    want = run(fused(workspace), inputs._replace(hidden=inputs.hidden.bfloat16()))
    with torch.autocast("cpu", torch.bfloat16):
        got = run(fused(workspace), inputs)
    assert got.hidden.dtype == torch.float32
    assert_same(got, want._replace(hidden=want.hidden.float()))


@pytest.mark.parametrize("workspace", [2 << 30, 20_000])
def test_a_master_weight_is_rounded_once_and_its_gradient_not_at_all(workspace: int) -> None:
    inputs = inputs_at(0.35, rows=30, width=32, vocab=700, dtype=torch.float32, bias=True)
    inputs = inputs._replace(hidden=inputs.hidden.bfloat16())
    rounded = inputs._replace(weight=inputs.weight.bfloat16())
    master, plain = run(fused(workspace), inputs), run(fused(workspace), rounded)
    assert (master.weight.dtype, master.hidden.dtype) == (torch.float32, torch.bfloat16)
    assert_same(master._replace(weight=master.weight.bfloat16()), plain)
    assert not torch.equal(master.weight, plain.weight.float())


def test_it_says_which_route_a_device_gets() -> None:
    assert "plain PyTorch" in describe("cpu") and "cpu" in describe(torch.device("cpu"))


@pytest.mark.parametrize("frozen", ["hidden", "weight"])
def test_frozen_inputs_get_no_gradient_and_change_nothing_else(frozen: str) -> None:
    inputs = inputs_at(2.0, rows=30, width=32, vocab=700)
    full = run(fused(), inputs)
    tensors = {"hidden": inputs.hidden.clone(), "weight": inputs.weight.clone()}
    trained = next(name for name in tensors if name != frozen)
    tensors[trained].requires_grad_()
    (linear_logprob(tensors["hidden"], tensors["weight"], inputs.target) * inputs.grad).sum().backward()
    assert tensors[frozen].grad is None
    got = tensors[trained].grad
    assert got is not None and torch.equal(got, getattr(full, trained))


def test_a_target_out_of_range_is_nan_in_a_vocabulary_of_one() -> None:
    hidden, weight = torch.randn(3, 8, requires_grad=True), torch.randn(1, 8)
    out = linear_logprob(hidden, weight, torch.tensor([0, 1, -100]))
    out.sum().backward()
    assert hidden.grad is not None
    assert out.isnan().tolist() == [False, True, False] == hidden.grad.isnan().all(1).tolist()


T, H, V = 1024, 64, 5000
THV = T * H * V


@pytest.mark.parametrize(
    ("workspace", "trained", "flops"),
    [
        (2 << 30, "hidden weight", 6 * THV),
        (10 << 20, "hidden weight", 8 * THV),
        (2 << 30, "hidden", 4 * THV),
        (10 << 20, "hidden", 6 * THV),
        (2 << 30, "weight", 4 * THV),
        (2 << 30, "", 2 * THV),
    ],
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_work_and_shapes_on_the_meta_device(workspace: int, trained: str, flops: int, dtype: torch.dtype) -> None:
    hidden = torch.empty(T, H, dtype=dtype, device="meta", requires_grad="hidden" in trained)
    weight = torch.empty(V, H, dtype=dtype, device="meta", requires_grad="weight" in trained)
    target = torch.empty(T, dtype=torch.long, device="meta")
    with FlopCounterMode(display=False) as counter:
        out = linear_logprob(hidden, weight, target, workspace_bytes=workspace)
        if trained:
            out.sum().backward()
    assert (out.shape, out.dtype, out.device.type) == ((T,), torch.float32, "meta")
    assert counter.get_total_flops() == flops
    for name, tensor in (("hidden", hidden), ("weight", weight)):
        assert (tensor.grad is not None) == (name in trained)
        assert tensor.grad is None or (tensor.grad.shape, tensor.grad.dtype) == (tensor.shape, dtype)


@beyond_torch_2_11
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_cuda_branches_run_on_the_meta_device(dtype: torch.dtype) -> None:
    """The operator's fake stops at its border; this checks every op inside, as a GPU without the kernel runs them."""
    hidden, weight = torch.empty(T, H, dtype=dtype, device="meta"), torch.empty(V, H, dtype=dtype, device="meta")
    bias, target = torch.empty(V, device="meta"), torch.empty(T, dtype=torch.long, device="meta")
    e = torch.empty(T, V + 24, dtype=dtype, device="meta")[:, :V]
    logprob, odds, unit, *_ = reference.plain_odds(hidden, weight, bias, target, 0.7, e)
    scales = reference.row_scales(logprob, odds, unit, target, 0.7)
    index, _ = reference.safe_targets(target, V)
    assert reference.hidden_gradient(e, weight, index, scales, dtype).shape == (T, H)
    weight_sum = bias_sum = None
    for _ in range(2):
        weight_sum = reference.add_weight_gradient(weight_sum, e, hidden, index, scales)
        bias_sum = reference.add_bias_gradient(bias_sum, e, index, scales)
        assert (weight_sum.shape, weight_sum.dtype) == ((V, H), torch.float32)
        assert (bias_sum.shape, bias_sum.dtype) == ((V,), torch.float32)


@pytest.mark.parametrize("workspace", [2 << 30, 100_000])
def test_compiles_into_one_graph(workspace: int) -> None:
    inputs = inputs_at(0.35, rows=300, width=32, vocab=700, dtype=torch.float32, bias=True)
    compiled = torch.compile(fused(workspace), fullgraph=True, backend="aot_eager")
    assert_same(run(compiled, inputs), run(fused(workspace), inputs))


@pytest.mark.parametrize("keep", [True, False])
def test_the_registered_operator_is_sound(keep: bool) -> None:
    inputs = inputs_at(2.0, rows=6, width=8, vocab=30, dtype=torch.float32, bias=True)
    hidden, weight = inputs.hidden.clone().requires_grad_(), inputs.weight.clone().requires_grad_()
    for softcap, asked in ((None, True), (None, False), (2.0, False)):
        torch.library.opcheck(
            _forward_op, (hidden, weight, inputs.target, inputs.bias, 0.7, softcap, 1 << 20, keep, asked)
        )


def test_what_it_refuses() -> None:
    h, w, y = torch.zeros(3, 4), torch.zeros(5, 4), torch.zeros(3, dtype=torch.long)
    with pytest.raises(TypeError, match="pass bfloat16 or float32"):
        linear_logprob(h.half(), w.half(), y)
    with pytest.raises(TypeError, match="must both be"):
        linear_logprob(h, w.bfloat16(), y)
    with pytest.raises(TypeError, match="int64"):
        linear_logprob(h, w, y.float())
    with pytest.raises(TypeError, match="bias"):
        linear_logprob(h, w, y, bias=torch.zeros(5, dtype=torch.float64))
    with pytest.raises(ValueError, match="must be"):
        linear_logprob(h, w[:, :3], y)
    with pytest.raises(ValueError, match="target"):
        linear_logprob(h, w, y[:2])
    with pytest.raises(ValueError, match="bias must be"):
        linear_logprob(h, w, y, bias=torch.zeros(4))
    with pytest.raises(ValueError, match="temperature"):
        linear_logprob(h, w, y, temperature=0.0)
    with pytest.raises(ValueError, match="one row needs 20 bytes"):
        linear_logprob(h, w, y, workspace_bytes=19)
