"""What surrounds a call of the heads: another current device, a sharded model, a counter of work."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.utils.flop_counter import FlopCounterMode, flop_registry
from triton.runtime.jit import JITFunction

from gapg_kernels import cublas_odds, entropy_gradient, odds_gemm, policy_loss_kernel, repair, row_kernels
from gapg_kernels.fused_policy_loss import fused_policy_loss
from gapg_kernels.linear_logprob import linear_logprob
from gapg_kernels.linear_loss import linear_loss
from gapg_kernels.policy_loss import DEFAULTS, PolicyLossOptions
from gapg_kernels.policy_loss_reference import Rows
from tests.kernels.counting import arguments_of
from tests.kernels.float64_oracle import error
from tests.kernels.two_ranks import on_two_ranks

T, H, V = 6, 16, 40
ROWS = ("coefficient", "old_logprob", "rollout_logprob", "reference_logprob")


@pytest.fixture
def launches(current: list[Tensor], monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Tensor | None]]:
    """Triton launches, noted instead of made, each with the tensor whose device PyTorch was told to make current."""
    noted: list[tuple[str, Tensor | None]] = []

    def run(kernel: Any, *_: object, **__: object) -> None:
        noted.append((kernel.fn.__name__, current[-1] if current else None))

    monkeypatch.setattr(JITFunction, "run", run)
    monkeypatch.setattr(odds_gemm, "_multiprocessors", lambda device: 132)  # the meta device has none
    return noted


def test_every_launch_is_made_on_the_device_of_its_tensors(launches: list[tuple[str, Tensor | None]]) -> None:
    """Triton launches on the current device: with a model on cuda:1 and cuda:0 current, on the wrong one."""
    hidden, weight = torch.empty(T, H, dtype=torch.bfloat16, device="meta"), torch.empty(V, H, device="meta").bfloat16()
    index = torch.empty(T, dtype=torch.long, device="meta")
    e, row = torch.empty(T, V, dtype=torch.bfloat16, device="meta"), torch.empty(T, device="meta")
    odds_gemm.fused_odds(hidden, weight, None, index, 1.0, e)
    cublas_odds.cublas_odds(hidden, weight, None, index, 1.0, e)
    assert all(x is hidden or (x is not None and x._base is hidden) for _, x in launches)  # or a view of it
    names = {name for name, _ in launches}
    launches.clear()
    entropy_gradient.spread_entropy(e, row, row, row, row, row, e)
    assert all(x is e for _, x in launches)
    names |= {name for name, _ in launches}
    launches.clear()
    logprob = torch.empty(T, device="meta")
    rows = Rows(logprob, torch.empty(1, 2, device="meta"), index, index, *(None,) * 6)
    policy_loss_kernel.fused_row_losses(rows, 1.0, DEFAULTS)
    assert all(x is logprob for _, x in launches)
    names |= {name for name, _ in launches}
    modules = (odds_gemm, cublas_odds, row_kernels, repair, entropy_gradient, policy_loss_kernel)
    assert names == {name for module in modules for name in vars(module) if name.endswith("_kernel")}


@pytest.fixture
def mesh() -> Iterator[DeviceMesh]:
    """Of one process."""
    begun = dist.is_initialized()  # by an engine that an earlier test of this process has run
    if not begun:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    if not begun:
        dist.destroy_process_group()


def _mean_ratio(old: Tensor, **arguments: Tensor) -> None:
    linear_loss(loss=lambda logprob, old: (logprob - old).exp().sum() / T, rows={"old": old}, **arguments)  # type: ignore[arg-type]


def test_a_dtensor_is_refused_in_the_same_words_wherever_it_is_passed(mesh: DeviceMesh) -> None:
    message = (
        "{}: {} is a DTensor, of which a rank holds a part; pass a plain tensor, such as weight.full_tensor("
        "grad_placements=[Partial('avg')]) where ranks average gradients, as FSDP does, or with [Partial()] where they "
        "add them"
    )
    index, rows = torch.zeros(T, dtype=torch.long), dict.fromkeys(ROWS, torch.full((T,), 0.5))
    inputs = {"hidden": torch.randn(T, H), "weight": torch.randn(V, H), "target": index, "bias": torch.zeros(V)}
    others = {"rewards": torch.tensor([[1.0, 0.0]]), "group": index, "sample": index, "main_grad": torch.zeros(V, H)}
    options = PolicyLossOptions(clip=(0.2, 0.2), tis_cap=2.0, kl_coef=0.1)
    fused = functools.partial(fused_policy_loss, denominator=1.0, options=options)
    heads: list[tuple[str, Any, dict[str, Tensor]]] = [
        ("linear_logprob", linear_logprob, inputs),
        ("linear_loss", _mean_ratio, inputs | {"main_grad": others["main_grad"], "old": rows["old_logprob"]}),
        ("fused_policy_loss", fused, inputs | others | rows),
    ]
    for caller, function, arguments in heads:
        function(**arguments)
        for name, x in arguments.items():
            sharded = {name: distribute_tensor(x, mesh, [Shard(0)])}
            with pytest.raises(TypeError) as refused:
                function(**arguments | sharded)
            assert str(refused.value) == message.format(caller, name)


def test_ranks_with_rows_of_their_own_get_the_gradient_that_fsdp_gives_them(tmp_path: Path) -> None:
    """As the refusal says. Plain `full_tensor()` would give each part of the weight one rank's gradient only."""
    for found in on_two_ranks("sharded_head", tmp_path):
        average = [x.double() for x in found.pop("FSDP")]
        assert len(found) == 6
        for name, gradients in found.items():
            for got, want in zip(gradients, average, strict=True):
                if name.endswith("plain"):
                    assert error(got, want) > 0.1
                else:
                    assert error(got, want * (2 if name.endswith("sum") else 1)) < 1e-6, name


@pytest.mark.parametrize(
    ("option", "room"), [("softcap", 2 << 30), ("return_entropy", V * 4 * 3), ("master", V * 4 * 3)]
)
def test_every_option_of_linear_logprob_compiles_for_any_number_of_rows(option: str, room: int) -> None:
    options: dict[str, Any] = {"softcap": {"softcap": 2.0}, "return_entropy": {"return_entropy": True}}.get(option, {})

    def loss(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        low = hidden.bfloat16() if option == "master" else hidden
        found = linear_logprob(low, weight, target, temperature=0.7, workspace_bytes=room, **options)
        logprob, entropy = found if isinstance(found, tuple) else (found, torch.zeros(()))
        return logprob.square().sum() + 0.1 * entropy.sum()

    compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend="aot_eager")
    g = torch.Generator().manual_seed(0)
    for rows in (9, 6, 13):
        leaves = [torch.randn(n, H, generator=g).requires_grad_() for n in (rows, V)]
        target = torch.randint(V, (rows,), generator=g)
        want, got = (torch.autograd.grad(function(*leaves, target), leaves) for function in (loss, compiled))
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


FUSED = torch.ops.gapg.fused_policy_loss
FORWARD, BACKWARD = torch.ops.gapg.linear_logprob, torch.ops.gapg.linear_logprob_backward
HIDDEN, WEIGHT, INDEX, FLOATS = torch.zeros(T, H), torch.zeros(V, H), torch.zeros(T, dtype=torch.long), torch.zeros(T)
COMMON = {"hidden": HIDDEN, "weight": WEIGHT, "target": INDEX, "temperature": 1.0, "workspace_bytes": 1 << 20}
LOSS = {"rewards": torch.tensor([[1.0, 0.0]]), "group": INDEX, "sample": INDEX, "kind": "gapg", "kl": "k3"}
LOSS |= {"kl_coef": 0.0, "denominator": 1.0, "with_entropy": False, "patched": False}
ODDS = {"grad": FLOATS, "logprob": FLOATS, "entropy": FLOATS[:0], "odds": FLOATS, "unit": FLOATS + 1}
ODDS |= {"slope": FLOATS[:0]}


@pytest.mark.parametrize(
    ("operator", "arguments", "gemms"),
    [
        (FUSED, LOSS | {"needs": [True, True, False]}, 3),
        (FUSED, LOSS | {"needs": [True, False, False]}, 2),
        (FUSED, LOSS | {"needs": [False, False, False]}, 1),
        (FORWARD, {"keep": True, "with_entropy": False}, 1),
        (BACKWARD, ODDS | {"e": torch.zeros(T, V), "needs": [True, True, False]}, 2),
        (BACKWARD, ODDS | {"e": torch.zeros(0, V), "needs": [True, False, False]}, 2),
    ],
)
def test_work_is_counted_by_the_arguments_names(operator: Any, arguments: dict[str, Any], gemms: int) -> None:
    """By position, one more argument would change the count without a word. A counter may pass names, too."""
    arguments = arguments_of(operator.default, **COMMON | arguments)
    with FlopCounterMode(display=False) as counter:
        operator(**arguments)
    assert counter.get_total_flops() == gemms * 2 * T * H * V
    shapes = {name: x.shape if isinstance(x, Tensor) else x for name, x in arguments.items()}
    assert flop_registry[operator](**shapes, out_val=None) == gemms * 2 * T * H * V
