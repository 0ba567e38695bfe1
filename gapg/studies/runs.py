"""The training runs of studies: where each lies, whether it is there, and how it is made. One of a kind is made once.

<work>/warm/<hash>/checkpoints/    a warm start, by the hash of what it depends on
<work>/runs/<hash>/config.yaml     a run, by the hash of its resolved config and controller
                  /checkpoints/    the last one; once finished its optimizer is emptied
                  /metrics.jsonl
                  /products/       one jsonl a product
                  /log.txt         what its worker said
                  /done.json       trained, and which products there are
"""

from __future__ import annotations

import fcntl
import gc
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from gapg.build import check_run, make_reward, make_task
from gapg.config import ConfigError, RunConfig, load_config
from gapg.evaluation.validate import validate
from gapg.files import remove_partials, write_whole
from gapg.jsonl import read_jsonl, to_json
from gapg.model.load import load_tokenizer
from gapg.reward import try_reward
from gapg.runs import checkpoint, run_identity
from gapg.runs.run import build_run, set_threads
from gapg.runs.run_dir import save_config
from gapg.studies.products import PRODUCTS, STANDARD, is_made, make_product
from gapg.studies.provenance import revision
from gapg.studies.study import Unit, product_path
from gapg.tasks import find_object
from gapg.train import train
from gapg.warm_start import check_demonstrations, warm_start

DEFAULTS = {
    "checkpoint_every": "100",
    "keep_checkpoints": "1",
    "tensorboard": "false",
    "threads": "1",
    "eval.every": "0",
    "compare": "false",
}
"""How a run of a study runs, where the command says nothing else: its curves are in metrics.jsonl."""

RESERVED = {
    "seed": "give --seeds 0,1,2",
    "output_dir": "give --work-dir and --results-dir",
    "compare": "drop it: the studies compare",
    "eval.every": "drop it: a study measures the trained model",
}
"""Keys that a study sets itself, and what to do instead."""

FURNITURE = (
    "output_dir", "threads", "tensorboard", "wandb", "compare", "checkpoint_every", "keep_checkpoints", "eval.every",
    "warm_start.checkpoint_every", "rollout.max_rows", "rollout.vllm_args", "oracle.cache", "oracle.account",
    "oracle.api_key_env", "oracle.concurrency", "oracle.timeout_s", "oracle.deadline_s", "oracle.max_retries",
    "oracle.requests_per_minute", "oracle.tokens_per_minute", "oracle.spending_cap", "oracle.price_per_million_prompt",
    "oracle.price_per_million_completion", "oracle.local_share",
)  # fmt: skip
"""Keys that change how a run runs and not what it is: runs that differ in nothing else are one run."""


@dataclass(frozen=True)
class Place:
    """A run to be made or found: what it is, and where it lies."""

    config: RunConfig
    folder: Path
    warm: Path | None
    """The warm start's folder; None: the config has no warm start."""
    controller: str | None
    products: tuple[str, ...]

    def finished(self) -> bool:
        """Trained, every product there, and the cloud known on all its problems (where it failed it is asked again)."""
        path = self.folder / "done.json"
        if not path.exists():
            return False
        made = json.loads(path.read_text())["products"]
        return all(made.get(p) == 0 and product_path(self.folder, p).exists() for p in self.products)

    def warm_finished(self) -> bool:
        if self.warm is None or self.config.warm_start is None:
            return True
        steps = checkpoint.steps(self.warm / "checkpoints")
        return bool(steps) and steps[-1] >= self.config.warm_start.steps


def place(unit: Unit, base: str, overrides: Mapping[str, str], work: Path) -> Place:
    """Where the unit's run lies under `work`: config `base`, the command's overrides, then the unit's own.

    Raises ConfigError: a key that the study sets itself, a bad value, an unknown product or controller.
    """
    for key in RESERVED.keys() & overrides.keys():
        raise ConfigError(f"{key}: {RESERVED[key]}")
    config = load_config(base, {**DEFAULTS, **overrides, **unit.overrides, "seed": str(unit.seed)})
    if config.eval.heldout == 0:
        raise ConfigError("eval.heldout=0: a study measures held-out problems; raise it, or leave it empty for all")
    identity = {key: value for key, value in _flat(config).items() if key not in FURNITURE}
    folder = work / "runs" / _hash(identity | {"controller": unit.controller})
    # an answer is paid for once, by whichever run asks first, and the spending cap is on all of them together
    oracle = {
        "cache": config.oracle.cache or str(work / "oracle.sqlite"),
        "account": config.oracle.account or str(work),
    }
    config = config.model_copy(
        update={"output_dir": folder, "oracle": config.oracle.model_copy(update=oracle)},
    )
    warm = work / "warm" / _hash(_warm_identity(config)) if config.warm_start else None
    try:
        for product in unit.products:
            if product not in PRODUCTS:
                find_object(product, "product")
        if unit.controller:
            find_object(unit.controller, "controller")
    except ValueError as error:
        raise ConfigError(f"{unit.label}: {error}") from None
    return Place(config, folder, warm, unit.controller, tuple(dict.fromkeys((*STANDARD, *unit.products))))


def check(places: Iterable[Place]) -> None:
    """What can be known before a model is made, once where runs differ in nothing of it. Raises ConfigError."""
    different = {_hash(_checked(p.config)): p.config for p in places}
    for config in different.values():
        task = make_task(config)
        tokenizer = load_tokenizer(config.model, task)
        check_run(config, task, tokenizer)
        check_demonstrations(config, task, tokenizer)
        try_reward(make_reward(config), config, task)


def _checked(config: RunConfig) -> dict[str, Any]:
    """What `check` looks at."""
    return {
        "task": config.task.model_dump(mode="json"),
        "model": config.model.model_dump(mode="json"),
        "demonstrations": config.warm_start and [str(config.warm_start.demonstrations)],
        "rollout": config.rollout.model_dump(mode="json"),
        "reward": [config.reward.model_dump(mode="json"), config.budget.controller],
        "token_cap": config.token_cap,
    }


def make_warm_start(place: Place) -> Path | None:
    """The model folder of the run's warm start, made or resumed unless it is there. Safe in several processes."""
    if place.warm is None:
        return None
    task = make_task(place.config)
    with _alone(place.warm):
        set_threads(place.config)
        tokenizer = load_tokenizer(place.config.model, task)
        run_identity.begin(place.warm, place.config, task, tokenizer)
        model = warm_start(place.config, place.warm / "checkpoints", task, tokenizer)
        # it is finished: whoever starts from it takes the weights alone
        checkpoint.forget_optimizer(model.parent)
    return model


def make_run(place: Place) -> None:
    """Trains the run, or goes on from its last checkpoint, and makes the products that are not there.

    Safe in several processes. Raises OracleDown when the oracle stays away, and ConfigError.
    """
    config, folder = place.config, place.folder
    warm = make_warm_start(place)
    with _alone(folder):
        if place.finished():
            return
        task = make_task(config)
        run_identity.begin(folder, config, task, load_tokenizer(config.model, task))
        save_config(config)
        set_threads(config)
        controller = find_object(place.controller, "controller")(config) if place.controller else None
        run = build_run(config, folder, task, warm, controller)
        try:
            train(run, validate)
            last = run.save()
            usage = asdict(run.oracle.usage)
            for name in place.products:
                new = not is_made(product_path(folder, name))
                _write_done(folder, run.state.step, usage, name, make_product(run, name), new)
        finally:
            run.close()
        checkpoint.forget_optimizer(last)  # a finished run is never trained on: its steps are in its name
    del run
    gc.collect()  # a model refers to itself, and the process goes on with the next run


def _write_done(folder: Path, step: int, usage: dict[str, Any], product: str, unknown: int, new: bool) -> None:
    """Says that a product is there, and of what revision where it was made just now; what is said of others stays.

    `unknown`: on how many of its problems the cloud is unknown. A product without a revision has the run's.
    """
    path = folder / "done.json"
    before: dict[str, Any] = {"revision": revision(), "products": {}}
    if path.exists():
        before = json.loads(path.read_text())
    products = before["products"] | {product: unknown}
    revisions = before.get("product_revisions", {}) | ({product: revision()} if new else {})
    rows = read_jsonl(folder / "metrics.jsonl")
    seconds = sum(value for row in rows for key, value in row.items() if key.startswith("seconds/"))
    now = {"step": step, "seconds": round(seconds, 1), "oracle": usage}
    now |= {"products": products, "product_revisions": revisions}
    write_whole(path, to_json(before | now, indent=1) + "\n")


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Waits until no other process makes what belongs in the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        remove_partials(folder)
        yield


def _warm_identity(config: RunConfig) -> dict[str, Any]:
    """What a warm start depends on."""
    assert config.warm_start is not None
    return {
        "seed": config.seed,
        "task": config.task.model_dump(mode="json"),
        "model": config.model.model_dump(mode="json", exclude={"lora"}),
        "warm_start": config.warm_start.model_dump(mode="json", exclude={"checkpoint_every"}),
        "eval.problems": config.eval.problems,
        "token_cap": config.token_cap,
        "rollout.max_prompt_tokens": config.rollout.max_prompt_tokens,
    }


def _flat(config: RunConfig) -> dict[str, Any]:
    """Dotted keys, two levels deep: what lies deeper is one value."""
    flat: dict[str, Any] = {}
    for key, value in config.model_dump(mode="json").items():
        flat |= {f"{key}.{inner}": v for inner, v in value.items()} if isinstance(value, dict) else {key: value}
    return flat


def _hash(identity: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]
