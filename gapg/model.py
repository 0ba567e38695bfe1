"""Makes or loads the device model and its tokenizer."""

from __future__ import annotations

from pathlib import Path

import torch
import transformers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from gapg import attention
from gapg.config import ConfigError, ModelConfig
from gapg.seeding import derive
from gapg.tasks.base import Task, Tokenized

# the run has a display of its own, and a bar for a model of three layers tells nothing
transformers.utils.logging.disable_progress_bar()


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def load_tokenizer(config: ModelConfig, task: Task) -> PreTrainedTokenizerBase:
    """The model folder's tokenizer, or the task's own for a model made from scratch. Raises ConfigError."""
    if config.path is None:
        if not isinstance(task, Tokenized):
            raise ConfigError(
                f"model.path is empty and task {task.name!r} brings no tokenizer: set model.path to a model"
            )
        return task.tokenizer()
    path = _check_folder(config.path)
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise ConfigError(f"model.path={config.path}: no tokenizer: {_first_line(error)}") from None
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_model(config: ModelConfig, tokenizer: PreTrainedTokenizerBase, seed: int) -> PreTrainedModel:
    """The policy in training mode on `device()`, float32 weights, packed attention. Raises ConfigError."""
    attention.register()
    if config.path is None:
        model = _from_scratch(config, tokenizer, seed)
    else:
        path = _check_folder(config.path)
        try:
            model = AutoModelForCausalLM.from_pretrained(
                path,
                config=_without_dropout(path),
                dtype=torch.float32,
                attn_implementation=attention.NAME,
                use_safetensors=True,
            )
        except (OSError, ValueError) as error:
            raise ConfigError(f"model.path={config.path}: cannot be loaded: {_first_line(error)}") from None
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    model.to(device())  # type: ignore[arg-type]
    return model.train()


def _from_scratch(config: ModelConfig, tokenizer: PreTrainedTokenizerBase, seed: int) -> PreTrainedModel:
    torch.manual_seed(derive(seed, "init"))
    size = config.llama
    model = LlamaForCausalLM._from_config(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=size.hidden_size,
            intermediate_size=size.intermediate_size,
            num_hidden_layers=size.num_layers,
            num_attention_heads=size.num_heads,
            max_position_embeddings=size.max_positions,
            tie_word_embeddings=False,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        ),
        attn_implementation=attention.NAME,
    )
    model.generation_config = GenerationConfig(
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, do_sample=True, top_k=0
    )
    return model


def _without_dropout(path: str) -> PretrainedConfig:
    """The model's config with dropout off: the policy that is trained is the one that was sampled."""
    config = AutoConfig.from_pretrained(path)
    for key, value in config.to_dict().items():
        if isinstance(value, float) and ("dropout" in key or "pdrop" in key):
            setattr(config, key, 0.0)
    return config


def _check_folder(path: str) -> str:
    """A path that looks local must be a model folder; a hub name is left to the hub client."""
    folder = Path(path).expanduser()
    looks_local = path.startswith((".", "/", "~")) or path.count("/") > 1 or folder.exists()
    if looks_local and not (folder / "config.json").is_file():
        what = "has no config.json" if folder.is_dir() else "does not exist"
        raise ConfigError(f"model.path={path}: the folder {what}; give a Hugging Face model folder or a hub name")
    return str(folder) if folder.exists() else path


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0][:200]
