"""The training runs of studies: where each lies, whether it is there, and how it is made. One of a kind is made once.

<work>/warm/<hash>/checkpoints/    a warm start, by the hash of what it depends on
<work>/runs/<hash>/config.yaml     a run, by the hash of its resolved config and controller
                  /checkpoints/    the last one; once finished its optimizer is emptied
                  /metrics.jsonl
                  /products/       one jsonl for each set of predictions
                  /log.txt         what its process said
                  /done.json       trained, and which predictions there are
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock

import record
from gapg.build import make_task
from gapg.commands.train import check as check_config
from gapg.config import RunConfig, load_config
from gapg.errors import ConfigError
from gapg.evaluation.validate import validate
from gapg.files import remove_partials, write_whole
from gapg.jsonl import read_jsonl, to_json
from gapg.model.load import load_tokenizer
from gapg.runs import checkpoint, run_identity
from gapg.runs.run import Run, build_run
from gapg.runs.run_dir import save_config
from gapg.tasks import find_object
from gapg.threads import set_threads
from gapg.train import train
from gapg.warm_start import warm_start
from studies.arms import Arm, Predictions
from studies.predictions import STANDARD, make_predictions

DEFAULTS = {
    "checkpoint_every": "100", "keep_checkpoints": "1", "tensorboard": "false", "threads": "1", "eval.every": "0",
}  # fmt: skip
"""How a run of a study runs, where the command says nothing else: its curves are in metrics.jsonl."""

SAVED_MINUTES = 5.0
"""What a killed study loses of each run at most, unless the command says it: steps of a real model take minutes."""

RESERVED = {
    "seed": "give --seeds 0,1,2",
    "output_dir": "give --work-dir and --output",
    "eval.every": "drop it: a study measures the trained model",
}
"""Keys that a study sets itself, and what to do instead."""

LATER: dict[str, tuple[Any, Any]] = {
    **dict.fromkeys(("deterministic", "model.compile", "optim.offload", "warm_start.optim.offload"), (False, None)),
    "model.parameters": ("float32", None),
    "model.liger": ("auto", False),
    "method": ("gapg", None),
    # written out: a run of other defaults is another run
    "marginal": ({"score": "log", "weight": 1.0, "trace": None, "prices": [0.0, 1.0], "cloud": "ignore"}, None),
}
"""Settings that runs were named without: the default, and what stood there before (None: nothing)."""

HOW_IT_RUNS = (
    "output_dir", "threads", "tensorboard", "wandb", "checkpoint_every", "keep_checkpoints", "eval.every",
    "warm_start.checkpoint_every", "rollout.max_rows", "rollout.vllm_args", "oracle.cache", "oracle.account",
    "oracle.api_key_env", "oracle.concurrency", "oracle.timeout_s", "oracle.deadline_s", "oracle.max_retries",
    "oracle.requests_per_minute", "oracle.tokens_per_minute", "oracle.spending_cap", "oracle.price_per_million_prompt",
    "oracle.price_per_million_completion", "oracle.local_share",
)  # fmt: skip
"""Keys that change how a run runs and not what it is: runs that differ in nothing else are one run."""


@dataclass(frozen=True)
class Place:
    """A run to be made or found: what it is, and where it lies."""

    arm: Arm
    config: RunConfig
    folder: Path
    warm: Path | None
    """The warm start's folder; None: the config has no warm start."""
    predictions: tuple[Predictions, ...]

    @property
    def title(self) -> str:
        return f"{self.arm.label}, seed {self.arm.seed} ({self.folder.name})"

    def finished(self) -> bool:
        """Trained, all predictions there, and the cloud known on all problems (where it failed it is asked again)."""
        path = self.folder / "done.json"
        unknown = by_name(json.loads(path.read_text())["products"]) if path.exists() else {}
        return all(unknown.get(p.name) == 0 and p.path(self.folder).exists() for p in self.predictions)


def place(arm: Arm, base: str, overrides: Mapping[str, str], work: Path) -> Place:
    """Where the arm's run lies under `work`: config `base`, the command's overrides, then the arm's own.

    Raises ConfigError: a key that the study sets itself, or a bad value.
    """
    for key in RESERVED.keys() & overrides.keys():
        raise ConfigError(f"{key}: {RESERVED[key]}")
    config = load_config(base, {**DEFAULTS, **overrides, **arm.overrides, "seed": str(arm.seed)})
    if config.eval.heldout == 0:
        raise ConfigError("eval.heldout=0: a study measures held-out problems; raise it, or leave it empty for all")
    folder = work / "runs" / _hash(_identity(config, arm.controller))
    # an answer is paid for once, by whichever run asks first, and the spending cap is on all of them together
    oracle = {
        "cache": config.oracle.cache or str(work / "oracle.sqlite"),
        "account": config.oracle.account or str(work),
    }
    config = config.model_copy(
        update={
            "output_dir": folder,
            "oracle": config.oracle.model_copy(update=oracle),
            "checkpoint_minutes": config.checkpoint_minutes or SAVED_MINUTES,
        }
    )
    warm = work / "warm" / _hash(_warm_identity(config)) if config.warm_start else None
    return Place(arm, config, folder, warm, tuple(dict.fromkeys((*STANDARD, *arm.predictions))))


def check(places: Iterable[Place]) -> None:
    """What can be known before a model is made, once for runs that differ in their seeds alone. Raises ConfigError."""
    for config in {_hash(_identity(p.config, None) | {"seed": 0}): p.config for p in places}.values():
        check_config(config)


def make_run(place: Place) -> None:
    """Trains the run, or goes on from its last checkpoint, and makes the predictions that are not there.

    Safe in several processes. Raises OracleDown when the oracle stays away, and ConfigError.
    """
    config, folder = place.config, place.folder
    warm = _make_warm_start(place.warm, config) if place.warm else None
    with _alone(folder):
        if place.finished():
            return
        controller = find_object(place.arm.controller, "controller")(config) if place.arm.controller else None
        with open_run(config, warm, controller) as run:
            train(run, validate)
            last = run.save()
            usage = asdict(run.oracle.usage)
            for wanted in place.predictions:
                unknown, new = make_predictions(run, wanted)
                _write_done(folder, run.state.step, usage, wanted.name, unknown, new)
        checkpoint.forget_optimizer(last)  # a finished run is never trained on: its steps are in its name


def _make_warm_start(folder: Path, config: RunConfig) -> Path:
    """The model folder of the warm start, made or resumed unless it is there."""
    with _alone(folder):
        task = make_task(config)
        set_threads(config)
        tokenizer = load_tokenizer(config.model, task)
        run_identity.begin(folder, config, task, tokenizer)
        model = warm_start(config, folder / "checkpoints", task, tokenizer)
        # it is finished: whoever starts from it takes the weights alone
        checkpoint.forget_optimizer(model.parent)
    return model


@contextmanager
def open_run(config: RunConfig, warm: Path | None, controller: Any = None) -> Iterator[Run]:
    """The run in `output_dir`, begun or gone on with, on this process's threads."""
    task = make_task(config)
    run_identity.begin(config.output_dir, config, task, load_tokenizer(config.model, task))
    save_config(config)
    set_threads(config)
    with closing(build_run(config, config.output_dir, task, warm, controller)) as run:
        yield run


def _write_done(folder: Path, step: int, usage: dict[str, Any], name: str, unknown: int, new: bool) -> None:
    """Says that predictions are there, and of what revision where they were made just now; the rest that is said stays.

    `unknown`: on how many of its problems the cloud is unknown. Predictions without a revision have the run's.
    """
    path = folder / "done.json"
    done: dict[str, Any] = {"revision": record.revision(), "products": {}}
    if path.exists():
        done = json.loads(path.read_text())
    done["products"] = by_name(done["products"]) | {name: unknown}
    done["product_revisions"] = by_name(done.get("product_revisions", {})) | ({name: record.revision()} if new else {})
    rows = read_jsonl(folder / "metrics.jsonl")
    seconds = sum(value for row in rows for key, value in row.items() if key.startswith("seconds/"))
    write_whole(path, to_json(done | {"step": step, "seconds": round(seconds, 1), "oracle": usage}, indent=1) + "\n")


def by_name(of_predictions: Mapping[str, Any]) -> dict[str, Any]:
    """What done.json says of predictions. In older ones a key may be an import path: the name follows its colon."""
    return {key.rpartition(":")[2]: value for key, value in of_predictions.items()}


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Waits until no other process makes what belongs in the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / ".lock"):
        remove_partials(folder)
        yield


def _identity(config: RunConfig, controller: str | None) -> dict[str, Any]:
    """What a run is named by. Dotted keys, two levels deep: what lies deeper is one value."""
    flat: dict[str, Any] = {"controller": controller}
    for key, value in _settings(config).items():
        flat |= {f"{key}.{inner}": v for inner, v in value.items()} if isinstance(value, dict) else {key: value}
    flat["checkpoint_minutes"] = None  # how a run runs too, but runs were named with it
    return {key: _lasting(value) for key, value in flat.items() if key not in HOW_IT_RUNS}


def _settings(config: RunConfig) -> dict[str, Any]:
    """All of a run's. A run keeps its name when a setting comes: those of `LATER` count where they are not as then."""
    settings = config.model_dump(mode="json")
    for path, (now, before) in LATER.items():
        *above, name = path.split(".")
        section = settings
        for key in above:
            section = section.get(key) or {}
        if section.get(name) == now and before is None:
            del section[name]
        elif section.get(name) == now:
            section[name] = before
    return settings


def _lasting(value: Any) -> Any:
    """A run keeps its name when a study's module moves: modules are called as where they lay when runs were named."""
    return f"gapg.{value}" if isinstance(value, str) and value.startswith("studies.") else value


def _warm_identity(config: RunConfig) -> dict[str, Any]:
    """What a warm start depends on."""
    settings = _settings(config)
    return {
        "seed": config.seed,
        "task": settings["task"],
        "model": {key: value for key, value in settings["model"].items() if key != "lora"},
        "warm_start": {key: value for key, value in settings["warm_start"].items() if key != "checkpoint_every"},
        "eval.problems": config.eval.problems,
        "token_cap": config.token_cap,
        "rollout.max_prompt_tokens": config.rollout.max_prompt_tokens,
    }


def _hash(identity: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]
