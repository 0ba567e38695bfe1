"""`gapg eval`: any checkpoint of a run, or any Hugging Face folder, on the held-out problems of a config."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import closing

from gapg.commands.options import Eval
from gapg.commands.target import open_target
from gapg.evaluation.heldout import evaluate


def evaluate_command(wanted: Eval, overrides: Mapping[str, str]) -> None:
    """Evaluates greedily and at the training temperature, and how good a forecast the decision is; prints tables,
    writes summary.json, predictions.jsonl and reliability.png.

    Raises ConfigError where the folder or the config is missing, or brings code, naming the fix; and OracleDown.
    """
    target = open_target(wanted.checkpoint, wanted.config, overrides, trust_code=wanted.trust_code)
    folder = target.place(target.beside("eval"), wanted.output_dir)
    with closing(target.oracle(folder)) as oracle, closing(target.engine()) as engine:
        evaluate(
            target.config, folder, target.task, target.tokenizer, engine, oracle,
            model=str(target.model_path), trained=target.trained, settings=target.settings,
        )  # fmt: skip
