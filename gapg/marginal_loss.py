"""The marginal estimator on packed batches: the policy's chance of calling, and a loss with the estimator's gradient.

`gapg.marginal` has the formulas. What is not known before a batch's forward is how likely each response is to be given
at all; so a batch's hazards are computed first, by the head alone, and from them the coefficients of everything else.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from gapg import marginal
from gapg.batches.batching import PackedBatch
from gapg.batches.decisions import Decisions
from gapg.config import RunConfig
from gapg.model.policy import head_weight, logit_arguments, response_states
from gapg_kernels.linear_loss import linear_loss
from gapg_kernels.policy_loss import group_advantages


@dataclass(frozen=True, slots=True)
class Masked:
    """What is known of responses sampled with help forbidden, beside whether each is right (the reward table).

    cloud_P: how right the cloud is on each prompt, in [0, 1]. hazard_PG: x by the engine's log-odds, or NaN. Float32.
    first_PG: int64, the sample that is in the batches for each response, of those that are equal; None: itself.
    """

    cloud_P: Tensor
    hazard_PG: Tensor
    first_PG: Tensor | None = None

    def to(self, device: torch.device) -> Masked:
        first_PG = None if self.first_PG is None else self.first_PG.to(device)
        return Masked(self.cloud_P.to(device), self.hazard_PG.to(device), first_PG)


class MarginalBatch(NamedTuple):
    loss: Tensor
    """its gradient is the estimator's; its value means nothing"""
    logprob: Tensor
    """[R] log pi~, detached"""


class MarginalLoss:
    """Of one update of one policy. `right_PG`, `masked`: of all prompts of D, on the model's device."""

    def __init__(self, model: PreTrainedModel, config: RunConfig, right_PG: Tensor, masked: Masked) -> None:
        self.model, self.config, self.right_PG = model, config, right_PG
        self.rollout_hazard_PG = masked.hazard_PG.reshape(right_PG.shape)
        self.cloud_PG = masked.cloud_P[:, None].expand_as(right_PG)
        self.noted_PG, self.first_PG = torch.full_like(right_PG, -torch.inf), masked.first_PG
        self.compute: torch.dtype = getattr(torch, config.model.dtype)

    @property
    def log_x_PG(self) -> Tensor:
        """log of the hazards, of the groups whose batches were here."""
        return self.noted_PG if self.first_PG is None else self.noted_PG.gather(1, self.first_PG)

    @torch.no_grad()
    def look_ahead(self, batches: Sequence[PackedBatch]) -> None:
        """Computes the hazards of groups that are spread over batches: a forward of theirs, before any backward."""
        for batch in batches:
            if batch.decisions is not None and not batch.decisions.whole:
                self._note(batch.decisions, self._log_odds(response_states(self.model, batch, self.compute), batch))

    def __call__(self, batch: PackedBatch, denominator: float) -> MarginalBatch:
        """To be followed by ``loss.backward()`` and nothing else, as `gapg.model.policy.response_loss`."""
        hidden_RH, decisions = response_states(self.model, batch, self.compute), batch.decisions
        assert decisions is not None
        with torch.no_grad():
            log_odds_NK = self._log_odds(hidden_RH.detach(), batch)
            self._note(decisions, log_odds_NK)
            pull_NK = self._pull(decisions, log_odds_NK)
            advantage_R = self._advantages()[batch.group, batch.sample]
        target = batch.target
        given = {"advantage": advantage_R, "weight": batch.weight, "rollout": batch.rollout_logprob}
        total, logprob_R, start = hidden_RH.new_zeros((), dtype=torch.float32), torch.zeros_like(batch.weight), 0
        for tokens, rows in decisions.parts:
            part = {name: x if rows is None else x[rows] for name, x in given.items()}
            if tokens:
                stop = start + (len(target) if rows is None else len(rows))
                part["pull"], start = pull_NK[start:stop, : len(tokens)], stop
            out = linear_loss(
                hidden_RH if rows is None else hidden_RH.index_select(0, rows),
                target=target if rows is None else target[rows],
                loss=partial(_surrogate, denominator=denominator, tis_cap=self.config.loss.tis_cap),
                rows=part,
                mask_columns=tokens,
                **self._head(),
            )
            total = total + out.loss
            logprob_R[slice(None) if rows is None else rows] = out.logprob
        return MarginalBatch(total, logprob_R)

    def metrics(self) -> dict[str, float]:
        """Of all responses of D, with the policy as it was in this update; NaN where D is empty.

        A decision sampled after each response would call on `call_fraction` of them, and be right on `accuracy`, of it
        `local_accuracy` by answering.
        """
        hazard, right = self.log_x_PG.exp(), self.right_PG
        stays, calls = (-hazard).exp(), -torch.expm1(-hazard)
        gap = (hazard - self.rollout_hazard_PG).abs()
        log_score = torch.where(right > 0, -hazard, marginal.log_expm1(self.log_x_PG) - hazard)
        figures = {
            "call_fraction": calls,
            "local_accuracy": right * stays,
            "accuracy": right * stays + self.cloud_PG * calls,
            "marginal/right": right,
            "marginal/brier": (stays - right).square(),
            "marginal/log_score": log_score.clamp(min=-100.0),
        }
        named = {name: x.mean() for name, x in figures.items()}
        named["hazard_gap"] = gap.max() if gap.numel() else gap.new_tensor(torch.nan)
        return dict(zip(named, torch.stack(list(named.values())).tolist(), strict=True))

    def _advantages(self) -> Tensor:
        """[P, G] of the groups whose hazards are all known."""
        worth = marginal.worth(
            self.right_PG, self.log_x_PG.exp(), self.cloud_PG, self.config.marginal, self.config.reward
        )
        return group_advantages(worth, self.config.loss.advantage)

    def _head(self) -> dict[str, Any]:
        head = self.model.get_output_embeddings()
        weight, main_grad = head_weight(self.model)
        arguments = logit_arguments(self.model, self.config.rollout.temperature)
        return {"weight": weight, "main_grad": main_grad, "bias": head.bias, **arguments}

    def _log_odds(self, hidden_RH: Tensor, batch: PackedBatch) -> Tensor:
        """[N, K] of each token that could begin the phrase, at each place; -inf beyond a place's own."""
        assert batch.decisions is not None
        parts = [(tokens, rows) for tokens, rows in batch.decisions.parts if tokens]
        most = max((len(tokens) for tokens, _ in parts), default=1)
        found = [hidden_RH.new_empty((0, most), dtype=torch.float32)]
        for tokens, rows in parts:
            out = linear_loss(
                hidden_RH if rows is None else hidden_RH.index_select(0, rows),
                target=batch.target if rows is None else batch.target[rows],
                loss=_nothing,
                mask_columns=tokens,
                **self._head(),
            )
            assert out.log_odds is not None
            found.append(torch.nn.functional.pad(out.log_odds, (0, most - len(tokens)), value=-torch.inf))
        return torch.cat(found)

    def _note(self, decisions: Decisions, log_odds_NK: Tensor) -> None:
        """Writes the batch's hazards into the table."""
        each_N = marginal.log_hazard(log_odds_NK.logsumexp(1))
        padded = torch.cat([each_N, each_N.new_full((1,), -torch.inf)])
        self.noted_PG[decisions.group, decisions.sample] = padded[decisions.place].logsumexp(1)

    def _pull(self, decisions: Decisions, log_odds_NK: Tensor) -> Tensor:
        """[N, K] d(score) / d(log-odds)."""
        at = decisions.group[decisions.response], decisions.sample[decisions.response]
        size_N, sign_N = marginal.decision_slopes(
            self.right_PG[at], self.log_x_PG[at], self.cloud_PG[at], self.config.marginal, self.config.reward
        )
        log_p_NK = log_odds_NK - marginal.softplus(log_odds_NK.logsumexp(1))[:, None]
        return sign_N[:, None] * (size_N[:, None] + log_p_NK).exp()


def _surrogate(
    logprob: Tensor, advantage: Tensor, weight: Tensor, rollout: Tensor, pull: Tensor | None = None,
    log_odds: Tensor | None = None, *, denominator: float, tis_cap: float | None,
) -> Tensor:  # fmt: skip
    """Minus the sum of coefficients times what they are the gradients by; `tis_cap` weighs the trace's term alone."""
    if tis_cap is not None:
        ratio = (logprob.detach() - rollout).exp().clamp(max=tis_cap)
        advantage = advantage * torch.where(rollout.isnan(), 1.0, ratio)
    each = advantage * logprob
    if pull is not None and log_odds is not None:
        each = each + torch.where(pull == 0, 0.0, pull * log_odds).sum(1)
    return -(weight * each).sum() / denominator


def _nothing(logprob: Tensor, log_odds: Tensor) -> Tensor:
    return logprob.new_zeros(())
