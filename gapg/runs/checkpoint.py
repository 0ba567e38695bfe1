"""Checkpoints that appear whole or not at all, and hold everything a resumed run needs. No pickle.

<run>/checkpoints/step-40/model/               a Hugging Face folder, in the type of the model's parameters
                         /optimizer.safetensors  AdamW's moments, and the masters of bfloat16 parameters
                         /adapters.safetensors  of a LoRA run, whose model/ is merged
                         /state.json            step, data cursor, budget, oracle spend, counters
                         /manifest.json         written last: size and SHA-256 of each of these, the run's id, the step
                 /best                          a link to one of them

A folder that its manifest does not describe, to the byte, or describes as another run's, is no checkpoint: nothing is
trained on it, and nothing of it is deleted.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from gapg.console import warn
from gapg.errors import ConfigError, one_line
from gapg.files import DiskFull, partial_name, remove_partials, replacing, size_text, sync, writing
from gapg.model.precision import adapter_tensors
from gapg.optim import MASTER, MasterAdamW
from gapg.runs import manifest, run_identity
from gapg.runs.health import diverged

STEP = re.compile(r"step-(\d+)")
OPTIMIZER = "optimizer.safetensors"
NEEDED = {"state.json", "model/config.json"}
LOADED = re.compile(
    r".*(adapter|config|merges|model|piece|template|token|vocab).*\.(json|txt|bin|model)|.*\.(safetensors|jinja|tiktoken|py)"
)
"""Files that transformers may load from a model's folder merely because they lie there."""


def save(
    root: Path,
    step: int,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    optimizer: torch.optim.Optimizer,
    state: Mapping[str, Any],
    about: Mapping[str, Any] | None = None,
) -> Path:
    """Writes `root/step-<step>` beside and renames it into place; an existing whole one of that step is kept as it is.

    about: what the manifest says beside the run, the step and the files.
    Raises Diverged, before anything is written, where a tensor or a number of `state` is not finite; DiskFull and
    ConfigError, with nothing left of it, where it cannot be written.
    """
    final, run = root / f"step-{step}", _run(root)
    reason = fault(final, run=run, step=step) if final.exists() else None
    if final.exists() and reason is None:
        return final
    moments = _flatten(model, optimizer)
    if name := _not_finite(model, moments, state):
        what = f"{name} is not finite: nothing is saved"
        raise diverged(f"step {step}", what, "lower the learning rate", newest(root))
    partial = partial_name(final)
    tensors = (*model.parameters(), *moments.values())
    size = size_text(sum(t.numel() * t.element_size() for t in tensors))
    with writing(root, f"the checkpoint of step {step} ({size})"):
        try:
            partial.mkdir(parents=True)
            model.save_pretrained(partial / "model")
            tokenizer.save_pretrained(partial / "model")
            save_file(moments, partial / OPTIMIZER)
            if adapters := adapter_tensors(model):
                save_file({name: t.cpu() for name, t in adapters.items()}, partial / "adapters.safetensors")
            (partial / "state.json").write_text(json.dumps(dict(state), indent=1))
            manifest.write(partial, {"run": run, "step": step, **(about or {})}, _names(partial))
            for path in (*partial.rglob("*"), partial):
                sync(path)
            if reason:
                _set_aside(final, reason)
            os.replace(partial, final)
            sync(root)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return final


def check_saves(root: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Saves all of a model's folder but the weights, and deletes it: a first save that fails would lose its steps.

    Raises ConfigError and DiskFull.
    """
    trial = partial_name(root / "trial")
    try:
        with writing(root, "a checkpoint"):
            trial.mkdir(parents=True)
            model.config.save_pretrained(trial)
            if model.generation_config is not None:
                model.generation_config.save_pretrained(trial)
            tokenizer.save_pretrained(trial)
    except (ConfigError, DiskFull):
        raise
    except Exception as error:  # transformers' own checks, a tokenizer's code
        raise ConfigError(
            f"{root}: no checkpoint could be written: {one_line(error)}; mend the model folder's config, "
            "generation_config or tokenizer"
        ) from None
    finally:
        shutil.rmtree(trial, ignore_errors=True)


def latest(root: Path) -> Path | None:
    """The newest whole checkpoint of the run under `root`, every byte read; None: nothing was saved there.

    Warns, in one line, of newer ones that were passed over. Raises ConfigError where there are some and none is whole.
    """
    run, passed = _run(root), list[tuple[Path, str]]()
    for step, path in sorted(_folders(root), reverse=True):
        if (reason := fault(path, run=run, step=step)) is None:
            if passed:
                others = "; ".join(f"{other.name}: {why}" for other, why in passed)
                warn(f"{root}: passed over {others}; taking {path.name}")
            return path
        passed.append((path, reason))
    if not passed:
        return None
    path, reason = passed[0]
    old = "" if (path / manifest.FILE).exists() else f"; gapg eval {path} takes it as a plain model"
    raise ConfigError(
        f"{root}: no checkpoint is whole and of this run: {path.name}: {reason}; put it back as it was saved, or move "
        f"{root} away to begin anew{old}"
    )


def newest(root: Path) -> Path | None:
    """The checkpoint of the run with the highest step, for messages: its files are not read."""
    found = steps(root)
    return root / f"step-{found[-1]}" if found else None


def steps(root: Path) -> list[int]:
    """Steps of the run's checkpoints under `root`, ascending, by their manifests: files are there, and not read."""
    run = _run(root)
    return sorted(step for step, path in _folders(root) if fault(path, hashes=False, run=run, step=step) is None)


def fault(path: Path, *, hashes: bool = True, **of: object) -> str | None:
    """What keeps `path` from being a whole checkpoint; None: nothing.

    hashes: read every byte. of: the `run` and `step` that it must be of.
    """
    try:
        content = manifest.read(path)
    except manifest.BadManifest as error:
        return str(error)
    if strange := [key for key, value in of.items() if content.get(key) != value]:
        return "it is of another run" if strange[0] == "run" else f"it is of step {content.get('step')}"
    names = content["files"].keys()
    if not names >= NEEDED:
        return f"its {manifest.FILE} is of no checkpoint"
    try:
        present = _names(path)
    except OSError as error:  # the run that it belongs to may be deleting it just now
        return f"{error.filename} cannot be read: {error.strerror}"
    if later := {n for n in present - names if n.startswith("model/") and LOADED.fullmatch(Path(n).name)}:
        return f"{min(later)} was put there later"
    return manifest.fault(path, content, hashes=hashes)


def check(path: Path) -> None:
    """Raises ConfigError where a checkpoint, of whatever run, is not as its manifest says.

    Other folders pass, and so do checkpoints of versions that wrote no manifest.
    """
    is_checkpoint = STEP.fullmatch(path.resolve().name) and (path / manifest.FILE).exists()
    if is_checkpoint and (reason := fault(path)):
        raise ConfigError(f"{path}: damaged since it was saved: {reason}; take another checkpoint, or copy it again")


def prune(root: Path, keep: int, also: set[int]) -> None:
    """Deletes all of the run's checkpoints but the last `keep` and the steps in `also`, and what a killed save left."""
    for step in steps(root)[:-keep]:
        if step not in also:
            # renamed first: a kill during the deletion must not leave half a checkpoint under a whole one's name
            doomed = partial_name(root / f"step-{step}")
            os.replace(root / f"step-{step}", doomed)
            shutil.rmtree(doomed, ignore_errors=True)  # what a network file system keeps goes the next time
    if root.is_dir():
        remove_partials(root)


def forget_optimizer(path: Path) -> None:
    """Empties the optimizer of a checkpoint that is never trained on: AdamW's state is two models large."""
    content = manifest.read(path)
    about = {key: value for key, value in content.items() if key != "files"}
    others = content["files"].keys() - {OPTIMIZER}
    # at every moment the manifest is right: it does not name the file while that changes
    manifest.write(path, about, others)
    with replacing(path / OPTIMIZER) as partial:
        save_file({}, partial)
    manifest.write(path, about, {*others, OPTIMIZER})


def restore_optimizer(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Loads the optimizer of a whole checkpoint, whose `model/` the caller has loaded; returns the saved state.

    Masters of a run that had bfloat16 parameters become the weights of one that has float32 parameters now.
    """
    params = dict(model.named_parameters())
    for key, value in load_file(path / OPTIMIZER).items():
        name, _, slot = key.rpartition("/")
        param = params[name]
        if slot == MASTER:
            param.data.copy_(value)
            if not isinstance(optimizer, MasterAdamW):
                continue
        # the fused AdamW keeps its step counter where the rest of its state is
        there = optimizer.state[param].get(slot, param)
        optimizer.state[param][slot] = value.to(there.device)
    state: dict[str, Any] = json.loads((path / "state.json").read_text())
    return state


def restore_adapters(path: Path, model: nn.Module) -> None:
    """Loads the adapters of checkpoint `path` into the model that the run began with, adapters added."""
    saved, ours = load_file(path / "adapters.safetensors"), adapter_tensors(model)
    if saved.keys() != ours.keys():
        raise ValueError(f"{path}/adapters.safetensors: made for other layers than this model's adapters")
    for name, tensor in saved.items():
        ours[name].copy_(tensor)


def mark_best(root: Path, step: int) -> None:
    """Points the link `best` at the checkpoint of `step`, if it is there; else there is no link."""
    best = root / "best"
    if best.exists() and not best.is_symlink():
        warn(f"{best}: no link, so it stays as it is; the best checkpoint is step-{step}")
        return
    with writing(best):
        if (root / f"step-{step}").is_dir():
            partial = partial_name(best)
            partial.symlink_to(f"step-{step}")
            os.replace(partial, best)
        else:
            best.unlink(missing_ok=True)
        if root.is_dir():
            sync(root)


def _run(root: Path) -> str | None:
    """The id of the run whose checkpoints lie in `root`."""
    found = run_identity.of_checkpoints(root)
    return None if found is None else found["id"]


def _folders(root: Path) -> Iterator[tuple[int, Path]]:
    """(step, folder) of all that is named as a checkpoint."""
    if root.is_dir():
        yield from ((int(m[1]), path) for path in root.iterdir() if (m := STEP.fullmatch(path.name)))


def _names(path: Path) -> set[str]:
    """Names of the files under a checkpoint's folder, the manifest's not."""
    return {str(file.relative_to(path)) for file in path.rglob("*") if file.is_file()} - {manifest.FILE}


def _set_aside(path: Path, reason: str) -> None:
    aside = path.with_name(f"set-aside-{path.name}-{secrets.token_hex(4)}")
    os.replace(path, aside)
    warn(f"{path}: {reason}; moved to {aside.name} to save this step")


def _flatten(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    return {
        f"{name}/{key}": value.detach().cpu().contiguous()
        for name, param in model.named_parameters()
        for key, value in optimizer.state.get(param, {}).items()
        if not (key == MASTER and param.dtype == torch.float32)  # in `model/` already
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
