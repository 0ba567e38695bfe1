"""A model on the held-out problems: greedy, sampled, and with each calibration beside it; how good a forecast its
decision is; tables, a picture and their files.

Greedy decoding with help masked comes first. Whatever does not call is decoded alike without the mask, so a greedy
decoding takes those responses from there, and decodes the others.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from gapg.build import fitting_prompts
from gapg.config import RunConfig
from gapg.console import say
from gapg.errors import ConfigError
from gapg.evaluation.calibrate import FILE, MaskedPass, load_calibration
from gapg.evaluation.evaluate import as_result, prediction, respond
from gapg.evaluation.masked_pass import masked_pass
from gapg.evaluation.reliability import bin_scores, forecast, reliability
from gapg.evaluation.report import print_reliability, print_table
from gapg.files import write_whole
from gapg.help_phrase import help_control, masked
from gapg.jsonl import to_json
from gapg.judge import Group, Judge
from gapg.model.endings import opens_think
from gapg.runs.outage import check_evaluation
from gapg.seeding import derive
from gapg.tasks.base import STOP, Prompt, Task
from gapg_rollout.records import Completion, Engine, HelpControl, Oracle, Sampling


def evaluate(
    config: RunConfig,
    folder: Path,
    task: Task,
    tokenizer: PreTrainedTokenizerBase,
    engine: Engine,
    oracle: Oracle,
    *,
    model: str,
    trained: RunConfig,
    settings: Mapping[str, Any] | None = None,
) -> None:
    """Held-out problems, greedy, sampled, and as each calibration beside the model says, and how good a forecast the
    decision is: tables on standard output; summary.json, predictions.jsonl and reliability.png in `folder`.

    trained: the config that the model was trained by. settings: what else summary.json tells of where the figures
    come from.
    Raises ConfigError where there is no problem, or a calibration does not fit the tokenizer; and OracleDown, after all
    is written, where the cloud failed every question, so that nothing is known of the calls.
    """
    prompts = fitting_prompts(config, task, tokenizer, "heldout")
    if not prompts:
        raise ConfigError(
            "no held-out problem to evaluate on: add --eval.heldout none for all, or --eval.heldout 200 for the first"
            if config.eval.heldout == 0
            else f"task {task.name!r}: no held-out problem fits; raise rollout.max_prompt_tokens"
        )
    judge = Judge(task, oracle, ask_unsolved=False, thinking=opens_think(task, tokenizer))
    wanted = decodings(config, tokenizer, Path(model))
    decoded, lines, unbiased = masked_greedy(config, task, tokenizer, engine, prompts, judge.thinking)
    rows, judged = [], list[Group]()
    for name, temperature, help in wanted:
        how = "sampled" if temperature else "greedy"
        seed = derive(config.seed, "eval", how)
        sampling = Sampling(config.rollout.max_new_tokens, temperature, STOP, seed, help, judge.thinking)
        known = {} if temperature else unmoved(unbiased, help)
        groups = respond(engine, task, tokenizer, judge, prompts, sampling, title=f"evaluate {name}", known=known)
        judged += groups
        decoding = name if help else how
        lines += [{"decoding": decoding, **prediction(g, config.reward)} for g in groups]
        outcomes = [g.outcomes[0].value for g in groups]
        rows.append(
            as_result(name, groups).row()
            | {"help_bias": help.bias if help else 0.0}
            | {"outcomes": {o: outcomes.count(o) for o in sorted(set(outcomes))}}
            | {"unknown": sum(g.unknown for g in groups)}
        )
    usage = asdict(oracle.usage)
    summary = {"model": model, **(settings or {}), "task": task.name, "oracle": config.oracle.kind, "rows": rows}
    summary |= {"oracle_usage": usage}
    write_whole(folder / "predictions.jsonl", "".join(to_json(line) + "\n" for line in lines))
    print_table(rows)
    files = [folder / "summary.json", folder / "predictions.jsonl"]
    if decoded is not None:
        files.append(folder / "reliability.png")
        title = f"{task.name}, {len(prompts)} problems"
        summary["decision"] = tell_decision(decoded, forecast(trained, Path(model)), files[-1], title)
    write_whole(files[0], to_json(summary, indent=1) + "\n")
    say(f"oracle: {', '.join(f'{key} {value:g}' for key, value in usage.items())}")
    say("  ".join(map(str, files)))
    check_evaluation(judged)


def masked_greedy(
    config: RunConfig,
    task: Task,
    tokenizer: PreTrainedTokenizerBase,
    engine: Engine,
    prompts: Sequence[Prompt],
    thinking: bool,
) -> tuple[MaskedPass | None, list[dict[str, Any]], list[Completion]]:
    """The problems decoded greedily with help masked: (what that tells, lines of predictions.jsonl, responses).

    Nothing, and a line that says why, where the tokenizer cannot tell the help phrase from an answer.
    """
    try:
        control = masked(help_control(tokenizer))
    except ConfigError as error:
        say(f"nothing is said of how calibrated the decision is: {error}")
        return None, [], []
    sampling = Sampling(config.rollout.max_new_tokens, 0.0, STOP, help=control, thinking=thinking)
    decoded, rows, groups = masked_pass(engine, task, tokenizer, prompts, sampling, None)
    lines = [{"decoding": "greedy, help masked", **row} for row in rows]
    return decoded, lines, [g.completions[0] for g in groups]


def unmoved(unbiased: Sequence[Completion], help: HelpControl | None) -> dict[int, Completion]:
    """The responses of greedy decoding with help masked that decoding with `help` gives too, by the index of their
    problem: those that it makes call nowhere. Decoding without a control records no margins, so they have none then."""
    bias = help.bias if help else 0.0
    stay = {i: c for i, c in enumerate(unbiased) if c.help_margin is not None and c.help_margin + bias < 0}
    return stay if help else {i: replace(c, help_margin=None, help_log_odds=None) for i, c in stay.items()}


def tell_decision(decoded: MaskedPass, trained: str, picture: Path, title: str) -> dict[str, Any]:
    """How good a forecast of a right answer the decision is: the figures, printed too, and drawn.

    trained: what S was trained to be, in words.
    """
    figures = reliability(decoded.hazard(), decoded.margin_N, decoded.local_N)
    bins = bin_scores(decoded.stays, decoded.local_N)
    print_reliability(figures, trained)
    # not above: matplotlib takes a second to import, and training imports this file before it starts
    from gapg.evaluation.reliability_diagram import draw

    draw(bins, decoded.stays, decoded.local_N, title, picture)
    return figures | {"bins": [asdict(b) for b in bins]}


def decodings(
    config: RunConfig, tokenizer: PreTrainedTokenizerBase, model_folder: Path
) -> list[tuple[str, float, HelpControl | None]]:
    """(name, temperature, help control) of all that is evaluated; says so where nothing is calibrated."""
    temperature = config.rollout.temperature
    found: list[tuple[str, float, HelpControl | None]] = [
        ("greedy", 0.0, None),
        (f"sampled, T={temperature:g}", temperature, None),
    ]
    entries = load_calibration(model_folder)
    if not entries:
        say(f"no {FILE} beside the model: only as trained (gapg calibrate sets a call fraction)")
        return found
    control = help_control(tokenizer)
    if any((e.spellings, e.blocks) != (control.spellings, control.blocks) for e in entries):
        raise ConfigError(f"{model_folder / FILE}: made with another tokenizer; delete it and run gapg calibrate again")
    return found + [(e.label, e.temperature, replace(control, bias=e.bias)) for e in entries]
