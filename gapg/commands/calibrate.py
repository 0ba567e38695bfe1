"""`gapg calibrate`: the bias on the help phrase with which a model calls on a wanted part of the problems, or where it
is less likely to be right than wanted."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping
from contextlib import closing, nullcontext
from pathlib import Path

from gapg.build import check_training_prompts, fitting_prompts
from gapg.commands.options import Calibrate
from gapg.commands.target import Target, open_target
from gapg.config import RunConfig
from gapg.console import say
from gapg.errors import ConfigError
from gapg.evaluation.calibrate import Calibration, check_saves, save_calibration
from gapg.evaluation.calibration_curve import report
from gapg.evaluation.masked_pass import masked_pass
from gapg.evaluation.reliability import no_forecast
from gapg.files import write_whole
from gapg.help_phrase import help_control, masked
from gapg.jsonl import to_json
from gapg.model.endings import opens_think
from gapg.runs.outage import check_evaluation
from gapg.seeding import derive
from gapg.tasks.base import STOP, Prompt
from gapg_rollout.records import Sampling


def calibrate_command(wanted: Calibrate, overrides: Mapping[str, str]) -> None:
    """Fits, saves beside the weights, prints, plots. The oracle is asked where it is free, or with `wanted.accuracy`.

    Raises ConfigError, naming the fix, for a missing model, a wrong fraction, a chance that the model does not know, or
    a model that never comes near calling; and OracleDown, after all is saved, where the cloud failed every question
    (the bias needs none).
    """
    target = open_target(wanted.checkpoint, wanted.config, overrides, trust_code=wanted.trust_code)
    config, task, tokenizer = target.config, target.task, target.tokenizer
    check_training_prompts(config, task, tokenizer)
    below, fraction = wanted.call_below, wanted.cloud_fraction or config.budget.cloud_fraction
    if below is not None:
        check_forecast(target.trained, target.model_path, below)
    prompts, described = calibration_set(target, wanted.problems)
    n = len(prompts)
    if below is None and not 0 < round(fraction * n) < n:
        least = math.ceil(1 / min(fraction, 1 - fraction))
        raise ConfigError(f"--cloud-fraction {fraction:g}: no such part of {n} problems; take at least {least}")
    new = len(fitting_prompts(config, task, tokenizer, "heldout")) or n
    check_saves(target.model_path)
    folder = target.place(target.beside("calibrate") / f"T{wanted.temperature:g}", wanted.output_dir)
    asked = wanted.accuracy or config.oracle.kind == "solver"
    with closing(target.oracle(folder)) if asked else nullcontext() as oracle, closing(target.engine()) as engine:
        control = help_control(tokenizer)
        sampling = Sampling(
            config.rollout.max_new_tokens,
            wanted.temperature,
            STOP,
            derive(config.seed, "calibrate", "pass"),
            masked(control),
            opens_think(task, tokenizer),
        )
        decoded, rows, groups = masked_pass(engine, task, tokenizer, prompts, sampling, oracle)
    write_whole(folder / "predictions.jsonl", "".join(to_json(row) + "\n" for row in rows))
    try:
        bias, agreement = (decoded.fit(fraction), None) if below is None else decoded.fit_below(below)
    except ValueError as error:
        raise ConfigError(
            f"{target.model_path}: {error}; train it, or warm-start it on demonstrations that call"
        ) from None
    entry = Calibration(
        temperature=wanted.temperature,
        cloud_fraction=fraction if below is None else None,
        bias=bias,
        called=float(decoded.chances(bias).mean()),
        calibrated_on=described,
        n=n,
        interval=decoded.interval(bias, new),
        new=new,
        spellings=control.spellings,
        blocks=control.blocks,
        call_below=below,
        agreement=agreement,
    )
    saved = save_calibration(target.model_path, entry)
    report(decoded, entry, folder, config, target.settings)
    say(f"{saved}  {folder}/curve.png  {folder}/summary.json  {folder}/predictions.jsonl")
    check_evaluation(groups)


def check_forecast(config: RunConfig, model: Path, call_below: float) -> None:
    """Raises ConfigError where the policy's chance of answering was not trained to be that of a right answer."""
    if why := no_forecast(config, model):
        raise ConfigError(
            f"--call-below needs a policy whose chance of answering was trained to be that of a right answer, and this "
            f"was not ({why}): use --cloud-fraction, or a model trained with method=marginal, whose score, weight and "
            "temperature are left as they are"
        )
    low, high = config.marginal.prices
    if not low < call_below < high:
        raise ConfigError(
            f"--call-below {call_below:g}: with marginal.prices=[{low:g}, {high:g}] the policy learnt no chance "
            "outside that range; give one inside, or use --cloud-fraction"
        )
    if config.marginal.cloud != "ignore":
        say(
            f"marginal.cloud={config.marginal.cloud}: S was trained to be the chance of a right answer over the chance "
            f"that the cloud is right; calls come where that ratio is below {call_below:g}"
        )


def calibration_set(target: Target, n: int | None) -> tuple[list[Prompt], str]:
    """(problems, what they are): the training split's that fit, or the first n of them in a seeded order."""
    prompts = fitting_prompts(target.config, target.task, target.tokenizer, "train")
    if n is None:
        return prompts, f"all {len(prompts)} training problems of {target.task.name}"
    if not 0 < n <= len(prompts):
        raise ConfigError(f"--problems {n}: the training split has {len(prompts)} that fit; give 1 to {len(prompts)}")
    random.Random(derive(target.config.seed, "calibrate", "problems")).shuffle(prompts)
    return prompts[:n], f"{n} of {len(prompts)} training problems of {target.task.name}"
