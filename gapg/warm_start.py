"""Supervised steps on demonstrations, before the policy gradient: the model learns both endings. Resumable."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Iterator, Sequence
from itertools import count
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from gapg.batches.batching import Example, packed_batches
from gapg.build import fitting_prompts, make_engine
from gapg.config import RunConfig
from gapg.config_sections import WarmStartConfig
from gapg.console import Display, say
from gapg.data import split_validation
from gapg.deterministic import use_deterministic_algorithms
from gapg.errors import ConfigError
from gapg.judge import parse
from gapg.model.compiled import within_limit
from gapg.model.endings import opens_think
from gapg.model.finite import is_finite
from gapg.model.load import device, load_model
from gapg.model.memory import checked_plan
from gapg.model.policy import response_logprobs
from gapg.model.route import choose_route
from gapg.optim import clip_and_step, learning_rate, make_optimizer
from gapg.runs import checkpoint, health, stop
from gapg.seeding import derive
from gapg.tasks.base import Demonstrated, Demonstration, Task
from gapg.tasks.demonstrations import load_demonstrations


def warm_start(config: RunConfig, folder: Path, task: Task, tokenizer: PreTrainedTokenizerBase) -> Path:
    """Runs or resumes the warm start under `folder`; returns the model folder.

    Loss: mean negative log-prob over the response tokens of a batch.
    Raises ConfigError, Diverged, DiskFull and Stopped.
    """
    settings = config.warm_start
    assert settings is not None
    if config.deterministic:
        use_deterministic_algorithms()
    last = checkpoint.latest(folder)
    begin = int(last.name.removeprefix("step-")) if last else 0
    if last and begin >= settings.steps:
        checkpoint.prune(folder, keep=1, also=set())  # a kill may have come before it
        return last / "model"
    if last:
        say(f"resuming the warm start from step {begin}")
    model, packed = _load(config, settings, folder, last, tokenizer)
    optimizer = make_optimizer(model, settings.optim, config.model.parameters)
    if last:
        checkpoint.restore_optimizer(last, model, optimizer)
    compute = getattr(torch, config.model.dtype)
    prompts = fitting_prompts(config, task, tokenizer, "train")
    unseen = {p.id for p in split_validation(prompts, config.eval.problems, config.seed)[1]}
    batches = _batches(config.seed, settings, task, begin, unseen)
    about = {"config": config.model_dump(mode="json")}
    bad_in_a_row, saved_at, most_s = 0, time.monotonic(), 60 * (config.checkpoint_minutes or math.inf)
    with stop.between_steps(), within_limit(), Display("warm start", settings.steps, begin) as display:
        for step in range(begin, settings.steps):
            examples = [_encode(d, task, tokenizer, config.token_cap) for d in next(batches)]
            tokens = sum(len(e.response_ids) for e in examples)
            total = torch.zeros((), device=device())
            for batch in packed_batches(examples, config.token_cap, device(), padded=not packed):
                loss = -response_logprobs(model, batch, compute=compute).sum() / tokens
                loss.backward()
                total += loss.detach()
            lr = learning_rate(settings.optim, step, settings.steps)
            norm = float(clip_and_step(optimizer, lr, settings.optim.grad_clip, total))
            bad_in_a_row = 0 if math.isfinite(norm) else bad_in_a_row + 1
            _check_health(step + 1, bad_in_a_row, model, compute, folder)
            display.advance(f"loss {float(total):.3f}" if step % 10 == 9 else "")
            done, signal = step + 1, stop.requested()
            late = done % settings.checkpoint_every == 0 or time.monotonic() - saved_at >= most_s
            if done == settings.steps or (late and not bad_in_a_row) or signal:
                checkpoint.save(folder, done, model, tokenizer, optimizer, {"step": done}, about)
                checkpoint.prune(folder, keep=1, also=set())
                saved_at = time.monotonic()
            if signal:
                raise stop.Stopped(f"{signal}: step {done} of the warm start is saved; go on with --resume")
    return folder / f"step-{settings.steps}" / "model"


def _load(
    config: RunConfig, settings: WarmStartConfig, folder: Path, last: Path | None, tokenizer: PreTrainedTokenizerBase
) -> tuple[PreTrainedModel, bool]:
    """(the model that the run starts from, or that of the last checkpoint; whether it trains on packed sequences).

    Raises ConfigError for one that cannot be trained, saved or decoded, before it is paid for.
    """
    start = config.model if last is None else config.model.model_copy(update={"path": str(last / "model")})
    model = load_model(start, tokenizer, config.seed)
    packed = choose_route(model, config.update.pack, config.rollout.longest)
    update = config.update.model_copy(update={"pack": packed})
    all_weights = config.model.model_copy(update={"lora": None})
    own = {"model": all_weights, "update": update, "optim": settings.optim}
    checked_plan(model, config.model_copy(update=own), device())
    checkpoint.check_saves(folder, model, tokenizer)
    if config.rollout.engine == "transformers":
        make_engine(config, model, tokenizer, "").close()
    return model, packed


def _check_health(step: int, bad_in_a_row: int, model: PreTrainedModel, compute: torch.dtype, folder: Path) -> None:
    """Warns of a step that was skipped. Raises Diverged where the last ones were, and where the weights are ruined."""
    where, what = f"warm start, step {step}", None
    if bad_in_a_row:
        health.warn_skipped(where, health.NOT_FINITE, bad_in_a_row)
    if bad_in_a_row >= health.BAD_STEPS:
        what = f"{health.NOT_FINITE}, {bad_in_a_row} steps in a row"
    elif not is_finite(model, compute):
        what = health.RUINED
    if what:
        raise health.diverged(where, what, "lower warm_start.optim.lr", checkpoint.newest(folder))


def check_demonstrations(config: RunConfig, task: Task, tokenizer: PreTrainedTokenizerBase) -> None:
    """Fails early, before the model is made. Raises ConfigError.

    Where prompts open a think block, a demonstration that does not close it would teach endings that never count.
    """
    settings = config.warm_start
    if settings is None:
        return
    if settings.demonstrations is None and not isinstance(task, Demonstrated):
        raise ConfigError(
            f"warm_start.demonstrations is empty and task {task.name!r} makes none: "
            'give a jsonl of {"prompt", "response"}, or set --warm-start ""'
        )
    try:
        demonstrations = _epoch(config.seed, settings, task, 0, set())
    except (ValueError, OSError) as error:
        said = " ".join(str(error).split()).removeprefix("demonstrations: ")
        raise ConfigError(f"warm_start.demonstrations: {said}") from None
    thinking = opens_think(task, tokenizer)
    for demo in demonstrations:
        if parse(demo.response, thinking).kind == "none":
            why = "the prompt opens a think block: close it before" if thinking else "it ends in neither ending"
            raise ConfigError(f"warm_start.demonstrations: that of {demo.prompt.id!r} teaches no ending: {why}")


def _batches(
    seed: int, settings: WarmStartConfig, task: Task, begin: int, unseen: set[str]
) -> Iterator[list[Demonstration]]:
    """Batches from step `begin` on: a function of (seed, step) alone."""
    epoch, pool = 0, _epoch(seed, settings, task, 0, unseen)
    for step in count(begin):
        batch = []
        for k in range(step * settings.batch_size, (step + 1) * settings.batch_size):
            while k // len(pool) != epoch:
                epoch = k // len(pool)
                pool = _epoch(seed, settings, task, epoch, unseen)
            batch.append(pool[k % len(pool)])
        yield batch


def _epoch(seed: int, settings: WarmStartConfig, task: Task, epoch: int, unseen: set[str]) -> list[Demonstration]:
    """The demonstrations of an epoch in their order, none of a problem in `unseen` (ids of validation problems)."""
    seed = derive(seed, "demonstrations", epoch)
    if settings.demonstrations is not None:
        pool: Sequence[Demonstration] = load_demonstrations(Path(settings.demonstrations), task)
    else:
        assert isinstance(task, Demonstrated)
        pool = task.demonstrations(seed)
    shuffled = [d for d in pool if d.prompt.id not in unseen]
    if not shuffled:
        raise ValueError("every demonstration is of a validation problem: lower eval.problems")
    random.Random(seed).shuffle(shuffled)
    return shuffled


def _encode(demo: Demonstration, task: Task, tokenizer: PreTrainedTokenizerBase, token_cap: int) -> Example:
    response = tokenizer(demo.response, add_special_tokens=False)["input_ids"]
    example = Example(task.render(demo.prompt, tokenizer), response, 1.0)
    if len(example.prompt_ids) + len(response) > token_cap:
        raise ConfigError(f"a demonstration of {demo.prompt.id!r} has over token_cap={token_cap} tokens: raise it")
    return example
