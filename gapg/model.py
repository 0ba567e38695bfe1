"""Makes or loads the device model and its tokenizer."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import hf_hub_download
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
from gapg.config import ConfigError, ModelConfig, one_line
from gapg.seeding import derive
from gapg.tasks.base import Task, Tokenized

# the run has a display of its own, and a bar for a model of three layers tells nothing
transformers.utils.logging.disable_progress_bar()


FILE = "generation_config.json"
SAMPLING_FLAGS = {"temperature", "top_p", "top_k", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff", "top_h"}
"""What greedy decoding ignores."""
LFS_POINTER = b"version https://git-lfs.github.com/spec/"


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
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except Exception as error:  # whatever a folder's files make the code of transformers say
        raise ConfigError(f"model.path={config.path}: no tokenizer: {one_line(error)}") from None
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def end_ids(config: ModelConfig, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """The tokens that end a response: the tokenizer's, and those that the folder's generation config adds."""
    found = [tokenizer.eos_token_id]
    if config.path is not None and (generation := generation_config(config.path)) is not None:
        more = generation.eos_token_id
        found += more if isinstance(more, list) else [more]
    return {i for i in found if i is not None}


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
                model = AutoModelForCausalLM.from_config(load_shape(config.path))
        lora.target_layers(model, config.lora)


def load_model(config: ModelConfig, tokenizer: PreTrainedTokenizerBase, seed: int) -> PreTrainedModel:
    """The policy in training mode on `device()`, float32 weights, packed attention, no adapters.

    Raises ConfigError, one line, for whatever keeps a folder from being this model, whole: files, weights that are
    missing, of another shape or under other names, a tokenizer with more tokens than the model has embeddings.
    """
    check_model(config, tokenizer)
    if config.path is None:
        model = _from_scratch(config, tokenizer, seed)
    else:
        shape, generation = load_shape(config.path), generation_config(config.path)
        with _loading(config):
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                _check_folder(config.path),
                config=shape,
                generation_config=generation,
                dtype=torch.float32,
                attn_implementation=attention.implementation(shape),
                use_safetensors=True,
                trust_remote_code=False,
                output_loading_info=True,
            )
        model, info = loaded
        _check_loaded(config.path, model, info, tokenizer)
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
    except Exception as error:  # whatever a folder's files make the code of transformers say
        raise ConfigError(f"model.path={config.path}: cannot be loaded: {one_line(error)}") from None


def _check_loaded(path: str, model: PreTrainedModel, info: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> None:
    """Names in the files that the model lacks are old buffers, unless the model's own are missing too."""
    missing, strange = sorted(info["missing_keys"]), sorted(info["unexpected_keys"])
    if missing:
        where = f", and {len(strange)} have names that it lacks, such as {strange[0]}" if strange else ""
        raise ConfigError(
            f"model.path={path}: {len(missing)} of the model's weights are not in its files, such as {missing[0]}"
            f"{where}; they would be random: save the plain model with save_pretrained"
        )
    if info["mismatched_keys"] or info.get("error_msgs"):
        found = [str(x) for x in (*info["mismatched_keys"], *info.get("error_msgs", ()))]
        raise ConfigError(f"model.path={path}: weights do not fit config.json: {found[0]}; save both from one model")
    embeddings: Any = model.get_input_embeddings()
    tokens, rows = max(tokenizer.get_vocab().values(), default=-1) + 1, embeddings.weight.shape[0]
    if tokens > rows:
        raise ConfigError(
            f"model.path={path}: the tokenizer has {tokens} tokens and the model embeddings for {rows}: call "
            "model.resize_token_embeddings(len(tokenizer)) and save both, or take the model's own tokenizer"
        )


def generation_config(path: str) -> GenerationConfig | None:
    """The folder's, or hub model's, in a form that can be saved; None where it has none. Raises ConfigError.

    A temperature beside greedy decoding, say, is common, and `save_pretrained` refuses it. What decoding ignores is
    dropped; where that does not help, everything but the tokens that begin, end and pad.
    """
    folder = Path(_check_folder(path))
    try:
        file = folder / FILE if folder.is_dir() else Path(hf_hub_download(path, FILE))
        values = json.loads(file.read_text(encoding="utf-8"))
    except OSError:  # many a model has none
        return None
    except ValueError as error:
        raise ConfigError(f"model.path={path}: {FILE}: {one_line(error)}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"model.path={path}: {FILE}: holds no settings")
    tokens = {"bos_token_id", "eos_token_id", "pad_token_id"}
    for kept in (values.keys(), values.keys() - SAMPLING_FLAGS, tokens & values.keys()):
        config = GenerationConfig(**{key: values[key] for key in values if key in tokens})
        with suppress(ValueError, TypeError):
            config = GenerationConfig(**{key: values[key] for key in values if key in kept})
            config.validate(strict=True)
            break
    return config


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


def load_shape(path: str) -> PretrainedConfig:
    """The config of the model in a folder or on the hub, without dropout and noise: what is trained is what sampled.

    Raises ConfigError.
    """
    try:
        config = AutoConfig.from_pretrained(_check_folder(path), trust_remote_code=False)
    except ConfigError:
        raise
    except Exception as error:
        raise ConfigError(f"model.path={path}: no model config: {one_line(error)}") from None
    for part in {id(c): c for c in (config, config.get_text_config())}.values():
        for key, value in part.to_dict().items():
            if isinstance(value, float) and ("drop" in key or "jitter" in key):
                setattr(part, key, 0.0)
    return config


def _check_folder(path: str) -> str:
    """A path that looks local must be a model folder; a hub name is left to the hub client."""
    folder = Path(path).expanduser()
    looks_local = path.startswith((".", "/", "~")) or path.count("/") > 1 or folder.exists()
    if looks_local and not (folder / "config.json").is_file():
        what = "has no config.json" if folder.is_dir() else "does not exist"
        raise ConfigError(f"model.path={path}: the folder {what}; give a Hugging Face model folder or a hub name")
    for file in sorted(folder.glob("*")) if folder.is_dir() else ():
        if file.is_file() and file.stat().st_size < 1024 and file.read_bytes().startswith(LFS_POINTER):
            raise ConfigError(f"model.path={path}: {file.name} is a git-lfs pointer, not the file: run git lfs pull")
    return str(folder) if folder.exists() else path
