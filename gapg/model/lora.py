"""Low-rank adapters (arXiv 2106.09685) through peft: the policy gradient moves W + (alpha / rank) B A, W is frozen.

To everything but the optimizer the model stays what it was, class and attributes included. Its `state_dict()`, and so
`save_pretrained` and an engine's `sync`, give merged weights under the plain model's own names, in float32. A model
that computes in bfloat16 rounds B A by itself and an engine the sum, which loses what is small beside W: their
log-probs then differ by more than those of full fine-tuning (`logprob_gap` shows it, `loss.tis_cap` corrects for it).
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from gapg.config_sections import LoraConfig
from gapg.errors import ConfigError, one_line
from gapg.model.precision import ADAPTER
from gapg.seeding import derive


def target_layers(model: PreTrainedModel, config: LoraConfig) -> list[str]:
    """Whole names of the linear layers that `config.targets` means. Raises ConfigError for a name of none.

    Never the LM head, nor the last of a Mamba layer: the fused loss and Mamba's kernels read their weights without
    calling them.
    """
    uncalled = {model.get_output_embeddings()}
    mamba = (layer for layer in model.modules() if {"A_log", "D"} <= layer._parameters.keys())
    uncalled |= {layer.get_submodule("out_proj") for layer in mamba}
    linear = [n for n, m in model.named_modules() if isinstance(m, nn.Linear | Conv1D) and m not in uncalled]
    if config.targets is None:
        return linear
    for target in config.targets:
        if not any(_is_called(name, target) for name in linear):
            choice = ", ".join(dict.fromkeys(name.rpartition(".")[2] for name in linear))
            raise ConfigError(
                f"model.lora.targets: no linear layer below the LM head is called {target!r}; choose from {choice}"
            )
    return [name for name in linear if any(_is_called(name, target) for target in config.targets)]


def add_adapters(model: PreTrainedModel, config: LoraConfig, seed: int) -> None:
    """Freezes the model and adds trainable float32 adapters in place: A random, B zero, so that nothing moves yet.

    Raises ConfigError for unknown targets, and for those that peft does not take.
    """
    from peft import LoraConfig as PeftConfig
    from peft import inject_adapter_in_model

    names = target_layers(model, config)
    transposed = any(isinstance(model.get_submodule(name), Conv1D) for name in names)
    settings = PeftConfig(
        r=config.rank, lora_alpha=config.alpha, lora_dropout=0.0, target_modules=names, fan_in_fan_out=transposed
    )
    torch.manual_seed(derive(seed, "lora"))
    try:
        inject_adapter_in_model(settings, model, ADAPTER)
    except ValueError as error:
        raise ConfigError(f"model.lora: peft does not take this {model.config.model_type}: {one_line(error)}") from None
    for name in names:
        model.get_submodule(name).register_state_dict_post_hook(_merge)


def frozen_twin(model: PreTrainedModel) -> PreTrainedModel:
    """Another model with the same tensors, in evaluation mode: adapters added to `model` leave the twin as it is."""
    shared: dict[int, Any] = {id(t): t for t in (*model.parameters(), *model.buffers())}
    twin: PreTrainedModel = copy.deepcopy(model, shared)
    return twin.eval().requires_grad_(False)


def _is_called(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")


@torch.no_grad()
def _merge(layer: Any, state_dict: dict[str, Any], prefix: str, _: Any) -> None:
    """A state-dict hook: one weight under the layer's plain name in place of base and adapter."""
    state_dict[f"{prefix}weight"] = layer.base_layer.weight + layer.get_delta_weight(ADAPTER)
    for key in [k for k in state_dict if k.startswith(prefix) and k != f"{prefix}weight"]:
        tensor = state_dict.pop(key)
        if key == f"{prefix}base_layer.bias":
            state_dict[f"{prefix}bias"] = tensor
