"""Makes or loads the device model and its tokenizer."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
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

from gapg import attention, lora
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


def check_model(config: ModelConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    """What can be known before the weights are loaded. Raises ConfigError."""
    if config.liger and not torch.cuda.is_available():
        raise ConfigError(
            "model.liger=true: liger-kernel needs a CUDA device, and there is none; set model.liger=false"
        )
    attention.register()
    if config.lora:
        with torch.device("meta"), _loading(config):
            if config.path is None:
                model = _from_scratch(config, tokenizer, seed=0)
            else:
                model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(_check_folder(config.path)))
        lora.target_layers(model, config.lora)


def load_model(config: ModelConfig, tokenizer: PreTrainedTokenizerBase, seed: int) -> PreTrainedModel:
    """The policy in training mode on `device()`, float32 weights, packed attention, no adapters. Raises ConfigError."""
    check_model(config, tokenizer)
    if config.path is None:
        model = _from_scratch(config, tokenizer, seed)
    else:
        path = _check_folder(config.path)
        with _loading(config):
            model = AutoModelForCausalLM.from_pretrained(
                path,
                config=_without_dropout(path),
                dtype=torch.float32,
                attn_implementation=attention.NAME,
                use_safetensors=True,
            )
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    model.to(device())  # type: ignore[arg-type]
    if config.liger:
        apply_liger(model)
    return model.train()


@torch.no_grad()
def apply_liger(model: PreTrainedModel) -> None:
    """Puts liger-kernel's RMSNorm, SwiGLU and RoPE in the model, through liger's own function for its architecture.

    Its losses stay off. RoPE is a function of transformers' module: from here on every model of this architecture in
    the process has liger's, an engine's too. Liger looks at nothing but the architecture's name (not at the
    activation, say), hence the comparison of a few logits. Proven without a GPU, in Triton's interpreter: the choice
    of functions and one float32 step; 16-bit types are liger's own affair.

    Raises ConfigError where liger does not know the architecture, or computes something else.
    """
    from liger_kernel.transformers.monkey_patch import (
        MODEL_TYPE_TO_APPLY_LIGER_FN,
        _apply_liger_kernel_to_instance,
    )

    name = model.config.model_type
    if name not in MODEL_TYPE_TO_APPLY_LIGER_FN:
        raise ConfigError(f"model.liger=true: liger-kernel has nothing for {name!r} models; set model.liger=false")
    ids = torch.arange(3, 11, device=model.device)[None] % model.config.get_text_config().vocab_size
    plain = model(input_ids=ids, use_cache=False).logits
    module = sys.modules[type(model).__module__]
    classes = {key: value for key, value in vars(module).items() if isinstance(value, type)}
    _apply_liger_kernel_to_instance(model, cross_entropy=False, fused_linear_cross_entropy=False)
    for key, value in classes.items():  # liger's, meant for models made later, would drop the biases of an MLP
        setattr(module, key, value)
    change = (model(input_ids=ids, use_cache=False).logits - plain).abs().max()
    if not change <= 1e-2 * plain.abs().max():
        raise ConfigError(f"model.liger=true: changes what this {name!r} model computes; set model.liger=false")


@contextmanager
def _loading(config: ModelConfig) -> Iterator[None]:
    try:
        yield
    except ConfigError:
        raise
    except (OSError, ValueError) as error:
        raise ConfigError(f"model.path={config.path}: cannot be loaded: {_first_line(error)}") from None


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
