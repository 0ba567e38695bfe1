"""One update by ours with each saving, and by others: transformers with full logits, TRL's head, Liger's fused loss.

TRL is 1.16's `GRPOTrainer._compute_loss` without its bookkeeping: the backbone on sequences padded as TRL pads them
(prompts left, completions right), then the autograd function that `add_fused_lm_head` puts behind it. It scores the
response positions only, as TRL does on CUDA (elsewhere it scores all). TRL's `use_liger_kernel` replaces layer kernels
only, so it makes the same products. Liger's own fused GRPO loss, which older TRLs called, is taken by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from gapg.batches.batching import Example

LR = 1e-6
"""Of every implementation: they all move one model."""
MICRO_BATCH = 8
"""Sequences; what a trainer without packing is commonly given, where they fit."""


@dataclass(frozen=True)
class Padded:
    """B sequences of S tokens, the last C of which are completions; all [B, S] int64, or [B, C] for the rows."""

    ids: Tensor
    mask: Tensor
    targets: Tensor
    """[B, C], -100 beyond a completion"""
    rows: Tensor
    """[R] int64: where the R true targets are in [B * C]"""
    weight: Tensor
    """[B] float32, what a token's negative log-prob is multiplied with"""

    def tensors(self, put: Callable[[Tensor], Tensor]) -> Padded:
        return Padded(*(put(x) for x in (self.ids, self.mask, self.targets, self.rows, self.weight)))


def padded(
    examples: Sequence[Example], advantages: Sequence[float], denominator: float, sequences: int = MICRO_BATCH
) -> Iterator[Padded]:
    """Micro-batches of so many in the order given, prompts padded on the left and completions on the right."""
    for start in range(0, len(examples), sequences):
        part = examples[start : start + sequences]
        prompt, response = max(len(e.prompt_ids) for e in part), max(len(e.response_ids) for e in part)
        ids = torch.zeros(len(part), prompt + response, dtype=torch.int64)
        mask, targets = torch.zeros_like(ids), torch.full((len(part), response), -100)
        for row, e in enumerate(part):
            begin, end = prompt - len(e.prompt_ids), prompt + len(e.response_ids)
            ids[row, begin:end] = torch.tensor([*e.prompt_ids, *e.response_ids])
            mask[row, begin:end] = 1
            targets[row, : len(e.response_ids)] = torch.tensor(e.response_ids)
        weight = torch.tensor(advantages[start : start + sequences], dtype=torch.float32) / denominator
        yield Padded(ids, mask, targets, (targets.flatten() >= 0).nonzero()[:, 0], weight)


def full_logits(model: PreTrainedModel, batch: Padded) -> Tensor:
    """The plain loop: logits of all positions, then a log-softmax in float32 of those that predict a response."""
    logits = model(input_ids=batch.ids, attention_mask=batch.mask, use_cache=False).logits
    logprob = torch.log_softmax(logits[:, -batch.targets.shape[1] - 1 : -1].float(), -1)
    logprob = logprob.gather(2, batch.targets.clamp(min=0)[..., None])[..., 0]
    return -(torch.where(batch.targets >= 0, logprob, 0.0) * batch.weight[:, None]).sum()


def trl_head(model: PreTrainedModel, batch: Padded) -> Tensor:
    """TRL 1.16's chunked log-probs and entropies of the response positions."""
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction
    from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE as COLUMNS

    hidden, targets, row = _response_rows(_backbone(model, batch), batch)
    weight, wanted = model.get_output_embeddings().weight, ("log_probs", "entropy")
    logprob = ChunkedLogProbFunction.apply(hidden, weight, None, targets, 1.0, COLUMNS, None, 1.0, wanted)[0]
    return -(logprob * batch.weight[row]).sum()


def liger_loss(model: PreTrainedModel, batch: Padded) -> Tensor:
    """The products of Liger's fused GRPO loss, by its own chunked autograd function, on all completion positions."""
    from liger_kernel.chunked_loss import fused_linear_ppo as liger

    count = batch.targets.shape[1]
    hidden = _backbone(model, batch)[:, -count - 1 : -1].flatten(0, 1)
    weight = model.get_output_embeddings().weight.to(hidden.dtype)
    targets = batch.targets.flatten()
    logprob = liger._ChunkedSelectiveLogProbFunction.apply(
        hidden.contiguous(), weight, targets.clamp(min=0), None, 1.0, liger._SELECTIVE_LOGPROB_VOCAB_CHUNK_SIZE
    )
    return -(torch.where(batch.targets >= 0, logprob.view(-1, count), 0.0) * batch.weight[:, None]).sum()


def _backbone(model: PreTrainedModel, batch: Padded) -> Tensor:
    return model.base_model(input_ids=batch.ids, attention_mask=batch.mask, use_cache=False).last_hidden_state


def _response_rows(hidden: Tensor, batch: Padded) -> tuple[Tensor, Tensor, Tensor]:
    """The rows whose target is not -100, by an index known to the host: (hidden [R, H], targets [R], sequence [R])."""
    count = batch.targets.shape[1]
    rows = hidden[:, -count - 1 : -1].flatten(0, 1).index_select(0, batch.rows)
    return rows, batch.targets.flatten().index_select(0, batch.rows), batch.rows // count


PEERS: dict[str, Callable[[PreTrainedModel, Padded], Tensor]] = {
    "padded, full logits": full_logits,
    "TRL 1.16": trl_head,
    "Liger fused GRPO loss": liger_loss,
}
