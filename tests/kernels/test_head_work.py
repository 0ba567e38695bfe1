"""What the fused heads cost at real sizes, counted on the meta device from the products and launches they ask for.

Nothing here uses a formula of the kernels' own: FLOPs come from the shapes given to mm and addmm and from the grids and
tiles of the Triton launches, bytes from the storages that are alive.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from gapg_kernels import cublas_odds, entropy_gradient, odds_gemm, reference, routes
from gapg_kernels.chunks import ChunkPlan, pitch
from gapg_kernels.fused_policy_loss import _fused_op
from gapg_kernels.linear_logprob import _backward_op, _forward_op
from gapg_kernels.linear_loss import linear_loss
from gapg_kernels.reference import ENTROPY_BLOCK
from tests.kernels.counting import Launch, Work, arguments_of, beyond_torch_2_11, triton_launches

pytestmark = beyond_torch_2_11

T, H, V = 16_384, 2_048, 151_936
THV = T * H * V
GIB = 1 << 30


def ask(op: Any, **given: Any) -> Any:
    """What the operator runs, itself: on the meta device its registered fake would stand in."""
    return op._init_fn(**arguments_of(op._opoverload, **given))


def forward(
    hidden: torch.Tensor, weight: torch.Tensor, target: torch.Tensor, workspace: int, *, keep: bool = False,
    with_entropy: bool = False,
) -> Any:  # fmt: skip
    return ask(
        _forward_op, hidden=hidden, weight=weight, target=target, temperature=1.0, workspace_bytes=workspace, keep=keep,
        with_entropy=with_entropy,
    )  # fmt: skip


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
    monkeypatch.setattr(reference, "plain_spread_entropy", entropy_gradient.spread_entropy)  # as where E is on a GPU
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
        ask(
            _fused_op, hidden=hidden, weight=weight, target=target, rewards=rewards, group=group,
            sample=torch.zeros_like(group), main_grad=total, kind="gapg", kl="k3", kl_coef=0.0,
            temperature=1.0, denominator=8.0, workspace_bytes=2 * GIB, needs=needs, with_entropy=False, patched=False,
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
    ("workspace", "needs", "bonus", "gemms"),
    [
        (8 * GIB, [True, True, False], False, 6),
        (2 * GIB, [True, True, False], False, 8),
        (8 * GIB, [True, False, False], False, 4),
        (2 * GIB, [True, False, False], False, 6),
        (8 * GIB, [True, True, False], True, 6),
        (2 * GIB, [True, True, False], True, 8),
    ],
)
def test_linear_logprob_keeps_e_or_computes_it_again(
    triton: bool, launches: list[Launch], workspace: int, needs: list[bool], bonus: bool, gemms: int
) -> None:
    """And neither way, nor with a gradient by the entropy, is more alive than the workspace and what is handed out."""
    hidden, weight, target = meta(T, H), meta(V, H), meta(T, dtype=torch.int64)
    plan = ChunkPlan.of(hidden, weight, workspace, kernel=False, entropy=bonus)
    keep = (plan.with_copy() if bonus else plan).fits(T)
    assert keep == (workspace > 2 * GIB)
    with Work() as work:
        logprob, entropy, odds, unit, slope, e = forward(
            hidden, weight, target, workspace, keep=keep, with_entropy=bonus
        )
        ask(
            _backward_op, grad=logprob, grad_entropy=logprob if bonus else None, hidden=hidden, weight=weight,
            target=target, logprob=logprob, entropy=entropy, odds=odds, unit=unit, slope=slope, e=e, temperature=1.0,
            workspace_bytes=workspace, needs=needs,
        )  # fmt: skip
    assert gemms <= (work.flops + gemm_flops(launches)) / THV <= gemms * 1.005
    assert work.peak <= workspace + 2 * T * H + (4 + 2) * V * H + T * H * (3 * 4 + 2) + 200 * T


@pytest.mark.parametrize("triton", ["Triton"], indirect=True)
def test_forward_only_writes_nothing_of_the_vocabularys_size(triton: bool, launches: list[Launch]) -> None:
    hidden, weight, target = meta(T, H), meta(V, H), meta(T, dtype=torch.int64)
    with Work() as work:
        forward(hidden, weight, target, 2 * GIB, with_entropy=True)
    assert 2 <= gemm_flops(launches) / THV <= 2.01 and not work.gemms
    assert all(a["e"] is None for kernel, a, _ in launches if kernel == "odds_gemm_kernel")
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


OWN = 20_000
"""Rows of a loss of one's own."""


def ratio(logprob: torch.Tensor, old: torch.Tensor, **_: torch.Tensor) -> torch.Tensor:
    return (logprob - old).exp().sum()


def bonus(logprob: torch.Tensor, old: torch.Tensor, entropy: torch.Tensor) -> torch.Tensor:
    return ratio(logprob, old) + entropy.sum()


def odds_too(logprob: torch.Tensor, old: torch.Tensor, log_odds: torch.Tensor) -> torch.Tensor:
    return ratio(logprob, old) - torch.nn.functional.softplus(log_odds).sum()


def own(launches: list[Launch], *, needs: str, rows: int = OWN, **options: Any) -> tuple[Count, Work]:
    """`linear_loss`, whose calls are not hidden in an operator: forward and backward as a user has them."""
    hidden, weight = meta(rows, H).requires_grad_("hidden" in needs), meta(V, H).requires_grad_("weight" in needs)
    given = {"loss": ratio, "rows": {"old": meta(rows, dtype=torch.float32)}} | options
    with Work() as work:
        out = linear_loss(hidden, weight, meta(rows, dtype=torch.int64), **given)
        if needs:
            out.loss.backward()
    return Count((work.flops + gemm_flops(launches)) / (rows * H * V), work.peak, launches), work


@pytest.mark.parametrize(("needs", "gemms"), [("hidden weight", 6), ("hidden", 4), ("weight", 4), ("", 2)])
def test_a_loss_of_ones_own_is_three_gemms(triton: bool, launches: list[Launch], needs: str, gemms: int) -> None:
    flops = own(launches, needs=needs)[0].flops
    assert gemms <= flops <= gemms * 1.006 if triton else flops == gemms  # the kernel's tiles are whole
    assert any(launch.kernel == "odds_gemm_kernel" for launch in launches) == triton


@pytest.mark.parametrize("triton", ["cuBLAS"], indirect=True)
@pytest.mark.parametrize("loss", [bonus, odds_too])
def test_entropy_gradient_and_masked_columns_add_no_product_over_the_vocabulary(
    triton: bool, launches: list[Launch], loss: Any
) -> None:
    _, plain = own(launches, needs="hidden weight")
    options: dict[str, Any] = {"entropy": True} if loss is bonus else {"mask_columns": (5, 7)}
    _, work = own(launches, needs="hidden weight", loss=loss, **options)
    large = [gemm for gemm in work.gemms if V in gemm]
    assert large == [gemm for gemm in plain.gemms if V in gemm] == plain.gemms
    others = [gemm for gemm in work.gemms if V not in gemm]
    assert all(2 in gemm for gemm in others) and bool(others) == (loss is odds_too)
    assert sum(a.kernel == "spread_entropy_kernel" for a in launches) == (len(large) // 3 if loss is bonus else 0)


@pytest.mark.parametrize("options", [{}, {"entropy": True, "loss": bonus}, {"mask_columns": (5, 7), "loss": odds_too}])
def test_a_loss_of_ones_own_stays_within_the_workspace(
    triton: bool, launches: list[Launch], options: dict[str, Any]
) -> None:
    count, _ = own(launches, needs="hidden weight", workspace_bytes=2 * GIB, **options)
    chunk = ChunkPlan.of(meta(OWN, H), meta(V, H), 2 * GIB, kernel=triton, entropy="entropy" in options)
    rows = max(part.stop - part.start for part in chunk.chunks(OWN, kept=False, store=True))
    gradients, factors = (2 * OWN + (4 + 2) * V) * H, rows * H * (3 * 4 + 2)
    columns = 4 * (V + 8 * H) if "mask_columns" in options else 0
    assert count.peak <= 2 * GIB + gradients + factors + columns + 200 * OWN
    assert count.peak >= rows * pitch(V, torch.bfloat16) * 2


@pytest.mark.parametrize(
    "options",
    [
        {"softcap": 3.0},
        {"entropy": True, "loss": bonus},
        {"mask_columns": (5, 7), "loss": odds_too, "softcap": 3.0},
        {"cuts": [0, 91, 182, 302, 452, 602, 762, 902, 1024]},  # chunks that grow: still one E at a time
    ],
)
def test_what_is_alive_on_a_cpu_stays_within_the_workspace(options: dict[str, Any]) -> None:
    """By the reference, in float32: it makes E where the logits were. Its passes hold four blocks more."""
    rows, width, vocab, room = 1024, 16, 5000, 180 * 5000 * 4
    hidden, weight = torch.randn(rows, width).requires_grad_(), torch.randn(vocab, width).requires_grad_()
    given = {"loss": ratio, "rows": {"old": torch.zeros(rows)}} | options
    with Work() as work:
        linear_loss(hidden, weight, torch.randint(8, vocab, (rows,)), workspace_bytes=room, **given).loss.backward()
    gradients, blocks = 4 * width * (rows + 2 * vocab), 4 * 4 * ENTROPY_BLOCK
    assert room < work.peak + (1 << 20) and work.peak <= room + gradients + blocks + 4 * width * rows + 60 * vocab
    assert room < 4 * rows * vocab / 5, "several chunks"


class _Copies(TorchDispatchMode):
    """Which copies from the host to the device would wait for the device."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[bool] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if (
            func is torch.ops.aten._to_copy.default
            and args[0].device.type == "cpu"
            and kwargs.get("device") is not None
        ):
            self.waits.append(not kwargs.get("non_blocking"))
        return func(*args, **kwargs)


def test_what_linear_loss_brings_to_the_device_waits_for_nothing() -> None:
    """The masked columns once, the cuts once a chunk."""

    def loss(logprob: torch.Tensor, log_odds: torch.Tensor, cuts: torch.Tensor) -> torch.Tensor:
        return logprob.sum() + log_odds.sum()

    hidden, weight = meta(8, 16, dtype=torch.float32).requires_grad_(), meta(64, 16, dtype=torch.float32)
    with _Copies() as copies:
        linear_loss(
            hidden, weight, meta(8, dtype=torch.int64), loss, cuts=[0, 2, 4, 6, 8], mask_columns=[3],
            workspace_bytes=4 * 64 * 4,
        )  # fmt: skip
    assert copies.waits == [False] * 3
