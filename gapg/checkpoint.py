"""Checkpoints that appear whole or not at all, and hold everything a resumed run needs. No pickle.

<run>/checkpoints/step-40/model/               a Hugging Face folder
                         /optimizer.safetensors
                         /adapters.safetensors  of a LoRA run, whose model/ is merged
                         /state.json            step, data cursor, budget, oracle spend, counters
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from gapg.config import ConfigError, one_line
from gapg.health import diverged
from gapg.lora import adapter_tensors

STEP = re.compile(r"step-(\d+)")


def save(
    root: Path,
    step: int,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    optimizer: torch.optim.Optimizer,
    state: Mapping[str, Any],
) -> Path:
    """Writes `root/step-<step>` beside and renames it into place; an existing one of that step is kept as it is.

    Raises Diverged, before anything is written, where a tensor or a number of `state` is not finite.
    """
    final = root / f"step-{step}"
    if final.exists():
        return final
    moments = _flatten(model, optimizer)
    if name := _not_finite(model, moments, state):
        what = f"{name} is not finite: nothing is saved"
        raise diverged(f"step {step}", what, "lower the learning rate", latest(root))
    partial = root / f".partial-step-{step}"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    model.save_pretrained(partial / "model")
    tokenizer.save_pretrained(partial / "model")
    save_file(moments, partial / "optimizer.safetensors")
    if adapters := adapter_tensors(model):
        save_file({name: tensor.cpu() for name, tensor in adapters.items()}, partial / "adapters.safetensors")
    (partial / "state.json").write_text(json.dumps(dict(state), indent=1))
    for path in partial.rglob("*"):
        _fsync(path)
    os.replace(partial, final)
    _fsync(root)
    return final


def check_saves(root: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Saves all of a model's folder but the weights, and deletes it: a first save that fails would lose its steps.

    Raises ConfigError.
    """
    trial = root / ".partial-trial"
    try:
        trial.mkdir(parents=True, exist_ok=True)
        model.config.save_pretrained(trial)
        if model.generation_config is not None:
            model.generation_config.save_pretrained(trial)
        tokenizer.save_pretrained(trial)
    except Exception as error:  # transformers' own checks, a tokenizer's code, the disk
        raise ConfigError(
            f"{root}: no checkpoint could be written: {one_line(error)}; mend the model folder's config, "
            "generation_config or tokenizer"
        ) from None
    finally:
        shutil.rmtree(trial, ignore_errors=True)


def latest(root: Path) -> Path | None:
    """The newest whole checkpoint under `root`, or None."""
    found = steps(root)
    return root / f"step-{found[-1]}" if found else None


def steps(root: Path) -> list[int]:
    """Steps of the whole checkpoints under `root`, ascending."""
    if not root.is_dir():
        return []
    return sorted(int(m[1]) for p in root.iterdir() if (m := STEP.fullmatch(p.name)))


def prune(root: Path, keep: int, also: set[int]) -> None:
    """Deletes all but the last `keep` checkpoints and the steps in `also`, and what a killed save left behind."""
    for step in steps(root)[:-keep]:
        if step not in also:
            # renamed first: a kill during the deletion must not leave half a checkpoint under a whole one's name
            doomed = root / f".partial-step-{step}"
            os.replace(root / f"step-{step}", doomed)
            shutil.rmtree(doomed)
    for leftover in root.glob(".partial-step-*"):
        shutil.rmtree(leftover, ignore_errors=True)


def restore_optimizer(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Loads the optimizer state of checkpoint `path`, whose `model/` the caller has loaded; returns the saved state.

    Raises ConfigError where a file is missing, damaged, or holds what is not finite.
    """
    fix = "delete this checkpoint and go on from the one before"
    try:
        tensors = load_file(path / "optimizer.safetensors")
        state: dict[str, Any] = json.loads((path / "state.json").read_text())
    except (OSError, ValueError, SafetensorError) as error:
        raise ConfigError(f"{path}: cannot be resumed: {one_line(error)}; {fix}") from None
    if name := next((n for n, tensor in tensors.items() if not tensor.isfinite().all()), None):
        raise ConfigError(f"{path}: {name} in optimizer.safetensors is not finite; {fix}")
    params = dict(model.named_parameters())
    for key, value in tensors.items():
        name, _, slot = key.rpartition("/")
        # the fused AdamW keeps its step counter where the parameter is
        optimizer.state[params[name]][slot] = value.to(params[name].device)
    return state


def restore_adapters(path: Path, model: nn.Module) -> None:
    """Loads the adapters of checkpoint `path` into the model that the run began with, adapters added."""
    saved, ours = load_file(path / "adapters.safetensors"), adapter_tensors(model)
    if saved.keys() != ours.keys():
        raise ValueError(f"{path}/adapters.safetensors: made for other layers than this model's adapters")
    for name, tensor in saved.items():
        ours[name].copy_(tensor)


def mark_best(root: Path, step: int) -> None:
    """Points the link `best` at the checkpoint of `step`."""
    partial = root / ".best"
    partial.unlink(missing_ok=True)
    partial.symlink_to(f"step-{step}")
    os.replace(partial, root / "best")


def _flatten(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    return {
        f"{name}/{key}": value.detach().cpu().contiguous()
        for name, param in model.named_parameters()
        for key, value in optimizer.state.get(param, {}).items()
    }


def _not_finite(model: nn.Module, moments: Mapping[str, torch.Tensor], state: Mapping[str, Any]) -> str | None:
    """The name of the first tensor that is not finite, or of the state; a buffer may be (a mask of -inf)."""
    buffers = {name for name, _ in model.named_buffers()}
    weights = {name: tensor for name, tensor in model.state_dict().items() if name not in buffers}
    for name, tensor in (*weights.items(), *moments.items()):
        if not tensor.isfinite().all():
            return name
    try:
        json.dumps(dict(state), allow_nan=False)
    except ValueError:
        return "a number of state.json"
    return None


def _fsync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
