"""`gapg calibrate`: the bias on the help phrase with which a model calls on a wanted part of the problems."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from rich.console import Console
from rich.table import Table

from gapg.build import fitting_prompts
from gapg.commands.eval import Target, open_target
from gapg.config import ConfigError, RunConfig
from gapg.evaluation.calibrate import (
    LIMIT,
    Calibration,
    MaskedPass,
    check_saves,
    help_control,
    masked,
    save_calibration,
)
from gapg.evaluation.evaluate import oracle_errors
from gapg.evaluation.report import BLUE, GREEN, GREY, save_figure
from gapg.files import write_whole
from gapg.jsonl import to_json
from gapg.judge import Group, oracle_score, parse
from gapg.model.endings import opens_think
from gapg.runs.outage import check_evaluation
from gapg.runs.tracking import Display, printable, say, warn
from gapg.seeding import derive
from gapg.tasks.base import STOP, Budgeted, Prompt, Task, Verdict
from gapg_rollout.records import Completion, Engine, Oracle, Sampling
from gapg_rollout.text import spoken

matplotlib.use("agg")
from matplotlib import pyplot as plt

SHOWN = (0.0, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0)
"""Call fractions of the table."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """What to calibrate for. `cloud_fraction`: None is the config's. `problems`: None is all that fit."""

    cloud_fraction: float | None
    temperature: float
    problems: int | None
    accuracy: bool


def calibrate_command(
    path: Path,
    wanted: Wanted,
    config_name: str | None,
    output: Path | None,
    overrides: Mapping[str, str],
    *,
    trust_code: bool = False,
) -> None:
    """Fits, saves beside the weights, prints, plots. The oracle is asked where it is free, or with `wanted.accuracy`.

    trust_code: the folder's own config may name code that is not this package's.
    Raises ConfigError, naming the fix, for a missing model, a wrong fraction, or a model that never comes near calling;
    and OracleDown, after all is saved, where the cloud failed every question (the bias needs none).
    """
    check(wanted)
    target = open_target(path, config_name, overrides, trust_code=trust_code)
    config = target.config
    fraction = config.budget.cloud_fraction if wanted.cloud_fraction is None else wanted.cloud_fraction
    prompts, described = calibration_set(target, wanted.problems)
    check_enough(fraction, len(prompts))
    new = len(fitting_prompts(config, target.task, target.tokenizer, "heldout")) or len(prompts)
    check_saves(target.model_path)
    folder = target.place(target.beside("calibrate") / f"T{wanted.temperature:g}", output)
    asked = wanted.accuracy or config.oracle.kind == "solver"
    oracle = target.oracle(folder) if asked else None
    try:
        engine = target.engine()
        try:
            control = help_control(target.tokenizer)
            sampling = Sampling(
                config.rollout.max_new_tokens,
                wanted.temperature,
                STOP,
                derive(config.seed, "calibrate", "pass"),
                masked(control),
                opens_think(target.task, target.tokenizer),
            )
            decoded, rows, groups = masked_pass(engine, target, prompts, sampling, oracle)
        finally:
            engine.close()
    finally:
        if oracle is not None:
            oracle.close()
    write_whole(folder / "predictions.jsonl", "".join(to_json(row) + "\n" for row in rows))
    try:
        bias = decoded.fit(fraction)
    except ValueError as error:
        raise ConfigError(
            f"{target.model_path}: {error}; train it, or warm-start it on demonstrations that call"
        ) from None
    entry = Calibration(
        temperature=wanted.temperature,
        cloud_fraction=fraction,
        bias=bias,
        called=float(decoded.chances(bias).mean()),
        calibrated_on=described,
        n=len(prompts),
        interval=decoded.interval(bias, new),
        new=new,
        spellings=control.spellings,
    )
    saved = save_calibration(target.model_path, entry)
    report(decoded, entry, folder, config, target.settings)
    say(f"{saved}  {folder}/curve.png  {folder}/summary.json  {folder}/predictions.jsonl")
    check_evaluation(groups)


def check(wanted: Wanted) -> None:
    """Raises ConfigError before anything is loaded."""
    c = wanted.cloud_fraction
    if c is not None and not 0 < c < 1:
        raise ConfigError(f"--cloud-fraction {c:g}: must be above 0 and below 1, such as 0.2 for 20% of the problems")
    if wanted.temperature != 0 and not 0.01 <= wanted.temperature < math.inf:
        raise ConfigError(f"--temperature {wanted.temperature:g}: must be 0 (greedy), or 0.01 or above")


def check_enough(fraction: float, n: int) -> None:
    if not 0 < round(fraction * n) < n:
        least = math.ceil(1 / min(fraction, 1 - fraction))
        raise ConfigError(f"--cloud-fraction {fraction:g}: no such part of {n} problems; take at least {least}")


def calibration_set(target: Target, n: int | None) -> tuple[list[Prompt], str]:
    """(problems, what they are): the training split's that fit, or the first n of them in a seeded order."""
    prompts = fitting_prompts(target.config, target.task, target.tokenizer, "train")
    if n is None:
        return prompts, f"all {len(prompts)} training problems of {target.task.name}"
    if not 0 < n <= len(prompts):
        raise ConfigError(f"--problems {n}: the training split has {len(prompts)} that fit; give 1 to {len(prompts)}")
    random.Random(derive(target.config.seed, "calibrate", "problems")).shuffle(prompts)
    return prompts[:n], f"{n} of {len(prompts)} training problems of {target.task.name}"


def masked_pass(
    engine: Engine, target: Target, prompts: Sequence[Prompt], sampling: Sampling, oracle: Oracle | None
) -> tuple[MaskedPass, list[dict[str, Any]], list[Group]]:
    """Decodes each problem once with help masked; the rows from which anyone can judge again; what the cloud said."""
    if isinstance(target.task, Budgeted):
        target.task.start_step()
    ids = [target.task.render(p, target.tokenizer) for p in prompts]
    done: dict[int, Completion] = {}
    asked = {}
    with Display("decode with help masked", len(prompts)) as display:
        for i, (completion,) in engine.generate(ids, 1, sampling):
            done[i] = completion
            if oracle is not None:
                asked[i] = oracle.ask(target.task.question(prompts[i]))
            display.advance()
    rows, groups = [], []
    for i, prompt in enumerate(prompts):
        replies = tuple(asked[i].result()) if oracle is not None else ()
        score = oracle_score(target.task, prompt, replies)
        groups.append(Group(prompt, (done[i],), (), (), score, replies))
        row = _row(target.task, prompt, done[i], sampling.thinking)
        rows.append(row | {"oracle_score": score, "oracle_error": next(oracle_errors(replies), None)})
    unsteered = sum(row["called_anyway"] for row in rows)
    if unsteered:
        warn(f"{unsteered} responses wrote the help phrase in other tokens than it is steered in; they call always")
    reasoned = sum(spoken(row["response"], row["thinking"]) != row["response"] for row in rows)
    if reasoned:
        warn(f"{reasoned} responses reason in a think block: the bias works in there too, where no call counts")
    odds = [c.help_log_odds or () for c in (done[i] for i in range(len(prompts)))]
    width = max(map(len, odds))
    decoded = MaskedPass(
        temperature=sampling.temperature,
        margin_N=np.array([math.inf if r["called_anyway"] else _or_minus_infinity(r["help_margin"]) for r in rows]),
        log_odds_NP=np.array([[*o, *[-math.inf] * (width - len(o))] for o in odds]).reshape(len(odds), width),
        local_N=np.array([float(r["local_correct"]) for r in rows]),
        cloud_N=None if oracle is None else np.array([r["oracle_score"] for r in rows], dtype=np.float64),
    )
    return decoded, rows, groups


def _row(task: Task, prompt: Prompt, completion: Completion, thinking: bool) -> dict[str, Any]:
    parsed = parse(completion.text, thinking)
    margin = completion.help_margin
    right = parsed.answer is not None and task.verify(prompt, [parsed.answer]) == [Verdict.CORRECT]
    return {
        "id": prompt.id,
        "problem": prompt.text,
        "gold": prompt.answer,
        "response": completion.text,
        "thinking": thinking,
        "local_correct": right,
        "called_anyway": parsed.kind == "help",
        "help_margin": margin if margin is not None and math.isfinite(margin) else None,
        "help_log_odds": completion.help_log_odds,
    }


def _or_minus_infinity(margin: float | None) -> float:
    return -math.inf if margin is None else margin


def report(
    decoded: MaskedPass, entry: Calibration, folder: Path, config: RunConfig, settings: Mapping[str, Any]
) -> None:
    """The table on standard output, and the same in `summary.json` and `curve.png` in the folder."""
    rows = [_figures(decoded, c) for c in SHOWN]
    chosen = _figures(decoded, entry.cloud_fraction)
    low, high = entry.interval
    how = "greedy" if entry.temperature == 0 else f"T={entry.temperature:g}"
    cloud = f"oracle: {config.oracle.kind}" if decoded.cloud_N is not None else "the oracle was not asked"
    console = Console(highlight=False, markup=False, emoji=False, width=100)
    console.print(printable(f"{how}, on {entry.calibrated_on} ({cloud})"))
    table = Table()
    for column in ("wanted", "called", "together", "local", "bias"):
        table.add_column(column, justify="right")
    for row in [*rows, chosen]:
        table.add_row(
            f"{100 * row['wanted']:.4g}%" + (" *" if row is chosen else ""),
            f"{row['called']:.3f}",
            "" if row["accuracy"] is None else f"{row['accuracy']:.3f}",
            f"{row['local_accuracy']:.3f}",
            f"{row['bias']:.3f}" if abs(row["bias"]) < LIMIT - 1 else f"{math.copysign(math.inf, row['bias'])}",
        )
    console.print(table)
    console.print(
        f"* saved: bias {entry.bias:+.4f}; of {entry.new} new problems of the same kind "
        f"{low:.1%} to {high:.1%} will call (95%)"
    )
    if decoded.cloud_N is None:
        say(f"accuracy together needs oracle.kind={config.oracle.kind} asked {entry.n} times: --accuracy does it")
    if decoded.reachable < entry.cloud_fraction:
        warn(f"only {decoded.reachable:.1%} of the responses come to where the phrase could begin: no bias calls more")
    summary = {"chosen": chosen, "rows": rows, "temperature": entry.temperature, "calibrated_on": entry.calibrated_on}
    summary |= {"interval": entry.interval, "new": entry.new, "oracle": config.oracle.kind, **settings}
    write_whole(folder / "summary.json", to_json(summary, indent=1) + "\n")
    plot(decoded, entry, f"{how}; calibration set: {entry.calibrated_on}", folder / "curve.png")


def _figures(decoded: MaskedPass, fraction: float) -> dict[str, Any]:
    bias = decoded.fit(fraction)
    local, together = decoded.accuracy(bias)
    called = float(decoded.chances(bias).mean())
    return {"wanted": fraction, "called": called, "bias": bias, "accuracy": together, "local_accuracy": local}


def plot(decoded: MaskedPass, entry: Calibration, title: str, path: Path) -> None:
    """Accuracy against call fraction on the calibration set, with the chosen point and its interval."""
    points = [_figures(decoded, c) for c in np.linspace(0.0, decoded.reachable, 41)]
    chosen = _figures(decoded, entry.cloud_fraction)
    figure, axis = plt.subplots(figsize=(7, 5), layout="constrained")
    called = [p["called"] for p in points]
    if chosen["accuracy"] is not None:
        axis.plot(called, [p["accuracy"] for p in points], color=BLUE, label="together")
        axis.plot(chosen["called"], chosen["accuracy"], "*", color=BLUE, markersize=14, label=f"bias {entry.bias:+.3f}")
    axis.plot(called, [p["local_accuracy"] for p in points], color=GREEN, label="answered locally and right")
    axis.axvline(entry.cloud_fraction, color="black", linewidth=0.8, linestyle="--", label="wanted")
    axis.axvspan(*entry.interval, color=GREY, alpha=0.3, label=f"95% on {entry.new} new problems")
    axis.set(xlabel="call fraction", ylabel="accuracy")
    axis.set_title(printable(title), parse_math=False)  # a task's name may hold dollars
    axis.legend(fontsize=8)
    save_figure(figure, path)
    plt.close(figure)
