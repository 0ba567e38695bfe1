"""P(true): the model itself is asked after its answer whether that is wrong (arXiv 2207.05221).

A model made from scratch knows no words to be asked in, so the answer is read from what every model here has: the odds
that the help phrase begins right after the response. `UNTRAINED` takes them from the model as it is. `TRAINED` takes
them from a copy of the whole model that learned to begin the phrase there exactly after a wrong answer: cross-entropy
on the run's greedy and sampled answers to its training problems, the epoch chosen by the validation problems.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits
from transformers import PreTrainedModel

from gapg.batches.batching import Example, PackedBatch, packed_batches
from gapg.config import RunConfig
from gapg.config_sections import OptimConfig
from gapg.console import Display
from gapg.help_phrase import help_control
from gapg.model.policy import head_weight, logit_arguments, response_states
from gapg.optim import clip_and_step, learning_rate, make_optimizer
from gapg.runs.run import Run
from gapg.seeding import derive
from gapg_kernels.linear_loss import linear_loss
from gapg_rollout.records import HelpSpelling
from studies import arms
from studies.answers import Answers, own_answers, score_rows, with_samples
from studies.arms import Entrant, Predictions, Rows


@dataclass(frozen=True)
class Recipe:
    """How the copy is trained."""

    lr: float
    epochs: int
    batch_size: int


FROM_SCRATCH, FINE_TUNING = Recipe(1e-3, 4, 128), Recipe(1e-5, 1, 32)
"""For a model made from scratch, and for one that was pretrained."""


class SelfCheck:
    """A model, and how it is asked: by the odds of `spelling`, one way to write the help phrase, at a text's end."""

    def __init__(self, model: PreTrainedModel, config: RunConfig, spelling: HelpSpelling, end_id: int) -> None:
        self.model, self.config, self.spelling, self.end_id = model, config, spelling, end_id
        self.compute: torch.dtype = getattr(torch, config.model.dtype)

    def batches(self, answers: Answers, indices: list[int]) -> Iterator[tuple[PackedBatch, Tensor]]:
        """(a batch with one row an answer, whether that is wrong [R]) of the answers of these indices."""
        examples = []
        for i in indices:
            e = answers.examples[i]
            before = [*e.prompt_ids, *e.response_ids, *self.spelling.prefix_ids]
            # the end token stands for whatever else could follow: it is not predicted
            examples.append(Example(before, [self.end_id], group=i))
        device, padded = self.model.device, self.config.update.pack is False
        for batch in packed_batches(examples, self.config.token_cap, device, padded=padded):
            yield batch, answers.wrong.to(device)[batch.group]

    def loss(self, batch: PackedBatch, wrong_R: Tensor, n: int) -> Tensor:
        """The sum of cross-entropies over n; to be followed by ``backward()`` and nothing else."""
        weight, main_grad = head_weight(self.model)
        hidden_RH, mean = response_states(self.model, batch, self.compute), partial(_cross_entropy, n=n)
        given = {"rows": {"wrong": wrong_R}, "main_grad": main_grad, **self._head()}
        return linear_loss(hidden_RH, weight, batch.target, mean, **given).loss

    @torch.no_grad()
    def scores(self, answers: Answers) -> Tensor:
        """[n] float32 log-odds of the help phrase after each answer, on the CPU."""
        trains = self.model.training
        self.model.eval()
        found = torch.zeros(len(answers.ids))
        for batch, wrong_R in self.batches(answers, list(range(len(answers.ids)))):
            hidden_RH = response_states(self.model, batch, self.compute)
            weight = self.model.get_output_embeddings().weight
            out = linear_loss(hidden_RH, weight, batch.target, _cross_entropy, rows={"wrong": wrong_R}, **self._head())
            assert out.log_odds is not None
            found[batch.group.cpu()] = out.log_odds[:, 0].float().cpu()
        self.model.train(trains)
        return found

    def _head(self) -> dict[str, Any]:
        bias = self.model.get_output_embeddings().bias
        return {"bias": bias, "mask_columns": (self.spelling.token_id,), **logit_arguments(self.model, 1.0)}


def _cross_entropy(logprob: Tensor, wrong: Tensor, log_odds: Tensor, *, n: int = 1) -> Tensor:
    return binary_cross_entropy_with_logits(log_odds[:, 0], wrong, reduction="sum") / n


def untrained(run: Run) -> SelfCheck:
    """The run's model, asked as it is. Raises ConfigError: a tokenizer without a help phrase of its own."""
    spelling = help_control(run.tokenizer).spellings[0]
    return SelfCheck(run.model, run.config, spelling, run.tokenizer.eos_token_id)


def trained(run: Run, training: Answers, validation: Answers, recipe: Recipe, label: str = "self-check") -> SelfCheck:
    """A copy that has learned from `training`, as it was after its best epoch on `validation`.

    The same run gives the same copy on the same machine.
    """
    asked = untrained(run)
    check = SelfCheck(copy.deepcopy(run.model), run.config, asked.spelling, asked.end_id)
    schedule = OptimConfig(lr=recipe.lr, weight_decay=0.01, warmup_steps=20, final_lr=0.0)
    optimizer = make_optimizer(check.model, schedule, run.config.model.parameters)
    lowest, best = validation.loss(check.scores(validation)), copy.deepcopy(check.model.state_dict())
    n = len(training.ids)
    per_epoch = -(-n // recipe.batch_size)
    with Display(label, recipe.epochs) as display:
        for epoch in range(recipe.epochs):
            order = list(range(n))
            random.Random(derive(run.config.seed, label, epoch)).shuffle(order)
            for k in range(per_epoch):
                chosen = order[k * recipe.batch_size : (k + 1) * recipe.batch_size]
                for batch, wrong_R in check.batches(training, chosen):
                    check.loss(batch, wrong_R, len(chosen)).backward()
                lr = learning_rate(schedule, epoch * per_epoch + k, recipe.epochs * per_epoch)
                clip_and_step(optimizer, lr, schedule.grad_clip)
            if (loss := validation.loss(check.scores(validation))) < lowest:
                lowest, best = loss, copy.deepcopy(check.model.state_dict())
            display.advance(f"loss {loss:.3f}")
    check.model.load_state_dict(best)
    return check


def _untrained(run: Run) -> Rows:
    answers, check = own_answers(run), untrained(run)
    return score_rows(answers, check.scores(answers.validation), check.scores(answers.heldout))


def _trained(run: Run) -> Rows:
    answers = with_samples(run, own_answers(run))
    check = trained(run, answers.training, answers.validation, FINE_TUNING if run.config.model.path else FROM_SCRATCH)
    return score_rows(answers, check.scores(answers.validation), check.scores(answers.heldout))


UNTRAINED, TRAINED = Predictions("p-true", _untrained), Predictions("p-true-trained", _trained)
ENTRANTS = (
    Entrant("+ P(true)", arms.masked, UNTRAINED),
    Entrant("+ P(true), trained", arms.masked, TRAINED),
)
