"""Rejection training: a supervised model that refuses where the policy mostly fails, in the manner of DiSRouter
(arXiv 2510.19208) and of R-Tuning (arXiv 2311.09677).

The task-tuned policy answers each training problem several times. One that it gets right less often than the threshold
says is taught the help phrase, after a trace of the policy's own that went wrong; any other is taught one of its own
right responses. As many supervised steps, on as many responses a step, as the policy gradient had updates come on top
of these: put onto a finished run it has twice the updates of a method that trains once, and G samples a problem more.
`half_tuned` is for a comparison at equal updates.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from transformers import PreTrainedModel

from gapg.batches.batching import Example, packed_batches
from gapg.console import Display
from gapg.evaluation.calibrate import LIMIT
from gapg.evaluation.evaluate import prediction
from gapg.help_phrase import help_control, masked
from gapg.judge import Group, Judge, Outcome
from gapg.model.policy import response_logprobs
from gapg.optim import clip_and_step, learning_rate, make_optimizer
from gapg.runs.run import Run
from gapg.seeding import derive
from gapg.tasks.base import ANSWER_OPEN, HELP_PHRASE, STOP, Prompt
from gapg_rollout.records import Sampling
from studies import arms
from studies.arms import Arm, Entrant, Predictions, Rows
from studies.predictions import heldout
from studies.stacked import OF_ANSWER
from studies.statistics import help_margins

THRESHOLD = 0.5
"""A problem that the policy gets right less often than this is refused."""


def targets(group: Group, threshold: float) -> list[str]:
    """The responses that a problem may be taught: its right ones, or the wrong traces followed by the help phrase.

    group: masked responses. A response without an answer block has no trace; none may be left.
    """
    right = [o is Outcome.LOCAL_CORRECT for o in group.outcomes]
    texts = [c.text for c in group.completions]
    if sum(right) >= threshold * len(right):
        return [text for text, r in zip(texts, right, strict=True) if r]
    wrong = (text.partition(ANSWER_OPEN) for text, r in zip(texts, right, strict=True) if not r)
    return [f"{trace}{HELP_PHRASE}" for trace, opened, _ in wrong if opened]


def train_refusal(run: Run, threshold: float) -> PreTrainedModel:
    """A copy of the run's model, trained on `targets` of its own responses to the training problems.

    Optimizer, schedule and steps are those of the run's policy gradient. The same run gives the same model.
    """
    config, model = run.config, copy.deepcopy(run.model)
    taught = {g.prompt: made for g in sampled(run) if (made := targets(g, threshold))}
    optimizer = make_optimizer(model, config.optim, config.model.parameters)
    batches = _batches(taught, config.rollout.prompts_per_step * config.rollout.samples_per_prompt, config.seed)
    with Display("rejection training", config.steps) as display:
        for step in range(config.steps):
            examples = [_encode(run, prompt, response) for prompt, response in next(batches)]
            tokens, total = sum(len(e.response_ids) for e in examples), torch.zeros((), device=model.device)
            packed = packed_batches(examples, config.token_cap, model.device, padded=not config.update.pack)
            for batch in packed:
                logprobs = response_logprobs(model, batch, compute=getattr(torch, config.model.dtype))
                loss = -logprobs.sum() / tokens
                loss.backward()
                total += loss.detach()
            clip_and_step(optimizer, learning_rate(config.optim, step, config.steps), config.optim.grad_clip, total)
            display.advance()
    return model


def sampled(run: Run) -> list[Group]:
    """G responses of the run's policy to each training problem, help forbidden, judged without the cloud."""
    prompts, rollout = run.queue.prompts, run.config.rollout
    control, seed = masked(help_control(run.tokenizer)), derive(run.config.seed, "rejection")
    sampling = Sampling(rollout.max_new_tokens, rollout.temperature, STOP, seed, control, thinking=run.judge.thinking)
    ids = [run.task.render(p, run.tokenizer) for p in prompts]
    judge, pending = _without_cloud(run), {}
    with Display("sample for rejection training", len(prompts)) as display:
        for i, completions in run.engine.generate(ids, rollout.samples_per_prompt, sampling):
            pending[i] = judge.submit(prompts[i], completions)
            display.advance()
    return [pending[i].result() for i in range(len(prompts))]


def _without_cloud(run: Run) -> Judge:
    return replace(run.judge, masked=True, ask_always=False)


def _batches(taught: Mapping[Prompt, Sequence[str]], size: int, seed: int) -> Iterator[list[tuple[Prompt, str]]]:
    """Problems in a new order each epoch, each with one of its responses. Raises ValueError where there are none."""
    if not taught:
        raise ValueError("rejection training: no response to a training problem has an answer, so nothing is taught")
    rng, waiting = random.Random(derive(seed, "rejection")), list[Prompt]()
    while True:
        while len(waiting) < size:
            waiting += rng.sample(list(taught), len(taught))
        batch, waiting = waiting[:size], waiting[size:]
        yield [(prompt, rng.choice(taught[prompt])) for prompt in batch]


def _encode(run: Run, prompt: Prompt, response: str) -> Example:
    ids = run.tokenizer.encode(response, add_special_tokens=False)
    return Example(run.task.render(prompt, run.tokenizer), ids)


def rejection(run: Run) -> Rows:
    """The margin of the help phrase of the model so trained, its own greedy answer, and whether that is right."""
    model = train_refusal(run, THRESHOLD)
    run.engine.sync(model.state_dict())
    try:
        return [row for split in ("validation", "heldout") for row in _decoded(run, split)]
    finally:  # whatever is measured next is of the run's own model
        run.engine.sync(run.model.state_dict())


def _decoded(run: Run, split: str) -> Rows:
    prompts = run.validation if split == "validation" else heldout(run)
    control = masked(help_control(run.tokenizer))
    sampling = Sampling(run.config.rollout.max_new_tokens, 0.0, STOP, 0, control, thinking=run.judge.thinking)
    ids, judge = [run.task.render(p, run.tokenizer) for p in prompts], _without_cloud(run)
    found = {}
    for i, completions in run.engine.generate(ids, 1, sampling):
        found[i] = judge.submit(prompts[i], completions).result()
    groups = [found[i] for i in range(len(prompts))]
    answers = [prediction(g, run.config.reward) for g in groups]
    scores = help_margins(answers).clip(-LIMIT, LIMIT).tolist()
    return [
        {"id": g.prompt.id, "split": split, "score": score, "local": int(g.outcomes[0] is Outcome.LOCAL_CORRECT)}
        | {key: answer[key] for key in OF_ANSWER}
        for g, answer, score in zip(groups, answers, scores, strict=True)
    ]


def half_tuned(seed: int) -> Arm:
    """Task-tuning with half of the quickstart's updates; rejection training has the other half."""
    return Arm("task-tuned, masked, 150 updates", {**arms.MASKED, "steps": "150"}, seed)


REJECTION = Predictions("rejection", rejection)
ENTRANTS = (
    Entrant("+ rejection training", arms.masked, REJECTION),
    Entrant("+ rejection training, 150 + 150 updates", half_tuned, REJECTION),
)
