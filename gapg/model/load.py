"""Makes or loads the device model and its tokenizer."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from gapg.config_sections import ModelConfig
from gapg.console import say
from gapg.errors import ConfigError, one_line
from gapg.model import attention, lora
from gapg.model.compiled import compile_layers
from gapg.model.folder import check_folder, check_loaded, generation_config, load_shape
from gapg.seeding import derive
from gapg.tasks import call_member
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
        return _own_tokenizer(task)
    load_shape(config.path)  # for its errors, which loading a tokenizer would say in other words
    try:
        tokenizer = AutoTokenizer.from_pretrained(check_folder(config.path), trust_remote_code=False)
    except BaseException as error:  # whatever a folder's files make the code of transformers say
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":  # Rust's, of tokenizers
            raise
        raise ConfigError(
            f"model.path={config.path}: no tokenizer: {one_line(error)}; it wants a whole tokenizer.json"
        ) from None
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _own_tokenizer(task: Task) -> PreTrainedTokenizerBase:
    tokenizer = call_member(task, "tokenizer")
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise ConfigError(f"task {task.name!r}: tokenizer() returned {tokenizer!r:.60}, no tokenizer of transformers")
    ids = set(tokenizer.get_vocab().values())
    if ids != set(range(len(tokenizer))):
        raise ConfigError(
            f"task {task.name!r}: tokenizer() has {len(ids)} tokens with ids up to {max(ids)}: number them from 0 on, "
            "without gaps"
        )
    return tokenizer


def end_ids(config: ModelConfig, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """The tokens that end a response: the tokenizer's, and those that the folder's generation config adds."""
    more = None if config.path is None else generation_config(config.path).eos_token_id
    return {tokenizer.eos_token_id, *(more if isinstance(more, list) else [more])} - {None}


def check_model(config: ModelConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    """What can be known before the weights are loaded. Raises ConfigError."""
    if config.liger is True and not torch.cuda.is_available():
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
        shape, generation, folder = load_shape(config.path), generation_config(config.path), check_folder(config.path)
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
        check_loaded(config.path, model, info, tokenizer)
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    model.to(device())  # type: ignore[arg-type]
    attention.activate(model, device())
    if config.compile:
        compile_layers(model)
    elif config.liger is True or (config.liger and torch.cuda.is_available() and find_spec("liger_kernel")):
        apply_liger(model, config.liger)
    return model.train()


def apply_liger(model: PreTrainedModel, setting: Literal["auto"] | bool) -> None:
    """Puts liger-kernel's layers in the model. Where that cannot be, "auto" says why, and True raises ConfigError."""
    if (reason := _patch(model)) is None:
        return
    if setting is True:
        raise ConfigError(f"model.liger=true: {reason}; set model.liger=false")
    say(f"model.liger=auto: {reason}, so its layers are transformers' own")


@torch.no_grad()
def _patch(model: PreTrainedModel) -> str | None:
    """Puts liger-kernel's RMSNorm, SwiGLU and RoPE in the model, through liger's own function for its architecture.

    Its losses stay off. RoPE is a function of transformers' module: from here on every model of this architecture in
    the process has liger's, an engine's too. Liger looks at nothing but the architecture's name (not at the
    activation, say), hence the comparison of a few logits. Proven without a GPU, in Triton's interpreter: the choice
    of functions and one float32 step; 16-bit types are liger's own affair.

    Returns why not, with the model as it was, where liger does not know the architecture or computes something else.
    """
    from liger_kernel.transformers.monkey_patch import (
        MODEL_TYPE_TO_APPLY_LIGER_FN,
        _apply_liger_kernel_to_instance,
    )

    name = model.config.model_type
    if name not in MODEL_TYPE_TO_APPLY_LIGER_FN:
        return f"liger-kernel has nothing for {name!r} models"
    ids = torch.arange(3, 11, device=model.device)[None] % model.config.get_text_config().vocab_size
    plain = model(input_ids=ids, use_cache=False).logits
    module = sys.modules[type(model).__module__]
    before = dict(vars(module))
    layers = {m: {**vars(m), "_modules": dict(m._modules)} for m in model.modules()}
    try:
        _apply_liger_kernel_to_instance(model, cross_entropy=False, fused_linear_cross_entropy=False)
        change = (model(input_ids=ids, use_cache=False).logits - plain).abs().max()
        reason = (
            None if change <= 1e-2 * plain.abs().max() else f"liger-kernel changes what this {name!r} model computes"
        )
    except Exception as error:  # liger's own, of any kind
        reason = f"liger-kernel does not take this {name!r} model: {one_line(error)}"
    # liger's classes, meant for models made later, would drop the biases of an MLP; its functions stay
    vars(module).update({k: v for k, v in before.items() if reason or isinstance(v, type)})
    for m, state in layers.items() if reason else ():
        vars(m).clear()
        vars(m).update(state)
    return reason


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
