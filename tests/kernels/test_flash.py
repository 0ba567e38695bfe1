"""Which FlashAttention is chosen, by implementations that PyTorch activates on the CPU; no GPU runs here."""

import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch.nn.attention import _registry, activate_flash_attention_impl, current_flash_attention_impl

from gapg_kernels import flash
from tests.kernels import flash_on_cpu
from tests.kernels.flash_on_cpu import backward, forward

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def fa2() -> Iterator[None]:
    """The CPU has PyTorch's own; whatever a test activates is gone after it."""
    with flash_on_cpu.kernels():
        yield
        if current_flash_attention_impl():
            _registry.restore_flash_attention_impl()


class Activated:
    """What PyTorch keeps of an active implementation."""

    def __init__(self, forward: Any, backward: Any) -> None:
        self.library = torch.library.Library("aten", "IMPL")
        self.library.impl("_flash_attention_forward", forward, "CPU", allow_override=True)
        self.library.impl("_flash_attention_backward", backward, "CPU", allow_override=True)

    def remove(self) -> None:
        self.library._destroy()


@pytest.fixture
def offer(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """`offer(name, forward, backward)`: PyTorch can activate this from now on."""

    def add(name: str, forward: Any = forward, backward: Any = backward) -> None:
        monkeypatch.setitem(_registry._FLASH_ATTENTION_IMPLS, name, lambda: Activated(forward, backward))

    return add


def test_without_packages_it_is_pytorchs_own_and_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    for package in ("flash_attn.cute.interface", "flash_attn_interface"):  # a machine may have them
        monkeypatch.setitem(sys.modules, package, None)
    line = flash.activate(CPU, [64])
    assert current_flash_attention_impl() is None
    assert line.startswith("PyTorch's FA2 (FA4: ") and "; FA3: " in line and line.count("flash_attn") == 2, line


def test_the_newest_that_works_is_active_and_reaches_the_operators(offer: Callable[..., None]) -> None:
    calls: list[tuple[int, int | None]] = []

    def noted(q: Any, *args: Any, window_size_left: int | None = None, **keywords: Any) -> Any:
        calls.append((q.shape[-1], window_size_left))
        return forward(q, *args, window_size_left=window_size_left, **keywords)

    offer("FA4", noted)
    offer("FA3")
    assert flash.activate(CPU, [64, 128]) == "FA4" == current_flash_attention_impl()
    assert calls == [(size, left) for size in (64, 128) for left in (None, None, 39)]
    q, cu = torch.randn(4, 2, 8).bfloat16(), torch.tensor([0, 4], dtype=torch.int32)
    flash.packed(q, q, q, flash.Lengths(cu, cu, 4, 4, True), 0.3)
    assert len(calls) == 7
    assert flash.activate(CPU, [64]) == "FA4, which was active before" and len(calls) == 7


def blind_to_windows(
    *args: Any, window_size_left: int | None = None, window_size_right: int | None = None, **rest: Any
) -> Any:
    return forward(*args, **rest)


def blind_to_the_merged_lse(grad: Any, q: Any, k: Any, v: Any, out: Any, lse: Any, *rest: Any, **keywords: Any) -> Any:
    *where, _seed, _unused = rest
    own = forward(q, k, v, *where, False, **keywords)[1]
    return backward(grad, q, k, v, out, own, *rest, **keywords)


def without_zeros_for_no_query(*args: Any, **keywords: Any) -> Any:
    dq, dk, dv = backward(*args, **keywords)
    seen = torch.cat([torch.full((keys,), queries > 0) for queries, keys in zip(*map(lengths, args[6:8]), strict=True)])
    return dq, dk.masked_fill(~seen[:, None, None], 1.0), dv


def lengths(cu: torch.Tensor) -> list[int]:
    return cu.diff().tolist()


def of_another_version(*args: Any, **keywords: Any) -> Any:
    out, lse = forward(*args, **keywords)[:5]  # too many values to unpack
    return out, lse


def of_nan(*args: Any, **keywords: Any) -> Any:
    out, *rest = forward(*args, **keywords)
    return out * torch.nan, *rest


@pytest.mark.parametrize(
    ("functions", "reason"),
    [
        ({"forward": blind_to_windows}, "off what FA2 computes"),
        ({"forward": of_nan}, "with heads of 64 it is nan off what FA2 computes"),
        ({"backward": blind_to_the_merged_lse}, "off what FA2 computes"),
        ({"backward": without_zeros_for_no_query}, "off what FA2 computes"),
        ({"forward": of_another_version}, "too many values to unpack"),
    ],
)
def test_one_that_computes_something_else_or_fails_is_left(
    functions: dict[str, Any], reason: str, offer: Callable[..., None]
) -> None:
    offer("FA4", **functions)
    offer("FA3")
    line = flash.activate(CPU, [64])
    assert line.startswith("FA3 (FA4: ") and reason in line and "\n" not in line
    assert current_flash_attention_impl() == "FA3"
    _registry.restore_flash_attention_impl()
    offer("FA3", **functions)
    assert reason in flash.activate(CPU, [64]) and current_flash_attention_impl() is None
    assert all(x.isfinite().all() for x in flash._trial(CPU, 64))  # PyTorch's own is back


def test_one_that_somebody_activated_stays(offer: Callable[..., None]) -> None:
    offer("FA4")
    offer("FA3")
    activate_flash_attention_impl("FA3")
    assert flash.activate(CPU, [64]) == "FA3, which was active before"


def test_it_is_called_on_the_device_of_its_tensors(current: list[torch.Tensor], offer: Callable[..., None]) -> None:
    """FA4 asks for the current device's architecture."""
    seen: list[torch.Tensor] = []

    def noted(function: Any) -> Any:
        return lambda *args, **keywords: seen.append(current[-1]) or function(*args, **keywords)

    offer("FA4", noted(forward), noted(backward))
    activate_flash_attention_impl("FA4")
    q, cu = torch.randn(4, 2, 8).bfloat16(), torch.tensor([0, 4], dtype=torch.int32)
    out, lse = flash.forward(q, q, q, flash.Lengths(cu, cu, 4, 4, True), 0.3)
    flash.backward(out, q, q, q, out, lse, flash.Lengths(cu, cu, 4, 4, True), 0.3)
    assert len(seen) == 2 and all(x is q for x in seen) and not current


@pytest.mark.parametrize("head_dim", [264, 20])
def test_head_sizes_that_no_flash_attention_has(head_dim: int) -> None:
    q, cu = torch.empty(4, 2, head_dim, dtype=torch.bfloat16, device="meta"), torch.empty(2, dtype=torch.int32)
    with pytest.raises(ValueError, match=f"at most 256, not {head_dim}: compute in float32"):
        flash.packed(q, q, q, flash.Lengths(cu, cu, 4, 4, True), 0.3)
