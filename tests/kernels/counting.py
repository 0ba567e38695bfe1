"""Counting what a kernel does from what it calls: GEMM shapes, Triton launches, live bytes. On any device, meta too."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import pytest
import torch
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_aten = torch.ops.aten

beyond_torch_2_11 = pytest.mark.skipif(
    torch.__version__.startswith("2.11."),
    reason="on the meta device torch 2.11 adds no product to a float32 sum, and its counter refuses grouped heads",
)


def arguments_of(operator: OpOverload, **given: Any) -> dict[str, Any]:
    """The operator's arguments by name; those not given are None, which only the optional ones may be."""
    optional = {argument.name: None for argument in operator._schema.arguments if "Optional" in str(argument.type)}
    return optional | given


class Launch(NamedTuple):
    """One Triton launch: the kernel's name, its arguments by name (of tensors the shape), the grid."""

    kernel: str
    arguments: dict[str, Any]
    grid: tuple[int, ...]


@contextmanager
def triton_launches() -> Iterator[list[Launch]]:
    """Records launches instead of making them: what the host code asks of a GPU, without one."""
    from triton.runtime.jit import JITFunction

    launches: list[Launch] = []

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        shapes = [tuple(x.shape) if hasattr(x, "shape") else x for x in args]  # keeping a tensor would keep it alive
        named = dict(zip(self.arg_names, shapes, strict=False)) | options
        launches.append(Launch(self.fn.__name__, named, tuple(grid)))

    real = JITFunction.run
    JITFunction.run = run
    try:
        yield launches
    finally:
        JITFunction.run = real


class Work(TorchDispatchMode):
    """FLOPs of every matrix product below it, from the shapes of its factors; and the peak of bytes alive at once.

    Only storages made under the mode count, so inputs do not. ``gemms`` holds (m, k, n) of each product.
    """

    def __init__(self) -> None:
        super().__init__()
        self.gemms: list[tuple[int, int, int]] = []
        self.live = self.peak = 0
        self._seen: set[int] = set()

    @property
    def flops(self) -> int:
        return sum(2 * m * k * n for m, k, n in self.gemms)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func._schema.name
        if name in ("aten::mm", "aten::addmm", "aten::bmm"):
            a, b = (args[1], args[2]) if name == "aten::addmm" else (args[0], args[1])
            self.gemms.append((a.shape[-2], a.shape[-1], b.shape[-1]))
        inputs = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        for x in tree_leaves(out):
            if isinstance(x, torch.Tensor) and x.untyped_storage()._cdata not in inputs | self._seen:
                self._watch(x.untyped_storage())
        return out

    def _watch(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        self._seen.add(key)
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._release, key, size)

    def _release(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.live -= size
