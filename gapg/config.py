"""Every setting of a run, validated before anything slow starts. Presets are the YAML files in `gapg/configs`."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from datetime import date
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field, ValidationError, field_validator, model_validator

from gapg import config_keys
from gapg.config_oracle import OracleConfig
from gapg.config_sections import (
    BudgetConfig,
    Count,
    EvalConfig,
    LossConfig,
    MarginalConfig,
    ModelConfig,
    OptimConfig,
    RewardConfig,
    RolloutConfig,
    Section,
    TaskConfig,
    UpdateConfig,
    WarmStartConfig,
    Whole,
)
from gapg.errors import ConfigError, one_line

PRESETS = Path(__file__).parent / "configs"


class RunConfig(Section):
    method: Literal["gapg", "marginal"] = "gapg"
    """`gapg`: the paper's, trained to one cloud budget. `marginal`: responses are sampled with help forbidden and the
    decision is integrated out, for every budget at once and without a cloud; filter and controller are gapg's alone."""
    seed: Annotated[int, Field(ge=0)] = 0
    """All that is random in the run follows from it."""
    deterministic: bool = False
    """On a GPU an update gives the same bits again, at some cost in time; an operator that cannot do so ends the run.
    A CPU does so anyway. What vLLM samples is not covered."""
    steps: Whole = 200
    """Optimizer steps of the policy gradient (0: the warm start alone)."""
    output_dir: Path = Path("runs/run")
    """The run's folder: its settings, metrics, checkpoints and evaluation."""
    task: TaskConfig
    model: ModelConfig = ModelConfig()
    warm_start: WarmStartConfig | None = None
    rollout: RolloutConfig = RolloutConfig()
    reward: RewardConfig = RewardConfig()
    marginal: MarginalConfig = MarginalConfig()
    loss: LossConfig = LossConfig()
    budget: BudgetConfig = BudgetConfig()
    oracle: OracleConfig = OracleConfig()
    optim: OptimConfig = OptimConfig(lr=5e-6)
    update: UpdateConfig = UpdateConfig()
    token_cap: Count = 16384
    """Most tokens in one packed micro-batch."""
    eval: EvalConfig = EvalConfig()
    checkpoint_every: Count = 50
    """Steps between checkpoints."""
    checkpoint_minutes: Annotated[float, Field(gt=0)] | None = None
    """Also a checkpoint after the first step that ends so long after the last one (empty: by steps only)."""
    keep_checkpoints: Count = 2
    """How many of the last checkpoints are kept, beside the best one."""
    threads: Annotated[int, Field(ge=1, le=1024)] | None = None
    """Torch threads on a CPU (empty: OMP_NUM_THREADS, or else one a core)."""
    tensorboard: bool = True
    """Also write the metrics for TensorBoard."""
    wandb: bool = False
    """Also send the metrics to Weights & Biases; needs gapg[wandb]."""

    @model_validator(mode="before")
    @classmethod
    def _of_older_versions(cls, tree: Any) -> Any:
        """Files of runs that an older version made hold the key `compare`, which meant another run beside this one."""
        if isinstance(tree, dict) and isinstance(tree.get("compare"), bool):
            tree = dict(tree)
            if tree.pop("compare"):
                _warn_of_compare()
        return tree

    @field_validator("task", mode="before")
    @classmethod
    def _task_by_name(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value

    @field_validator("output_dir", mode="before")
    @classmethod
    def _path_of_any_name(cls, value: Any) -> Any:
        """A number or a date is a name too; no name would be the folder that one stands in."""
        if isinstance(value, int | float | date) and not isinstance(value, bool):
            return str(value)
        return None if value == "" else value

    @model_validator(mode="after")
    def _possible(self) -> RunConfig:
        if self.wandb and find_spec("wandb") is None:
            raise ValueError("wandb=true: W&B is not installed; pip install 'gapg[wandb]'")
        if self.method == "gapg" or self.marginal.cloud != "ignore":
            check_cloud(self.oracle)
        return self

    @model_validator(mode="after")
    def _marginal(self) -> RunConfig:
        if self.method == "gapg" and self.marginal != MarginalConfig():
            raise ValueError("marginal.*: settings of method=marginal; set that, or leave them out")
        if self.method == "marginal":
            loss, reward, budget, usual = self.loss, self.reward, self.budget, BudgetConfig()
            for key, odd, why in (
                ("loss.epochs", loss.epochs > 1, "responses of an older policy would need its decisions' odds; set 1"),
                ("loss.kl_coef", loss.kl_coef > 0, "the penalty is not defined without a decision; set 0"),
                ("loss.aggregation", loss.aggregation != "sequence_sum", "a decision is a response's; leave it out"),
                ("loss.entropy", loss.entropy, "it would be of the policy without the phrase; set false"),
                ("reward.function", reward.function != "gapg.judge:rewards", "it has a worth of its own; leave it out"),
                ("budget.rho", budget.rho is not None, "nothing is filtered; leave it out"),
                ("budget.gain", budget.gain != usual.gain, "no price is moved; leave it out"),
                ("budget.damping", budget.damping != usual.damping, "no price is moved; leave it out"),
                ("reward.alpha_f", reward.alpha_f > 0, "every response ends in an answer; set 0"),
            ):
                if odd:
                    raise ValueError(f"method=marginal: {key} is gapg's: {why}, or set method=gapg")
        return self


def check_cloud(oracle: OracleConfig) -> None:
    """Raises ValueError where a server is to be asked, and for which model is not said."""
    if oracle.kind == "openai" and not oracle.model:
        raise ValueError("oracle.model is empty: name the cloud model, e.g. --oracle.model gpt-5-mini")


@cache  # a command reads a run's files more than once
def _warn_of_compare() -> None:
    logging.getLogger(__name__).warning(f"compare: left out, there is no such key any more; {config_keys.COMPARE}")


def load_config(name: str, overrides: Mapping[str, str] | None = None) -> RunConfig:
    """The preset or YAML file `name` with dotted overrides (`{"optim.lr": "1e-4"}`) applied.

    Raises ConfigError, one line that names the key and the fix.
    """
    tree = load_tree(name)
    for key, value in (overrides or {}).items():
        _set(tree, key, value)
    try:
        config = RunConfig.model_validate(tree)
        config.model_dump(mode="json")  # a YAML alias may put a value into itself, and !!binary is no text
    except ValidationError as error:
        raise ConfigError(config_keys.explain(RunConfig, error)) from None
    except ValueError as error:
        raise ConfigError(f"config {name!r} holds a value that cannot be kept: {one_line(error)}") from None
    return config


def load_tree(name: str) -> dict[str, Any]:
    """What the preset or YAML file `name` says, as it says it. Raises ConfigError."""
    path = PRESETS / f"{name}.yaml" if name in presets() else Path(name)
    if not os.path.isfile(path):
        raise ConfigError(f"config {name!r} is neither a file nor a preset; presets: {', '.join(presets())}")
    return read_tree(path)


def read_tree(path: Path) -> dict[str, Any]:
    """What a YAML file says. Raises ConfigError."""
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: expected a mapping of settings, got {type(tree).__name__}")
    return tree


def presets() -> list[str]:
    return sorted(p.stem for p in PRESETS.glob("*.yaml"))


def dump_config(config: RunConfig) -> str:
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def _set(tree: dict[str, Any], key: str, text: str) -> None:
    if not (found := config_keys.find(RunConfig, key)):
        raise ConfigError(config_keys.unknown(RunConfig, key))
    *sections, last = key.split(".")
    for section in sections:
        held = tree.get(section)
        if not isinstance(held, dict):
            tree[section] = {"name": held} if section == "task" and isinstance(held, str) else {}
        tree = tree[section]
    tree[last] = config_keys.read(text, found)
