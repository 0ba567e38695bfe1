"""A loss of one's own over log-probs, in three GEMM passes and nothing else.

``linear_loss`` takes a function of log-probs, calls it on the rows of a chunk under autograd, and makes the chunk's
gradients while its E is at hand: 6THV flops whatever the loss and however many rows, never a [T, V] tensor nor a second
forward. The odds form is that of `gapg_kernels.reference`.

>>> import torch
>>> hidden, weight = torch.randn(6, 8, requires_grad=True), torch.randn(32, 8, requires_grad=True)
>>> target, old, advantage = torch.randint(32, (6,)), torch.full((6,), -3.0), torch.randn(6)
>>> def clipped(logprob, old, advantage):
...     ratio = (logprob - old).exp()
...     return -torch.min(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage).sum() / 6
>>> out = linear_loss(hidden, weight, target, clipped, rows={"old": old, "advantage": advantage})
>>> out.loss.backward()
>>> weight.grad.shape
torch.Size([32, 8])
"""

from __future__ import annotations

import inspect
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from gapg_kernels import head
from gapg_kernels.chunked_head import Chunk, ChunkedHead
from gapg_kernels.chunks import sum_dtype

Loss = Callable[..., Tensor]
GIVEN = ("logprob", "entropy", "log_odds", "cuts")
"""What a loss may be given besides its rows."""


class LinearLoss(NamedTuple):
    """What `linear_loss` returns."""

    loss: Tensor
    """scalar, the sum over chunks; differentiable in hidden, weight and bias"""
    logprob: Tensor
    """[T] float32, detached"""
    entropy: Tensor | None
    """[T] nats, detached, or None"""
    log_odds: Tensor | None
    """[T, K], detached, or None"""


def linear_loss(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    loss: Loss,
    *,
    rows: Mapping[str, Tensor] | None = None,
    cuts: Sequence[int] | None = None,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    entropy: bool = False,
    mask_columns: Sequence[int] = (),
    main_grad: Tensor | None = None,
    workspace_bytes: int | None = None,
) -> LinearLoss:
    """The sum of ``loss`` over chunks of rows, its gradients already computed when it returns.

    ``loss(logprob, **rows)`` gets a chunk's log-probs [C] and the same rows of every tensor in ``rows``, and returns
    its scalar; the total is the sum over chunks, so a mean is a sum divided by a number that all chunks share. What it
    wants to keep, such as statistics, it appends to a list of its own, detached. It may be compiled; `linear_loss`
    itself is called outside compiled regions.

    Args:
        hidden: [T, H] bfloat16 or float32. T may be 0: then ``loss`` is not called. Under autocast as
            `torch.nn.functional.linear` takes it.
        weight: [V, H], hidden's dtype, or float32 under bfloat16 hidden (a master; its gradient is not rounded). Of a
            sharded one what `linear_logprob` takes.
        target: [T] int64 token ids; -100 masks a row: log-prob and entropy 0, log-odds -inf, no gradient. Another id
            outside [0, V), or among the masked columns, makes NaN.
        loss: see above. It is given keywords besides: ``entropy`` [C], ``log_odds`` [C, K] and ``cuts`` as asked for.
        rows: tensors of T rows by the name of the loss's argument, on hidden's device; constants to autograd.
        cuts: where a chunk may end, ascending host integers from 0 to T, for a loss of whole sequences: `cu_seqlens`.
            The loss then gets ``cuts`` [n + 1] int64, where its chunk's sequences start, and its number of rows.
        bias: [V] in hidden's dtype or float32, or None.
        temperature: divides the logits; positive.
        softcap: logits become ``softcap * tanh(logit / softcap)`` before the temperature; None: no.
        entropy: give the loss each row's entropy in nats. Where the loss uses it (a bonus), its gradient costs one read
            and one write of E more; ``entropy.detach()`` costs nothing. With a softcap it has no gradient.
        mask_columns: token ids left out of every row's softmax (host integers). The loss gets each one's ``log_odds``
            against the rest: its logit less the log-sum-exp of the others, differentiable. With one such column h its
            probability is ``sigmoid(log_odds)``, and log(1 - p_h) = ``-softplus(log_odds)``, exact near 0 and 1.
        main_grad: [V, H] float32: receives d(weight) during this call (+=, unrounded, over any number of calls), and
            weight gets no gradient from autograd. The gradient that arrives in backward must then be 1, as in
            ``loss.backward()``: anything else gives NaN in the hidden gradient. Not within a checkpointed part of a
            model, which is run, and added, twice.
        workspace_bytes: limit for E and the scratch of a chunk; as in `linear_logprob`.

    Raises:
        TypeError, ValueError: as `linear_logprob`; rows or cuts that do not fit T; rows that require a gradient; a
            stretch between cuts that does not fit the workspace (it says what it needs); a loss that does not
            take what it is given, is no scalar, does not depend on what it is given, or depends on another tensor that
            requires a gradient.
    """
    if torch.compiler.is_dynamo_compiling():  # where a graph may break, it does here, and this is not seen
        raise RuntimeError(
            "linear_loss: it cannot be part of a graph; compile the loss, or call it outside of the graph"
        )
    hidden = head.follow_autocast(hidden)
    rows = dict(rows or {})
    head.check_inputs("linear_loss", hidden, weight, target, bias, temperature, softcap)
    head.refuse_sharded("linear_loss", main_grad=main_grad, **rows)
    _check_rows(hidden, rows)
    chunked = ChunkedHead(
        weight, bias=bias, temperature=temperature, softcap=softcap, mask_columns=mask_columns, entropy=entropy,
        needs=head.wanted(hidden, weight, bias, main_grad), main_grad=main_grad, workspace_bytes=workspace_bytes,
    )  # fmt: skip
    total, logprob, entropies, log_odds = _Loss.apply(hidden, weight, bias, target, chunked, loss, rows, cuts)
    return LinearLoss(total, logprob, entropies if entropy else None, log_odds if len(mask_columns) else None)


def _check_rows(hidden: Tensor, rows: Mapping[str, Tensor]) -> None:
    count = hidden.shape[0]
    for name, x in rows.items():
        if name in GIVEN:
            raise ValueError(f"linear_loss: rows[{name!r}] has the name of what the loss is given; call it otherwise")
        if not isinstance(x, Tensor):
            raise TypeError(f"linear_loss: rows[{name!r}] is {type(x).__name__}; pass a tensor of {count} rows")
        if x.dim() == 0 or x.shape[0] != count:
            raise ValueError(
                f"linear_loss: rows[{name!r}] {tuple(x.shape)} must be [{count}, ...], one entry a row of hidden"
            )
        if x.device != hidden.device:
            raise ValueError(
                f"linear_loss: rows[{name!r}] is on {x.device}; move it to {hidden.device}, where hidden is"
            )
        if x.requires_grad:
            raise ValueError(
                f"linear_loss: rows[{name!r}] requires a gradient, which it would not get; pass its detach()"
            )


class _Loss(torch.autograd.Function):
    """Hands out the gradients that the chunks made."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, chunked: ChunkedHead,
        loss: Loss, rows: Mapping[str, Tensor], cuts: Sequence[int] | None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
        count, wide = hidden.shape[0], sum_dtype(hidden.dtype)
        columns = 0 if chunked.columns is None else len(chunked.columns)
        total, logprob = hidden.new_zeros((), dtype=wide), hidden.new_empty(count, dtype=wide)
        entropy = hidden.new_empty(count if chunked.entropy else 0, dtype=wide)
        log_odds = hidden.new_empty(count, columns, dtype=wide)
        grad_hidden = hidden.new_empty(hidden.shape if chunked.needs[0] else (0,))
        for part in chunked.chunks(hidden, cuts):
            chunk = chunked.forward_chunk(hidden[part], target[part])
            logprob[part] = chunk.logprob
            if chunk.entropy is not None:
                entropy[part] = chunk.entropy
            if chunk.log_odds is not None:
                log_odds[part] = chunk.log_odds
            named = {name: x[part] for name, x in rows.items()}
            if cuts is not None:
                own = torch.tensor(_within(cuts, part), dtype=torch.int64)
                named["cuts"] = own.to(hidden.device, non_blocking=True)  # else each chunk waits for the device
            value, gradients = _evaluate(loss, chunk, named, any(chunked.needs))
            total += value
            if gradients is not None:
                by_hidden = chunked.backward_chunk(chunk, *gradients)
                if by_hidden is not None:
                    grad_hidden[part] = by_hidden
        grad_weight, grad_bias = chunked.gradients()
        ctx.save_for_backward(grad_hidden if chunked.needs[0] else None, grad_weight, grad_bias)
        ctx.in_place = chunked.sums.in_place and chunked.needs[1]
        ctx.mark_non_differentiable(logprob, entropy, log_odds)
        return total, logprob, entropy, log_odds

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.in_place:  # d(weight) is already in main_grad, for a gradient of 1; to look would wait for the device
            grad = torch.where(grad == 1, grad, torch.nan)
        return *(None if x is None else (x * grad).to(x.dtype) for x in ctx.saved_tensors), *(None,) * 5


def _evaluate(
    loss: Loss, chunk: Chunk, named: dict[str, Tensor], need: bool
) -> tuple[Tensor, tuple[Tensor, Tensor | None, Tensor | None] | None]:
    """The caller's loss of a chunk, and its gradients by log-probs, entropies and log-odds."""
    given = {"logprob": chunk.logprob, "entropy": chunk.entropy, "log_odds": chunk.log_odds}
    with torch.set_grad_enabled(need):
        leaves = {name: x.detach().requires_grad_(need) for name, x in given.items() if x is not None}
        named |= {name: x.clone() for name, x in leaves.items()}  # a loss may change them in place
        logprob = named.pop("logprob")
        _check_call(loss, named)
        value = loss(logprob, **named)
    if not isinstance(value, Tensor) or value.dim():
        what = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise TypeError(f"linear_loss: loss returned {what}; return the chunk's sum, a tensor of no dimensions")
    if not need:
        return value, None
    if value.grad_fn is None:
        raise ValueError(
            "linear_loss: the loss has no graph; make it of the log-probs it is given, not of their detach()"
        )
    _refuse_other_leaves(value, list(leaves.values()))
    found = dict(zip(leaves, torch.autograd.grad(value, list(leaves.values()), allow_unused=True), strict=True))
    by_logprob = found["logprob"]
    if by_logprob is None:
        by_logprob = torch.zeros_like(chunk.logprob)
    return value.detach(), (by_logprob, found.get("entropy"), found.get("log_odds"))


def _check_call(loss: Loss, named: Mapping[str, Tensor]) -> None:
    """Raises TypeError where the loss does not take what it is given."""
    with suppress(ValueError):  # of a builtin, whose arguments are not known
        try:
            inspect.signature(loss).bind(None, **named)
        except TypeError as error:
            call = ", ".join(["logprob", *named])
            raise TypeError(f"linear_loss: the loss is called as loss({call}): {error}") from None


def _refuse_other_leaves(value: Tensor, ours: Sequence[Tensor]) -> None:
    """Raises ValueError where the loss's graph ends in a tensor whose gradient nobody would see."""
    seen, queue = set[Any](), [value.grad_fn]
    while queue:
        node = queue.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        leaf = getattr(node, "variable", None) if type(node).__name__ == "AccumulateGrad" else None
        if leaf is not None and not any(leaf is x for x in ours):
            raise ValueError(
                f"linear_loss: the loss depends on another tensor that requires a gradient, {tuple(leaf.shape)}, which "
                "it would not get here; pass its detach(), and give it a loss and a backward of its own"
            )
        queue.extend(inner for inner, _ in node.next_functions)


def _within(cuts: Sequence[int], part: slice) -> list[int]:
    """The cuts of a chunk, from its first row; an empty sequence at a border belongs to the chunk that ends there."""
    first = bisect_right(cuts, part.start) - 1 if part.start else 0
    return [at - part.start for at in cuts[first : bisect_right(cuts, part.stop)]]
