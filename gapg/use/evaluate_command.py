"""`gapg eval`: any checkpoint of a run, or any Hugging Face folder, on the held-out problems of a config."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from gapg import checkpoint
from gapg.config import ConfigError, RunConfig, load_config
from gapg.judge import Judge
from gapg.model import load_model, load_tokenizer
from gapg.parts import check_run, fitting_prompts, make_engine, make_oracle, make_task
from gapg.policy import check_supported
from gapg.rollout.records import Engine, Oracle, Sampling
from gapg.run import set_threads
from gapg.seeding import derive
from gapg.tasks.base import STOP, Task
from gapg.tracking import say, write_whole
from gapg.use.evaluate import as_result, prediction, respond
from gapg.use.report import print_table


def evaluate_command(target: Path, config_name: str | None, output: Path | None, overrides: Mapping[str, str]) -> None:
    """Evaluates greedily and at the training temperature; prints the table, writes summary.json and predictions.jsonl.

    Raises ConfigError where the folder or the config is missing, naming the fix.
    """
    model_path, run_folder = find_model(target)
    if config_name is None and run_folder is None:
        raise ConfigError(f"{target}: not part of a run, so name the task with --config, e.g. --config gsm8k-smollm2")
    config = load_config(config_name or str(run_folder / "config.yaml"), overrides)  # type: ignore[operator]
    set_threads(config)
    task = make_task(config)
    model_config = config.model.model_copy(update={"path": str(model_path)})
    tokenizer = load_tokenizer(model_config, task)
    check_run(config, task, tokenizer)
    name = model_path.resolve().parent.name if model_path.name == "model" else model_path.resolve().name
    folder = output or (run_folder or Path("runs")) / "eval" / name
    folder.mkdir(parents=True, exist_ok=True)
    oracle = make_oracle(config, task, run_folder or folder)  # the run's paid answers are not paid again
    try:
        model = load_model(model_config, tokenizer, config.seed)
        check_supported(model)
        engine = make_engine(config, model, tokenizer, str(model_path))
        try:
            evaluate(config, folder, task, tokenizer, engine, oracle, model=str(model_path))
        finally:
            engine.close()
    finally:
        oracle.close()


def find_model(target: Path) -> tuple[Path, Path | None]:
    """(model folder, run folder or None) of a run, a checkpoint, or a model folder. Raises ConfigError."""
    newest = checkpoint.latest(target / "checkpoints")
    for candidate in ([newest / "model"] if newest else []) + [target / "model", target]:
        if (candidate / "config.json").is_file():
            # <run>/checkpoints/step-N/model, or <run>/warm-start/checkpoints/step-N/model
            above = [p.parent for p in candidate.resolve().parents if p.name in ("checkpoints", "warm-start")]
            return candidate, next((p for p in above if (p / "config.yaml").is_file()), None)
    raise ConfigError(f"{target}: holds no model; give a run's folder, a checkpoint, or a Hugging Face model folder")


def evaluate(
    config: RunConfig,
    folder: Path,
    task: Task,
    tokenizer: PreTrainedTokenizerBase,
    engine: Engine,
    oracle: Oracle,
    *,
    model: str,
) -> None:
    """Held-out problems, greedy and sampled: prints a table; summary.json and predictions.jsonl in `folder`."""
    prompts = fitting_prompts(config, task, tokenizer, "heldout")
    judge = Judge(task, oracle, ask_unsolved=False)
    rows, lines = [], []
    for decoding, temperature in (("greedy", 0.0), ("sampled", config.rollout.temperature)):
        seed = derive(config.seed, "eval", decoding)
        sampling = Sampling(config.rollout.max_new_tokens, temperature, STOP, seed)
        groups = respond(engine, task, tokenizer, judge, prompts, sampling, title=f"evaluate {decoding}")
        lines += [{"decoding": decoding, **prediction(g, config.reward)} for g in groups]
        outcomes = [g.outcomes[0].value for g in groups]
        rows.append(
            as_result(decoding if temperature == 0 else f"{decoding}, T={temperature:g}", groups).row()
            | {"outcomes": {o: outcomes.count(o) for o in sorted(set(outcomes))}}
            | {"unknown": sum(g.unknown for g in groups)}
        )
    usage = asdict(oracle.usage)
    summary = {"model": model, "task": task.name, "oracle": config.oracle.kind, "rows": rows, "oracle_usage": usage}
    write_whole(folder / "predictions.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
    write_whole(folder / "summary.json", json.dumps(summary, indent=1) + "\n")
    print_table(rows)
    say(f"oracle: {', '.join(f'{key} {value:g}' for key, value in usage.items())}")
    say(f"{folder}/summary.json  {folder}/predictions.jsonl")
