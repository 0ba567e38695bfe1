"""What a run began with, kept in its folder: a resumed run is compared with it, and a difference is refused by name.

<run>/run.json         its id, its config, and hashes of data, prompts, tokenizer, model and demonstrations
     /run-data.json    [id, hash of the text, hash of the gold answer] of each problem, in order, to name what differs
"""

from __future__ import annotations

import hashlib
import json
import secrets
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from transformers import PreTrainedTokenizerBase
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME
from transformers.utils.hub import cached_file, get_checkpoint_shard_files

from gapg.build import render, task_prompts
from gapg.config import RunConfig
from gapg.config_sections import ModelConfig
from gapg.errors import ConfigError, one_line
from gapg.files import write_whole
from gapg.model.folder import check_folder
from gapg.model.load import end_ids
from gapg.runs.manifest import digest, sha256s
from gapg.tasks.base import Prompt, Split, Task

FILE, DATA_FILE = "run.json", "run-data.json"
PLACES = ("checkpoints/step-*", "warm-start/checkpoints/step-*")
"""Where a run's folder, or a warm start's own, holds checkpoints."""
RENDERED = 8
"""Training prompts, evenly spaced, whose tokens and questions are compared."""
WRITTEN_BY = ("transformers_version", "_name_or_path")
"""What of a config.json tells who wrote it, and not what the model is."""

Rows = list[list[str]]


def begin(folder: Path, config: RunConfig, task: Task, tokenizer: PreTrainedTokenizerBase) -> None:
    """Makes `folder` a run, under a new id; one that is a run is compared with what it began with.

    Reads the weights of `model.path`. Raises ConfigError naming the first difference, or for a folder with checkpoints
    that is no run; and DiskFull.
    """
    data = {split: _rows(config, task, split) for split in ("train", "heldout")}
    now = {
        "data": {split: rows and {"problems": len(rows), "sha256": digest(rows)} for split, rows in data.items()},
        "prompts": _prompts(task, tokenizer),
        "tokenizer": _tokenizer(config, tokenizer),
        "model": {"settings": _model_config(config.model), "weights": weights_sha256(config, None)},
        "demonstrations": _demonstrations(config),
    }
    if (folder / FILE).exists():
        try:
            difference = next(_differences(folder, read(folder), now, data, config), None)
        except (LookupError, TypeError, AttributeError):
            raise ConfigError(f"{folder / FILE}: not as it was written; put it back as it was") from None
        if difference:
            raise ConfigError(f"{difference}; put back what it began with, or choose another --output-dir")
        return
    if saved := saved_steps(folder):
        raise ConfigError(
            f"{folder}: {FILE}, with what the run began with, is missing, as in runs of an older version, so it cannot "
            f"be resumed: put it back, or choose another --output-dir (gapg eval {saved[0]} takes that model as before)"
        )
    write_whole(folder / DATA_FILE, json.dumps(data))
    about = {"id": secrets.token_hex(8), "config": config.model_dump(mode="json")}
    write_whole(folder / FILE, json.dumps(about | now, indent=1))


def saved_steps(folder: Path) -> list[Path]:
    """Whatever is named as a checkpoint in a run's folder, or in a warm start's own."""
    return [step for place in PLACES for step in sorted(folder.glob(place))]


def read(folder: Path) -> dict[str, Any]:
    """What run.json says. Raises ConfigError."""
    try:
        content = json.loads((folder / FILE).read_bytes())
        if not isinstance(content["id"], str):
            raise ValueError("it has no id")
    except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
        raise ConfigError(f"{folder / FILE}: cannot be read: {one_line(error)}; put it back as it was") from None
    return dict(content)


def began_config(folder: Path) -> RunConfig | None:
    """The settings that the run began with (config.yaml may have been edited since); None: it is no run yet.

    Raises ConfigError.
    """
    if not (folder / FILE).exists():
        return None
    try:
        return RunConfig.model_validate(read(folder)["config"])
    except (ValidationError, LookupError):
        raise ConfigError(f"{folder / FILE}: not as it was written; put it back as it was") from None


def of_checkpoints(root: Path) -> dict[str, Any] | None:
    """run.json of the run whose checkpoints, or warm start's, lie in `root`; None: they are of no run's folder."""
    folder = next((folder for folder in root.absolute().parents[:2] if (folder / FILE).exists()), None)
    return None if folder is None else read(folder)


def weights_sha256(config: RunConfig, folder: Path | None) -> str:
    """Of the weights in `folder` (empty: those of the config's model, or what they are made from). Raises ConfigError.

    A model's other files are not part of it.
    """
    path = config.model.path if folder is None else str(folder)
    if path is None:
        return digest([config.seed, config.model.llama.model_dump(mode="json")])
    try:
        files = _weight_files(check_folder(path))
        return digest([[file.name, sha256] for file, sha256 in zip(files, sha256s(files), strict=True)])
    except OSError as error:
        raise ConfigError(f"model.path={path}: its weights cannot be read: {one_line(error)}") from None


def _weight_files(path: str) -> list[Path]:
    """The files that transformers reads the weights from; none where it would refuse the folder."""
    if Path(path).is_dir():
        return sorted(file for file in Path(path).glob("*.safetensors") if file.is_file())
    if single := cached_file(path, SAFE_WEIGHTS_NAME, _raise_exceptions_for_missing_entries=False):
        return [Path(single)]
    index = cached_file(path, SAFE_WEIGHTS_INDEX_NAME, _raise_exceptions_for_missing_entries=False)
    return sorted(map(Path, get_checkpoint_shard_files(path, index)[0])) if index else []


def _model_config(config: ModelConfig) -> str | None:
    if config.path is None:
        return None
    try:
        content = json.loads(Path(cached_file(check_folder(config.path), "config.json") or "").read_bytes())
    except (OSError, ValueError) as error:
        raise ConfigError(f"model.path={config.path}: no model config: {one_line(error)}") from None
    return digest({key: value for key, value in content.items() if key not in WRITTEN_BY})


def _rows(config: RunConfig, task: Task, split: Split) -> Rows | None:
    """None: a run without held-out problems need not have any. Raises ConfigError."""
    if split == "heldout" and config.eval.heldout == 0:
        return None
    return [[p.id, _short(p.text), _short(p.answer)] for p in task_prompts(task, split)]


def _prompts(task: Task, tokenizer: PreTrainedTokenizerBase) -> dict[str, dict[str, str]]:
    prompts: Sequence[Prompt] = task.prompts("train")
    chosen = prompts[:: max(1, len(prompts) // RENDERED)][:RENDERED]
    return {
        p.id: {
            "tokens": digest(list(map(int, render(task, p, tokenizer)))),
            "words for the cloud": _question(task, p),
        }
        for p in chosen
    }


def _question(task: Task, prompt: Prompt) -> str:
    try:
        return digest([dict(message) for message in task.question(prompt).messages])
    except Exception as error:  # a task's own code
        raise ConfigError(f"task {task.name!r}: question() of prompt {prompt.id!r}: {one_line(error)}") from None


def _tokenizer(config: RunConfig, tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    merges = json.loads(backend.to_str())["model"].get("merges") if backend else None
    # tokenizers wrote a merge as one text before it wrote it as two
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in merges or ()]
    special = {token: tokenizer.convert_tokens_to_ids(token) for token in tokenizer.all_special_tokens}
    roles = [tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id]
    return {
        "vocabulary": digest(tokenizer.get_vocab()),
        "merges": digest(merges),
        "special tokens": digest([special, roles]),
        "words in its chat template": digest(getattr(tokenizer, "chat_template", None)),
        "tokens that end a response": digest(sorted(end_ids(config.model, tokenizer))),
    }


def _demonstrations(config: RunConfig) -> str | None:
    path = config.warm_start and config.warm_start.demonstrations
    return sha256s([Path(path).expanduser()])[0] if path else None


def _differences(
    folder: Path, began: Mapping[str, Any], now: Mapping[str, Any], data: Mapping[str, Rows | None], config: RunConfig
) -> Iterator[str]:
    """What is not as it was when the run began, each in words."""
    for split, rows in data.items():
        before = began["data"][split]
        if before and rows and before != now["data"][split]:
            found = _first_difference(folder, split, rows)
            kind = "training" if split == "train" else "held-out"
            yield f"task: the data has {len(rows)} {kind} problems and the run began with {before['problems']}{found}"
    model = f"model.path={config.model.path}"
    parts = [(f"{'task' if config.model.path is None else model}: the tokenizer", began["tokenizer"], now["tokenizer"])]
    for prompt, hashes in now["prompts"].items():
        parts.append((f"task: problem {prompt!r}", began["prompts"].get(prompt, {}), hashes))
    parts.append((f"{model}: the model", began["model"], now["model"]))
    for what, before, hashes in parts:
        for part, sha256 in hashes.items():
            if before.get(part) != sha256:
                yield f"{what} has other {part} than when the run began"
    if began["demonstrations"] != now["demonstrations"]:
        path = config.warm_start and config.warm_start.demonstrations
        yield f"warm_start.demonstrations={path}: not the file that the run began with"


def _first_difference(folder: Path, split: str, rows: Rows) -> str:
    try:
        before: Rows = json.loads((folder / DATA_FILE).read_bytes())[split]
    except (OSError, ValueError, LookupError, TypeError):
        return ""
    for n, (was, row) in enumerate(zip(before, rows, strict=False), 1):
        if was[0] != row[0]:
            return f"; first difference: problem {n} is {row[0]!r}, was {was[0]!r}"
        if was != row:
            part = "text" if was[1] != row[1] else "answer"
            return f"; first difference: problem {n}, {row[0]!r}, has another {part}"
    return ""


def _short(text: str) -> str:
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).hexdigest()
