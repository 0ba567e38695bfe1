"""What is measured on a trained model: predictions, one file a product, made once and kept in the run's folder."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from gapg.build import fitting_prompts, make_oracle
from gapg.evaluation.calibrate import help_control, masked
from gapg.evaluation.evaluate import prediction, respond
from gapg.files import write_whole
from gapg.jsonl import read_jsonl, to_json
from gapg.judge import Judge
from gapg.model.endings import opens_think
from gapg.runs.run import Run
from gapg.runs.tracking import warn
from gapg.seeding import derive
from gapg.studies.study import product_path
from gapg.tasks import find_object
from gapg.tasks.base import STOP, Prompt, Task
from gapg_rollout.records import HelpControl, Oracle, Sampling

Rows = list[dict[str, Any]]
SAMPLES = 5
"""Responses a problem for self-consistency."""


def make_product(run: Run, name: str) -> int:
    """Makes the product unless it is there; returns on how many rows the cloud is unknown, because it failed.

    One with such rows is made again (paid answers are not asked twice).
    """
    path = product_path(run.folder, name)
    rows = read_jsonl(path, whole=True)
    if not _whole(rows):
        make: Callable[[Run], Rows] = PRODUCTS[name] if name in PRODUCTS else find_object(name, "product")
        rows = make(run)
        path.parent.mkdir(exist_ok=True)
        write_whole(path, "".join(to_json(row) + "\n" for row in rows))
    if unknown := _unknown(rows):
        warn(f"{path}: the oracle failed on {unknown} of {len(rows)} rows; the same command asks again")
    return unknown


def is_made(path: Path) -> bool:
    """Whether a product lies there, the cloud known on all its rows."""
    return _whole(read_jsonl(path, whole=True))


def _whole(rows: Rows) -> bool:
    return bool(rows) and not _unknown(rows)


def _unknown(rows: Rows) -> int:
    return sum("oracle_score" in row and row["oracle_score"] is None for row in rows)


def decode(
    run: Run,
    name: str,
    prompts: Sequence[Prompt],
    *,
    temperature: float,
    control: HelpControl | None,
    task: Task | None = None,
    oracle: Oracle | None = None,
) -> Rows:
    """One prediction a prompt, in their order, the cloud's answer to each included.

    `name` is the display's title and seeds the sampling. `control`: None leaves help to the model, token by token, as
    in training; a bias of 0 would still force the rest of a phrase that is begun, and records margins.
    `task`, `oracle`: others than the run's config says; the caller closes such an oracle.
    """
    task = task or run.task
    sampling = Sampling(
        max_new_tokens=run.config.rollout.max_new_tokens,
        temperature=temperature,
        stop=STOP,
        seed=derive(run.config.seed, "product", name),
        help=control,
        thinking=opens_think(task, run.tokenizer),
    )
    # its own oracle, so that the run's totals stay those of training
    asked = oracle or make_oracle(run.config, task, run.folder)
    try:
        judge = Judge(task, asked, ask_always=True, thinking=sampling.thinking)
        groups = respond(run.engine, task, run.tokenizer, judge, prompts, sampling, title=name)
    finally:
        if oracle is None:
            asked.close()
    return [prediction(g, run.config.reward) for g in groups]


def heldout(run: Run) -> list[Prompt]:
    return fitting_prompts(run.config, run.task, run.tokenizer, "heldout")


def heldout_sampled(run: Run) -> Rows:
    """As trained: at the training temperature, help neither steered nor masked."""
    temperature = run.config.rollout.temperature
    return decode(run, "heldout-sampled", heldout(run), temperature=temperature, control=None)


def greedy_masked(run: Run, name: str, prompts: Sequence[Prompt]) -> Rows:
    """Greedy with help forbidden: with bias b a problem calls iff help_margin > -b, and else answers as here."""
    return decode(run, name, prompts, temperature=0.0, control=masked(help_control(run.tokenizer)))


def heldout_masked(run: Run) -> Rows:
    return greedy_masked(run, "heldout-masked", heldout(run))


def train_masked(run: Run) -> Rows:
    """All problems of the training split, those for validation included: for thresholds and calibration."""
    prompts = fitting_prompts(run.config, run.task, run.tokenizer, "train")
    return greedy_masked(run, "train-masked", prompts)


def sampled_masked(run: Run, name: str, prompts: Sequence[Prompt]) -> Rows:
    """`SAMPLES` responses a problem at temperature 1, help forbidden; a problem's rows follow each other (`sample`)."""
    control = masked(help_control(run.tokenizer))
    tables = [decode(run, f"{name} {k + 1}", prompts, temperature=1.0, control=control) for k in range(SAMPLES)]
    return [row | {"sample": k} for of_problem in zip(*tables, strict=True) for k, row in enumerate(of_problem)]


def heldout_samples(run: Run) -> Rows:
    return sampled_masked(run, "heldout-samples", heldout(run))


def calibration_samples(run: Run) -> Rows:
    """On the validation problems."""
    return sampled_masked(run, "calibration-samples", run.validation)


STANDARD = ("heldout-sampled", "heldout-masked", "train-masked")
"""Made of every run."""

PRODUCTS: dict[str, Callable[[Run], Rows]] = {
    "heldout-sampled": heldout_sampled,
    "heldout-masked": heldout_masked,
    "train-masked": train_masked,
    "heldout-samples": heldout_samples,
    "calibration-samples": calibration_samples,
}
