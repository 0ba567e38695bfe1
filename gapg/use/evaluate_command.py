"""`gapg eval`: any checkpoint of a run, or any Hugging Face folder, on the held-out problems of a config."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from gapg import checkpoint
from gapg.config import ConfigError, RunConfig, load_config
from gapg.judge import Judge
from gapg.model import load_model, load_tokenizer
from gapg.policy import check_supported
from gapg.rollout.records import Sampling
from gapg.run import make_engine, make_oracle, make_task, set_threads
from gapg.seeding import derive
from gapg.tasks.base import STOP
from gapg.tracking import say, write_whole
from gapg.use.evaluate import as_result, prediction, respond
from gapg.use.report import print_table


def evaluate_command(target: Path, config_name: str | None, output: Path | None, overrides: Mapping[str, str]) -> None:
    """Evaluates greedily and at the training temperature; prints the table, writes summary.json and predictions.

    Raises ConfigError where the folder or the config is missing, naming the fix.
    """
    model_path, run_folder = find_model(target)
    if config_name is None and run_folder is None:
        raise ConfigError(f"{target}: not part of a run, so name the task with --config, e.g. --config gsm8k-smollm2")
    config = load_config(config_name or str(run_folder / "config.yaml"), overrides)  # type: ignore[operator]
    folder = output or (run_folder or Path("runs") / model_path.resolve().name) / "eval"
    folder.mkdir(parents=True, exist_ok=True)
    summary = _evaluate(config, model_path, folder)
    write_whole(folder / "summary.json", json.dumps(summary, indent=1) + "\n")
    print_table(summary["rows"])
    say(f"oracle: {summary['oracle_usage']}")
    say(f"{folder}/summary.json  {folder}/predictions-*.jsonl")


def find_model(target: Path) -> tuple[Path, Path | None]:
    """(model folder, run folder or None) of a run, a checkpoint, or a model folder. Raises ConfigError."""
    newest = checkpoint.latest(target / "checkpoints")
    for candidate in ([newest / "model"] if newest else []) + [target / "model", target]:
        if (candidate / "config.json").is_file():
            run = next((p for p in candidate.resolve().parents if (p / "config.yaml").is_file()), None)
            return candidate, run
    raise ConfigError(f"{target}: holds no model; give a run's folder, a checkpoint, or a Hugging Face model folder")


def _evaluate(config: RunConfig, model_path: Path, folder: Path) -> dict[str, Any]:
    set_threads(config)
    task = make_task(config)
    model_config = config.model.model_copy(update={"path": str(model_path)})
    tokenizer = load_tokenizer(model_config, task)
    prompts = task.prompts("heldout")[: config.eval.heldout]
    model = load_model(model_config, tokenizer, config.seed)
    check_supported(model)
    engine = make_engine(config, model, tokenizer, str(model_path))
    oracle = make_oracle(config.oracle, task, folder, config.seed)
    rows = []
    try:
        for name, temperature in (
            ("greedy", 0.0),
            (f"sampled, T={config.rollout.temperature:g}", config.rollout.temperature),
        ):
            label = name.split(",")[0]
            sampling = Sampling(config.rollout.max_new_tokens, temperature, STOP, derive(config.seed, "eval", label))
            judge = Judge(task, oracle, ask_unsolved=False)
            groups = respond(engine, task, tokenizer, judge, prompts, sampling, title=f"evaluate {label}")
            lines = "".join(json.dumps(prediction(g)) + "\n" for g in groups)
            write_whole(folder / f"predictions-{label}.jsonl", lines)
            outcomes = [g.outcomes[0].value for g in groups]
            rows.append(
                as_result(name, groups).row()
                | {"outcomes": {o: outcomes.count(o) for o in sorted(set(outcomes))}}
                | {"unknown": sum(g.unknown for g in groups)}
            )
    finally:
        engine.close()
        oracle.close()
    return {"model": str(model_path), "task": task.name, "oracle": config.oracle.kind, "rows": rows,
            "oracle_usage": asdict(oracle.usage)}  # fmt: skip
