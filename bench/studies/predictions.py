"""What is measured on a trained model: predictions on whole sets of problems, each made once and kept with the run."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import closing

from gapg.build import fitting_prompts, make_oracle
from gapg.console import warn
from gapg.evaluation.evaluate import prediction, respond
from gapg.files import write_whole
from gapg.help_phrase import deciding_tokens, help_control, masked, masked_logprobs
from gapg.jsonl import read_jsonl, to_json
from gapg.judge import Group, Judge
from gapg.runs.run import Run
from gapg.seeding import derive
from gapg.tasks.base import STOP, Prompt
from gapg_rollout.records import HelpControl, Sampling
from studies.arms import Predictions, Rows

SAMPLES = 5
"""Responses a problem for self-consistency."""


def make_predictions(run: Run, wanted: Predictions) -> tuple[int, bool]:
    """Makes them unless they are there; returns (on how many rows the cloud is unknown, whether they were made now).

    A file with rows on which the cloud failed is made again (paid answers are not asked twice).
    """
    path = wanted.path(run.folder)
    rows = read_jsonl(path, whole=True)
    if new := not rows or _unknown(rows) > 0:
        rows = wanted.make(run)
        path.parent.mkdir(exist_ok=True)
        write_whole(path, "".join(to_json(row) + "\n" for row in rows))
    if unknown := _unknown(rows):
        warn(f"{path}: the oracle failed on {unknown} of {len(rows)} rows; the same command asks again")
    return unknown, new


def _unknown(rows: Rows) -> int:
    return sum("oracle_score" in row and row["oracle_score"] is None for row in rows)


def judged(
    run: Run, title: str, seed: int, prompts: Sequence[Prompt], temperature: float, control: HelpControl | None
) -> list[Group]:
    """One judged response a prompt, the cloud asked about each.

    `control`: None leaves help to the model, token by token, as in training; a bias of 0 would still force the rest of
    a phrase that is begun, and records margins.
    """
    thinking = run.judge.thinking
    sampling = Sampling(run.config.rollout.max_new_tokens, temperature, STOP, seed, control, thinking)
    # its own oracle, so that the run's totals stay those of training
    with closing(make_oracle(run.config, run.task, run.folder)) as oracle:
        judge = Judge(run.task, oracle, ask_always=True, thinking=thinking)
        return respond(run.engine, run.task, run.tokenizer, judge, prompts, sampling, title=title)


def decode(run: Run, name: str, prompts: Sequence[Prompt], temperature: float, control: HelpControl | None) -> Rows:
    """One prediction a prompt, in their order. `name` seeds the sampling."""
    groups = judged(run, name, derive(run.config.seed, "product", name), prompts, temperature, control)
    return [prediction(g, run.config.reward) for g in groups]


def greedy_masked(run: Run, name: str, prompts: Sequence[Prompt]) -> Rows:
    """Greedy with help forbidden: with bias b a problem calls iff help_margin > -b, and else answers as here.

    `stays`: S, the policy's own chance of giving this answer instead of calling.
    """
    control, rows = masked(help_control(run.tokenizer)), []
    for group in judged(run, name, derive(run.config.seed, "product", name), prompts, 0.0, control):
        (completion,) = group.completions
        prompt = run.task.render(group.prompt, run.tokenizer)
        _, hazard = masked_logprobs(completion, deciding_tokens(control, prompt, completion.token_ids, group.thinking))
        rows.append(prediction(group, run.config.reward) | {"stays": math.exp(-hazard)})
    return rows


def sampled_masked(run: Run, name: str, prompts: Sequence[Prompt]) -> Rows:
    """`SAMPLES` responses a problem at temperature 1, help forbidden; a problem's rows follow each other (`sample`)."""
    control = masked(help_control(run.tokenizer))
    tables = [decode(run, f"{name} {k + 1}", prompts, 1.0, control) for k in range(SAMPLES)]
    return [row | {"sample": k} for of_problem in zip(*tables, strict=True) for k, row in enumerate(of_problem)]


def heldout(run: Run) -> list[Prompt]:
    return fitting_prompts(run.config, run.task, run.tokenizer, "heldout")


def _heldout_sampled(run: Run) -> Rows:
    """As trained: at the training temperature, help neither steered nor masked."""
    return decode(run, "heldout-sampled", heldout(run), run.config.rollout.temperature, None)


def _heldout_masked(run: Run) -> Rows:
    return greedy_masked(run, "heldout-masked", heldout(run))


def _train_masked(run: Run) -> Rows:
    """All problems of the training split, those for validation included: for thresholds and calibration."""
    return greedy_masked(run, "train-masked", fitting_prompts(run.config, run.task, run.tokenizer, "train"))


def _heldout_samples(run: Run) -> Rows:
    return sampled_masked(run, "heldout-samples", heldout(run))


def _calibration_samples(run: Run) -> Rows:
    return sampled_masked(run, "calibration-samples", run.validation)


TRAIN_MASKED = Predictions("train-masked", _train_masked)
HELDOUT_SAMPLES = Predictions("heldout-samples", _heldout_samples)
CALIBRATION_SAMPLES = Predictions("calibration-samples", _calibration_samples)
STANDARD = (
    Predictions("heldout-sampled", _heldout_sampled), Predictions("heldout-masked", _heldout_masked), TRAIN_MASKED,
)  # fmt: skip
"""Made of every run."""
