"""What a model's folder, or its place on the hub, holds: refused where it is no whole plain causal language model."""

from __future__ import annotations

import copy
import json
import re
from contextlib import suppress
from functools import cache, partial
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download
from torch.nn import ModuleList
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from gapg.console import say_once
from gapg.errors import ConfigError, one_line

FILE = "generation_config.json"
SAMPLING_FLAGS = {"temperature", "top_p", "top_k", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff", "top_h"}
"""What greedy decoding ignores."""
NOISE = re.compile("drop|jitter")
"""Names of settings that make training mode another function than evaluation mode, and a random one."""
TOKENS = {"bos_token_id", "eos_token_id", "pad_token_id"}
LFS_POINTER = b"version https://git-lfs.github.com/spec/"

_read_config = partial(AutoConfig.from_pretrained, trust_remote_code=False)
_hub_config = cache(_read_config)
"""The hub is asked once: a start looks at the config half a dozen times."""


def load_shape(path: str) -> PretrainedConfig:
    """The config of the model in a folder or on the hub, without dropout and noise: what is trained is what sampled.

    Raises ConfigError, also for what is no causal language model, and for quantized weights, which cannot be trained.
    """
    folder = check_folder(path)
    try:
        config = _read_config(folder) if Path(folder).is_dir() else copy.deepcopy(_hub_config(folder))
        if not isinstance(config.get_text_config(), PretrainedConfig):
            raise ValueError("text_config is of no known model")
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
    set_plain(config)
    return config


def set_plain(config: PretrainedConfig) -> None:
    """No dropout, dropped layers or jitter, in the config's parts too: in training mode as in evaluation mode.

    Raises ConfigError for the one architecture whose noise no setting switches off.
    """
    if config.model_type == "phimoe":  # its router_jitter_noise is a threshold, in evaluation mode too
        raise ConfigError("model phimoe: in training mode its routers draw experts at random; choose another model")
    for key, value in list(vars(config).items()):
        if isinstance(value, PretrainedConfig):
            set_plain(value)
        elif isinstance(value, int | float) and not isinstance(value, bool) and NOISE.search(key):
            setattr(config, key, type(value)(0))  # the type that the config declares: a whole number in MPT's
    config.return_dict, config.output_hidden_states, config.output_attentions = True, False, False


def check_folder(path: str) -> str:
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
    folder = Path(check_folder(path))
    file = folder / FILE if folder.is_dir() else _hub_file(path)
    if file is None or not file.exists():
        return None
    try:
        values = json.loads(file.read_text(encoding="utf-8"), parse_constant=lambda _: None)  # NaN is no JSON
    except (OSError, ValueError) as error:
        raise ConfigError(f"model.path={path}: {FILE}: {one_line(error)}; mend or delete it") from None
    if not isinstance(values, dict):
        raise ConfigError(f"model.path={path}: {FILE}: holds no settings; mend or delete it")
    return values


@cache
def _hub_file(path: str) -> Path | None:
    try:
        return Path(hf_hub_download(path, FILE))
    except OSError:  # many a model has none
        return None


def check_loaded(path: str, model: PreTrainedModel, info: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> None:
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
    if not getattr(model.config.get_text_config(), "num_nextn_predict_layers", 0):  # those stand behind the last layer
        layers += tuple(f"{n}.{len(part)}." for n, part in model.named_modules() if isinstance(part, ModuleList))
    bare = f"{model.base_model_prefix}."  # which files of a model without its head leave out
    if spoilt := [n for n in strange if n.startswith(layers) or f"{bare}{n}".startswith(layers)]:
        raise ConfigError(
            f"model.path={path}: its files hold {spoilt[0]}, for which the model that config.json describes has no "
            "place, as with more layers, adapters, biases, quantized weights: save the plain model with save_pretrained"
        )
    if strange:
        say_once(f"model.path={path}: {len(strange)} weights of its files are not the model's, such as {strange[0]}")
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
