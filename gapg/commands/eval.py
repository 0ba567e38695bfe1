"""`gapg eval`: any checkpoint of a run, or any Hugging Face folder, on the held-out problems of a config."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from gapg.build import check_run, fitting_prompts, make_engine, make_oracle, make_task
from gapg.config import ConfigError, RunConfig, load_config
from gapg.evaluation import trust
from gapg.evaluation.calibrate import FILE, help_control, load_calibration
from gapg.evaluation.evaluate import as_result, prediction, respond
from gapg.evaluation.report import print_table
from gapg.files import write_whole
from gapg.jsonl import to_json
from gapg.judge import Group, Judge
from gapg.model.endings import opens_think
from gapg.model.load import load_model, load_tokenizer
from gapg.model.policy import choose_route
from gapg.runs import checkpoint
from gapg.runs.outage import check_evaluation
from gapg.runs.run import set_threads
from gapg.runs.tracking import say
from gapg.seeding import derive
from gapg.tasks.base import STOP, Task
from gapg_rollout.records import Engine, HelpControl, Oracle, Sampling


def evaluate_command(
    target: Path,
    config_name: str | None,
    output: Path | None,
    overrides: Mapping[str, str],
    *,
    trust_code: bool = False,
) -> None:
    """Evaluates greedily and at the training temperature; prints the table, writes summary.json and predictions.jsonl.

    trust_code: the folder's own config may name code that is not this package's.
    Raises ConfigError where the folder or the config is missing, or brings code, naming the fix; and OracleDown.
    """
    opened = open_target(target, config_name, overrides, trust_code=trust_code)
    folder = opened.place(opened.beside("eval"), output)
    oracle = opened.oracle(folder)
    try:
        engine = opened.engine()
        try:
            evaluate(
                opened.config,
                folder,
                opened.task,
                opened.tokenizer,
                engine,
                oracle,
                model=str(opened.model_path),
                settings=opened.settings,
            )
        finally:
            engine.close()
    finally:
        oracle.close()


@dataclass(frozen=True, slots=True)
class Target:
    """A model to use: its folder, the run it belongs to if any, and what its config names.

    settings: which weights and which config, for the record. notice: what must be said before the oracle is asked.
    """

    model_path: Path
    run_folder: Path | None
    config: RunConfig
    task: Task
    tokenizer: PreTrainedTokenizerBase
    settings: Mapping[str, Any] = field(default_factory=dict)
    notice: str | None = None

    def engine(self) -> Engine:
        """Loads the weights. Raises ConfigError."""
        model = load_model(self.config.model, self.tokenizer, self.config.seed)
        choose_route(model, longest=self.config.rollout.longest)
        return make_engine(self.config, model, self.tokenizer, str(self.model_path))

    def oracle(self, folder: Path) -> Oracle:
        """Opened, with the run's paid answers, which are not paid again; without a run `folder` keeps them."""
        oracle = make_oracle(self.config, self.task, self.run_folder or folder)
        if self.notice:
            say(self.notice)
        return oracle

    def beside(self, kind: str) -> Path:
        """Where results about this model go: a folder of its run's, or of `runs`; each model has its own.

        `step-40`, `best-step-40` and `warm-start-step-40` of a run; any other by its name and a hash of its place.
        """
        path, real = self.model_path, self.model_path.resolve()
        if self.run_folder is None:
            name = real.parent.name if real.name == "model" else real.name
            return Path("runs") / kind / f"{name}-{hashlib.sha256(bytes(real)).hexdigest()[:8]}"
        link = path.parent if path.name == "model" else path
        names = [link.name] if link.is_symlink() else []  # `best`
        names += [part for part in real.relative_to(self.run_folder.resolve()).parts if part != "checkpoints"]
        return self.run_folder / kind / "-".join(names).removesuffix("-model")

    def place(self, usual: Path, wanted: Path | None) -> Path:
        """The folder for results, made: `wanted`, or `usual`.

        Raises ConfigError, before anything is spent, where nothing can be written, and where a link, which may be
        someone else's, puts `usual` outside the run's folder.
        """
        folder = wanted or usual
        try:
            if wanted is None and self.run_folder and not folder.resolve().is_relative_to(self.run_folder.resolve()):
                raise ValueError("a link leads out of the run's folder")
            folder.mkdir(parents=True, exist_ok=True)
            if not os.access(folder, os.W_OK):
                raise ValueError("it cannot be written")
        except (OSError, ValueError, RuntimeError) as error:  # the last for links in a circle
            why = getattr(error, "strerror", None) or error
            raise ConfigError(f"{folder}: no place for results: {why}; choose another --output-dir") from None
        return folder


def open_target(
    target: Path, config_name: str | None, overrides: Mapping[str, str], *, trust_code: bool = False
) -> Target:
    """All but the weights. Raises ConfigError where the folder or the config is missing, naming the fix.

    Nothing is imported for a config that the folder brings, unless it is of this package or `trust_code` is set.
    """
    try:
        model_path, run_folder = find_model(target)
    except OSError as error:
        raise ConfigError(f"{target}: {error.strerror}; name a folder that you can read") from None
    notice = None
    if config_name is not None:
        config = load_config(config_name, overrides)
    elif run_folder is not None:
        config_name = str(file := run_folder / "config.yaml")
        config = load_config(config_name, overrides)
        if not trust_code:
            trust.check_code(config, file, overrides)
            trust.check_cache(config, file, overrides)
        notice = trust.where_questions_go(config, file, overrides)
    else:
        raise ConfigError(f"{target}: not part of a run, so name the task with --config, e.g. --config gsm8k-smollm2")
    set_threads(config)
    task = make_task(config)
    config = config.model_copy(update={"model": config.model.model_copy(update={"path": str(model_path)})})
    tokenizer = load_tokenizer(config.model, task)
    check_run(config, task, tokenizer)
    settings = {"checkpoint": str(model_path.resolve()), "config": config_name, "overrides": dict(overrides)}
    return Target(model_path, run_folder, config, task, tokenizer, settings, notice)


def find_model(target: Path) -> tuple[Path, Path | None]:
    """(model folder, run folder or None) of a run, a checkpoint, or a model folder. Raises ConfigError."""
    newest = checkpoint.latest(target / "checkpoints")
    for candidate in ([newest / "model"] if newest else []) + [target / "model", target]:
        if (candidate / "config.json").is_file():
            if candidate.parent != newest:
                checkpoint.check(candidate.parent)
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
