"""A trained model's own greedy answers, for routers that learn to judge them.

They are read back from predictions that every run has: nothing is decoded again, no cloud is asked, and all routers
judge the same answers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch.nn.functional import binary_cross_entropy_with_logits

from gapg.batches.batching import Example
from gapg.jsonl import read_jsonl
from gapg.runs.run import Run
from gapg.tasks.base import Prompt
from studies.arms import Rows, predictions_path
from studies.predictions import STANDARD, heldout, make_predictions


@dataclass(frozen=True)
class Answers:
    """To n problems. examples: prompt and response in tokens, `group` the place; wrong [n] float32, 0 or 1."""

    ids: list[str]
    examples: list[Example]
    wrong: torch.Tensor

    def prompts_alone(self) -> Answers:
        """The same without the responses: what is known before decoding."""
        return replace(self, examples=[replace(e, response_ids=[]) for e in self.examples])

    def part(self, indices: Sequence[int]) -> Answers:
        examples = [replace(self.examples[i], group=k) for k, i in enumerate(indices)]
        return Answers([self.ids[i] for i in indices], examples, self.wrong[list(indices)])

    def loss(self, score: torch.Tensor) -> float:
        """Mean cross-entropy of `score` [n], log-odds of a wrong answer, in nats."""
        return float(binary_cross_entropy_with_logits(score, self.wrong))


class OwnAnswers(NamedTuple):
    """By problems: those that the policy was trained on, those kept out for choosing, and the held-out ones."""

    training: Answers
    validation: Answers
    heldout: Answers


def own_answers(run: Run) -> OwnAnswers:
    """The run's greedy answers with help masked, their text in the tokenizer's tokens."""
    for predictions in STANDARD:
        make_predictions(run, predictions)
    rows = {
        row["id"]: row
        for name in ("train-masked", "heldout-masked")
        for row in read_jsonl(predictions_path(run.folder, name))
    }

    def of(prompts: Sequence[Prompt]) -> Answers:
        texts = [rows[p.id]["response"] for p in prompts]
        responses = [run.tokenizer.encode(text, add_special_tokens=False) for text in texts]
        examples = [
            Example(run.task.render(p, run.tokenizer), response, group=i)
            for i, (p, response) in enumerate(zip(prompts, responses, strict=True))
        ]
        wrong = [float(rows[p.id]["outcome"] != "local_correct") for p in prompts]
        return Answers([p.id for p in prompts], examples, torch.tensor(wrong))

    return OwnAnswers(of(run.queue.prompts), of(run.validation), of(heldout(run)))


def score_rows(answers: OwnAnswers, validation: torch.Tensor, heldout: torch.Tensor) -> Rows:
    """Rows of an entrant's predictions: scores [n] on the validation and on the held-out problems."""
    return [
        {"id": id_, "split": split, "score": score, "local": int(not wrong)}
        for split, of_split, scores in (
            ("validation", answers.validation, validation),
            ("heldout", answers.heldout, heldout),
        )
        for id_, score, wrong in zip(of_split.ids, scores.tolist(), of_split.wrong.tolist(), strict=True)
    ]
