"""Log-probabilities of given tokens from hidden states and the LM head, without ever holding [T, V].

``linear_logprob`` is ``log_softmax(hidden @ weight^T / temperature)`` gathered at ``target``, in the odds form of
`gapg_kernels.reference`: chunked over rows, no pass over the vocabulary between the GEMMs, 6THV flops for forward and
backward while E fits the workspace and 8THV when it is recomputed. The policy-gradient losses of arXiv 2509.24050 are
sums of its result times per-token coefficients.

Which forward a device gets `gapg_kernels.routes` says: a Triton kernel on CUDA in bfloat16, or the plain reference.

>>> import torch
>>> hidden, weight = torch.randn(6, 8, requires_grad=True), torch.randn(32, 8, requires_grad=True)
>>> target, advantage = torch.randint(32, (6,)), torch.randn(6)
>>> logprob = linear_logprob(hidden, weight, target)
>>> (-logprob * advantage).sum().backward()
>>> logprob.shape, weight.grad.shape
(torch.Size([6]), torch.Size([32, 8]))
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, overload

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from gapg_kernels import head, reference, routes
from gapg_kernels.chunks import ChunkPlan, pitch, sum_dtype, workspace_for
from gapg_kernels.reference import RowOdds


@overload
def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    return_entropy: Literal[False] = False,
    workspace_bytes: int | None = None,
) -> Tensor: ...


@overload
def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    return_entropy: Literal[True],
    workspace_bytes: int | None = None,
) -> tuple[Tensor, Tensor]: ...


def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    return_entropy: bool = False,
    workspace_bytes: int | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """``log_softmax((hidden @ weight^T + bias) / temperature)[t, target[t]]`` for every row t.

    Differentiable in hidden, weight and bias; an input that needs no gradient costs none (a frozen weight skips dW).
    The result and the gradients are the same bits from run to run.

    Args:
        hidden: [T, H] bfloat16 or float32; under autocast in its type, as for `torch.nn.functional.linear`. T may be 0.
            (float64 too, for gradcheck: then everything is float64.)
        weight: [V, H], hidden's dtype, any V; or float32 under bfloat16 hidden: a master, of which one rounded copy is
            made, and whose gradient is not rounded. Of a sharded weight (FSDP2) give
            ``weight.full_tensor(grad_placements=[Partial("avg")])`` where ranks average gradients, as FSDP does, or
            ``[Partial()]`` where they add them: plain ``full_tensor()`` would drop the other ranks' gradients.
        target: [T] int64 (or int32) token ids. -100 masks a row: log-prob 0, no gradient. Any other id outside
            [0, V) gives NaN, in the log-prob and in the gradients it takes part in.
        bias: [V] in hidden's dtype or float32, or None.
        temperature: divides the logits; positive.
        softcap: logits become ``softcap * tanh(logit / softcap)`` before the temperature; None: no.
        return_entropy: also give the entropy of every row's distribution over the vocabulary.
        workspace_bytes: limit for E and the scratch of a chunk; None: 2 GiB, but at most half of what a CUDA device has
            free (only then do bits depend on what else is there). Inputs, gradients, the float32 sum of dW and a master
            weight's copy are not counted, nor float32 copies of bfloat16 factors on a CPU, which has no 16-bit GEMM
            with a wide result.

    Returns:
        [T] float32 log-probs, all sums in float32; with ``return_entropy`` also [T] float32 entropies in nats, 0 where
        the row is masked. A gradient by the entropy costs one read and one write of E more; see `linear_loss`.

    Raises:
        TypeError: float16, or dtypes that do not go together; non-integer targets; a DTensor.
        ValueError: shapes that do not agree; a temperature that is not positive; a workspace under one row.
    """
    hidden = head.follow_autocast(hidden)
    head.check_inputs("linear_logprob", hidden, weight, target, bias, temperature, softcap)
    grad = any(head.wanted(hidden, weight, bias))
    # The larger need: whether E is kept then never depends on the device, and a compiler can trace it.
    workspace = workspace_for(hidden.device, workspace_bytes)
    plan = ChunkPlan.of(hidden, weight, workspace, kernel=False, entropy=return_entropy, softcap=softcap)
    plan.require_one_row("linear_logprob", grad=grad)
    keep = grad and (plan.with_copy() if return_entropy else plan).fits(hidden.shape[0])
    logprob: Tensor
    logprob, entropy, *_ = _forward_op(
        hidden, weight, target.long(), bias, float(temperature), softcap, workspace, keep, return_entropy
    )
    return (logprob, entropy) if return_entropy else logprob


@torch.library.custom_op("gapg::linear_logprob", mutates_args=())
def _forward_op(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    temperature: float,
    softcap: float | None,
    workspace_bytes: int,
    keep: bool,
    with_entropy: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Returns (logprob [T], entropy [T] or [0], S [T], exp(-b) [T], softcap's slope [T] or [0], E [T, pitch] when kept,
    else [0, pitch])."""
    rows, vocab = hidden.shape[0], weight.shape[0]
    outputs = _forward_outputs(hidden, weight, softcap, keep, with_entropy)
    logprob, entropy, odds, unit, slope, e = outputs
    hidden, weight = hidden.contiguous(), weight.to(hidden.dtype).contiguous()
    forward, kernel = routes.route(hidden), routes.uses_kernel(hidden)
    plan = ChunkPlan.of(hidden, weight, workspace_bytes, kernel=kernel, entropy=with_entropy, softcap=softcap)
    with head.without_autocast(hidden.device):
        for part in plan.chunks(rows, kept=keep, store=keep):
            store = e[part, :vocab] if keep else None
            chunk = forward(hidden[part], weight, bias, target[part], temperature, store, with_entropy, softcap)
            logprob[part], odds[part], unit[part] = chunk.logprob, chunk.odds, chunk.unit
            if chunk.entropy is not None:
                entropy[part] = chunk.entropy
            if chunk.slope is not None:
                slope[part] = chunk.slope
    return outputs


@_forward_op.register_fake
def _(hidden: Tensor, weight: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    _, _, _, softcap, _, keep, with_entropy = rest
    return _forward_outputs(hidden, weight, softcap, keep, with_entropy)


def _forward_outputs(
    hidden: Tensor, weight: Tensor, softcap: float | None, keep: bool, with_entropy: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    rows, wide = hidden.shape[0], sum_dtype(hidden.dtype)
    logprob, odds, unit = (hidden.new_empty(rows, dtype=wide) for _ in range(3))
    entropy, slope = (hidden.new_empty(rows if there else 0, dtype=wide) for there in (with_entropy, softcap))
    e = hidden.new_empty(rows if keep else 0, pitch(weight.shape[0], hidden.dtype))
    return logprob, entropy, odds, unit, slope, e


@torch.library.custom_op("gapg::linear_logprob_backward", mutates_args=())
def _backward_op(
    grad: Tensor,
    grad_entropy: Tensor | None,
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    logprob: Tensor,
    entropy: Tensor,
    odds: Tensor,
    unit: Tensor,
    slope: Tensor,
    e: Tensor,
    temperature: float,
    softcap: float | None,
    workspace_bytes: int,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns (dH, dW, dbias); those not in ``needs`` are empty. ``e`` with no rows is recomputed, chunk by chunk."""
    (rows, _), vocab = hidden.shape, weight.shape[0]
    kept = e.shape[0] == rows
    grad_hidden, _, _ = head.empty_gradients(hidden, weight, bias, [needs[0], False, False])
    gradients = head.HeadGradients(weight, bias, needs)
    hidden, weight = hidden.contiguous(), weight.to(hidden.dtype).contiguous()
    index, _ = reference.safe_targets(target, vocab)
    forward, kernel = routes.route(hidden), routes.uses_kernel(hidden)
    plan = ChunkPlan.of(hidden, weight, workspace_bytes, kernel=kernel, softcap=softcap)
    if kept and grad_entropy is not None:
        plan = plan.with_copy()
    room: Tensor | None = None  # for E computed again, or for the kept one's change
    with head.without_autocast(hidden.device):
        for part in plan.chunks(rows, kept=kept, store=True):
            size = part.stop - part.start
            if room is None and not (kept and grad_entropy is None):  # no chunk is longer than the first
                room = e.new_empty(size, e.shape[1])
            e_part = e[part, :vocab] if kept or room is None else room[:size, :vocab]
            if not kept:
                forward(hidden[part], weight, bias, target[part], temperature, e_part, False, softcap)
            known = odds[part], unit[part], target[part], temperature
            if grad_entropy is None:
                scales = reference.row_scales(grad[part], *known, slope[part] if softcap else None)
            else:
                unread = logprob[part]  # in the place of its logit
                row = RowOdds(logprob[part], odds[part], unit[part], entropy[part], unread, None)
                out = e_part if room is None else room[:size, :vocab]
                scales = reference.entropy_scales(
                    e_part, grad[part], grad_entropy[part], row, target[part], temperature, out
                )
                e_part = out
            by_hidden = gradients.add(hidden[part], weight, e_part, index[part], scales)
            if by_hidden is not None:
                grad_hidden[part] = by_hidden
    return grad_hidden, *gradients.results()


@_backward_op.register_fake
def _(*args: Any) -> Any:
    call = head.by_name(torch.ops.gapg.linear_logprob_backward.default, args)
    return head.empty_gradients(call["hidden"], call["weight"], call["bias"], call["needs"])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden, weight, target, bias, ctx.temperature, ctx.softcap, ctx.workspace_bytes, _, with_entropy = inputs
    ctx.set_materialize_grads(False)  # a gradient for E would be a [T, V] of zeros
    ctx.mark_non_differentiable(*output[2 if with_entropy else 1 :])
    ctx.save_for_backward(hidden, weight, target, bias, *output)


def _backward(ctx: Any, grad: Tensor | None, grad_entropy: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    if grad is None and grad_entropy is None:
        return (None,) * 9
    hidden, weight, target, bias, *outputs = ctx.saved_tensors
    if grad_entropy is not None and ctx.softcap:
        raise RuntimeError("linear_logprob: with a softcap the entropy has no gradient; use entropy.detach()")
    if grad is None:
        grad = torch.zeros_like(outputs[0])
    needs = [ctx.needs_input_grad[0], ctx.needs_input_grad[1], ctx.needs_input_grad[3]]
    grads = _backward_op(
        grad, grad_entropy, hidden, weight, target, bias, *outputs, ctx.temperature, ctx.softcap, ctx.workspace_bytes,
        needs,
    )  # fmt: skip
    grad_hidden, grad_weight, grad_bias = (g if need else None for g, need in zip(grads, needs, strict=True))
    return grad_hidden, grad_weight, None, grad_bias, *(None,) * 5


_forward_op.register_autograd(_backward, setup_context=_setup_context)


@register_flop_formula(torch.ops.gapg.linear_logprob)
def _forward_flops(hidden: torch.Size, weight: torch.Size, *_: Any, **__: Any) -> int:
    return 2 * hidden[0] * hidden[1] * weight[0]


@register_flop_formula(torch.ops.gapg.linear_logprob_backward)
def _backward_flops(*args: Any, **named: Any) -> int:
    call = head.by_name(torch.ops.gapg.linear_logprob_backward.default, args, named)
    hidden, weight, needs = call["hidden"], call["weight"], call["needs"]
    gemms = int(needs[0]) + int(needs[1]) + int(call["e"][0] != hidden[0])
    return 2 * gemms * hidden[0] * hidden[1] * weight[0]
