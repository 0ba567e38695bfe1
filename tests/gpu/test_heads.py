"""The fused heads on a card, and every tile of their GEMM: accuracy, range, long batches, repeatability, no waiting."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from gapg_kernels import reference, routes
from gapg_kernels.chunks import pitch
from gapg_kernels.cublas_odds import cublas_odds
from gapg_kernels.fused_policy_loss import fused_policy_loss
from gapg_kernels.linear_logprob import linear_logprob
from gapg_kernels.odds_gemm import fused_odds
from gapg_kernels.policy_loss import rows_with_advantage
from gapg_kernels.reference import RowOdds
from gapg_kernels.tiles import HOPPER, TILES
from tests.kernels.float64_capped import capped_truth
from tests.kernels.float64_entropy import entropies, gaps
from tests.kernels.float64_oracle import ENTROPIES, Inputs, Result, error, inputs_at, truth

DEVICE = "cuda"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
DTYPES = [torch.bfloat16, torch.float32]
CARD = TILES.get(torch.cuda.get_device_capability(), {}) if torch.cuda.is_available() else HOPPER
"""The tiles of this card; collected without one, those of an H100."""
HEADS = ["linear_logprob", "fused", "patched", "main_grad"]
WINNER = torch.tensor([[1.0, 0.0]])
"""One group of two whose first response has the advantage +1."""


def on_device(inputs: Inputs) -> Inputs:
    return Inputs(*(x.to(DEVICE) if isinstance(x, Tensor) else x for x in inputs))


def run(name: str, inputs: Inputs, **options: Any) -> Result:
    """Log-probs and the gradients of sum_t grad_t logprob_t, on the CPU."""
    x = on_device(inputs)
    leaves = [t.clone().requires_grad_() for t in (x.hidden, x.weight, x.bias) if t is not None]
    hidden, weight, bias = (*leaves, None)[:3]
    common: dict[str, Any] = {"bias": bias, "temperature": x.temperature}
    total = None
    if name == "linear_logprob":
        logprob = linear_logprob(hidden, weight, x.target, **common, **options)
        (logprob * x.grad).sum().backward()
    else:
        if name == "main_grad":
            weight.requires_grad_(False)
            total = torch.zeros_like(weight, dtype=torch.float32)
        row = torch.zeros(len(x.target), dtype=torch.long)
        found = fused_policy_loss(
            hidden, weight, x.target, WINNER, row, row, denominator=1.0, coefficient=-x.grad, main_grad=total,
            target_term="patched" if name == "patched" else "exact", **common, **options,
        )  # fmt: skip
        found.loss.backward()
        logprob = found.logprob
    grads = [hidden.grad, weight.grad if total is None else total, None if bias is None else bias.grad]
    return Result(logprob.detach().cpu(), *(None if g is None else g.cpu() for g in grads))  # type: ignore[arg-type]


def eager(inputs: Inputs) -> Result:
    x = on_device(inputs)
    hidden, weight = x.hidden.clone().requires_grad_(), x.weight.clone().requires_grad_()
    bias = None if x.bias is None else x.bias.clone().requires_grad_()
    logits = F.linear(hidden, weight, bias).float() / x.temperature
    logprob = logits.log_softmax(-1).gather(1, x.target[:, None])[:, 0]
    (logprob * x.grad).sum().backward()
    assert hidden.grad is not None and weight.grad is not None
    bias_grad = None if bias is None else bias.grad.cpu()  # type: ignore[union-attr]
    return Result(logprob.detach().cpu(), hidden.grad.cpu(), weight.grad.cpu(), bias_grad)


def logprob_tolerance(inputs: Inputs) -> float:
    """1e-3, or 8 units in the last place of the largest logit where that is more."""
    logits = F.linear(inputs.hidden.double(), inputs.weight.double()) / inputs.temperature
    return max(1e-3, 8 * 2**-23 * logits.abs().max().item())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("nats", ENTROPIES)
@pytest.mark.parametrize("name", HEADS)
def test_every_entropy_is_at_least_as_exact_as_eager(name: str, nats: float, dtype: torch.dtype) -> None:
    inputs = inputs_at(nats, rows=300, width=128, vocab=5003, dtype=dtype, bias=True, temperature=0.7)
    want, peer, got = truth(inputs), eager(inputs), run(name, inputs)
    assert (got.logprob - want.logprob).abs().max() <= logprob_tolerance(inputs)
    rounding = 3 * 2**-9 if dtype == torch.bfloat16 else 2e-5
    for ours, theirs, exact in zip(got[1:], peer[1:], want[1:], strict=True):
        assert error(ours, exact) < rounding
        if name != "patched":  # its target is rounded like E, so that at high entropy it is as good as eager only
            assert error(ours, exact) <= max(1.02 * error(theirs, exact), 1e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", HEADS)
def test_targets_far_below_the_rest(name: str, dtype: torch.dtype) -> None:
    """On both sides of the repair, and far beyond the range of exp."""
    gaps = torch.tensor([60.0, 81.0, 83.0, 125.0, 127.0, 1000.0])
    weight = torch.zeros(300, 16)
    weight[:, 0], weight[:, 1] = torch.linspace(-1, 1, 300), torch.linspace(3, -2, 300)
    hidden = torch.zeros(6, 16)
    hidden[:, 0], hidden[:, 1] = gaps / 2, torch.linspace(-0.5, 0.5, 6)
    grad = torch.linspace(0.5, 2, 6)
    inputs = Inputs(hidden.to(dtype), weight.to(dtype), torch.zeros(6, dtype=torch.long), grad)
    want, got = truth(inputs), run(name, inputs)
    torch.testing.assert_close(got.logprob.double(), want.logprob, rtol=1e-5, atol=1e-4)
    assert got.logprob.min() < -990
    for row in range(6):  # each by itself: the norm of all would hide a row whose gradient has vanished
        assert error(got.hidden[row], want.hidden[row]) < 3 * 2**-9
    assert error(got.weight, want.weight) < 3 * 2**-9
    with torch.no_grad():  # the kernel that stores no E
        x = on_device(inputs)
        alone = linear_logprob(x.hidden, x.weight, x.target).cpu()
    torch.testing.assert_close(alone.double(), want.logprob, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("tokens", [65_537, 66_000])
def test_more_rows_than_a_grid_dimension_holds(tokens: int) -> None:
    g = torch.Generator(DEVICE).manual_seed(0)
    hidden = torch.randn(tokens, 16, generator=g, device=DEVICE).bfloat16()
    weight = torch.randn(1000, 16, generator=g, device=DEVICE).bfloat16()
    target = torch.randint(0, 1000, (tokens,), generator=g, device=DEVICE)
    grad = torch.randn(tokens, generator=g, device=DEVICE)
    logits = hidden.double() @ weight.double().t()
    want = logits.log_softmax(-1)
    d = -want.exp()
    d[torch.arange(tokens, device=DEVICE), target] += 1
    d *= grad[:, None]
    for name in ("linear_logprob", "fused"):
        got = run(name, Inputs(hidden, weight, target, grad))
        assert (got.logprob - want.gather(1, target[:, None])[:, 0].cpu()).abs().max() < 1e-3
        assert error(got.hidden[-600:], (d[-600:] @ weight.double()).cpu()) < 3 * 2**-9  # the last rows by themselves
        assert error(got.hidden, (d @ weight.double()).cpu()) < 3 * 2**-9
        assert error(got.weight, (d.t() @ hidden.double()).cpu()) < 3 * 2**-9


@pytest.mark.parametrize("vocab", [1, 114, 255, 257, 32_003])
def test_vocabularies_that_are_no_multiple_of_a_tile(vocab: int) -> None:
    """Every logit is -30: a tail of V that read as logit 0 would carry nearly all of the probability."""
    g = torch.Generator().manual_seed(0)
    bias = torch.full((vocab,), -30.0).bfloat16()
    target = torch.randint(0, vocab, (70,), generator=g)
    inputs = Inputs(
        torch.randn(70, 64, generator=g).bfloat16(), 0.3 * torch.randn(vocab, 64, generator=g).bfloat16(), target,
        torch.randn(70, generator=g), bias,
    )  # fmt: skip
    want = truth(inputs)
    for name in HEADS:
        got = run(name, inputs)
        assert (got.logprob - want.logprob).abs().max() < 1e-3
        if vocab > 1:
            assert error(got.hidden, want.hidden) < 3 * 2**-9 and error(got.weight, want.weight) < 3 * 2**-9


def test_masked_rows_are_zero_and_wrong_targets_nan() -> None:
    inputs = inputs_at(2.0, rows=64, width=64, vocab=500)
    target = torch.cat([inputs.target[:60], torch.tensor([-100, -100, 500, -1])])
    for name in ("linear_logprob", "fused"):
        got = run(name, inputs._replace(target=target))
        assert got.logprob[:60].isfinite().all() and got.logprob[62:].isnan().all()
        assert (got.logprob[60:62] == 0).all() and (got.hidden[60:62] == 0).all()
        assert got.hidden[62:].isnan().any(1).all()


@pytest.mark.parametrize("name", HEADS)
def test_small_workspaces_give_the_same(name: str) -> None:
    inputs = inputs_at(2.0, rows=700, width=64, vocab=1500)
    want = truth(inputs)
    for mib in (1, 3):
        got = run(name, inputs, workspace_bytes=mib << 20)
        assert (got.logprob - want.logprob).abs().max() < 1e-3
        assert error(got.hidden, want.hidden) < 3 * 2**-9 and error(got.weight, want.weight) < 3 * 2**-9


@pytest.mark.parametrize("rows", [1, 100, 129, 256, 257])
def test_a_rows_logprob_does_not_depend_on_its_batch(rows: int) -> None:
    x = on_device(inputs_at(2.0, rows=537, width=128, vocab=5003))
    if not routes.uses_kernel(x.hidden):
        pytest.skip("the fused GEMM has no tiles for this card")
    with torch.no_grad():
        everything = linear_logprob(x.hidden, x.weight, x.target)
        part = linear_logprob(x.hidden[-rows:].contiguous(), x.weight, x.target[-rows:])
    assert torch.equal(everything[-rows:], part)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", HEADS)
def test_every_run_gives_the_same_bits(name: str, dtype: torch.dtype) -> None:
    inputs = inputs_at(0.35, rows=537, width=128, vocab=5003, dtype=dtype, bias=True)
    inputs = inputs._replace(target=inputs.target % 7)  # many rows add to one row of dW
    first = run(name, inputs)
    for _ in range(5):
        again = run(name, inputs)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True) if a is not None and b is not None)


def by_tile(
    x: Inputs, name: str, store: bool, entropy: bool = False, softcap: float | None = None
) -> tuple[RowOdds, Tensor | None]:
    """The fused GEMM with this tile, or "cuBLAS" and its pass; and E with its padding, all of which holds 7 before the
    call; None: not stored."""
    if name in CARD and not routes.uses_kernel(x.hidden):
        pytest.skip("the fused GEMM has no tiles for this card")
    vocab = x.weight.shape[0]
    e = x.hidden.new_full((x.hidden.shape[0], pitch(vocab, x.hidden.dtype)), 7.0) if store else None
    view = None if e is None else e[:, :vocab]
    forward = cublas_odds if name == "cuBLAS" else functools.partial(fused_odds, tile=CARD[name])
    return forward(x.hidden, x.weight, x.bias, x.target, x.temperature, view, entropy, softcap), e


@pytest.mark.parametrize("nats", ENTROPIES)
def test_every_tile_against_float64(nats: float) -> None:
    inputs = inputs_at(nats, rows=300, width=128, vocab=5003, bias=True, temperature=0.7)
    x, want, tolerance = on_device(inputs), truth(inputs), logprob_tolerance(inputs)
    index = x.target
    for tile in CARD:
        alone, _ = by_tile(x, tile, store=False, entropy=True)
        rows, e = by_tile(x, tile, store=True, entropy=True)
        assert e is not None and (e[:, 5003:] == 7.0).all(), tile
        for found in (alone, rows):
            assert found.entropy is not None
            assert (found.logprob.cpu() - want.logprob).abs().max() <= tolerance, tile
            wrong = (found.entropy.cpu() - entropies(inputs)).abs()
            assert (wrong <= tolerance + 1e-6 * (1 + gaps(inputs))).all(), tile
        scales = reference.row_scales(x.grad, rows.odds, rows.unit, x.target, x.temperature)
        hidden = reference.hidden_gradient(e[:, :5003], x.weight, index, scales, torch.bfloat16)
        weight = reference.add_weight_gradient(None, e[:, :5003], x.hidden, index, scales)
        assert error(hidden.cpu(), want.hidden) < 3 * 2**-9 and error(weight.cpu(), want.weight) < 3 * 2**-9, tile


@pytest.mark.parametrize("cap", [30.0, 3.0])
@pytest.mark.parametrize("nats", ENTROPIES)
def test_a_softcap_with_every_tile_against_float64(nats: float, cap: float) -> None:
    inputs = inputs_at(nats, rows=300, width=128, vocab=5003, bias=True, temperature=0.7)
    x, want, index = on_device(inputs), capped_truth(inputs, cap), inputs.target.to(DEVICE)
    for tile in CARD:
        rows, e = by_tile(x, tile, store=True, entropy=True, softcap=cap)
        assert e is not None and rows.entropy is not None and rows.slope is not None
        assert (rows.logprob.cpu() - want.logprob).abs().max() <= 1e-3, tile
        assert ((rows.entropy.cpu() - want.entropy).abs() <= 1e-3 + 1e-6 * (1 + want.gap)).all(), tile
        scales = reference.row_scales(x.grad, rows.odds, rows.unit, index, x.temperature, rows.slope)
        hidden = reference.hidden_gradient(e[:, :5003], x.weight, index, scales, torch.bfloat16)
        assert error(hidden.cpu(), want.hidden) < 3 * 2**-9, tile


@pytest.mark.parametrize("cap", [None, 30.0])
@pytest.mark.parametrize("nats", ENTROPIES)
def test_a_chunk_with_most_targets_far_below_the_rest(nats: float, cap: float | None) -> None:
    """The repair's two products, of several tiles of rows and several spans of columns, by every forward."""
    near, vocab, target = 20, 5003, torch.full((200,), 7)
    inputs = inputs_at(nats, rows=200, width=128, vocab=vocab, temperature=0.3)
    target[:near] = torch.where(inputs.target[:near] == 7, 8, inputs.target[:near])
    inputs = inputs._replace(target=target, bias=torch.zeros(vocab).index_fill_(0, target[-1:], -1e4))
    x, want, tolerance = on_device(inputs), capped_truth(inputs, cap), logprob_tolerance(inputs)
    for name in (*CARD, "cuBLAS"):
        (alone, _), (rows, e) = (by_tile(x, name, store, entropy=True, softcap=cap) for store in (False, True))
        assert e is not None and rows.entropy is not None and (e[:, vocab:] == 7.0).all(), name
        assert torch.equal(rows.unit.cpu() != reference.UNIT, target == 7), name
        assert torch.equal(alone.logprob[near:], rows.logprob[near:]), name
        torch.testing.assert_close(rows.logprob.double().cpu(), want.logprob, rtol=1e-5, atol=tolerance)
        wrong = (rows.entropy.cpu() - want.entropy).abs()
        assert (wrong <= tolerance + 1e-6 * (1 + want.gap * (target != 7))).all(), name
        scales = reference.row_scales(x.grad, rows.odds, rows.unit, x.target, x.temperature, rows.slope)
        hidden = reference.hidden_gradient(e[:, :vocab], x.weight, x.target, scales, torch.float32)
        weight = reference.add_weight_gradient(None, e[:, :vocab], x.hidden, x.target, scales)
        for row in range(near, 200, 30):
            assert error(hidden[row].cpu(), want.hidden[row]) < 3 * 2**-9, name
        assert error(hidden.cpu(), want.hidden) < 3 * 2**-9 and error(weight.cpu(), want.weight) < 3 * 2**-9, name


@pytest.mark.parametrize("store", [True, False])
@pytest.mark.parametrize("tile", CARD)
def test_a_tile_gives_the_same_bits_in_every_run_and_every_batch(tile: str, store: bool) -> None:
    """Several tiles for each of 264 programs, the last of them short in rows and in columns."""
    g = torch.Generator(DEVICE).manual_seed(0)
    hidden, weight = (torch.randn(n, 128, generator=g, device=DEVICE).bfloat16() for n in (537, 20_003))
    x = Inputs(hidden, weight, torch.randint(0, 20_003, (537,), generator=g, device=DEVICE), hidden[:, 0])
    first, e = by_tile(x, tile, store)
    for count in (537, 537, 537, 257, 256, 129, 100, 1):  # of 1 and of multiples of 16 Triton may make other code
        part = x._replace(hidden=hidden[-count:].clone(), target=x.target[-count:])
        again, part_e = by_tile(part, tile, store)
        assert torch.equal(again.logprob, first.logprob[-count:]) and torch.equal(again.odds, first.odds[-count:])
        if e is not None:
            assert part_e is not None and torch.equal(part_e, e[-count:])


def policy(drop: bool = True, table: str = "cpu", grad: Tensor | None = None) -> list[Tensor]:
    """A batch of 16 responses, half of them in a group of equal rewards. ``drop``: their rows are left out."""
    x = on_device(inputs_at(1.0, rows=320, width=64, vocab=2000))
    hidden, weight = x.hidden.clone().requires_grad_(), x.weight.clone().requires_grad_(grad is None)
    rewards = torch.cat([torch.ones(1, 8), torch.arange(8.0)[None] % 3])
    response = torch.arange(16).repeat_interleave(20)
    at = rows_with_advantage(rewards, response // 8, response % 8) if drop else torch.arange(320)
    rows = at.to(DEVICE)
    group, sample, rewards = (t.to(table) for t in (response[at] // 8, response[at] % 8, rewards))
    found = fused_policy_loss(
        hidden[rows], weight, x.target[rows], rewards, group, sample, denominator=16.0, main_grad=grad
    )
    found.loss.backward()
    grads = (hidden.grad, weight.grad if grad is None else grad)
    return [found.loss.detach(), *(g for g in grads if g is not None)]


def test_rows_of_zero_advantage_change_nothing() -> None:
    dropped = policy()
    for other in (policy(drop=False), policy(drop=False, table=DEVICE)):
        assert dropped[0].item() == pytest.approx(other[0].item(), rel=1e-5)
        assert error(dropped[1], other[1].double()) < 2**-8 and error(dropped[2], other[2].double()) < 2**-8
        assert (other[1][:160] == 0).all()


def test_main_grad_adds_up_over_calls() -> None:
    _, _, once = policy()
    total = torch.zeros_like(once, dtype=torch.float32)
    for _ in range(3):
        policy(grad=total)
    assert error(total, 3 * once.double()) < 2**-8


@pytest.mark.parametrize("table", ["cpu", DEVICE])
def test_the_host_never_waits(table: str, request: pytest.FixtureRequest) -> None:
    x = on_device(inputs_at(1.0, rows=320, width=64, vocab=2000))
    response = torch.arange(16).repeat_interleave(20)
    rewards = torch.cat([torch.ones(1, 8), torch.arange(8.0)[None] % 3])
    group, sample, rewards = (t.to(table) for t in (response // 8, response % 8, rewards))
    hidden, weight = x.hidden.clone().requires_grad_(), x.weight.clone().requires_grad_()

    def work() -> None:
        loss = fused_policy_loss(hidden, weight, x.target, rewards, group, sample, denominator=16.0).loss
        torch.autograd.grad(loss, [hidden, weight])
        torch.autograd.grad((linear_logprob(hidden, weight, x.target) * x.grad).sum(), [hidden, weight])
        with torch.no_grad():
            linear_logprob(hidden, weight, x.target)

    work()
    request.getfixturevalue("no_sync")
    work()
