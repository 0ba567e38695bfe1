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
from gapg_kernels.chunks import sum_dtype
from gapg_kernels.reference import RankOne, RowScales


def check_inputs(
    caller: str,
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    temperature: float,
    softcap: float | None = None,
) -> None:
    """Raises TypeError or ValueError, one line that begins with ``caller`` and names the fix."""
    for name, x in (("hidden", hidden), ("weight", weight), ("target", target), ("bias", bias)):
        if not isinstance(x, Tensor) and not (x is None and name == "bias"):
            raise TypeError(f"{caller}: {name} is a {type(x).__name__}; pass a tensor, such as lm_head.weight")
        if x is not None and x.device != hidden.device:
            raise ValueError(f"{caller}: {name} is on {x.device}; move it to {hidden.device}, where hidden is")
    refuse_sharded(caller, hidden=hidden, weight=weight, target=target, bias=bias)
    if torch.float16 in (hidden.dtype, weight.dtype):
        raise TypeError(
            f"{caller}: float16 is too narrow for the odds form; pass bfloat16 or float32 tensors, "
            "under autocast torch.autocast(device, torch.bfloat16)"
        )
    master = hidden.dtype == torch.bfloat16 and weight.dtype == torch.float32
    if hidden.dtype not in (torch.bfloat16, torch.float32, torch.float64) or not (
        weight.dtype == hidden.dtype or master
    ):
        raise TypeError(
            f"{caller}: hidden ({hidden.dtype}) and weight ({weight.dtype}) must both be bfloat16 or both float32, or "
            "hidden bfloat16 and weight its float32 master: pass hidden.to(weight.dtype)"
        )
    if bias is not None and bias.dtype not in (hidden.dtype, torch.float32):
        wanted = " or ".join(str(dtype) for dtype in dict.fromkeys([hidden.dtype, torch.float32]))
        raise TypeError(f"{caller}: bias is {bias.dtype}; pass {wanted}")
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
    if not 0 < temperature < math.inf:
        raise ValueError(f"{caller}: temperature must be positive and finite, not {temperature}")
    if softcap is not None and not 0 < softcap < math.inf:
        raise ValueError(f"{caller}: softcap must be positive and finite, or None for no softcap, not {softcap}")


def wanted(hidden: Tensor, weight: Tensor, bias: Tensor | None, main_grad: Tensor | None = None) -> list[bool]:
    """Whether gradients of hidden, weight and bias are wanted; none is where they are disabled."""
    asked = hidden.requires_grad, weight.requires_grad or main_grad is not None, bias is not None and bias.requires_grad
    return [torch.is_grad_enabled() and need for need in asked]


def check_main_grad(caller: str, main_grad: Tensor | None, weight: Tensor) -> None:
    """Raises ValueError unless ``main_grad`` is a contiguous sum for ``weight``'s gradient on its device, or None."""
    if main_grad is None:
        return
    dtype = sum_dtype(weight.dtype)
    alike = main_grad.shape == weight.shape and main_grad.device == weight.device
    if not alike or main_grad.dtype != dtype or not main_grad.is_contiguous():
        raise ValueError(
            f"{caller}: main_grad {tuple(main_grad.shape)} {main_grad.dtype} on {main_grad.device} must be contiguous "
            f"{tuple(weight.shape)} {dtype} on {weight.device}"
        )


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


def follow_autocast(hidden: Tensor) -> Tensor:
    """``hidden`` in autocast's type where that is on, as `torch.nn.functional.linear` would have it; differentiable.

    The weight stays as it is: a float32 one is a master, which is rounded inside and whose gradient is not.
    """
    kind = hidden.device.type
    if kind == "meta" or hidden.dtype == torch.float64 or not torch.is_autocast_enabled(kind):
        return hidden
    return hidden.to(torch.get_autocast_dtype(kind))


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """Autocast would round the float32 products inside the heads to 16 bits. (The meta device knows no autocast.)"""
    return nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)


class HeadGradients:
    """The gradients of weight and bias, added up chunk by chunk in float32 and rounded once; a chunk's of hidden.

    Args:
        weight: [V, H], the one whose gradient is wanted: what the products take, or its float32 master.
        bias: [V] or None.
        needs: which of the gradients of hidden, weight and bias are wanted; the others stay empty.
        main_grad: [V, H] float32, takes the sum of dW in place; then ``weight``'s stays empty.
    """

    def __init__(
        self, weight: Tensor, bias: Tensor | None, needs: Sequence[bool], main_grad: Tensor | None = None
    ) -> None:
        self.weight, self.bias, self.needs = weight, bias, needs
        self.in_place = main_grad is not None
        self._weight_sum: Tensor | None = main_grad
        self._bias_sum: Tensor | None = None

    def add(
        self, hidden: Tensor, weight: Tensor, e: Tensor, index: Tensor, scales: RowScales, extra: RankOne | None = None
    ) -> Tensor | None:
        """One chunk: hidden [C, H] and weight [V, H] as the products took them, E [C, V], its targets (in range), its
        row scales. Returns dH [C, H], or None where it is not wanted."""
        if self.needs[1]:
            self._weight_sum = reference.add_weight_gradient(self._weight_sum, e, hidden, index, scales, extra)
        if self.needs[2]:
            self._bias_sum = reference.add_bias_gradient(self._bias_sum, e, index, scales, extra)
        if self.needs[0]:
            return reference.hidden_gradient(e, weight, index, scales, hidden.dtype, extra)
        return None

    def results(self) -> tuple[Tensor, Tensor]:
        """(dW, dbias) in the types of their inputs; zeros where there was no row."""
        sums = [None if self.in_place else self._weight_sum, self._bias_sum]
        unsummed = [need and total is None for need, total in zip(self.needs[1:], sums, strict=True)]
        grads = list(empty_sums(self.weight, self.bias, unsummed, self.in_place))
        for i, total in enumerate(sums):
            grads[i] = grads[i].zero_() if total is None else total.to(grads[i].dtype)
        return grads[0], grads[1]


def empty_gradients(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, needs: Sequence[bool], main_grad: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Unwritten (dH, dW, dbias); of no elements where not needed, or summed elsewhere."""
    return hidden.new_empty(hidden.shape if needs[0] else (0,)), *empty_sums(weight, bias, needs[1:], main_grad)


def empty_sums(weight: Tensor, bias: Tensor | None, needs: Sequence[bool], main_grad: bool) -> tuple[Tensor, Tensor]:
    """The same of weight and bias alone."""
    like = weight if bias is None else bias
    return (
        weight.new_empty(weight.shape if needs[0] and not main_grad else (0,)),
        like.new_empty(weight.shape[:1] if needs[1] else (0,)),
    )


def by_name(operator: OpOverload, args: Sequence[Any], named: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The arguments of a call of the operator; a counter of work may pass any of them by name."""
    names = (argument.name for argument in operator._schema.arguments)
    return dict(zip(names, args, strict=False)) | dict(named or {})
