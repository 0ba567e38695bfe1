"""What each command takes beside the config's keys: small settings models, read and explained as those are."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pydantic import Field, ValidationError, field_validator, model_validator

from gapg import config_keys
from gapg.config import RunConfig
from gapg.config_sections import Section
from gapg.errors import ConfigError


class Options(Section):
    """`words`: the fields that are words of the command, in their order; the others are options."""

    words: ClassVar[tuple[str, ...]] = ()


class Train(Options):
    """Train a device model."""

    words = ("name",)
    name: str
    """A preset (`gapg config list`) or a YAML file."""
    resume: bool = False
    """Go on from the last checkpoint in the output folder."""


class OfModel(Options):
    words = ("checkpoint",)
    checkpoint: Path
    """A run's folder, one of its checkpoints, or a model folder."""
    config: str | None = None
    """Preset or YAML file; empty: the config of the run the checkpoint belongs to."""
    output_dir: Path | None = None
    """Where summary.json, predictions.jsonl and a picture, if there is one, go; empty: beside the checkpoint."""
    trust_code: bool = False
    """Run code of others that the folder's own config names (a task, a reward function), and its settings of vLLM."""


class Eval(OfModel):
    """Evaluate a checkpoint or any Hugging Face model folder on held-out problems, greedy and sampled, and how good a
    forecast of a right answer its decision is."""

    suite: str | None = None
    """Also evaluate on several sets of maths problems, with one table and suite.json at the end: `maths` (GSM8K,
    MATH-500, AMC23, Minerva, AGIEval's MATH, SVAMP), or a YAML file that names sets of your own. Of each set as many
    problems as `--eval.heldout` says."""
    suite_data: Path | None = None
    """A folder that has the suite's sets, `gsm8k/test.jsonl` and so on; empty: they are read from the hub."""

    @model_validator(mode="after")
    def _data_of_a_suite(self) -> Eval:
        if self.suite_data is not None and self.suite is None:
            raise ValueError("--suite-data is the folder of a suite's sets: add --suite maths")
        return self


class Calibrate(OfModel):
    """Find the bias on the help phrase that gives a call fraction, or calls where a right answer is unlikely, and save
    it beside the model.

    Decodes the training problems once with help masked. `gapg eval` reads what is saved.
    """

    cloud_fraction: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Part of the problems that may go to the cloud; empty: the config's budget.cloud_fraction."""
    call_below: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Instead: call where the chance of a right answer is below this. For policies of method=marginal, decoded
    greedily, whose chance of answering was trained by a proper score to be that."""
    temperature: float = 0.0
    """The decoding to calibrate; 0 is greedy."""
    problems: int | None = None
    """How many training problems to calibrate on; empty: all that fit."""
    accuracy: bool = False
    """Ask a paid oracle about every calibration problem, for the accuracy together (a solver is always asked).
    The bias needs no oracle."""

    @field_validator("temperature")
    @classmethod
    def _decodes(cls, value: float) -> float:
        if value != 0 and value < 0.01:
            raise ValueError(f"temperature={value:g}: must be 0 (greedy), or 0.01 or above")
        return value

    @model_validator(mode="after")
    def _one_target(self) -> Calibrate:
        if self.call_below is not None and self.cloud_fraction is not None:
            raise ValueError("--call-below and --cloud-fraction are two ways to say when to call: give one of them")
        if self.call_below is not None and self.temperature:
            raise ValueError("--call-below is for greedy decoding, whose calls are not drawn: leave out --temperature")
        return self


class Config(Options):
    """Name the presets (`list`), or print one with all its keys and what options change (`show`)."""

    words = ("action", "name")
    action: Literal["list", "show"]
    name: str = ""
    """The preset or YAML file to show."""


class Info(Options):
    """Versions, devices, and which kernels, attention and engines are in use, and why."""

    config: str | None = None
    """Preset or YAML file: what an update of this run would need in memory, instead. Takes its options too."""


COMMANDS: dict[str, type[Options]] = {
    "train": Train,
    "eval": Eval,
    "calibrate": Calibrate,
    "config": Config,
    "info": Info,
}


def usage(command: str) -> str:
    model = COMMANDS[command]
    shown = {"action": "list|show", "name": "NAME", "checkpoint": "CHECKPOINT"}
    words = [shown[w] if model.model_fields[w].is_required() else f"[{shown[w]}]" for w in model.words]
    return " ".join(("usage: gapg", command, *words, "[--key value …]"))


def parse(command: str, args: list[str]) -> tuple[Options, dict[str, str]]:
    """(what the command takes, overrides of the config). Raises ConfigError."""
    model = COMMANDS[command]
    own = {name: field.annotation for name, field in model.model_fields.items() if name not in model.words}
    words, texts, overrides = config_keys.parse(args, RunConfig, own)
    given = {name: config_keys.read(text, config_keys.kinds(own[name])) for name, text in texts.items()}
    help = f"{usage(command)}; gapg {command} --help says more"
    if spare := words[len(model.words) :]:
        raise ConfigError(f"{spare[0]!r}: one word too many; {help}")
    given |= dict(zip(model.words, words, strict=False))
    if any(model.model_fields[word].is_required() and word not in given for word in model.words):
        raise ConfigError(help)
    try:
        return model.model_validate(given), overrides
    except ValidationError as error:
        raise ConfigError(config_keys.explain(model, error)) from None
