"""From hidden states and rewards to the policy loss and its gradients, in three GEMM passes and nothing else.

``fused_policy_loss`` joins the odds-form head of `gapg_kernels.linear_logprob` with the row losses of
`gapg_kernels.policy_loss`. Because a row's coefficient is known as soon as its log-prob is, forward and backward of a
chunk follow each other while E is at hand: 6THV flops always, 4THV with a frozen weight, 2THV without gradients. The
gradients are computed in the forward call and handed out by ``backward``. The loss is that of arXiv 2509.24050; GRPO's
advantage, clipping, truncated importance sampling and a KL penalty are options.

Two prompts, two responses each, three tokens a response:

>>> import torch
>>> hidden, weight = torch.randn(12, 8, requires_grad=True), torch.randn(32, 8, requires_grad=True)
>>> rewards, target = torch.tensor([[1.0, 0.0], [0.25, 1.0]]), torch.randint(32, (12,))
>>> group, sample = torch.arange(12) // 6, torch.arange(12) // 3 % 2
>>> out = fused_policy_loss(hidden, weight, target, rewards, group, sample, denominator=4)
>>> out.loss.backward()
>>> out.logprob.shape, weight.grad.shape
(torch.Size([12]), torch.Size([32, 8]))
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.flop_counter import register_flop_formula

from gapg_kernels import head, reference
from gapg_kernels.chunked_head import ChunkedHead
from gapg_kernels.chunks import ChunkPlan, sum_dtype, workspace_for
from gapg_kernels.policy_loss import DEFAULTS, STATS, PolicyLossOptions, RowLosses, check_source, row_losses
from gapg_kernels.policy_loss_reference import look_up


class FusedLoss(NamedTuple):
    """What `fused_policy_loss` returns."""

    loss: Tensor
    """scalar; differentiable in hidden, weight and bias"""
    stats: Tensor
    """[len(STATS)]; `gapg_kernels.policy_loss.summarize` reads it"""
    logprob: Tensor
    """[T], detached"""
    entropy: Tensor | None
    """[T] nats, detached, or None"""


def fused_policy_loss(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    rewards: Tensor | None = None,
    group: Tensor | None = None,
    sample: Tensor | None = None,
    *,
    denominator: float,
    options: PolicyLossOptions = DEFAULTS,
    advantage: Tensor | None = None,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    coefficient: Tensor | None = None,
    old_logprob: Tensor | None = None,
    rollout_logprob: Tensor | None = None,
    reference_logprob: Tensor | None = None,
    with_entropy: bool = False,
    main_grad: Tensor | None = None,
    target_term: Literal["exact", "patched"] = "exact",
    workspace_bytes: int | None = None,
) -> FusedLoss:
    """The policy loss of T response tokens, its gradients already computed when it returns.

    A row is one response token; `group` and `sample` say which response of the reward table it belongs to, so rows may
    be any part of a batch: responses may be missing, and a group may be spread over several calls.

    Args:
        hidden: [T, H] bfloat16 or float32: the states that predict the tokens. T may be 0.
        weight: [V, H], hidden's dtype: the LM head. Of a sharded one what `linear_logprob` takes.
        target: [T] int64 token ids; -100 masks a row, another id outside [0, V) makes its loss NaN.
        rewards: [P, G] floats, the whole table, also of responses without rows here. NaN: no such sample.
        group, sample: [T] integers into the table, on its device: the CPU, or hidden's. A row of zero advantage goes
            through the GEMMs too: `gapg_kernels.policy_loss.rows_with_advantage` names the rows to pass on.
        advantage: instead of rewards, advantages of one's own: [T], a token each, on hidden's device; or a table [P, G]
            of the responses', with group and sample.
        denominator: what the sum over rows is divided by: |D| * G sequences for the sequence sum (with the defaults
            that is the paper's estimator), or the batch's number of response tokens for the token mean.
        options: see `PolicyLossOptions`.
        bias: [V] in hidden's dtype or float32.
        temperature: divides the logits.
        softcap: logits become ``softcap * tanh(logit / softcap)`` before the temperature; None: no.
        coefficient: [T] multiplies a row's loss and gradient.
        old_logprob, rollout_logprob, reference_logprob: [T], as `options` asks for them.
        with_entropy: also give each row's entropy, through which no gradient flows.
        main_grad: [V, H] float32: receives d(weight) during this call (+=, unrounded, over any number of calls), and
            weight gets no gradient from autograd. The gradient that arrives in backward must then be 1, as in
            ``loss.backward()``: anything else gives NaN in the hidden gradient. Without gradients enabled it is left
            alone. Not within a checkpointed part of a model, which is run, and added, twice.
        target_term: "exact" adds the target's own term in float32; "patched" stores it in E, rounded like E.
        workspace_bytes: as in `linear_logprob`.

    Raises:
        TypeError, ValueError: as `linear_logprob` and `policy_loss`, and for a main_grad of another shape or dtype.
            No argument may be a DTensor.
    """
    hidden = head.follow_autocast(hidden)
    head.check_inputs("fused_policy_loss", hidden, weight, target, bias, temperature, softcap)
    head.refuse_sharded(
        "fused_policy_loss", rewards=rewards, group=group, sample=sample, advantage=advantage, coefficient=coefficient,
        old_logprob=old_logprob, rollout_logprob=rollout_logprob, reference_logprob=reference_logprob,
        main_grad=main_grad,
    )  # fmt: skip
    check_source("fused_policy_loss", rewards, group, sample, advantage)
    table = rewards if advantage is None or group is None else advantage
    if table is not None and not table.device == group.device == sample.device:  # type: ignore[union-attr]
        raise ValueError("fused_policy_loss: the table, group and sample must be on one device")
    rows = TokenRows(
        target.long(), group, sample, advantage, coefficient, old_logprob, rollout_logprob, reference_logprob
    )
    _check_rows(hidden.shape[0], rows if advantage is None or group is None else rows._replace(advantage=None))
    if advantage is not None and group is not None and sample is not None:
        own = look_up(advantage.detach(), group, sample).to(sum_dtype(hidden.dtype))
        rows = rows._replace(group=None, sample=None, advantage=own)
    head.check_main_grad("fused_policy_loss", main_grad, weight)
    if target_term not in ("exact", "patched"):
        raise ValueError(f"fused_policy_loss: target_term must be 'exact' or 'patched', not {target_term!r}")
    needs = head.wanted(hidden, weight, bias, main_grad)
    workspace = workspace_for(hidden.device, workspace_bytes)
    plan = ChunkPlan.of(hidden, weight, workspace, kernel=False, entropy=with_entropy, softcap=softcap)
    plan.require_one_row("fused_policy_loss", grad=any(needs))
    scalars = (float(temperature), softcap, float(denominator), workspace)
    loss, stats, logprob, entropy = _Fused.apply(
        hidden, weight, bias, rewards, rows, main_grad, options, scalars, needs, with_entropy,
        target_term == "patched",
    )  # fmt: skip
    return FusedLoss(loss, stats, logprob, entropy if with_entropy else None)


def _check_rows(count: int, rows: TokenRows) -> None:
    """What the chunks could not notice; `row_losses` checks the rest."""
    for name, x in rows._asdict().items():
        if x is not None and x.shape != (count,):
            raise ValueError(f"fused_policy_loss: {name} {tuple(x.shape)} must be [{count}], one entry a row of hidden")


class _Fused(torch.autograd.Function):
    """Hands out the gradients that the operator computed; an operator that writes to main_grad cannot do it itself."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, rewards: Tensor | None, rows: TokenRows,
        main_grad: Tensor | None, options: PolicyLossOptions,
        scalars: tuple[float, float | None, float, int], needs: list[bool], with_entropy: bool, patched: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
        low, high = options.clip or (None, None)
        loss, stats, logprob, entropy, *gradients = _fused_op(
            hidden, weight, bias, rewards, *rows, main_grad, options.advantage, low, high, options.tis_cap, options.kl,
            options.kl_coef, *scalars, needs, with_entropy, patched,
        )  # fmt: skip
        ctx.save_for_backward(*gradients)
        ctx.needs, ctx.in_place = needs, main_grad is not None
        ctx.mark_non_differentiable(stats, logprob, entropy)
        return loss, stats, logprob, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias = ctx.saved_tensors
        need_hidden, need_weight, need_bias = ctx.needs
        if ctx.in_place:  # d(weight) is already in main_grad, for a gradient of 1; to look would wait for the device
            grad = torch.where(grad == 1, grad, torch.nan)
        return (
            (hidden * grad).to(hidden.dtype) if need_hidden else None,
            (weight * grad).to(weight.dtype) if need_weight and not ctx.in_place else None,
            (bias * grad).to(bias.dtype) if need_bias else None,
            *(None,) * 8,
        )


@torch.library.custom_op("gapg::fused_policy_loss", mutates_args=("main_grad",))
def _fused_op(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, rewards: Tensor | None, target: Tensor,
    group: Tensor | None, sample: Tensor | None, advantage: Tensor | None, coefficient: Tensor | None,
    old_logprob: Tensor | None, rollout_logprob: Tensor | None, reference_logprob: Tensor | None,
    main_grad: Tensor | None, kind: str, clip_low: float | None,
    clip_high: float | None, tis_cap: float | None, kl: str, kl_coef: float, temperature: float,
    softcap: float | None, denominator: float,
    workspace_bytes: int, needs: Sequence[bool], with_entropy: bool, patched: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Returns (loss, stats, logprob [T], entropy [T] or [0], dH, dW, dbias); gradients not in ``needs`` are empty.

    Every row, chunk by chunk: odds forward, row losses, row scales, the two backward GEMMs.
    """
    clip = None if clip_low is None or clip_high is None else (clip_low, clip_high)
    options = PolicyLossOptions(kind, clip, tis_cap, kl, kl_coef)  # type: ignore[arg-type]
    table = None if rewards is None else rewards.to(hidden.device, non_blocking=True)
    rows = TokenRows(target, group, sample, advantage, coefficient, old_logprob, rollout_logprob, reference_logprob)
    rows = rows.to(hidden.device)
    _, _, logprob, entropy = _row_outputs(hidden, with_entropy)
    grad_hidden, _, _ = head.empty_gradients(hidden, weight, bias, [needs[0], False, False])
    chunked = ChunkedHead(
        weight, bias=bias, temperature=temperature, softcap=softcap, entropy=with_entropy, needs=needs,
        main_grad=main_grad, patch_target=patched, workspace_bytes=workspace_bytes,
    )  # fmt: skip
    losses = []
    for at in chunked.chunks(hidden):
        part = rows.part(at)
        chunk = chunked.forward_chunk(hidden[at], part.target)
        logprob[at] = chunk.logprob
        if chunk.entropy is not None:
            entropy[at] = chunk.entropy
        losses.append(part.losses(chunk.logprob, chunk.entropy, table, denominator, options))
        if any(needs):
            by_hidden = chunked.backward_chunk(chunk, losses[-1].grad)
            if by_hidden is not None:
                grad_hidden[at] = by_hidden
    if not losses:
        losses.append(rows.losses(logprob, None, table, denominator, options))
    loss = torch.cat([chunk.loss for chunk in losses]).sum()
    return loss, _merged([chunk.stats for chunk in losses]), logprob, entropy, grad_hidden, *chunked.sums.results()


class TokenRows(NamedTuple):
    """What belongs to a token, [T] each; the arguments of `fused_policy_loss`."""

    target: Tensor
    group: Tensor | None
    sample: Tensor | None
    advantage: Tensor | None
    coefficient: Tensor | None
    old_logprob: Tensor | None
    rollout_logprob: Tensor | None
    reference_logprob: Tensor | None

    def part(self, part: slice) -> TokenRows:
        return TokenRows(*(None if x is None else x[part] for x in self))  # type: ignore[arg-type]

    def to(self, device: torch.device) -> TokenRows:
        """On one device, without waiting for it."""
        return TokenRows(*(None if x is None else x.to(device, non_blocking=True) for x in self))  # type: ignore[arg-type]

    def losses(
        self, logprob: Tensor, entropy: Tensor | None, rewards: Tensor | None, denominator: float,
        options: PolicyLossOptions,
    ) -> RowLosses:  # fmt: skip
        rows: dict[str, Any] = self._asdict()
        mask = rows.pop("target") != reference.IGNORE
        return row_losses(
            logprob, rewards, denominator=denominator, options=options, mask=mask, entropy=entropy, **rows
        )


def _merged(stats: list[Tensor]) -> Tensor:
    """The statistics of all chunks: sums, but for the two extremes."""
    table, low, high = torch.stack(stats), STATS.index("ratio_min"), STATS.index("ratio_max")
    total = table.sum(0)
    total[low], total[high] = table[:, low].amin(), table[:, high].amax()
    return total


@_fused_op.register_fake
def _(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    call = head.by_name(torch.ops.gapg.fused_policy_loss.default, args)
    gradients = head.empty_gradients(
        call["hidden"], call["weight"], call["bias"], call["needs"], call["main_grad"] is not None
    )
    return *_row_outputs(call["hidden"], call["with_entropy"]), *gradients


def _row_outputs(hidden: Tensor, with_entropy: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Unwritten (loss, stats, logprob [T], entropy [T] or [0])."""
    count, dtype = hidden.shape[0], sum_dtype(hidden.dtype)
    shapes = ((), (len(STATS),), (count,), (count if with_entropy else 0,))
    loss, stats, logprob, entropy = (hidden.new_empty(shape, dtype=dtype) for shape in shapes)
    return loss, stats, logprob, entropy


@register_flop_formula(torch.ops.gapg.fused_policy_loss)
def _flops(*args: Any, **named: Any) -> int:
    call = head.by_name(torch.ops.gapg.fused_policy_loss.default, args, named)
    hidden, weight, needs = call["hidden"], call["weight"], call["needs"]
    return 2 * (1 + int(needs[0]) + int(needs[1])) * hidden[0] * hidden[1] * weight[0]
