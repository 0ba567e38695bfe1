"""A trained model's own answers, for routers that learn to judge them.

The greedy ones are read back from predictions that every run has, so that all routers judge the same answers. To learn
from there are sampled ones too: the greedy answers to problems that a policy was trained on are often right, and few.
No cloud is asked.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch.nn.functional import binary_cross_entropy_with_logits

from gapg.batches.batching import Example
from gapg.evaluation.evaluate import respond
from gapg.help_phrase import help_control, masked
from gapg.jsonl import read_jsonl
from gapg.judge import Judge
from gapg.runs.run import Run
from gapg.seeding import derive
from gapg.tasks.base import STOP, Prompt
from gapg_rollout.records import Sampling
from studies.arms import Predictions, Rows, predictions_path
from studies.predictions import STANDARD, heldout, make_predictions

SAMPLED = 2
"""Answers a training problem, beside the greedy one."""


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
        return _read(run, prompts, [rows[p.id] for p in prompts])

    return OwnAnswers(of(run.queue.prompts), of(run.validation), of(heldout(run)))


def with_samples(run: Run, answers: OwnAnswers) -> OwnAnswers:
    """The same with `SAMPLED` sampled answers a training problem after the greedy ones to learn from."""
    make_predictions(run, TRAINING_SAMPLES)
    rows = read_jsonl(TRAINING_SAMPLES.path(run.folder))
    by_id = {p.id: p for p in run.queue.prompts}
    sampled, greedy = _read(run, [by_id[row["id"]] for row in rows], rows), answers.training
    n = len(greedy.ids)
    examples = [*greedy.examples, *(replace(e, group=n + e.group) for e in sampled.examples)]
    training = Answers([*greedy.ids, *sampled.ids], examples, torch.cat([greedy.wrong, sampled.wrong]))
    return answers._replace(training=training)


def _read(run: Run, prompts: Sequence[Prompt], rows: Rows) -> Answers:
    """The responses of these rows, a prompt each."""
    examples = [
        Example(
            run.task.render(p, run.tokenizer), run.tokenizer.encode(row["response"], add_special_tokens=False), group=i
        )
        for i, (p, row) in enumerate(zip(prompts, rows, strict=True))
    ]
    wrong = [float(row["outcome"] != "local_correct") for row in rows]
    return Answers([p.id for p in prompts], examples, torch.tensor(wrong))


def _training_samples(run: Run) -> Rows:
    rollout, thinking = run.config.rollout, run.judge.thinking
    judge, help = Judge(run.task, run.oracle, thinking=thinking, masked=True), masked(help_control(run.tokenizer))
    rows: Rows = []
    for k in range(SAMPLED):
        title = f"training samples {k + 1}"
        seed = derive(run.config.seed, title)
        sampling = Sampling(rollout.max_new_tokens, rollout.temperature, STOP, seed, help, thinking)
        groups = respond(run.engine, run.task, run.tokenizer, judge, run.queue.prompts, sampling, title=title)
        rows += [{"id": g.prompt.id, "response": g.completions[0].text, "outcome": g.outcomes[0].value} for g in groups]
    return rows


TRAINING_SAMPLES = Predictions("training-samples", _training_samples)
"""Sampled with help masked, as in training; judged without the cloud."""


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
