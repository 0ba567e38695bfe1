"""A batch as TRL's GRPOTrainer makes it, and what a trainer of its kind makes of that."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedTokenizerBase
from trl import GRPOConfig, GRPOTrainer

from gapg.integrations.trl import FusedLogprobs

GROUPS, SIZE, WIDTH = 3, 4, 6
QUESTIONS = ["1 2 3 = 6 :", "2 5 = 7 :", "8 8 4 = 20 :"]


class Fused(FusedLogprobs, GRPOTrainer):
    """As a user writes it."""


def reward(completion_ids: list[list[int]], **_: object) -> list[float]:
    """Some groups agree, so that their advantage is 0."""
    return [float(sum(ids) % 3) if sum(ids[:2]) % 2 else 1.0 for ids in completion_ids]


Make = Callable[..., GRPOTrainer]


def maker(folder: Path, tokenizer: PreTrainedTokenizerBase, settings: dict[str, Any]) -> Make:
    """`make(kind, switches..., **GRPOConfig settings)`: a trainer of the model in the folder."""

    def make(
        kind: type[GRPOTrainer] = Fused, switches: dict[str, Any] | None = None, given: dict[str, Any] | None = None,
        **changed: Any,
    ) -> GRPOTrainer:  # fmt: skip
        config = settings | {"per_device_train_batch_size": GROUPS * SIZE, "num_generations": SIZE} | changed
        rest: dict[str, Any] = {
            "reward_funcs": reward,
            "train_dataset": Dataset.from_list([{"prompt": question} for question in QUESTIONS]),
        }
        return kind(
            model=str(folder),
            args=GRPOConfig(**config),
            processing_class=tokenizer,
            **(rest | (given or {})),
            **(switches or {}),
        )

    return make


@torch.no_grad()
def batch(trainer: GRPOTrainer, *, old: bool = True, seed: int = 0) -> dict[str, Any]:
    """Prompts padded on the left, completions on the right, one of them masked whole; half the advantages are 0.

    Old, reference and sampling log-probs lie around the model's own: some tokens are clipped, weighed, masked.
    """
    draw = torch.Generator().manual_seed(seed)
    rows, vocab = GROUPS * SIZE, trainer.model.config.vocab_size

    def around(x: Tensor) -> Tensor:
        return x + 0.3 * torch.randn(x.shape, generator=draw)

    prompt_ids, completion_ids = (torch.randint(3, vocab, (rows, width), generator=draw) for width in (7, WIDTH))
    lengths = torch.randint(1, WIDTH + 1, (rows, 1), generator=draw)
    lengths[4] = 0
    prompt_mask = (torch.arange(7) >= 7 - torch.randint(2, 8, (rows, 1), generator=draw)).long()
    completion_mask = (torch.arange(WIDTH) < lengths).long()
    advantages = torch.randn(rows, generator=draw)
    advantages[torch.arange(rows) % 4 > 1] = 0
    made = {
        "prompt_ids": prompt_ids,
        "prompt_mask": prompt_mask,
        "completion_ids": completion_ids,
        "completion_mask": completion_mask,
        "advantages": advantages,
        "num_items_in_batch": completion_mask.sum(),
    }
    ids, mask = torch.cat([prompt_ids, completion_ids], 1), torch.cat([prompt_mask, completion_mask], 1)
    own, _, _ = GRPOTrainer._get_per_token_logps_and_entropies(trainer, trainer.model, ids, mask, WIDTH)
    for name in ("old", "ref", "sampling"):
        if old or name != "old":
            made[f"{name}_per_token_logps"] = around(own) * completion_mask
    made["importance_sampling_ratio"] = around(torch.zeros_like(own)).exp()
    return made


class Outcome(NamedTuple):
    """A loss, all gradients end to end, and TRL's metrics of the batch."""

    loss: float
    gradient: Tensor
    metrics: dict[str, float]


def outcome(trainer: GRPOTrainer, inputs: dict[str, Any]) -> Outcome:
    trainer.model.train().zero_grad()
    trainer.current_gradient_accumulation_steps = 2
    trainer._metrics["train"].clear()
    with trainer.compute_loss_context_manager():
        loss = trainer._compute_loss(trainer.model, inputs)
    loss.backward()
    gradient = torch.cat([p.grad.flatten() for p in trainer.model.parameters() if p.grad is not None])
    return Outcome(float(loss.detach()), gradient, {k: v[-1] for k, v in trainer._metrics["train"].items()})


def apart(ours: Tensor, theirs: Tensor) -> float:
    """The distance, relative to the norm."""
    return float((ours.double() - theirs.double()).norm() / theirs.double().norm())
