"""Log-probabilities of given tokens from hidden states and the LM head, without ever holding [T, V].

``linear_logprob`` is ``log_softmax(hidden @ weight^T / temperature)`` gathered at ``target``, in the odds form of
`gapg.kernels.definition`: chunked over rows, no pass over the vocabulary between the GEMMs, 6THV flops for forward and
backward while E fits the workspace and 8THV when it is recomputed. The policy-gradient losses of arXiv 2509.24050 are
sums of its result times per-token coefficients.

On CUDA sm_90 in bfloat16 the forward is the Triton kernel of `gapg.kernels.odds_gemm`; everywhere else it is the plain
definition over the device's own GEMM.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from gapg.kernels import definition
from gapg.kernels.definition import RowOdds

DEFAULT_WORKSPACE = 2 << 30
PITCH = 64
"""E's rows are this many elements apart or a multiple of it: an odd V would break TMA stores and slow the GEMMs."""

KERNEL_CAPABILITY = (9, 0)
"""The CUDA architecture the Triton kernels are compiled and checked for."""


def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    workspace_bytes: int = DEFAULT_WORKSPACE,
) -> Tensor:
    """``log_softmax((hidden @ weight^T + bias) / temperature)[t, target[t]]`` for every row t.

    Differentiable in hidden, weight and bias; an input that needs no gradient costs none (a frozen weight skips dW).
    The result and the gradients are the same bits from run to run.

    Args:
        hidden: [T, H] bfloat16 or float32. T may be 0.
        weight: [V, H], hidden's dtype. Any V.
        target: [T] int64 (or int32) token ids. -100 masks a row: log-prob 0, no gradient. Any other id outside
            [0, V) gives NaN, in the log-prob and in the gradients it takes part in.
        bias: [V] in hidden's dtype or float32, or None.
        temperature: divides the logits; positive.
        workspace_bytes: limit for E and the scratch of a chunk. Inputs, gradients and the float32 sum of dW are not
            counted, nor float32 copies of bfloat16 factors on a CPU, which has no 16-bit GEMM with a wide result.

    Returns:
        [T] float32 log-probs, all sums in float32.

    Raises:
        TypeError: float16 or mixed dtypes; non-integer targets.
        ValueError: shapes that do not agree; a temperature that is not positive; a workspace under one row.
    """
    _check(hidden, weight, target, bias, temperature)
    grad = torch.is_grad_enabled() and (
        hidden.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)
    )
    plan = _Plan.of(hidden, weight, workspace_bytes, kernel=False)  # the larger need: whether E is kept never
    plan.require_one_row(grad)  # depends on the device, and a compiler can trace it
    keep = grad and plan.fits(hidden.shape[0])
    logprob: Tensor
    logprob, *_ = _forward_op(hidden, weight, target.long(), bias, float(temperature), workspace_bytes, keep)
    return logprob


def _check(hidden: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None, temperature: float) -> None:
    if hidden.dtype == torch.float16 or weight.dtype == torch.float16:
        raise TypeError("linear_logprob: float16 is too narrow for the odds form; pass bfloat16 or float32 tensors")
    if hidden.dtype not in (torch.bfloat16, torch.float32) or weight.dtype != hidden.dtype:
        raise TypeError(
            f"linear_logprob: hidden ({hidden.dtype}) and weight ({weight.dtype}) must both be bfloat16 or both float32"
        )
    if bias is not None and bias.dtype not in (hidden.dtype, torch.float32):
        raise TypeError(f"linear_logprob: bias is {bias.dtype}; pass {hidden.dtype} or torch.float32")
    if target.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"linear_logprob: target is {target.dtype}; pass int64 token ids")
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(
            f"linear_logprob: hidden {tuple(hidden.shape)} and weight {tuple(weight.shape)} must be [T, H] and [V, H]"
        )
    if target.shape != hidden.shape[:1]:
        raise ValueError(f"linear_logprob: target {tuple(target.shape)} must be [{hidden.shape[0]}]")
    if weight.shape[0] == 0 or (bias is not None and bias.shape != weight.shape[:1]):
        raise ValueError("linear_logprob: weight needs at least one row, and bias must be [V]")
    if not (temperature > 0 and math.isfinite(temperature)):
        raise ValueError(f"linear_logprob: temperature must be positive and finite, not {temperature}")


class _Plan(NamedTuple):
    """How many rows a chunk may have. ``stored``: bytes of a row of E; ``scratch``: bytes a row needs besides."""

    vocab: int
    stored: int
    scratch: int
    workspace: int

    @staticmethod
    def of(hidden: Tensor, weight: Tensor, workspace: int, *, kernel: bool) -> _Plan:
        vocab = weight.shape[0]
        stored = _pitch(vocab, hidden.dtype) * hidden.element_size()
        if kernel:
            scratch = 4 * -(-vocab // 128)  # partial sums, one a vocabulary tile
        else:
            scratch = 0 if hidden.dtype == torch.float32 else 4 * vocab  # float32 logits; float32 makes E in place
        return _Plan(vocab, stored, scratch, workspace)

    def fits(self, rows: int) -> bool:
        """Whether E for all rows fits, with room left to work on at least 256 of them at a time."""
        return rows * self.stored + min(rows, 256) * self.scratch <= self.workspace

    def require_one_row(self, grad: bool) -> None:
        need = self.stored + self.scratch if grad else max(self.stored, self.scratch)
        if need > self.workspace:
            raise ValueError(f"linear_logprob: one row needs {need} bytes, workspace_bytes is {self.workspace}")

    def chunks(self, rows: int, *, kept: bool, store: bool) -> Iterator[slice]:
        """Equal chunks, as few as the workspace allows: a short last chunk would waste the GEMMs' efficiency."""
        room = self.workspace - (rows * self.stored if kept else 0)
        each = self.scratch if kept else self.scratch + self.stored if store else max(self.scratch, self.stored)
        most = max(1, room // each) if each else rows
        count = -(-rows // most) if rows else 0
        size = -(-rows // count) if count else 0
        if count > 1 and (rounded := -(-size // 256) * 256) <= most:
            size = rounded
        return (slice(at, min(at + size, rows)) for at in range(0, rows, max(size, 1)))


def _pitch(vocab: int, dtype: torch.dtype) -> int:
    return vocab if dtype == torch.float32 else -(-vocab // PITCH) * PITCH


def uses_kernel(hidden: Tensor) -> bool:
    """Whether the Triton forward runs: bfloat16 on a CUDA device of compute capability 9.0, H a multiple of 16."""
    return (
        hidden.is_cuda
        and hidden.dtype == torch.bfloat16
        and hidden.shape[1] % 16 == 0
        and torch.cuda.get_device_capability(hidden.device) == KERNEL_CAPABILITY
    )


def describe(device: torch.device | str) -> str:
    """Which forward `linear_logprob` takes on this device, and why, in one line."""
    device = torch.device(device)
    if device.type != "cuda":
        return f"plain PyTorch in odds form (the Triton kernel needs CUDA; this is {device.type})"
    major, minor = torch.cuda.get_device_capability(device)
    if (major, minor) != KERNEL_CAPABILITY:
        return f"plain PyTorch in odds form over cuBLAS (the Triton kernel is for sm_90; this is sm_{major}{minor})"
    return "Triton GEMM with odds epilogue (sm_90) for bfloat16; plain PyTorch in odds form over cuBLAS for float32"


Route = Callable[[Tensor, Tensor, Tensor | None, Tensor, float, Tensor | None], RowOdds]


def _route(hidden: Tensor) -> Route:
    if uses_kernel(hidden):
        from gapg.kernels.odds_gemm import fused_odds  # triton is imported only where it runs

        return fused_odds
    return definition.plain_odds


@torch.library.custom_op("gapg::linear_logprob", mutates_args=())
def _forward_op(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    temperature: float,
    workspace_bytes: int,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns (logprob [T], S [T], exp(-b) [T], E [T, pitch] when kept, else [0, pitch])."""
    rows, vocab = hidden.shape[0], weight.shape[0]
    hidden, weight = hidden.contiguous(), weight.contiguous()
    logprob, odds, unit, e = _forward_outputs(hidden, weight, keep)
    route = _route(hidden)
    plan = _Plan.of(hidden, weight, workspace_bytes, kernel=uses_kernel(hidden))
    with torch.autocast(hidden.device.type, enabled=False):  # it would round the float32 GEMMs in here to 16 bits
        for part in plan.chunks(rows, kept=keep, store=keep):
            store = e[part, :vocab] if keep else None
            chunk = route(hidden[part], weight, bias, target[part], temperature, store)
            logprob[part], odds[part], unit[part] = chunk
    return logprob, odds, unit, e


@_forward_op.register_fake
def _(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    temperature: float,
    workspace_bytes: int,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _forward_outputs(hidden, weight, keep)


def _forward_outputs(hidden: Tensor, weight: Tensor, keep: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows = hidden.shape[0]
    logprob, odds, unit = (hidden.new_empty(rows, dtype=torch.float32) for _ in range(3))
    e = hidden.new_empty(rows if keep else 0, _pitch(weight.shape[0], hidden.dtype))
    return logprob, odds, unit, e


@torch.library.custom_op("gapg::linear_logprob_backward", mutates_args=())
def _backward_op(
    grad: Tensor,
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    odds: Tensor,
    unit: Tensor,
    e: Tensor,
    temperature: float,
    workspace_bytes: int,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns (dH, dW, dbias); those not in ``needs`` are empty. ``e`` with no rows is recomputed, chunk by chunk."""
    (rows, _), vocab = hidden.shape, weight.shape[0]
    kept = e.shape[0] == rows
    hidden, weight = hidden.contiguous(), weight.contiguous()
    grad_hidden, grad_weight, grad_bias = _backward_outputs(hidden, weight, bias, needs)
    index, _ = definition.safe_targets(target, vocab)
    scales = definition.row_scales(grad.float(), odds, unit, target, temperature)
    weight_sum: Tensor | None = None
    bias_sum: Tensor | None = None
    route = _route(hidden)
    plan = _Plan.of(hidden, weight, workspace_bytes, kernel=uses_kernel(hidden))
    with torch.autocast(hidden.device.type, enabled=False):
        for part in plan.chunks(rows, kept=kept, store=True):
            h, y = hidden[part], index[part]
            chunk = definition.RowScales(*(scale[part] for scale in scales))
            if kept:
                e_part = e[part, :vocab]
            else:
                e_part = e.new_empty(h.shape[0], e.shape[1])[:, :vocab]
                route(h, weight, bias, target[part], temperature, e_part)
            if needs[0]:
                grad_hidden[part] = definition.hidden_gradient(e_part, weight, y, chunk, hidden.dtype)
            if needs[1]:
                weight_sum = definition.add_weight_gradient(weight_sum, e_part, h, y, chunk)
            if needs[2]:
                bias_sum = definition.add_bias_gradient(bias_sum, e_part, y, chunk)
    if needs[1]:
        grad_weight = grad_weight.zero_() if weight_sum is None else weight_sum.to(weight.dtype)
    if needs[2]:
        grad_bias = grad_bias.zero_() if bias_sum is None else bias_sum.to(grad_bias.dtype)
    return grad_hidden, grad_weight, grad_bias


@_backward_op.register_fake
def _(
    grad: Tensor,
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    odds: Tensor,
    unit: Tensor,
    e: Tensor,
    temperature: float,
    workspace_bytes: int,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    return _backward_outputs(hidden, weight, bias, needs)


def _backward_outputs(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, needs: Sequence[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    bias_dtype = hidden.dtype if bias is None else bias.dtype
    return (
        hidden.new_empty(hidden.shape if needs[0] else (0,)),
        weight.new_empty(weight.shape if needs[1] else (0,)),
        hidden.new_empty(weight.shape[:1] if needs[2] else (0,), dtype=bias_dtype),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
    hidden, weight, target, bias, ctx.temperature, ctx.workspace_bytes, _ = inputs
    _, odds, unit, e = output
    ctx.set_materialize_grads(False)  # a gradient for E would be a [T, V] of zeros
    ctx.mark_non_differentiable(odds, unit, e)
    ctx.save_for_backward(hidden, weight, target, bias, odds, unit, e)


def _backward(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 7
    hidden, weight, target, bias, odds, unit, e = ctx.saved_tensors
    needs = [ctx.needs_input_grad[0], ctx.needs_input_grad[1], ctx.needs_input_grad[3]]
    grads = _backward_op(grad, hidden, weight, target, bias, odds, unit, e, ctx.temperature, ctx.workspace_bytes, needs)
    grad_hidden, grad_weight, grad_bias = (g if need else None for g, need in zip(grads, needs, strict=True))
    return grad_hidden, grad_weight, None, grad_bias, None, None, None


_forward_op.register_autograd(_backward, setup_context=_setup_context)


@register_flop_formula(torch.ops.gapg.linear_logprob)
def _forward_flops(hidden: torch.Size, weight: torch.Size, *_: Any, **__: Any) -> int:
    return 2 * hidden[0] * hidden[1] * weight[0]


@register_flop_formula(torch.ops.gapg.linear_logprob_backward)
def _backward_flops(
    grad: torch.Size,
    hidden: torch.Size,
    weight: torch.Size,
    target: torch.Size,
    bias: torch.Size | None,
    odds: torch.Size,
    unit: torch.Size,
    e: torch.Size,
    temperature: float,
    workspace_bytes: int,
    needs: Sequence[bool],
    **_: Any,
) -> int:
    gemms = int(needs[0]) + int(needs[1]) + int(e[0] != hidden[0])
    return 2 * gemms * hidden[0] * hidden[1] * weight[0]
