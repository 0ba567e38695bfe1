"""A run: its parts in one place, and what a checkpoint holds of it. `train.py` uses them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from gapg.budget import Controller
from gapg.build import fitting_prompts, make_controller, make_engine, make_reward, make_training_oracle
from gapg.config import RunConfig
from gapg.console import say
from gapg.data import PromptQueue, split_validation
from gapg.deterministic import use_deterministic_algorithms
from gapg.errors import ConfigError
from gapg.files import sync, writing
from gapg.help_phrase import help_control, masked
from gapg.judge import Judge
from gapg.model import lora
from gapg.model.endings import opens_think
from gapg.model.load import load_model, load_tokenizer
from gapg.model.memory import announce
from gapg.model.precision import round_parameters
from gapg.model.route import choose_route
from gapg.optim import learning_rate, make_optimizer
from gapg.reward import RewardFunction
from gapg.runs import checkpoint, manifest, run_identity, stop
from gapg.runs.state import TrainState
from gapg.runs.tracking import Phases, Tracker
from gapg.seeding import derive
from gapg.tasks.base import STOP, Prompt, Task
from gapg_rollout.oracle.cache import CacheError
from gapg_rollout.records import Engine, HelpControl, Oracle, OracleAnswer, OracleUsage, Sampling


@dataclass(slots=True)
class Run:
    config: RunConfig
    folder: Path
    task: Task
    tokenizer: PreTrainedTokenizerBase
    model: PreTrainedModel
    reference: PreTrainedModel | None
    optimizer: torch.optim.Optimizer
    engine: Engine
    oracle: Oracle
    """What training may ask; one that sends nothing where `marginal.cloud` says so."""
    judge: Judge
    queue: PromptQueue
    validation: list[Prompt]
    controller: Controller
    reward: RewardFunction
    tracker: Tracker
    state: TrainState
    help: HelpControl | None
    """How the rollouts steer the help phrase: forbidden under `method: marginal`, else not at all."""
    began_with: dict[str, str]
    """SHA-256 of the `model` that the first step changed and of the `data`; in the manifest of each checkpoint."""
    failure: OracleAnswer | None = None
    """An answer that failed in the last step."""
    phases: Phases = field(default_factory=Phases)

    def sampling(self, label: str, help: HelpControl | None = None) -> Sampling:
        """Sampling settings whose seed is drawn from (run seed, label, step)."""
        rollout = self.config.rollout
        return Sampling(
            max_new_tokens=rollout.max_new_tokens,
            temperature=rollout.temperature,
            stop=STOP,
            seed=derive(self.config.seed, label, self.state.step),
            help=help,
            thinking=self.judge.thinking,
        )

    def save(self) -> Path:
        """A checkpoint of this moment; older ones than the last K and the best are deleted.

        Raises Diverged, DiskFull and ConfigError; what was saved before stays.
        """
        state = {
            **asdict(self.state),
            "queue": {"cursor": self.queue.cursor, "returned": self.queue.returned},
            "controller": asdict(self.controller),
            "oracle": asdict(self.oracle.usage),
        }
        about = {"began_with": self.began_with, "config": self.config.model_dump(mode="json")}
        with writing(self.tracker.path):
            sync(self.tracker.path)  # the rows up to here belong to the checkpoint
        root = self.folder / "checkpoints"
        path = checkpoint.save(root, self.state.step, self.model, self.tokenizer, self.optimizer, state, about)
        checkpoint.mark_best(root, self.state.best_step)
        checkpoint.prune(root, self.config.keep_checkpoints, also={self.state.best_step})
        return path

    def close(self) -> None:
        self.engine.close()
        self.oracle.close()
        self.tracker.close()


def build_run(
    config: RunConfig, folder: Path, task: Task, model_path: Path | None, controller: Controller | None = None
) -> Run:
    """A run ready for its next step: fresh from `model_path` (or the config's model), or from its last checkpoint.

    `controller`: another law for alpha_c than the budget's; a dataclass, whose fields go into the checkpoints.
    Raises ConfigError and Stopped.
    """
    stop.look()
    marginal = config.method == "marginal"
    if config.deterministic:
        use_deterministic_algorithms()
    root = folder / "checkpoints"
    last = checkpoint.latest(root)
    # the adapters of a LoRA run continue on the weights that it began with: its checkpoints' are merged
    source = last / "model" if last and not config.model.lora else model_path
    model_config = config.model if source is None else config.model.model_copy(update={"path": str(source)})
    tokenizer = load_tokenizer(model_config, task)
    began_with = _began_with(config, folder, model_path, last)
    model = load_model(model_config, tokenizer, config.seed)
    packed = choose_route(model, config.update.pack, config.rollout.longest)
    config = config.model_copy(update={"update": config.update.model_copy(update={"pack": packed})})
    reference = _reference(config, tokenizer, model_path, model) if config.loss.kl_coef else None
    if config.model.lora:
        lora.add_adapters(model, config.model.lora, config.seed)
        if last:  # before the optimizer takes its masters of them
            checkpoint.restore_adapters(last, model)
    announce(model, config, model.device)
    checkpoint.check_saves(root, model, tokenizer)
    optimizer = make_optimizer(model, config.optim, config.model.parameters)
    oracle = make_training_oracle(config, task, folder)
    prompts = fitting_prompts(config, task, tokenizer, "train")
    train, validation = split_validation(prompts, config.eval.problems, config.seed)
    controller = controller or make_controller(config)
    queue, state = PromptQueue(train, config.seed), TrainState()
    if last:
        saved = checkpoint.restore_optimizer(last, model, optimizer)
        state, controller = _restore(saved, queue, oracle, controller)
        say(f"resuming from step {state.step} ({last})")
        _say_schedule(manifest.read(last), config, state.step)
    checkpoint.mark_best(root, state.best_step)  # a kill may have left another link, or none
    engine = make_engine(config, model, tokenizer, str(source or config.model.path))
    return Run(
        config=config,
        folder=folder,
        task=task,
        tokenizer=tokenizer,
        model=model,
        reference=reference,
        optimizer=optimizer,
        engine=engine,
        oracle=oracle,
        judge=Judge(
            task,
            oracle,
            ask_always=marginal and config.marginal.cloud != "ignore",
            ask_unsolved=config.budget.filter,
            thinking=opens_think(task, tokenizer),
            masked=marginal,
        ),
        queue=queue,
        validation=validation,
        controller=controller,
        reward=make_reward(config),
        tracker=Tracker(folder, state.step if last else -1, tensorboard=config.tensorboard, wandb=config.wandb),
        state=state,
        help=masked(help_control(tokenizer)) if marginal else None,
        began_with=began_with,
    )


def _began_with(config: RunConfig, folder: Path, model_path: Path | None, last: Path | None) -> dict[str, str]:
    """Raises ConfigError where the weights that adapters or a penalty are relative to are not those of the beginning.

    A run that goes on from whole weights never looks at its first ones again.
    """
    before: dict[str, str] = manifest.read(last).get("began_with", {}) if last else {}
    used = "model.lora" if config.model.lora else "loss.kl_coef" if config.loss.kl_coef else None
    if last and not used:
        return before
    record = run_identity.of_checkpoints(folder / "checkpoints") or {"data": None}
    now = {"model": run_identity.weights_sha256(config, model_path), "data": manifest.digest(record["data"])}
    if last and before.get("model") != now["model"]:
        where = f"{model_path}" if model_path else f"model.path={config.model.path}"
        raise ConfigError(
            f"{where}: not the base weights that the run began with, which {used} goes on from; put them back, or "
            "choose another --output-dir"
        )
    return now


def _restore(
    saved: dict[str, Any], queue: PromptQueue, oracle: Oracle, controller: Controller
) -> tuple[TrainState, Controller]:
    """Puts a checkpoint's state into queue and oracle, and returns the rest of it. Raises ConfigError."""
    queue.restore(**saved["queue"])
    try:
        oracle.restore(OracleUsage(**saved["oracle"]))
    except (CacheError, ValueError, TypeError) as error:
        raise ConfigError(f"the checkpoint's oracle totals: {error}") from None
    # an older checkpoint lacks what was added since
    state = TrainState(**{name: saved[name] for name in asdict(TrainState()) if name in saved})
    return state, replace(controller, **saved["controller"])


def _say_schedule(saved: dict[str, Any], config: RunConfig, step: int) -> None:
    """Says what a number of steps that was changed means for the learning rate."""
    before = saved.get("config", {}).get("steps", config.steps)
    if step > config.steps:
        say(f"steps: {before} -> {config.steps}: the run has {step} behind it, so nothing more is trained")
    if before == config.steps or step >= config.steps:
        return
    was, now = (learning_rate(config.optim, min(step, n - 1), n) for n in (before, config.steps))
    say(
        f"steps: {before} -> {config.steps}: the learning rate follows the schedule of {config.steps} steps from here "
        f"on: {now:.2e} at step {step + 1}, instead of {was:.2e}"
    )


def _reference(
    config: RunConfig, tokenizer: PreTrainedTokenizerBase, model_path: Path | None, model: PreTrainedModel
) -> PreTrainedModel:
    """The policy as it was before the first step, frozen; also for a run that goes on from a checkpoint."""
    if config.model.lora:
        return lora.frozen_twin(model)
    path = config.model.path if model_path is None else str(model_path)
    frozen = load_model(config.model.model_copy(update={"path": path}), tokenizer, config.seed)
    frozen.set_attn_implementation(model.config._attn_implementation)
    frozen.eval().requires_grad_(False)
    if config.model.parameters == "bfloat16":
        round_parameters(frozen)
    return frozen


Validate = Callable[[Run], dict[str, float]]
"""Scores the current policy on the validation problems; keys as they appear in metrics.jsonl."""
