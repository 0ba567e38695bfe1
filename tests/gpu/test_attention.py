"""Packed attention and shared prompts on a card against float64 on the CPU, one sequence at a time."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch.nn.attention import (
    activate_flash_attention_impl,
    current_flash_attention_impl,
    restore_flash_attention_impl,
)
from torch.nn.functional import scaled_dot_product_attention

from gapg.model.attention import packed_attention
from gapg_kernels import flash
from gapg_kernels.shared_layout import share_prompts
from gapg_kernels.shared_prompt_attention import shared_prompt_attention

DEVICE = "cuda"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
ROUNDING = {torch.bfloat16: 1e-2, torch.float32: 1e-5}
HEADS = [(4, 4, 64), (14, 2, 64), (16, 2, 128)]


def inputs(tokens: int, heads: tuple[int, int, int], dtype: torch.dtype) -> list[Tensor]:
    """q, k, v and the gradient of the output, on the CPU, rounded to ``dtype``."""
    g = torch.Generator().manual_seed(tokens)
    queries, keys, size = heads
    shapes = [(tokens, queries, size), (tokens, keys, size), (tokens, keys, size), (tokens, queries, size)]
    return [torch.randn(shape, generator=g).to(dtype) for shape in shapes]


def causal(q: Tensor, k: Tensor, v: Tensor, window: int | None = None) -> Tensor:
    """One sequence [T, heads, D] in its own type."""
    seen = torch.ones(len(q), len(q), dtype=torch.bool).tril().triu(1 - (window or len(q)))
    batch = [x.transpose(0, 1)[None] for x in (q, k, v)]
    out = scaled_dot_product_attention(*batch, attn_mask=seen, enable_gqa=q.shape[1] != k.shape[1])
    return out[0].transpose(0, 1)


@pytest.fixture(params=["FA2", "FA3", "FA4"])
def implementation(request: pytest.FixtureRequest) -> Iterator[None]:
    """What stands behind PyTorch's operators; one that has no package here, or not this GPU, is skipped."""
    if request.param == "FA2":
        yield
        return
    if torch.cuda.get_device_capability()[0] not in {"FA3": (9,), "FA4": (9, 10)}[request.param]:
        pytest.skip(f"PyTorch gives this GPU no {request.param}")
    try:
        activate_flash_attention_impl(request.param)
    except ImportError as error:
        pytest.skip(str(error))
    yield
    restore_flash_attention_impl()


def assert_close(got: list[Tensor], want: list[Tensor], dtype: torch.dtype) -> None:
    for ours, exact in zip(got, want, strict=True):
        assert ((ours.double().cpu() - exact).norm() / exact.norm()).item() < ROUNDING[dtype]


@pytest.mark.usefixtures("implementation")
@pytest.mark.parametrize("window", [None, 50])
@pytest.mark.parametrize("dtype", list(ROUNDING), ids=str)
@pytest.mark.parametrize("heads", HEADS, ids=str)
def test_packed_equals_one_by_one_in_float64(
    heads: tuple[int, int, int], dtype: torch.dtype, window: int | None
) -> None:
    lengths = [1, 300, 17, 17, 128, 64, 5]
    cu = [0, *itertools.accumulate(lengths)]
    given = inputs(cu[-1], heads, dtype)
    exact = [x.double().requires_grad_() for x in given[:3]]
    want = torch.cat([causal(*(x[a:b] for x in exact), window) for a, b in itertools.pairwise(cu)])
    want_grads = torch.autograd.grad(want, exact, given[3].double())

    q, k, v = (x.to(DEVICE).requires_grad_() for x in given[:3])
    got = packed_attention(q, k, v, torch.tensor(cu, dtype=torch.int32, device=DEVICE), max(lengths), window=window)
    got_grads = torch.autograd.grad(got, [q, k, v], given[3].to(DEVICE))
    assert got.dtype == dtype
    assert_close([got.detach(), *got_grads], [want.detach(), *want_grads], dtype)


@pytest.mark.usefixtures("implementation")
@pytest.mark.parametrize("window", [None, 50])
@pytest.mark.parametrize("dtype", list(ROUNDING), ids=str)
@pytest.mark.parametrize("heads", HEADS, ids=str)
def test_shared_prompts_equal_unshared_in_float64(
    heads: tuple[int, int, int], dtype: torch.dtype, window: int | None
) -> None:
    prompts, responses = [130, 1, 40], [[5, 77, 1], [64], [9, 9, 9, 200]]
    flat = [n for of_one in responses for n in of_one]
    segments = [0, *itertools.accumulate(prompts + flat)]
    prompt_starts = [0, *itertools.accumulate(prompts)]
    response_starts = [0, *itertools.accumulate(sum(of_one) for of_one in responses)]
    layout = share_prompts(segments, prompt_starts, response_starts, DEVICE)

    given = inputs(segments[-1], heads, dtype)
    exact = [x.double().requires_grad_() for x in given[:3]]
    pieces = [causal(*(x[a:b] for x in exact), window) for a, b in itertools.pairwise(prompt_starts)]
    at = len(prompts)
    for i, of_one in enumerate(responses):
        for _ in of_one:
            whole = [
                torch.cat([x[prompt_starts[i] : prompt_starts[i + 1]], x[segments[at] : segments[at + 1]]])
                for x in exact
            ]
            pieces.append(causal(*whole, window)[prompts[i] :])
            at += 1
    want = torch.cat(pieces)
    want_grads = torch.autograd.grad(want, exact, given[3].double())

    q, k, v = (x.to(DEVICE).requires_grad_() for x in given[:3])
    got = shared_prompt_attention(q, k, v, layout, window=window)
    got_grads = torch.autograd.grad(got, [q, k, v], given[3].to(DEVICE))
    assert_close([got.detach(), *got_grads], [want.detach(), *want_grads], dtype)


@pytest.mark.usefixtures("implementation")
def test_the_host_never_waits(request: pytest.FixtureRequest) -> None:
    cu = torch.tensor([0, 30, 47, 111], dtype=torch.int32, device=DEVICE)
    layout = share_prompts([0, 30, 47, 111], [0, 30], [0, 81], DEVICE)
    q, k, v, grad = (x.to(DEVICE).requires_grad_() for x in inputs(111, (4, 2, 64), torch.bfloat16))

    def work() -> None:
        for window in (None, 20):
            torch.autograd.grad(packed_attention(q, k, v, cu, 64, window=window), [q, k, v], grad)
            torch.autograd.grad(shared_prompt_attention(q, k, v, layout, window=window), [q, k, v], grad)

    work()
    request.getfixturevalue("no_sync")
    work()


@pytest.mark.usefixtures("implementation")
def test_under_the_switch_the_same_bits_again() -> None:
    """At a size where, without it, d(q) is added up by many blocks."""
    lengths = [2048, 1500, 700]
    cu = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=DEVICE)
    layout = share_prompts([0, 2048, 3548, 4248], [0, 2048], [0, 2200], DEVICE)
    q, k, v, grad = (x.to(DEVICE).requires_grad_() for x in inputs(4248, (12, 2, 128), torch.bfloat16))

    def work() -> list[Tensor]:
        found: list[Tensor] = []
        for window in (None, 300):
            found += torch.autograd.grad(packed_attention(q, k, v, cu, 2048, window=window), [q, k, v], grad)
            found += torch.autograd.grad(shared_prompt_attention(q, k, v, layout, window=window), [q, k, v], grad)
        return found

    torch.use_deterministic_algorithms(True)
    try:
        first = work()
        assert all(torch.equal(a, b) for _ in range(5) for a, b in zip(work(), first, strict=True))
    finally:
        torch.use_deterministic_algorithms(False)


def test_what_is_activated_computes_what_pytorchs_own_does() -> None:
    """Whichever packages there are, `activate` leaves one that passes its trial, at each head size."""
    try:
        for head_dim in (64, 128, 256):
            expected = [x.float() for x in flash._trial(torch.device(DEVICE), head_dim)]
            line = flash.activate(torch.device(DEVICE), [head_dim])
            assert line.split()[0] == (current_flash_attention_impl() or "PyTorch's")
            for got, want in zip(flash._trial(torch.device(DEVICE), head_dim), expected, strict=True):
                assert (got.float() - want).norm() < flash.ROUNDING * want.norm()
            if current_flash_attention_impl():
                restore_flash_attention_impl()
    finally:
        if current_flash_attention_impl():
            restore_flash_attention_impl()
