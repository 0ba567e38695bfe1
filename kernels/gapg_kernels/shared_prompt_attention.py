"""Causal attention of packed responses that share one copy of their prompt.

>>> import torch
>>> from gapg_kernels.shared_layout import share_prompts
>>> layout = share_prompts([0, 2, 3, 5], cu_prompts=[0, 2], cu_responses=[0, 3])  # a prompt of 2, responses of 1 and 2
>>> q, k, v = torch.randn(5, 4, 8), torch.randn(5, 2, 8), torch.randn(5, 2, 8)
>>> shared_prompt_attention(q, k, v, layout).shape
torch.Size([5, 4, 8])

G responses to one prompt of P tokens are a row of P + sum(R) tokens, not G * P + sum(R). All prompts of the row come
first, then all responses, in the order of their prompts; so that no piece of it needs a gather:

1. every segment, prompt or response, attends causally to itself;
2. every response attends to all of its prompt;
3. a response's two results are merged by their log-sum-exp: with w = sigmoid(lse_2 - lse_1),
   out = (1 - w) out_1 + w out_2 and lse = log(exp(lse_1) + exp(lse_2)).

Backward: softmax probabilities are exp(score - lse) whichever piece of the row they come from, so each piece's own
backward, called with the merged out and lse, gives its part of the gradient (as in ring attention, Liu et al. 2023,
arXiv 2310.01889); the parts add up. Positions (rotary, learned) are the caller's: a response's start at its prompt's
length.

On CUDA in 16 bits steps 1 and 2 are one launch each of FlashAttention (`gapg_kernels.flash`), forward and backward. On
the CPU step 1 is a call of PyTorch's FlashAttention for each distinct length, and step 2 one for each prompt. Anything
else goes the CPU's way in plain PyTorch, waits for the device, and holds heads * responses of a prompt * prompt.

Within a sliding window `gapg_kernels.windowed_prompts` does it.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils.flop_counter import register_flop_formula

from gapg_kernels import equal_lengths, flash, windowed_prompts
from gapg_kernels.chunks import sum_dtype
from gapg_kernels.flash import Lengths
from gapg_kernels.shared_layout import SharedPrompts


def shared_prompt_attention(
    q: Tensor, k: Tensor, v: Tensor, layout: SharedPrompts, scale: float | None = None, window: int | None = None
) -> Tensor:
    """Causal attention of each prompt to itself, and of each response to its prompt and itself; differentiable.

    It is what causal attention gives on every prompt-and-response by itself, to rounding. torch.compile keeps it whole,
    but for a window where there is no FlashAttention.

    Args:
        q: [T, Hq, D], the row that `layout` describes.
        k, v: [T, Hkv, D]; query head h reads key head h // (Hq // Hkv).
        layout: on q's device.
        scale: of the scores; D ** -0.5 by default.
        window: each token sees no more than so many, itself and those before it; 1 or more, all by default.

    Returns:
        [T, Hq, D], contiguous, in the type of q, k and v; autocast's where that is on for the device.

    Raises:
        ValueError: types or shapes that differ; a layout of another number of tokens; a window below 1; on CUDA and
            meta in 16 bits, a head size that FlashAttention lacks.
    """
    q, k, v = flash.one_type(q, k, v)
    flash.check_window(window)
    if k.shape != v.shape or q.shape[::2] != k.shape[::2] or q.shape[1] % k.shape[1] != 0:
        raise ValueError(f"q {tuple(q.shape)}, k {tuple(k.shape)} and v {tuple(v.shape)} must agree: [T, heads, D]")
    if q.shape[0] != layout.tokens:
        raise ValueError(f"the layout is of {layout.tokens} tokens, and q has {q.shape[0]}")
    if q.dtype in flash.HALVES and q.device.type in ("cuda", "meta"):
        flash.check_head_dim(q.shape[-1])
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if window is not None and window < layout.max_sequence:
        return windowed_prompts.attention(q, k, v, layout, scale, window)
    cu = layout.cu_segments, layout.cu_prompts, layout.cu_responses
    sizes = layout.prompt_tokens, layout.max_segment, layout.max_prompt, layout.max_responses
    out: Tensor
    out, _ = _forward_op(q, k, v, *cu, *sizes, float(scale))
    return out


# --- the operators ---------------------------------------------------------------------------------------------------


@torch.library.custom_op("gapg::shared_prompt_attention", mutates_args=())
def _forward_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_segments: Tensor,
    cu_prompts: Tensor,
    cu_responses: Tensor,
    prompt_tokens: int,
    max_segment: int,
    max_prompt: int,
    max_responses: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Returns (out [T, Hq, D], lse [Hq, T])."""
    pieces = Pieces(cu_segments, cu_prompts, cu_responses, prompt_tokens, max_segment, max_prompt, max_responses)
    if flash.takes(q):
        return varlen_forward(q, k, v, pieces, scale)
    return grouped_forward(q, k, v, pieces, scale)


@_forward_op.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty((q.shape[1], q.shape[0]), dtype=sum_dtype(q.dtype))


@torch.library.custom_op("gapg::shared_prompt_attention_backward", mutates_args=())
def _backward_op(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_segments: Tensor,
    cu_prompts: Tensor,
    cu_responses: Tensor,
    prompt_tokens: int,
    max_segment: int,
    max_prompt: int,
    max_responses: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    pieces = Pieces(cu_segments, cu_prompts, cu_responses, prompt_tokens, max_segment, max_prompt, max_responses)
    if flash.takes(q):
        return varlen_backward(grad, q, k, v, out, lse, pieces, scale)
    return grouped_backward(grad, q, k, v, out, lse, pieces, scale)


@_backward_op.register_fake
def _(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, *cu = inputs[:6]
    ctx.rest = inputs[6:]
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(q, k, v, *output, *cu)


def _backward(ctx: Any, grad: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 11
    return *_backward_op(grad, *ctx.saved_tensors, *ctx.rest), *(None,) * 8


_forward_op.register_autograd(_backward, setup_context=_setup_context)


class Pieces(NamedTuple):
    """The arguments above from cu_segments on, as steps 1 and 2 need them."""

    cu_segments: Tensor
    cu_prompts: Tensor
    cu_responses: Tensor
    prompt_tokens: int
    max_segment: int
    max_prompt: int
    max_responses: int

    @property
    def own(self) -> Lengths:
        return Lengths(self.cu_segments, self.cu_segments, self.max_segment, self.max_segment, causal=True)

    @property
    def cross(self) -> Lengths:
        return Lengths(self.cu_responses, self.cu_prompts, self.max_responses, self.max_prompt, causal=False)


def _merge(out: Tensor, lse: Tensor, other: Tensor, other_lse: Tensor) -> None:
    """Step 3, in place: out [R, Hq, D] and lse [Hq, R] (rows of T apart) become the merged ones."""
    weight = torch.sigmoid(other_lse - lse).T.unsqueeze(-1)
    out.copy_(torch.lerp(out.to(lse.dtype), other.to(lse.dtype), weight))
    lse.copy_(torch.logaddexp(lse, other_lse))


# --- CUDA ------------------------------------------------------------------------------------------------------------


def varlen_forward(q: Tensor, k: Tensor, v: Tensor, pieces: Pieces, scale: float) -> tuple[Tensor, Tensor]:
    """Steps 1 to 3 by two launches of FlashAttention; never waits for the device."""
    at = pieces.prompt_tokens
    out, lse = flash.forward(q, k, v, pieces.own, scale)
    if at < q.shape[0]:
        _merge(out[at:], lse[:, at:], *flash.forward(q[at:], k[:at], v[:at], pieces.cross, scale))
    return out.contiguous(), lse


def varlen_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, pieces: Pieces, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """d(q), d(k), d(v) by two launches; out and lse are the merged ones."""
    at = pieces.prompt_tokens
    grad = grad.contiguous()
    dq, dk, dv = flash.backward(grad, q, k, v, out, lse, pieces.own, scale)
    if at < q.shape[0]:
        rows = lse[:, at:].contiguous()  # the kernels take its rows to be R apart
        cross = flash.backward(grad[at:], q[at:], k[:at], v[:at], out[at:], rows, pieces.cross, scale)
        for whole, part in zip((dq[at:], dk[:at], dv[:at]), cross, strict=True):
            whole += part
    return dq, dk, dv


# --- elsewhere -------------------------------------------------------------------------------------------------------


def grouped_forward(q: Tensor, k: Tensor, v: Tensor, pieces: Pieces, scale: float) -> tuple[Tensor, Tensor]:
    """Steps 1 to 3 by a call per distinct length of a segment and one per prompt."""
    at, plan = pieces.prompt_tokens, _plan(q, pieces)
    batches = zip(plan.split(q), plan.split(k), plan.split(v), strict=True)
    results = [equal_lengths.forward(q_, k_, v_, True, scale) for q_, k_, v_ in batches]
    out, lse = plan.join([x for x, _ in results]), plan.join_lse([x for _, x in results])
    if at < q.shape[0]:
        # of a prompt without responses there is nothing to merge
        other, other_lse = torch.zeros_like(out[at:]), torch.full_like(lse[:, at:], -torch.inf)
        for answers, prompt in _groups(pieces):
            q_, k_, v_ = _batch(q[at:][answers]), _batch(k[prompt]), _batch(v[prompt])
            (piece,), (piece_lse,) = equal_lengths.forward(q_, k_, v_, False, scale)
            other[answers] = piece.transpose(0, 1)
            other_lse[:, answers] = piece_lse
        _merge(out[at:], lse[:, at:], other, other_lse)
    return out, lse


def grouped_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, pieces: Pieces, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """d(q), d(k), d(v), likewise."""
    at, plan = pieces.prompt_tokens, _plan(q, pieces)
    batches = zip(*(plan.split(x) for x in (grad, q, k, v, out)), plan.split_lse(lse), strict=True)
    parts = [
        equal_lengths.backward(grad_, q_, k_, v_, out_, lse_, True, scale) for grad_, q_, k_, v_, out_, lse_ in batches
    ]
    dq = torch.empty_like(q).copy_(plan.join([x for x, _, _ in parts]))
    dk = torch.empty_like(k).copy_(plan.join([x for _, x, _ in parts]))
    dv = torch.empty_like(v).copy_(plan.join([x for _, _, x in parts]))
    for answers, prompt in _groups(pieces):
        grad_, q_, out_ = _batch(grad[at:][answers]), _batch(q[at:][answers]), _batch(out[at:][answers])
        k_, v_, lse_ = _batch(k[prompt]), _batch(v[prompt]), lse[None, :, at:][:, :, answers]
        cross = equal_lengths.backward(grad_, q_, k_, v_, out_, lse_, False, scale)
        for whole, (part,) in zip((dq[at:][answers], dk[prompt], dv[prompt]), cross, strict=True):
            whole += part.transpose(0, 1)
    return dq, dk, dv


def _plan(q: Tensor, pieces: Pieces) -> equal_lengths.Plan:
    return equal_lengths.plan(tuple(pieces.cu_segments.tolist()), q.shape[0], q.device)


def _groups(pieces: Pieces) -> Iterator[tuple[slice, slice]]:
    """Where each prompt's responses are, counted from the first response token, and where the prompt is."""
    bounds = zip(pairwise(pieces.cu_responses.tolist()), pairwise(pieces.cu_prompts.tolist()), strict=True)
    return ((slice(*answers), slice(*prompt)) for answers, prompt in bounds if answers[0] < answers[1])


def _batch(x: Tensor) -> Tensor:
    """[T, H, D] as [1, H, T, D]"""
    return x.transpose(0, 1)[None]


# --- counted work ----------------------------------------------------------------------------------------------------


def _pairs(cu_segments: Tensor, cu_prompts: Tensor, cu_responses: Tensor, *sizes: int) -> int:
    """(query, key) pairs of both steps, whole squares as PyTorch counts them; without data, the most there can be."""
    _prompt_tokens, max_segment, max_prompt, max_responses = sizes
    if cu_segments.device.type == "meta" or isinstance(cu_segments, FakeTensor):
        return (len(cu_segments) - 1) * max_segment**2 + (len(cu_prompts) - 1) * max_prompt * max_responses
    own, prompts, responses = (x.diff().long() for x in (cu_segments, cu_prompts, cu_responses))
    return int((own * own).sum() + (prompts * responses).sum())


@register_flop_formula(torch.ops.gapg.shared_prompt_attention, get_raw=True)
def _forward_flops(q: Tensor, k: Tensor, v: Tensor, *rest: Any, out_val: Any = None) -> int:
    *layout, _scale = rest
    return 4 * q.shape[1] * q.shape[2] * _pairs(*layout)


@register_flop_formula(torch.ops.gapg.shared_prompt_attention_backward, get_raw=True)
def _backward_flops(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *rest: Any, out_val: Any = None
) -> int:
    return 5 * _forward_flops(q, k, v, *rest) // 2
