"""What a study is made of: the training runs it needs, what is kept of each, and what an analysis hands back."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gapg.config import RunConfig
from gapg.jsonl import read_jsonl

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Unit:
    """One training run that a study needs. Units of equal config and controller share one run, also across studies."""

    label: str
    """The method or setting in the study's own words: "GAPG", "alpha_c 0.3"."""
    overrides: Mapping[str, str]
    """Dotted keys over the base config, as `load_config` takes them: {"reward.alpha_c": "0.3"}."""
    seed: int
    controller: str | None = None
    """Import path `module:function` of a factory (RunConfig) -> controller; None: the config's own."""
    products: tuple[str, ...] = ()
    """What is measured on the trained model beyond `products.STANDARD`: names in `products.PRODUCTS`, or import paths
    `module:function` of a function (Run) -> rows."""


@dataclass(frozen=True)
class Finished:
    """A unit whose run is trained and whose products are all there."""

    unit: Unit
    folder: Path
    config: RunConfig

    def rows(self, product: str) -> list[dict[str, Any]]:
        """One prediction a problem, in the order of the task. Raises FileNotFoundError: the unit did not ask for it."""
        path = product_path(self.folder, product)
        if not path.exists():
            raise FileNotFoundError(f"{path}: {self.unit.label!r} names no product {product!r}")
        return read_jsonl(path)

    def metrics(self) -> list[dict[str, Any]]:
        """One row a training step (key `step`), from metrics.jsonl."""
        return read_jsonl(self.folder / "metrics.jsonl")

    @cached_property
    def info(self) -> dict[str, Any]:
        """done.json: what the run took (`seconds`), its last `step`, what the oracle was asked (`oracle`)."""
        return dict(json.loads((self.folder / "done.json").read_text()))


@dataclass(frozen=True)
class Table:
    title: str
    columns: Sequence[str]
    cells: Sequence[Sequence[str]]
    """Rows of texts, as many as there are columns."""


@dataclass(frozen=True)
class Report:
    """What an analysis found. Everything but `draw` goes into the study's JSON."""

    rows: list[dict[str, Any]]
    """The raw figures: one row a (method, seed, …), JSON-able."""
    tables: list[Table]
    comparisons: list[dict[str, Any]]
    """Paired differences with their 95% intervals."""
    conclusions: list[str]
    """Sentences, built from the figures by code so that they stay true, also where something buys nothing."""
    draw: Callable[[Figure], None]
    """Draws on an empty figure of a constrained layout; may resize it."""


@dataclass(frozen=True)
class Study:
    name: str
    question: str
    seeds: tuple[int, ...]
    units: Callable[[int], list[Unit]] = field(repr=False)
    """The runs of one seed."""
    analyse: Callable[[list[Finished]], Report] = field(repr=False)
    """All seeds' finished units, in the order of `units`, seed by seed -> the report."""
    check: Callable[[RunConfig], None] | None = field(default=None, repr=False)
    """Raises ConfigError, before anything slow, for a config that the study cannot work with."""
    sets: tuple[str, ...] = ()
    """Keys that no command may override, beside those that units set: the analysis takes them as the study has them."""


def product_path(folder: Path, product: str) -> Path:
    """Where a run keeps a product; of an import path the part after the colon counts."""
    return folder / "products" / f"{product.rpartition(':')[2]}.jsonl"
