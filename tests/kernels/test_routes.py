"""Which forward a device and given tensors get, and the line that says why."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from gapg_kernels import cublas_odds, odds_gemm, reference, routes
from gapg_kernels.fused_policy_loss import fused_policy_loss
from gapg_kernels.linear_logprob import linear_logprob
from gapg_kernels.linear_loss import linear_loss
from gapg_kernels.tiles import TILES, Capability, tile_for


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Capability], None]]:
    """Tensors on a CUDA device that is not there, of this compute capability."""

    def plug(capability: Capability) -> None:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)

    with FakeTensorMode():
        yield plug


def on_card(width: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(8, width, dtype=dtype, device="cuda")


@pytest.mark.parametrize("capability", TILES, ids=str)
def test_every_card_of_the_table_takes_the_fused_gemm(
    card: Callable[[Capability], None], capability: Capability
) -> None:
    card(capability)
    hidden = on_card(64, torch.bfloat16)
    assert routes.uses_kernel(hidden) and routes.route(hidden) is odds_gemm.fused_odds
    line = routes.describe(hidden, hidden)
    assert line == routes.describe("cuda") and "\n" not in line
    assert line.startswith("Triton GEMM with odds epilogue (bfloat16 on sm_{}{}: ".format(*capability))
    assert "not timed" in line


@pytest.mark.parametrize("capability", [(7, 5), (8, 7), (9, 4), (10, 3), (12, 1), (13, 0)], ids=str)
def test_an_unknown_card_takes_cublas_and_says_so(card: Callable[[Capability], None], capability: Capability) -> None:
    card(capability)
    hidden = on_card(64, torch.bfloat16)
    assert routes.route(hidden) is cublas_odds.cublas_odds
    why = "the fused GEMM is for sm_80, sm_86, sm_89, sm_90, sm_100, sm_120; this is sm_{}{}".format(*capability)
    assert routes.describe(hidden) == routes.describe("cuda:0") == f"cuBLAS and one Triton pass in odds form ({why})"


def test_what_tensors_get_and_why(card: Callable[[Capability], None]) -> None:
    card((9, 0))
    bf16, f32, f64 = (on_card(64, dtype) for dtype in (torch.bfloat16, torch.float32, torch.float64))
    odd = on_card(72, torch.bfloat16)
    assert [routes.route(x) for x in (f32, odd)] == [cublas_odds.cublas_odds] * 2
    assert routes.describe(f32, f32).endswith("(the fused GEMM is for bfloat16; this is float32)")
    assert routes.describe(odd).endswith("(the fused GEMM needs an H that is a multiple of 16; this is 72)")
    assert routes.route(f64) is reference.plain_odds and routes.describe(f64).startswith("plain PyTorch")
    master = routes.describe(bf16, f32)
    assert master == f"{routes.describe(bf16)}; the float32 weight is rounded to bfloat16 for it"
    for hidden, weight in ((on_card(64, torch.float16), None), (bf16, on_card(64, torch.float16))):
        assert routes.describe(hidden, weight).startswith("refused: float16 is too narrow")
    assert routes.describe(f32, bf16) == "refused: hidden is float32 and weight bfloat16; pass hidden.to(weight.dtype)"


def test_an_amd_card_is_none_of_the_table(card: Callable[[Capability], None], monkeypatch: pytest.MonkeyPatch) -> None:
    card((9, 0))  # what PyTorch says of a gfx90a
    monkeypatch.setattr(torch.version, "hip", "6.4")
    hidden = on_card(64, torch.bfloat16)
    assert routes.route(hidden) is cublas_odds.cublas_odds
    assert routes.describe(hidden).endswith("(the fused GEMM is for NVIDIA's cards; this is AMD's)")


def test_no_rows_take_no_kernel(card: Callable[[Capability], None]) -> None:
    card((9, 0))
    for dtype in (torch.bfloat16, torch.float32):
        assert routes.route(torch.empty(0, 64, dtype=dtype, device="cuda")) is reference.plain_odds


@pytest.mark.parametrize("weight", [torch.float32, torch.bfloat16], ids=str)
def test_the_line_is_that_of_the_autocast_that_is_on(weight: torch.dtype) -> None:
    hidden, lm_head = torch.zeros(2, 16), torch.zeros(3, 16, dtype=weight)
    with torch.autocast("cpu", torch.bfloat16):
        line = routes.describe(hidden, lm_head)
    assert line == routes.describe(hidden.bfloat16(), lm_head) != routes.describe(hidden, lm_head)
    with torch.autocast("cpu", torch.float16):
        assert routes.describe(hidden, lm_head).startswith("refused: float16")


def test_a_forward_gets_temperature_and_softcap_as_floats(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton would compile another kernel for an integer, and another one for 1."""
    given: list[Any] = []

    def plain_odds(*arguments: Any) -> reference.RowOdds:
        given.append((arguments[4], arguments[7]))
        return reference.plain_odds(*arguments)

    monkeypatch.setattr(routes, "route", lambda hidden: plain_odds)
    hidden, weight, target = torch.randn(4, 16, requires_grad=True), torch.randn(9, 16), torch.arange(4)
    options: dict[str, Any] = {"temperature": 1, "softcap": 30}
    linear_logprob(hidden, weight, target, **options, workspace_bytes=256).sum().backward()
    linear_loss(hidden, weight, target, lambda logprob: logprob.sum(), **options)
    rows = torch.zeros(4, dtype=torch.long)
    fused_policy_loss(hidden, weight, target, torch.tensor([[1.0, 0.0]]), rows, rows, denominator=2, **options)
    assert len(given) > 4, "one forward computes E twice, in more than one chunk"
    assert all(type(x) is float for pair in given for x in pair)


def test_without_cuda_it_is_plain_pytorch() -> None:
    hidden = torch.zeros(2, 16, dtype=torch.bfloat16)
    assert routes.route(hidden) is reference.plain_odds
    assert routes.describe(hidden) == "plain PyTorch in odds form (the Triton kernels need CUDA; this is cpu)"


def test_a_tile_is_chosen_by_card_and_vocabulary() -> None:
    """Every card has one for every V; all go through H in the same steps, so that E is the same with each."""
    assert tile_for(2049, (9, 0)).bn == 256
    for capability, table in TILES.items():
        assert tile_for(151_936, capability) == table["wide"]
        assert tile_for(2048, capability).bn == 128
        assert {tile.bk for tile in table.values()} == {64}
