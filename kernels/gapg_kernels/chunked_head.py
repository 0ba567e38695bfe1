"""The fused head a chunk at a time, for losses and loops of one's own: forward, then backward while E is at hand.

``forward_chunk`` gives the log-probs of a chunk of rows, ``backward_chunk`` takes d loss by them: three products of
2CHV flops and no [C, V] pass between them, whatever the loss. `gapg_kernels.linear_loss` runs this loop for a loss that
is a function; `gapg_kernels.fused_policy_loss` for the policy loss of arXiv 2509.24050.

>>> import torch
>>> hidden, weight, target = torch.randn(6, 8), torch.randn(32, 8), torch.randint(32, (6,))
>>> head = ChunkedHead(weight, needs=(True, True, False))
>>> grad_hidden = torch.empty_like(hidden)
>>> for part in head.chunks(hidden):
...     chunk = head.forward_chunk(hidden[part], target[part])
...     grad_hidden[part] = head.backward_chunk(chunk, -torch.ones_like(chunk.logprob))  # of loss = -logprob.sum()
>>> grad_weight, _ = head.gradients()
>>> grad_weight.shape
torch.Size([32, 8])
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from numbers import Integral
from typing import NamedTuple

import torch
from torch import Tensor

from gapg_kernels import head, reference, routes
from gapg_kernels.chunks import ChunkPlan, pitch, sum_dtype, workspace_for
from gapg_kernels.reference import RankOne, RowOdds


class Chunk(NamedTuple):
    """A chunk of C rows between its forward and its backward. The first three are constants to autograd."""

    logprob: Tensor
    """[C] float32"""
    entropy: Tensor | None
    """[C] nats, when asked for"""
    log_odds: Tensor | None
    """[C, K], with masked columns: each one's logit less the log-sum-exp of all columns that are not masked"""
    hidden: Tensor
    target: Tensor
    odds: RowOdds
    e: Tensor | None
    """[C, V], the head's buffer until the next forward; None where no gradient is needed"""
    slope: Tensor | None
    """[C, K], a softcap's slope at the masked columns"""


class ChunkedHead:
    """One pass over rows of hidden states: a chunk's log-probs, then its gradients; those of the weight add up.

    For the next step make a new one: sums, and a master's rounded copy, are this step's. Autocast is not followed.

    Args:
        weight: [V, H] bfloat16 or float32; hidden's dtype, or float32 under bfloat16 hidden: a master, of which one
            rounded copy is made, and whose gradient is not rounded.
        bias: [V] in hidden's dtype or float32, or None.
        temperature: divides the logits; positive.
        softcap: logits become ``softcap * tanh(logit / softcap)`` before the temperature; None: no.
        mask_columns: token ids that are left out of every row's softmax. Their log-odds against the rest come with each
            chunk. A target among them gives NaN.
        entropy: give each row's entropy as well, of the columns that are not masked.
        needs: whether gradients of hidden, weight and bias are wanted. With none, E is not stored.
        main_grad: [V, H] float32, contiguous, receives d(weight) (+=, unrounded).
        patch_target: store the target's own term in E, rounded like E, instead of adding it in float32.
        workspace_bytes: limit for E and the scratch of a chunk, which `chunks` keeps to; as in `linear_logprob`.

    Raises:
        TypeError, ValueError: as `linear_logprob`; for mask_columns that are no ids or all of them; for a main_grad of
            another shape or dtype.
    """

    def __init__(
        self,
        weight: Tensor,
        *,
        bias: Tensor | None = None,
        temperature: float = 1.0,
        softcap: float | None = None,
        mask_columns: Sequence[int] = (),
        entropy: bool = False,
        needs: Sequence[bool] = (True, True, True),
        main_grad: Tensor | None = None,
        patch_target: bool = False,
        workspace_bytes: int | None = None,
    ) -> None:
        head.check_main_grad("ChunkedHead", main_grad, weight)
        self.master, self.bias, self.temperature = weight, bias, float(temperature)
        self.softcap = None if softcap is None else float(softcap)
        self.entropy, self.needs = entropy, [*needs[:2], needs[2] and bias is not None]
        self.workspace = workspace_for(weight.device, workspace_bytes)
        self.patch_target = patch_target
        self.columns, self._masked_bias = _mask(weight, bias, mask_columns)
        self._weight: Tensor | None = None
        self._buffer: Tensor | None = None
        self._longest = 0
        self._last: Chunk | None = None
        self.sums = head.HeadGradients(weight, bias, self.needs, main_grad)

    def chunks(self, hidden: Tensor, cuts: Sequence[int] | None = None) -> list[slice]:
        """The rows of hidden [T, H] in the fewest chunks that fit the workspace.

        ``cuts``: where a chunk may end, ascending host integers from 0 to T; None: anywhere.

        Raises TypeError or ValueError for other cuts; ValueError where a row, or the rows between two cuts, do not fit:
        it says what they need.
        """
        _check_cuts(cuts, len(hidden))
        kernel, store = routes.uses_kernel(hidden), any(self.needs)
        plan = ChunkPlan.of(
            hidden, self.master, self.workspace, kernel=kernel, entropy=self.entropy, softcap=self.softcap
        )
        plan.require_one_row("ChunkedHead", grad=store)
        parts = list(plan.chunks(len(hidden), kept=False, store=store, cuts=cuts, caller="ChunkedHead"))
        self._longest = max((part.stop - part.start for part in parts), default=0)
        return parts

    def forward_chunk(self, hidden: Tensor, target: Tensor) -> Chunk:
        """The log-probs of hidden [C, H] at target [C]. E lies in one buffer: what an earlier chunk had is gone.

        -100 in target masks a row: log-prob and entropy 0, log-odds -inf, no gradient. Other ids outside [0, V): NaN.
        """
        head.check_inputs("forward_chunk", hidden, self.master, target, self.bias, self.temperature, self.softcap)
        hidden, target, weight = hidden.detach().contiguous(), target.long(), self._weight_for(hidden)
        if self.columns is not None:  # no id of the vocabulary, so NaN
            target = torch.where(torch.isin(target, self.columns), len(weight), target)
        e = self._e(hidden)
        with torch.no_grad(), head.without_autocast(hidden.device):
            bias = self.bias if self._masked_bias is None else self._masked_bias
            odds = routes.route(hidden)(hidden, weight, bias, target, self.temperature, e, self.entropy, self.softcap)
            log_odds, slope = (None, None) if self.columns is None else self._log_odds(hidden, weight, odds)
        self._last = Chunk(odds.logprob, odds.entropy, log_odds, hidden, target, odds, e, slope)
        return self._last

    def backward_chunk(
        self,
        chunk: Chunk,
        grad: Tensor,
        grad_entropy: Tensor | None = None,
        grad_log_odds: Tensor | None = None,
    ) -> Tensor | None:
        """The gradients of a loss from its gradients by the chunk's log-probs, entropies [C] and log-odds [C, K].

        Those of weight and bias are added to their sums. A gradient by the entropy is no factor of a row and costs one
        read and one write of the chunk's E, which is stored rounded; it cannot be had with a softcap, whose slope
        E carries.

        Returns:
            d loss / d hidden [C, H], or None where ``needs`` says so.

        Raises:
            ValueError: called twice, or after a later chunk has taken the buffer; a gradient of another shape, or by
                what the head was not asked for; one by the entropy with a softcap; one by more than the log-probs with
                a patched target.
        """
        if chunk.e is None or chunk is not self._last:
            raise ValueError(
                "backward_chunk: E is kept from a chunk's forward to its backward, until the next forward, and where "
                "needs is not all False; call it once, before the next forward_chunk"
            )
        grad, grad_entropy, grad_log_odds = self._checked(chunk, grad, grad_entropy, grad_log_odds)
        self._last = None  # what follows may change E
        odds, target = chunk.odds, chunk.target
        with torch.no_grad(), head.without_autocast(chunk.hidden.device):
            index, _ = reference.safe_targets(target, chunk.e.shape[1])
            others, extra = None, None
            if grad_log_odds is not None and self.columns is not None:
                others = grad_log_odds.sum(1)
                coefficient = torch.where((target == reference.IGNORE)[:, None], 0.0, grad_log_odds) / self.temperature
                extra = RankOne(self.columns, coefficient if chunk.slope is None else coefficient * chunk.slope)
            if grad_entropy is not None:
                scales = reference.entropy_scales(
                    chunk.e, grad, grad_entropy, odds, target, self.temperature, chunk.e, others
                )
            else:
                scales = reference.row_scales(grad, odds.odds, odds.unit, target, self.temperature, odds.slope, others)
                if self.patch_target:  # the target goes into E and leaves no pull
                    reference.patch_target(chunk.e, index, odds.odds if odds.slope is None else odds.odds * odds.slope)
                    scales = scales._replace(pull=torch.zeros_like(scales.pull))
            return self.sums.add(chunk.hidden, self._weight_for(chunk.hidden), chunk.e, index, scales, extra)

    def _checked(
        self, chunk: Chunk, grad: Tensor, grad_entropy: Tensor | None, grad_log_odds: Tensor | None
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """The gradients of a chunk's backward in the type of its log-probs."""
        for name, x, of in (
            ("grad", grad, chunk.logprob),
            ("grad_entropy", grad_entropy, chunk.entropy),
            ("grad_log_odds", grad_log_odds, chunk.log_odds),
        ):
            if x is not None and (of is None or x.shape != of.shape):
                want = "None: the head was not asked for it" if of is None else f"{list(of.shape)}"
                raise ValueError(f"backward_chunk: {name} {tuple(x.shape)} must be {want}")
        if grad_entropy is not None and self.softcap:
            raise ValueError("backward_chunk: with a softcap the entropy has no gradient; pass entropy.detach()")
        if self.patch_target and (grad_entropy is not None or grad_log_odds is not None):
            raise ValueError(
                "backward_chunk: a patched target has a gradient by log-probs only; leave patch_target out"
            )
        wide = chunk.logprob.dtype
        by_entropy, by_log_odds = (None if x is None else x.to(wide) for x in (grad_entropy, grad_log_odds))
        return grad.to(wide), by_entropy, by_log_odds

    def gradients(self) -> tuple[Tensor | None, Tensor | None]:
        """(d loss / d weight [V, H], d loss / d bias [V]) of all chunks, in their types; None where not wanted.

        The weight's is None too where ``main_grad`` has it.
        """
        weight, bias = self.sums.results()
        return weight if self.needs[1] and not self.sums.in_place else None, bias if self.needs[2] else None

    def _weight_for(self, hidden: Tensor) -> Tensor:
        """The weight in hidden's type, rounded once."""
        if self._weight is None or self._weight.dtype != hidden.dtype:
            self._weight = self.master.detach().to(hidden.dtype).contiguous()
        return self._weight

    def _e(self, hidden: Tensor) -> Tensor | None:
        """[C, V] of the buffer, in which rows lie a pitch apart."""
        if not any(self.needs):
            return None
        rows, vocab = len(hidden), len(self.master)
        if self._buffer is None or len(self._buffer) < rows or self._buffer.dtype != hidden.dtype:
            self._buffer = self._last = None  # before the next is made
            # Room for the longest chunk at once: while a caller holds a chunk, its E stays beside a larger one.
            self._buffer = hidden.new_empty(max(rows, self._longest), pitch(vocab, hidden.dtype))
        return self._buffer[:rows, :vocab]

    def _log_odds(self, hidden: Tensor, weight: Tensor, odds: RowOdds) -> tuple[Tensor, Tensor | None]:
        """Each masked column's logit less the log-sum-exp of the others, [C, K], and a softcap's slope there."""
        assert self.columns is not None
        logit = reference.matmul_wide(hidden, weight.index_select(0, self.columns).t())
        if self.bias is not None:
            logit += self.bias.detach()[self.columns]
        slope = reference.softcap_(logit, self.softcap) if self.softcap else None
        return (logit - odds.logit[:, None]) / self.temperature + odds.logprob[:, None], slope


def _check_cuts(cuts: Sequence[int] | None, rows: int) -> None:
    if cuts is None:
        return
    if isinstance(cuts, Tensor) or not all(isinstance(at, Integral) for at in cuts):
        raise TypeError("cuts must be host integers, such as cu_seqlens.tolist()")
    if not len(cuts) or cuts[0] != 0 or cuts[-1] != rows or any(b < a for a, b in pairwise(cuts)):
        raise ValueError(f"cuts must ascend from 0 to {rows}, the number of rows, not {list(cuts)[:8]}")


def _mask(weight: Tensor, bias: Tensor | None, columns: Sequence[int]) -> tuple[Tensor | None, Tensor | None]:
    """The columns as a tensor [K], and a bias [V] that is -inf there."""
    if not len(columns):
        return None, None
    vocab, ids = len(weight), list(columns)
    known = all(isinstance(i, Integral) and not isinstance(i, bool) and 0 <= i < vocab for i in ids)
    if not known or len(set(ids)) < len(ids) or len(ids) >= vocab:
        raise ValueError(
            f"mask_columns {ids[:8]} must be different ids in [0, {vocab}), and not all of them: host integers"
        )
    index = torch.tensor(ids, dtype=torch.int64).to(weight.device, non_blocking=True)  # else it waits for the device
    wide = sum_dtype(weight.dtype)
    masked = weight.new_zeros(vocab, dtype=wide) if bias is None else bias.detach().to(wide, copy=True)
    return index, masked.index_fill_(0, index, -torch.inf)
