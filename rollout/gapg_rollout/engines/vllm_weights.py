"""The way of a state dict into vLLM's running model.

vLLM reads weights in the layout of a model folder's files. In memory transformers holds some models otherwise: the
experts of a layer stacked in one tensor, weights under other names, a multimodal model's text part on its own.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key, revert_weight_conversion

if TYPE_CHECKING:
    from vllm.config import VllmConfig


def skeleton(model_dir: Path) -> PreTrainedModel:
    """transformers' model of a folder, without weights (on the meta device)."""
    config = AutoConfig.from_pretrained(model_dir, trust_remote_code=False)
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    return model


class FileLayout:
    """Turns a state dict of the model in `model_dir` into its safetensors files' names and shapes.

    What the files hold beside this model's weights is left alone: a vision tower, old buffers, a consolidated copy.
    `names` are all the names in the files.
    """

    def __init__(self, model_dir: Path) -> None:
        model: Any = skeleton(model_dir)
        own, prefix = model.state_dict(), model.base_model_prefix
        conversions = get_model_conversion_mapping(model)
        renamings = [c for c in conversions if isinstance(c, WeightRenaming)]
        converters = [c for c in conversions if isinstance(c, WeightConverter)]
        self.names = _names(model_dir)
        homes = {name: rename_source_key(name, renamings, converters, prefix, own)[0] for name in self.names}
        # as after from_pretrained: a conversion that these files did not need must not be reversed
        self._conversions = [c for c in conversions if c.was_used()]
        model._weight_conversions, self._model = self._conversions, model
        # files of a model without its head leave the base model's prefix out
        bare = {home: name for name, home in homes.items() if home == f"{prefix}.{name}"}
        self._bare = {home: name for home, name in bare.items() if home not in self.names}

    def __call__(self, state_dict: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The same weights under the files' names; the same tensors, where memory and files agree."""
        weights = {name: tensor.detach() for name, tensor in state_dict.items()}
        if self._conversions:
            weights = revert_weight_conversion(self._model, weights)
        return {self._bare.get(name, name): tensor for name, tensor in weights.items()}


def _names(model_dir: Path) -> set[str]:
    names: set[str] = set()
    for path in model_dir.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            names.update(file.keys())
    return names


def load_weights(weights: Mapping[str, torch.Tensor], vllm_config: VllmConfig, model: Any) -> None:
    """Replaces weights of vLLM's model by those of the same names in files, as vLLM's own `reload_weights` does.

    Raises ValueError for a layer whose weights were given and not taken: vLLM would go on with the old ones.
    """
    from vllm.config import set_current_vllm_config
    from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

    on_cpu = vllm_config.device_config.device_type == "cpu"
    if on_cpu:
        _forget_expert_kernels(model)
    with set_current_vllm_config(vllm_config):
        initialize_layerwise_reload(model)
        model.load_weights(iter(weights.items()))
        unread = _unread_layers(model)
        finalize_layerwise_reload(model, vllm_config.model_config)
    parents = {name.rpartition(".")[0] for name in weights}
    holders = Counter(id(parameter) for layer in model.modules() for parameter in layer._parameters.values())
    for name, layer in unread.items():
        # a tied head is read with the embeddings, but for the packed copy that it has on CPUs
        tied = not on_cpu and all(holders[id(parameter)] > 1 for parameter in layer._parameters.values())
        if not tied and any(f"{name}.".startswith(f"{parent}.") for parent in parents):
            raise ValueError(f"it kept the old weights of {name}")


def _unread_layers(model: torch.nn.Module) -> dict[str, torch.nn.Module]:
    """Layers with parameters, none of which has been loaded: vLLM counts what passes through its weight loaders."""
    from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info

    layers = {name: layer for name, layer in model.named_modules() if layer._parameters}
    infos = {name: get_layerwise_info(layer) for name, layer in layers.items()}
    return {n: layers[n] for n, info in infos.items() if info.load_numel == 0 and (info.load_numel_total or 0) > 0}


def _forget_expert_kernels(model: torch.nn.Module) -> None:
    """Makes the next load like the first: vLLM 0.32 packs experts for its CPU kernels only then."""
    for layer in model.modules():
        method: Any = getattr(layer, "quant_method", None)
        if getattr(method, "moe_kernel", None) is not None:
            method.moe_kernel = None
