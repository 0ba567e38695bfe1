"""What the fused heads cost at real sizes, counted on the meta device from the products and launches they ask for.

Nothing here uses a formula of the kernels' own: FLOPs come from the shapes given to mm and addmm and from the grids and
tiles of the Triton launches, bytes from the storages that are alive.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import pytest
import torch

from gapg_kernels import cublas_odds, odds_gemm, routes
from gapg_kernels.chunks import ChunkPlan, pitch
from gapg_kernels.fused_policy_loss import _fused_op
from gapg_kernels.linear_logprob import _backward_op, _forward_op
from tests.kernels.counting import Launch, Work, beyond_torch_2_11, triton_launches

pytestmark = beyond_torch_2_11

T, H, V = 16_384, 2_048, 151_936
THV = T * H * V
GIB = 1 << 30
FUSED, FORWARD, BACKWARD = (op._init_fn for op in (_fused_op, _forward_op, _backward_op))


class Count(NamedTuple):
    flops: float
    """of mm, addmm and the Triton GEMM, tile padding included, in units of THV"""
    peak: int
    """bytes alive at once, inputs left out"""
    launches: list[Launch]


@pytest.fixture(params=["cuBLAS", "Triton"])
def triton(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Both CUDA routes: GEMM, then a pass over it; and the fused GEMM, on an H100's 132 processors."""
    kernel = request.param == "Triton"
    monkeypatch.setattr(routes, "uses_kernel", lambda hidden: kernel)
    monkeypatch.setattr(routes, "route", lambda hidden: odds_gemm.fused_odds if kernel else cublas_odds.cublas_odds)
    monkeypatch.setattr(odds_gemm, "_multiprocessors", lambda device: 132)
    return kernel


@pytest.fixture
def launches() -> Iterator[list[Launch]]:
    with triton_launches() as found:
        yield found


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def gemm_flops(launches: list[Launch]) -> int:
    """Every tile of every GEMM launch, whole: 2 BM BN for each step through H."""
    flops = 0
    for kernel, a, grid in launches:
        if kernel != "odds_gemm_kernel":
            continue
        tiles = math.ceil(a["C"] / a["BM"]) * math.ceil(a["V"] / a["BN"])
        assert grid == (min(132, tiles),)  # persistent: the programs share all tiles out among them
        flops += 2 * tiles * a["BM"] * a["BN"] * math.ceil(a["H"] / a["BK"]) * a["BK"]
    return flops


def fused(launches: list[Launch], *, needs: list[bool], main_grad: bool = True) -> Count:
    rewards, group = torch.tensor([[1.0, 0.0]]), torch.zeros(T, dtype=torch.int64)
    hidden, weight, target = meta(T, H), meta(V, H), meta(T, dtype=torch.int64)
    total = meta(V, H, dtype=torch.float32) if main_grad and needs[1] else None
    with Work() as work:
        FUSED(
            hidden, weight, None, target, rewards, group, torch.zeros_like(group), None, None, None, None, total,
            "gapg", None, None, None, "k3", 0.0, 1.0, 8.0, 2 * GIB, needs, False, False,
        )  # fmt: skip
    return Count((work.flops + gemm_flops(launches)) / THV, work.peak, launches)


@pytest.mark.parametrize(
    ("needs", "gemms"), [([True, True, False], 6), ([True, False, False], 4), ([False, False, False], 2)]
)
def test_the_fused_loss_is_three_gemms(triton: bool, launches: list[Launch], needs: list[bool], gemms: int) -> None:
    flops = fused(launches, needs=needs).flops
    assert gemms <= flops <= gemms * 1.005
    assert any(launch.kernel == "odds_gemm_kernel" for launch in launches) == triton


@pytest.mark.parametrize(
    ("workspace", "needs", "gemms"),
    [
        (8 * GIB, [True, True, False], 6),
        (2 * GIB, [True, True, False], 8),
        (8 * GIB, [True, False, False], 4),
        (2 * GIB, [True, False, False], 6),
    ],
)
def test_linear_logprob_keeps_e_or_computes_it_again(
    triton: bool, launches: list[Launch], workspace: int, needs: list[bool], gemms: int
) -> None:
    hidden, weight, target = meta(T, H), meta(V, H), meta(T, dtype=torch.int64)
    keep = ChunkPlan.of(hidden, weight, workspace, kernel=False).fits(T)
    with Work() as work:
        logprob, _, odds, unit, e = FORWARD(hidden, weight, target, None, 1.0, workspace, keep, False)
        BACKWARD(logprob, hidden, weight, target, None, odds, unit, e, 1.0, workspace, needs)
    assert gemms <= (work.flops + gemm_flops(launches)) / THV <= gemms * 1.005


@pytest.mark.parametrize("triton", ["Triton"], indirect=True)
def test_forward_only_writes_nothing_of_the_vocabularys_size(triton: bool, launches: list[Launch]) -> None:
    hidden, weight, target = meta(T, H), meta(V, H), meta(T, dtype=torch.int64)
    with Work() as work:
        FORWARD(hidden, weight, target, None, 1.0, 2 * GIB, False, True)
    assert 2 <= gemm_flops(launches) / THV <= 2.01 and not work.gemms
    assert all(a["e_desc"] is None for kernel, a, _ in launches if kernel == "odds_gemm_kernel")
    assert sum(launch.kernel == "odds_gemm_kernel" for launch in launches) == 1, "nothing to keep: one chunk"
    partials = 2 * 4 * T * math.ceil(V / 256)  # sums and moments, one a row and tile
    assert work.peak < 1.05 * partials + 100 * T


@pytest.mark.parametrize("main_grad", [True, False])
def test_what_is_alive_stays_within_the_workspace(triton: bool, launches: list[Launch], main_grad: bool) -> None:
    """2 GiB for E, partial sums and wide logits; beside it the gradients, the sum of dW and three [C, H] in float32."""
    count = fused(launches, needs=[True, True, False], main_grad=main_grad)
    hidden, weight = meta(T, H), meta(V, H)
    plan = ChunkPlan.of(hidden, weight, 2 * GIB, kernel=triton)
    chunk = next(iter(plan.chunks(T, kept=False, store=True)))
    gradients = 2 * T * H + (0 if main_grad else (4 + 2) * V * H)
    factors = chunk.stop * H * (3 * 4 + 2)
    assert count.peak <= 2 * GIB + gradients + factors + 200 * T
    assert count.peak >= chunk.stop * pitch(V, torch.bfloat16) * 2


def test_chunks_are_as_few_as_the_workspace_allows(triton: bool, launches: list[Launch]) -> None:
    """Each costs a read and a write of main_grad: at 2 GiB three chunks of the fused kernel, and seven
    where float32 logits need room beside E."""
    fused(launches, needs=[True, True, False])
    chunks = sum(launch.kernel == ("odds_gemm_kernel" if triton else "odds_pass_kernel") for launch in launches)
    assert chunks == (3 if triton else 7)
