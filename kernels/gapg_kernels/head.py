"""What the fused heads share: the inputs they accept, and the sums of their gradients."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload

from gapg_kernels import reference
from gapg_kernels.reference import RowScales


def check_inputs(
    caller: str, hidden: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None, temperature: float
) -> None:
    """Raises TypeError or ValueError, one line that begins with ``caller`` and names the fix."""
    refuse_sharded(caller, hidden=hidden, weight=weight, target=target, bias=bias)
    if torch.float16 in (hidden.dtype, weight.dtype):
        raise TypeError(f"{caller}: float16 is too narrow for the odds form; pass bfloat16 or float32 tensors")
    if hidden.dtype not in (torch.bfloat16, torch.float32, torch.float64) or weight.dtype != hidden.dtype:
        raise TypeError(
            f"{caller}: hidden ({hidden.dtype}) and weight ({weight.dtype}) must both be bfloat16 or both float32"
        )
    if bias is not None and bias.dtype not in (hidden.dtype, torch.float32):
        raise TypeError(f"{caller}: bias is {bias.dtype}; pass {hidden.dtype} or torch.float32")
    if target.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"{caller}: target is {target.dtype}; pass int64 token ids")
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(
            f"{caller}: hidden {tuple(hidden.shape)} and weight {tuple(weight.shape)} must be [T, H] and [V, H]"
        )
    if target.shape != hidden.shape[:1]:
        raise ValueError(f"{caller}: target {tuple(target.shape)} must be [{hidden.shape[0]}]")
    if weight.shape[0] == 0 or (bias is not None and bias.shape != weight.shape[:1]):
        raise ValueError(f"{caller}: weight needs at least one row, and bias must be [V]")
    if not (temperature > 0 and math.isfinite(temperature)):
        raise ValueError(f"{caller}: temperature must be positive and finite, not {temperature}")


def refuse_sharded(caller: str, **inputs: Tensor | None) -> None:
    """Raises TypeError for a DTensor, one line that says what to pass instead of a sharded parameter.

    Not just ``full_tensor()``: its backward takes every rank's gradient for the whole one and keeps a part of it, so
    ranks with different rows would each train their part of the weight on their own rows only.
    """
    for name, x in inputs.items():
        if hasattr(x, "full_tensor"):  # without importing torch.distributed
            raise TypeError(
                f"{caller}: {name} is a DTensor, of which a rank holds a part; pass a plain tensor, such as "
                "weight.full_tensor(grad_placements=[Partial('avg')]) where ranks average gradients, as FSDP does, "
                "or with [Partial()] where they add them"
            )


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """Autocast would round the float32 products inside the heads to 16 bits. (The meta device knows no autocast.)"""
    return nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)


class HeadGradients:
    """The gradients of hidden, weight and bias, added up chunk by chunk in float32 and rounded once.

    Args:
        hidden: [T, H].
        weight: [V, H].
        bias: [V] or None.
        needs: which of the three are wanted; the others stay empty.
        main_grad: [V, H] float32, takes the sum of dW in place; then ``weight`` stays empty.
    """

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        needs: Sequence[bool],
        main_grad: Tensor | None = None,
    ) -> None:
        self.inputs, self.needs, self.in_place = (hidden, weight, bias), needs, main_grad is not None
        self.hidden = hidden.new_empty(hidden.shape if needs[0] else (0,))
        self._weight_sum: Tensor | None = main_grad
        self._bias_sum: Tensor | None = None

    def add(self, part: slice, e: Tensor, index: Tensor, scales: RowScales) -> None:
        """One chunk: its rows, E [C, V], its targets (always in range) and its row scales."""
        hidden, weight, _ = self.inputs
        if self.needs[0]:
            self.hidden[part] = reference.hidden_gradient(e, weight, index, scales, hidden.dtype)
        if self.needs[1]:
            self._weight_sum = reference.add_weight_gradient(self._weight_sum, e, hidden[part], index, scales)
        if self.needs[2]:
            self._bias_sum = reference.add_bias_gradient(self._bias_sum, e, index, scales)

    def results(self) -> tuple[Tensor, Tensor, Tensor]:
        """(dH, dW, dbias) in the types of their inputs; zeros where there was no row."""
        hidden, weight, bias = self.inputs
        sums = [None if self.in_place else self._weight_sum, self._bias_sum]
        unsummed = [need and total is None for need, total in zip(self.needs[1:], sums, strict=True)]
        _, *grads = empty_gradients(hidden, weight, bias, [False, *unsummed], self.in_place)
        for i, total in enumerate(sums):
            grads[i] = grads[i].zero_() if total is None else total.to(grads[i].dtype)
        return self.hidden, grads[0], grads[1]


def empty_gradients(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, needs: Sequence[bool], main_grad: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Unwritten (dH, dW, dbias); of no elements where not needed, or summed elsewhere."""
    return (
        hidden.new_empty(hidden.shape if needs[0] else (0,)),
        weight.new_empty(weight.shape if needs[1] and not main_grad else (0,)),
        hidden.new_empty(weight.shape[:1] if needs[2] else (0,), dtype=hidden.dtype if bias is None else bias.dtype),
    )


def by_name(operator: OpOverload, args: Sequence[Any], named: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The arguments of a call of the operator; a counter of work may pass any of them by name."""
    names = (argument.name for argument in operator._schema.arguments)
    return dict(zip(names, args, strict=False)) | dict(named or {})
