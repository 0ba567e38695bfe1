"""A model on the held-out problems: greedy, sampled, and with each calibration beside it; a table and its files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from gapg.build import fitting_prompts
from gapg.config import RunConfig
from gapg.console import say
from gapg.errors import ConfigError
from gapg.evaluation.calibrate import FILE, load_calibration
from gapg.evaluation.evaluate import as_result, prediction, respond
from gapg.evaluation.report import print_table
from gapg.files import write_whole
from gapg.help_phrase import help_control
from gapg.jsonl import to_json
from gapg.judge import Group, Judge
from gapg.model.endings import opens_think
from gapg.runs.outage import check_evaluation
from gapg.seeding import derive
from gapg.tasks.base import STOP, Task
from gapg_rollout.records import Engine, HelpControl, Oracle, Sampling


def evaluate(
    config: RunConfig,
    folder: Path,
    task: Task,
    tokenizer: PreTrainedTokenizerBase,
    engine: Engine,
    oracle: Oracle,
    *,
    model: str,
    settings: Mapping[str, Any] | None = None,
) -> None:
    """Held-out problems, greedy, sampled, and as each calibration beside the model says: a table on standard output;
    summary.json and predictions.jsonl in `folder`.

    settings: what else summary.json tells of where the figures come from.
    Raises ConfigError where a calibration does not fit the tokenizer; and OracleDown, after all is written, where the
    cloud failed every question, so that nothing is known of the calls.
    """
    prompts = fitting_prompts(config, task, tokenizer, "heldout")
    judge = Judge(task, oracle, ask_unsolved=False, thinking=opens_think(task, tokenizer))
    rows, lines, judged = [], [], list[Group]()
    for name, temperature, help in decodings(config, tokenizer, Path(model)):
        how = "sampled" if temperature else "greedy"
        seed = derive(config.seed, "eval", how)
        sampling = Sampling(config.rollout.max_new_tokens, temperature, STOP, seed, help, judge.thinking)
        groups = respond(engine, task, tokenizer, judge, prompts, sampling, title=f"evaluate {name}")
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
    write_whole(folder / "summary.json", to_json(summary, indent=1) + "\n")
    print_table(rows)
    say(f"oracle: {', '.join(f'{key} {value:g}' for key, value in usage.items())}")
    say(f"{folder}/summary.json  {folder}/predictions.jsonl")
    check_evaluation(judged)


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
    elif any(e.spellings != help_control(tokenizer).spellings for e in entries):
        raise ConfigError(f"{model_folder / FILE}: made with another tokenizer; delete it and run gapg calibrate again")
    return found + [(e.label, e.temperature, e.control) for e in entries]
