"""`gapg eval`: any checkpoint of a run, or any Hugging Face folder, on the held-out problems of a config."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from gapg import checkpoint
from gapg.config import ConfigError, RunConfig, load_config
from gapg.endings import opens_think
from gapg.files import write_whole
from gapg.jsonl import to_json
from gapg.judge import Judge
from gapg.model import load_model, load_tokenizer
from gapg.parts import check_run, fitting_prompts, make_engine, make_oracle, make_task
from gapg.policy import choose_route
from gapg.rollout.records import Engine, HelpControl, Oracle, Sampling
from gapg.run import set_threads
from gapg.seeding import derive
from gapg.tasks.base import STOP, Task
from gapg.tracking import say
from gapg.use.calibrate import FILE, help_control, load_calibration
from gapg.use.evaluate import as_result, prediction, respond
from gapg.use.report import print_table


def evaluate_command(target: Path, config_name: str | None, output: Path | None, overrides: Mapping[str, str]) -> None:
    """Evaluates greedily and at the training temperature; prints the table, writes summary.json and predictions.jsonl.

    Raises ConfigError where the folder or the config is missing, naming the fix.
    """
    opened = open_target(target, config_name, overrides)
    folder = output or opened.beside("eval")
    folder.mkdir(parents=True, exist_ok=True)
    config, task = opened.config, opened.task
    oracle = make_oracle(config, task, opened.run_folder or folder)  # the run's paid answers are not paid again
    try:
        engine = opened.engine()
        try:
            evaluate(config, folder, task, opened.tokenizer, engine, oracle, model=str(opened.model_path))
        finally:
            engine.close()
    finally:
        oracle.close()


@dataclass(frozen=True, slots=True)
class Target:
    """A model to use: its folder, the run it belongs to if any, and what its config names."""

    model_path: Path
    run_folder: Path | None
    config: RunConfig
    task: Task
    tokenizer: PreTrainedTokenizerBase

    def engine(self) -> Engine:
        """Loads the weights. Raises ConfigError."""
        model = load_model(self.config.model, self.tokenizer, self.config.seed)
        choose_route(model, longest=self.config.rollout.longest)
        return make_engine(self.config, model, self.tokenizer, str(self.model_path))

    def beside(self, kind: str) -> Path:
        """Where results about this model go: a folder of its run's, or of `runs`."""
        path = self.model_path
        name = path.resolve().parent.name if path.name == "model" else path.resolve().name
        return (self.run_folder or Path("runs")) / kind / name


def open_target(target: Path, config_name: str | None, overrides: Mapping[str, str]) -> Target:
    """All but the weights. Raises ConfigError where the folder or the config is missing, naming the fix."""
    model_path, run_folder = find_model(target)
    if config_name is None and run_folder is None:
        raise ConfigError(f"{target}: not part of a run, so name the task with --config, e.g. --config gsm8k-smollm2")
    config = load_config(config_name or str(run_folder / "config.yaml"), overrides)  # type: ignore[operator]
    set_threads(config)
    task = make_task(config)
    config = config.model_copy(update={"model": config.model.model_copy(update={"path": str(model_path)})})
    tokenizer = load_tokenizer(config.model, task)
    check_run(config, task, tokenizer)
    return Target(model_path, run_folder, config, task, tokenizer)


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
    """Held-out problems, greedy, sampled, and as each calibration beside the model says: a table on standard output;
    summary.json and predictions.jsonl in `folder`.

    Raises ConfigError where a calibration does not fit the tokenizer.
    """
    prompts = fitting_prompts(config, task, tokenizer, "heldout")
    judge = Judge(task, oracle, ask_unsolved=False, thinking=opens_think(task, tokenizer))
    rows, lines = [], []
    for name, temperature, help in decodings(config, tokenizer, Path(model)):
        how = "sampled" if temperature else "greedy"
        seed = derive(config.seed, "eval", how)
        sampling = Sampling(config.rollout.max_new_tokens, temperature, STOP, seed, help, judge.thinking)
        groups = respond(engine, task, tokenizer, judge, prompts, sampling, title=f"evaluate {name}")
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
    summary = {"model": model, "task": task.name, "oracle": config.oracle.kind, "rows": rows, "oracle_usage": usage}
    write_whole(folder / "predictions.jsonl", "".join(to_json(line) + "\n" for line in lines))
    write_whole(folder / "summary.json", to_json(summary, indent=1) + "\n")
    print_table(rows)
    say(f"oracle: {', '.join(f'{key} {value:g}' for key, value in usage.items())}")
    say(f"{folder}/summary.json  {folder}/predictions.jsonl")


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
