"""Decoding with the cache that a model makes itself, whatever its layers keep: keys and values, or a running state.

Layers of attention take prompts of unlike lengths in one batch, padded on the left and masked. A recurrent or
convolutional layer would have to be masked by its own code, which not every model does: there, `check_decoding` says,
a batch holds prompts of one length.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import (
    CacheLayerMixin,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionCacheLayerMixin,
)

CACHE_NAMES = ("past_key_values", "cache_params")
"""What a model calls its cache, in its output and in its forward's arguments."""

NO_LIMIT = (0.0, math.inf)

ROUNDING = 16
"""Units of rounding, of the largest logit, by which log-probs with and without a cache may differ (at least 1e-3).

Seen: 2 units in models of two layers, and deep ones add up more; a wrong cache is off by the logits' own spread. On a
GPU a unit is TF32's, which the kernels of some recurrent layers multiply in.
"""


class DecodingBatch:
    """B rows decoded together: one prefill a prompt, n rows of it, then a token a row.

    `logits_BV` are those of the next token.
    """

    def __init__(self, model: PreTrainedModel, prompts: Sequence[Sequence[int]], n: int) -> None:
        """Raises ValueError for a model without a cache."""
        self.model = model
        self._arguments = inspect.signature(type(model).forward).parameters
        self._cache: dict[str, Any] = {}
        device = model.device
        lengths = torch.tensor([len(p) for p in prompts], device=device)
        width = int(lengths.max())
        ids = torch.zeros(len(prompts), width, dtype=torch.long, device=device)
        for i, prompt in enumerate(prompts):
            ids[i, width - len(prompt) :] = torch.tensor(list(prompt), device=device)
        real = torch.arange(width, device=device) >= (width - lengths)[:, None]
        self._mask = None if bool(real.all()) else real.long()
        self._position = (real.cumsum(1) - 1).clamp(min=0)
        self.logits_BV = self._forward(ids)
        self._position = self._position[:, -1:]
        self.keep(torch.arange(len(prompts), device=device).repeat_interleave(n))

    def step(self, token_B: torch.Tensor) -> None:
        """Appends a token to each row."""
        self._position = self._position + 1
        if self._mask is not None:
            self._mask = torch.cat([self._mask, self._mask.new_ones(len(self._mask), 1)], 1)
        self.logits_BV = self._forward(token_B[:, None])

    def keep(self, index: torch.Tensor) -> None:
        """Goes on with these rows, in this order; a row may come several times."""
        for cache in self._cache.values():
            _select_rows(cache, index, len(self._position))
        self._position, self.logits_BV = self._position[index], self.logits_BV[index]
        self._mask = None if self._mask is None else self._mask[index]

    @property
    def takes_padding(self) -> bool:
        """Whether the cache holds keys and values of plain attention and nothing else."""
        (cache,) = self._cache.values()
        layers = (DynamicLayer, DynamicSlidingWindowLayer)
        return type(cache) is DynamicCache and all(type(layer) in layers for layer in cache.layers)

    def _forward(self, ids_BT: torch.Tensor) -> torch.Tensor:
        wanted = {"attention_mask": self._mask, "position_ids": self._position, "logits_to_keep": 1}
        wanted = {name: value for name, value in wanted.items() if name in self._arguments and value is not None}
        out = self.model(input_ids=ids_BT, use_cache=True, **wanted, **self._cache)
        self._cache = {name: out[name] for name in CACHE_NAMES if out.get(name) is not None}
        if not self._cache:
            raise ValueError("it keeps no cache that can be given back")
        logits: torch.Tensor = out.logits[:, -1]
        return logits


def _select_rows(holder: Any, index: torch.Tensor, rows: int) -> None:
    """Replaces every tensor that a cache, or a layer of one, keeps for each of its `rows`.

    transformers' own `batch_select_indices` and `reorder_cache` each leave some models' states out.
    """
    for name, value in vars(holder).items():
        vars(holder)[name] = _selected(value, index, rows)


def _selected(value: Any, index: torch.Tensor, rows: int) -> Any:
    if isinstance(value, torch.Tensor):
        return value.index_select(0, index) if value.dim() > 1 and len(value) == rows else value
    if isinstance(value, dict):
        return {key: _selected(item, index, rows) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_selected(item, index, rows) for item in value)
    if isinstance(value, CacheLayerMixin | LinearAttentionCacheLayerMixin):
        _select_rows(value, index, rows)
    return value


def hold_time_steps(model: PreTrainedModel) -> None:
    """Makes Mamba-2 layers clamp the time step of a single token too, as they do those of a whole sequence.

    transformers 5.19 leaves it out there, which for Nemotron-H and Zamba2 (least step 0.001) moves log-probs by up to
    0.003. The clamp is put before the softplus, where the projection's last columns are the time steps.
    """
    for layer in model.modules():
        if tuple(getattr(layer, "time_step_limit", NO_LIMIT)) != NO_LIMIT and hasattr(layer, "dt_bias"):
            projection: Any = layer.in_proj
            projection.register_forward_hook(partial(_clamp_time_steps, layer))


def _clamp_time_steps(layer: Any, _projection: Any, _inputs: Any, out: torch.Tensor) -> torch.Tensor:
    limits = torch.tensor(layer.time_step_limit, device=out.device)
    low, high = limits + torch.log(-torch.expm1(-limits))  # softplus of these is the limits
    heads = len(layer.dt_bias)
    steps = (out[..., -heads:] + layer.dt_bias).clamp(low, high) - layer.dt_bias
    return torch.cat([out[..., :-heads], steps.to(out.dtype)], -1)


@torch.inference_mode()
def check_decoding(model: PreTrainedModel) -> bool:
    """Whether prompts of unlike lengths may share a batch.

    Decodes a few tokens, drops and reorders rows, and compares each token's log-prob with that of the model's forward
    over the whole sequence alone, without a cache.

    Raises:
        ValueError: the model cannot be decoded here, or its log-probs are not numbers.
    """
    size = model.config.get_text_config().vocab_size
    prompts = [[(5 + 7 * i + 3 * t) % size for t in range(length)] for i, length in enumerate((3, 3, 9))]
    try:
        padded = DecodingBatch(model, prompts[:2], 2).takes_padding
        waves = [prompts] if padded else [prompts[:2], prompts[2:]]
        gap, scale = torch.stack([_gap_and_scale(model, wave) for wave in waves]).amax(0).tolist()
    except Exception as error:  # each architecture fails in its own way
        raise _refusal(model, f"{type(error).__name__}: {' '.join(str(error).split())[:120]}") from None
    if math.isnan(scale):
        raise ValueError("the model's log-probs are not numbers: its weights are ruined; set model.path to sound ones")
    unit = max(torch.finfo(model.dtype).eps, 2**-11 if model.device.type == "cuda" else 0.0)
    if not gap <= max(1e-3, ROUNDING * unit * scale):
        raise _refusal(model, f"log-probs with its cache are off by {gap:.2g}")
    return padded


def _refusal(model: PreTrainedModel, reason: str) -> ValueError:
    return ValueError(
        f"a {model.config.model_type!r} model cannot be decoded by the transformers engine ({reason}): "
        "set rollout.engine=vllm, if vLLM has this model"
    )


def _gap_and_scale(model: PreTrainedModel, prompts: list[list[int]]) -> torch.Tensor:
    """[2] the largest difference of a log-prob with and without the cache, and the largest logit."""
    batch, rows = DecodingBatch(model, prompts, 2), list(range(2 * len(prompts)))
    sequences = [list(prompt) for prompt in prompts for _ in range(2)]
    found: list[list[torch.Tensor]] = [[] for _ in sequences]
    for step in range(4):
        logp_BV = torch.log_softmax(batch.logits_BV.float(), -1)
        likeliest_B2 = logp_BV.topk(2).indices.tolist()
        for i, row in enumerate(rows):
            token = likeliest_B2[i][(row + step) % 2]  # the two rows of a prompt differ
            sequences[row].append(token)
            found[row].append(logp_BV[i, token])
        if step == 1:
            batch.keep(torch.arange(len(rows) - 1, 0, -1, device=model.device))
            rows = rows[:0:-1]
        if step < 3:
            batch.step(torch.tensor([sequences[row][-1] for row in rows], device=model.device))
    worst = []
    for ids, logprobs in zip(sequences, found, strict=True):
        count, ids_1T = len(logprobs), torch.tensor([ids], device=model.device)
        logits_TV = model(input_ids=ids_1T, use_cache=False).logits[0].float()
        logp_TV = torch.log_softmax(logits_TV[-count - 1 : -1], -1)
        gap = (logp_TV.gather(1, ids_1T[0, -count:, None])[:, 0] - torch.stack(logprobs)).abs().max()
        worst.append(torch.stack([gap, logits_TV.abs().max()]))
    return torch.stack(worst).amax(0)
