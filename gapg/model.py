"""Makes or loads the device model and its tokenizer."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import hf_hub_download
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
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
from gapg.tracking import say

# the run has a display of its own, and a bar for a model of three layers tells nothing
transformers.utils.logging.disable_progress_bar()


FILE = "generation_config.json"
SAMPLING_FLAGS = {"temperature", "top_p", "top_k", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff", "top_h"}
"""What greedy decoding ignores."""
TOKENS = {"bos_token_id", "eos_token_id", "pad_token_id"}
LFS_POINTER = b"version https://git-lfs.github.com/spec/"

_say_once = cache(say)


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
    load_shape(config.path)  # for its errors, which loading a tokenizer would say in other words
    try:
        tokenizer = AutoTokenizer.from_pretrained(_check_folder(config.path), trust_remote_code=False)
    except Exception as error:  # whatever a folder's files make the code of transformers say
        raise ConfigError(
            f"model.path={config.path}: no tokenizer: {one_line(error)}; it wants a whole tokenizer.json"
        ) from None
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def end_ids(config: ModelConfig, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """The tokens that end a response: the tokenizer's, and those that the folder's generation config adds."""
    more = None if config.path is None else generation_config(config.path).eos_token_id
    return {tokenizer.eos_token_id, *(more if isinstance(more, list) else [more])} - {None}


def check_model(config: ModelConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    """What can be known before the weights are loaded. Raises ConfigError."""
    if config.liger and not torch.cuda.is_available():
        raise ConfigError(
            "model.liger=true: liger-kernel needs a CUDA device, and there is none; set model.liger=false"
        )
    attention.register()
    if config.lora:
        with torch.device("meta"):
            model = _from_scratch(config, tokenizer, seed=0) if config.path is None else unloaded_model(config)
            lora.add_adapters(model, config.lora, seed=0)


def unloaded_model(config: ModelConfig) -> PreTrainedModel:
    """The model of `config.path` without its weights, on the meta device. Raises ConfigError."""
    assert config.path is not None
    shape = load_shape(config.path)
    attention.register()
    with torch.device("meta"), _loading(config):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(
            shape, attn_implementation=attention.implementation(shape), dtype=torch.float32
        )
    return model


def load_model(config: ModelConfig, tokenizer: PreTrainedTokenizerBase, seed: int) -> PreTrainedModel:
    """The policy in training mode on `device()`, float32 weights, packed attention, no adapters.

    Raises ConfigError, one line, for whatever keeps a folder from being this model, whole: files, weights that are
    missing, of another shape or under other names, a tokenizer with more tokens than the model has embeddings.
    """
    check_model(config, tokenizer)
    if config.path is None:
        model = _from_scratch(config, tokenizer, seed)
    else:
        shape, generation, folder = load_shape(config.path), generation_config(config.path), _check_folder(config.path)
        if Path(folder).is_dir() and not any(file.is_file() for file in Path(folder).glob("*.safetensors")):
            what = "has no weights in safetensors files: load it with transformers, and save_pretrained"
            raise ConfigError(f"model.path={config.path}: the folder {what}")
        with _loading(config):
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                folder,
                config=shape,
                generation_config=generation,
                dtype=torch.float32,
                attn_implementation=attention.implementation(shape),
                use_safetensors=True,
                trust_remote_code=False,
                ignore_mismatched_sizes=True,  # they are refused below, by name
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
    """Errors in one line, without the report on weights that transformers prints before."""
    reports = logging.getLogger("transformers.modeling_utils")
    reports.addFilter(_is_error)  # a level would make transformers say more
    try:
        yield
    except ConfigError:
        raise
    except Exception as error:  # whatever a folder's files make the code of transformers say
        raise ConfigError(f"model.path={config.path}: cannot be loaded: {one_line(error)}") from None
    finally:
        reports.removeFilter(_is_error)


def _is_error(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.ERROR


def _check_loaded(path: str, model: PreTrainedModel, info: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises ConfigError where the model is not what its files hold; says which of their weights it has no place for.

    Those are old buffers, or of another head or tower. In a layer of the model they would change what it computes.
    """
    missing, strange = sorted(info["missing_keys"]), sorted(info["unexpected_keys"])
    if missing:
        where = f", and {len(strange)} have names that it lacks, such as {strange[0]}" if strange else ""
        raise ConfigError(
            f"model.path={path}: {len(missing)} of the model's weights are not in its files, such as {missing[0]}"
            f"{where}; they would be random: save the plain model with save_pretrained"
        )
    if info["mismatched_keys"] or info.get("error_msgs"):
        found = [f"{name} has {list(a)}, not {list(b)}" for name, a, b in sorted(info["mismatched_keys"])]
        found += map(str, info.get("error_msgs", ()))
        raise ConfigError(f"model.path={path}: weights do not fit config.json: {found[0]}; save both from one model")
    layers = tuple(f"{n}." for n, layer in model.named_modules() if layer._parameters and not layer._modules)
    bare = f"{model.base_model_prefix}."  # which files of a model without its head leave out
    if spoilt := [n for n in strange if n.startswith(layers) or f"{bare}{n}".startswith(layers)]:
        raise ConfigError(
            f"model.path={path}: its files hold {spoilt[0]}, for which the model that config.json describes has no "
            "place, as with adapters, biases or quantized weights: save the plain model with save_pretrained"
        )
    if strange:
        _say_once(f"model.path={path}: {len(strange)} weights of its files are not the model's, such as {strange[0]}")
    if own := sorted(model.get_expanded_tied_weights_keys(all_submodels=True).keys() - model.all_tied_weights_keys):
        raise ConfigError(
            f"model.path={path}: config.json ties {own[0]} to the embeddings, and the files hold another one: set "
            "tie_word_embeddings to false there if those are right"
        )
    embeddings: Any = model.get_input_embeddings()
    tokens, rows = max(tokenizer.get_vocab().values(), default=-1) + 1, embeddings.weight.shape[0]
    if tokens > rows:
        raise ConfigError(
            f"model.path={path}: the tokenizer has {tokens} tokens and the model embeddings for {rows}: call "
            "model.resize_token_embeddings(len(tokenizer)) and save both, or take the model's own tokenizer"
        )


def generation_config(path: str) -> GenerationConfig:
    """The folder's, or hub model's, in a form that can be saved; of the config's tokens where it has none.

    A temperature beside greedy decoding, say, is common, and `save_pretrained` refuses it. What decoding ignores is
    dropped; where that does not help, everything but the tokens that begin, end and pad. An end token without
    embedding, such as -1, is dropped too. Raises ConfigError.
    """
    shape = load_shape(path).get_text_config()
    values = _generation_settings(path)
    if values is None:
        values = {key: getattr(shape, key, None) for key in TOKENS}
    ends = values.get("eos_token_id")
    listed = ends if isinstance(ends, list) else [] if ends is None else [ends]
    if not all(type(token) is int for token in listed):
        raise ConfigError(f"model.path={path}: {FILE}: eos_token_id={ends!r}: give a token's number, or several")
    known = [token for token in listed if 0 <= token < shape.vocab_size]
    values["eos_token_id"] = known[0] if len(known) == 1 else known or None
    for kept in (values.keys(), values.keys() - SAMPLING_FLAGS, TOKENS):
        with suppress(Exception):  # each setting has a check of its own
            config = GenerationConfig(**{key: value for key, value in values.items() if key in kept})
            config.validate(strict=True)
            return config
    return GenerationConfig(eos_token_id=values["eos_token_id"])


def _generation_settings(path: str) -> dict[str, Any] | None:
    folder = Path(_check_folder(path))
    try:
        file = folder / FILE if folder.is_dir() else Path(hf_hub_download(path, FILE))
    except OSError:  # many a model has none
        return None
    if not file.exists():
        return None
    try:
        values = json.loads(file.read_text(encoding="utf-8"), parse_constant=lambda _: None)  # NaN is no JSON
    except (OSError, ValueError) as error:
        raise ConfigError(f"model.path={path}: {FILE}: {one_line(error)}; mend or delete it") from None
    if not isinstance(values, dict):
        raise ConfigError(f"model.path={path}: {FILE}: holds no settings; mend or delete it")
    return values


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

    Raises ConfigError, also for what is no causal language model, and for quantized weights, which cannot be trained.
    """
    folder = _check_folder(path)
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # whatever a config makes the code of transformers say
        raise ConfigError(f"model.path={path}: no model config: {one_line(error)}") from None
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ConfigError(
            f"model.path={path}: transformers has no causal language model of type {config.model_type!r}: take "
            "another, such as this one's text part"
        )
    if quantization := getattr(config, "quantization_config", None):
        method = quantization.get("quant_method") if isinstance(quantization, dict) else type(quantization).__name__
        raise ConfigError(
            f"model.path={path}: its weights are quantized ({method}), and training needs plain ones: take the model "
            "that they were made from, or dequantize it and save_pretrained"
        )
    _set_plain(config)
    return config


def _set_plain(config: PretrainedConfig) -> None:
    for key, value in list(vars(config).items()):
        if isinstance(value, PretrainedConfig):
            _set_plain(value)
        elif isinstance(value, float) and ("drop" in key or "jitter" in key):
            setattr(config, key, 0.0)
    config.return_dict, config.output_hidden_states, config.output_attentions = True, False, False


def _check_folder(path: str) -> str:
    """A path that looks local must be a model folder; a hub name is left to the hub client. Raises ConfigError."""
    try:
        folder = Path(path).expanduser()
        if not (path.startswith((".", "/", "~")) or path.count("/") > 1 or folder.exists()):
            return path
        fault = _fault(folder)
    except (OSError, RuntimeError) as error:  # no permission, no such user
        fault = one_line(error)
    if fault:
        raise ConfigError(f"model.path={path}: {fault}")
    return str(folder)


def _fault(folder: Path) -> str | None:
    """What keeps a path from being a model folder, and the fix."""
    if not folder.is_dir():
        what = "this is a file" if folder.exists() else "the folder does not exist"
        return f"{what}; give a Hugging Face model folder or a hub name"
    if (folder / "adapter_config.json").exists():
        return "the folder holds adapters of peft: merge them into their model (merge_and_unload) and save_pretrained"
    if not (folder / "config.json").is_file():
        return "the folder has no config.json; give a Hugging Face model folder or a hub name"
    for file in sorted(f for f in folder.iterdir() if f.suffix in (".json", ".safetensors", ".model", ".jinja")):
        if file.is_file() and file.stat().st_size < 1024 and file.read_bytes().startswith(LFS_POINTER):
            return f"{file.name} is a git-lfs pointer, not the file: run git lfs pull"
    return None
