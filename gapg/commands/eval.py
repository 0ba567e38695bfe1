"""`gapg eval`: any checkpoint of a run, or any Hugging Face folder, on the held-out problems of a config, and on a
suite of sets of maths problems."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack, closing
from pathlib import Path

from gapg.build import make_oracle
from gapg.commands.options import Eval
from gapg.commands.target import Target, open_target
from gapg.evaluation.heldout import Setup, decodings, evaluate, heldout_prompts
from gapg.evaluation.suite import ProblemSet, evaluate_suite, load_sets, read_suite
from gapg_rollout.records import Oracle


def evaluate_command(wanted: Eval, overrides: Mapping[str, str]) -> None:
    """Evaluates greedily and at the training temperature, and how good a forecast the decision is; prints tables,
    writes summary.json, predictions.jsonl and reliability.png. With a suite these are written for each set, and one
    table is printed and one suite.json written of all.

    Raises ConfigError where the folder or the config is missing, or brings code, naming the fix; and OracleDown.
    """
    suite = None if wanted.suite is None else read_suite(wanted.suite, wanted.suite_data)
    target = open_target(wanted.checkpoint, wanted.config, overrides, trust_code=wanted.trust_code)
    if suite is not None:
        sets = load_sets(suite, target.config, target.task, target.tokenizer, target.trained_task())
        _evaluate_suite(target, sets, target.place(target.beside("eval"), wanted.output_dir), wanted)
        return
    prompts = heldout_prompts(target.config, target.task, target.tokenizer)
    folder = target.place(target.beside("eval"), wanted.output_dir)
    with closing(target.oracle(folder)) as oracle, closing(target.engine()) as engine:
        evaluate(
            target.config, folder, target.task, target.tokenizer, engine, oracle,
            model=str(target.model_path), trained=target.trained, settings=target.settings, prompts=prompts,
        )  # fmt: skip


def _evaluate_suite(target: Target, sets: Sequence[ProblemSet], folder: Path, wanted: Eval) -> None:
    places = [target.place(folder / s.key, wanted.output_dir and wanted.output_dir / s.key) for s in sets]
    how = decodings(target.config, target.tokenizer, target.model_path)
    about = {"model": str(target.model_path), **target.settings, "suite": wanted.suite}
    if wanted.suite_data is not None:
        about["suite_data"] = str(wanted.suite_data)
    with ExitStack() as stack:
        oracles = _oracles(target, sets, folder, stack)
        engine = stack.enter_context(closing(target.engine()))
        evaluate_suite(Setup(target.config, target.tokenizer, engine, how, about), folder, places, sets, oracles)


def _oracles(target: Target, sets: Sequence[ProblemSet], folder: Path, stack: ExitStack) -> list[Oracle]:
    """One cloud for all sets, whose limits hold over them all; a solver knows the problems of its own task only."""
    first = stack.enter_context(closing(target.oracle(folder)))
    if target.config.oracle.kind != "solver":
        return [first] * len(sets)
    return [first, *(make_oracle(target.config, one.task, folder) for one in sets[1:])]
