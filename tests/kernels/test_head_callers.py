"""What surrounds a call of the heads: another current device, a sharded model, a counter of work."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils.flop_counter import FlopCounterMode, flop_registry
from triton.runtime.jit import JITFunction

from gapg.kernels import odds_gemm, odds_pass, odds_rows, policy_loss_kernel
from gapg.kernels.fused_policy_loss import fused_policy_loss
from gapg.kernels.linear_logprob import linear_logprob
from gapg.kernels.policy_loss import DEFAULTS
from gapg.kernels.policy_loss_definition import Rows

T, H, V = 6, 16, 40


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Tensor | None]]:
    """Triton launches, noted instead of made, each with the tensor whose device PyTorch was told to make current."""
    current: list[Tensor] = []
    noted: list[tuple[str, Tensor | None]] = []

    @contextmanager
    def device_of(x: Tensor) -> Iterator[None]:
        current.append(x)
        yield
        current.pop()

    def run(kernel: Any, *_: object, **__: object) -> None:
        noted.append((kernel.fn.__name__, current[-1] if current else None))

    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    monkeypatch.setattr(JITFunction, "run", run)
    monkeypatch.setattr(odds_gemm, "_multiprocessors", lambda device: 132)  # the meta device has none
    return noted


def test_every_launch_is_made_on_the_device_of_its_tensors(launches: list[tuple[str, Tensor | None]]) -> None:
    """Triton launches on the current device: with a model on cuda:1 and cuda:0 current, on the wrong one."""
    hidden, weight = torch.empty(T, H, dtype=torch.bfloat16, device="meta"), torch.empty(V, H, device="meta").bfloat16()
    index = torch.empty(T, dtype=torch.long, device="meta")
    odds_gemm.fused_odds(hidden, weight, None, index, 1.0, None)
    odds_pass.cublas_odds(hidden, weight, None, index, 1.0, None)
    assert all(x is hidden for _, x in launches)
    names = {name for name, _ in launches}
    launches.clear()
    logprob = torch.empty(T, device="meta")
    rows = Rows(logprob, torch.empty(1, 2, device="meta"), index, index, *(None,) * 6)
    policy_loss_kernel.fused_row_losses(rows, 1.0, DEFAULTS)
    assert all(x is logprob for _, x in launches)
    names |= {name for name, _ in launches}
    modules = (odds_gemm, odds_pass, odds_rows, policy_loss_kernel)
    assert names == {name for module in modules for name in vars(module) if name.endswith("_kernel")}


@pytest.fixture
def sharded() -> Iterator[nn.Linear]:
    """An LM head as FSDP2 keeps it, over a group of one process."""
    begun = dist.is_initialized()  # by an engine that an earlier test of this process has run
    if not begun:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    layer = nn.Linear(H, V)
    fully_shard(layer, mesh=init_device_mesh("cpu", (1,)))
    yield layer
    if not begun:
        dist.destroy_process_group()


def test_a_sharded_head_is_refused_in_words_and_a_gathered_one_trains(sharded: nn.Linear) -> None:
    hidden, target = torch.randn(T, H), torch.randint(0, V, (T,))
    table = torch.zeros(T, dtype=torch.long)
    for weight, bias, name in ((sharded.weight, None, "weight"), (sharded.weight.full_tensor(), sharded.bias, "bias")):
        message = rf"^{{}}: {name} is a DTensor, of which a rank holds a part; pass {name}\.full_tensor\(\)$"
        with pytest.raises(TypeError, match=message.format("linear_logprob")):
            linear_logprob(hidden, weight, target, bias=bias)
        with pytest.raises(TypeError, match=message.format("fused_policy_loss")):
            fused_policy_loss(
                hidden, weight, target, torch.tensor([[1.0, 0.0]]), table, table, denominator=1.0, bias=bias
            )
    weight, bias = sharded.weight.full_tensor(), sharded.bias.full_tensor()
    linear_logprob(hidden, weight, target, bias=bias).sum().backward()
    logits = nn.functional.linear(hidden, weight, bias)
    want = torch.autograd.grad(logits.log_softmax(-1).gather(1, target[:, None]).sum(), sharded.weight)[0]
    assert sharded.weight.grad is not None
    torch.testing.assert_close(sharded.weight.grad.full_tensor(), want.full_tensor())


FUSED = torch.ops.gapg.fused_policy_loss
FORWARD, BACKWARD = torch.ops.gapg.linear_logprob, torch.ops.gapg.linear_logprob_backward
HIDDEN, WEIGHT, INDEX, FLOATS = torch.zeros(T, H), torch.zeros(V, H), torch.zeros(T, dtype=torch.long), torch.zeros(T)
COMMON = {"hidden": HIDDEN, "weight": WEIGHT, "target": INDEX, "bias": None, "temperature": 1.0}
COMMON |= {"workspace_bytes": 1 << 20}
LOSS = {"rewards": torch.tensor([[1.0, 0.0]]), "group": INDEX, "sample": INDEX, "advantage": "gapg", "kl": "k3"}
LOSS |= {"kl_coef": 0.0, "denominator": 1.0, "loss_scale": 1.0, "with_entropy": False, "drop": True, "patched": False}
LOSS |= dict.fromkeys(("coefficient", "old_logprob", "rollout_logprob", "reference_logprob", "main_grad"))
LOSS |= dict.fromkeys(("clip_low", "clip_high", "tis_cap"))
ODDS = {"grad": FLOATS, "odds": FLOATS, "unit": FLOATS + 1}


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
    arguments = COMMON | arguments
    with FlopCounterMode(display=False) as counter:
        operator(**arguments)
    assert counter.get_total_flops() == gemms * 2 * T * H * V
    shapes = {name: x.shape if isinstance(x, Tensor) else x for name, x in arguments.items()}
    assert flop_registry[operator](**shapes, out_val=None) == gemms * 2 * T * H * V
