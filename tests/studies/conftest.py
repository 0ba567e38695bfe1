"""What tests of studies share: a config whose runs take a second, and finished runs made by hand."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from gapg.config import load_config
from gapg.studies.study import Finished, Unit, product_path

Rows = list[dict[str, Any]]


@pytest.fixture(scope="session")
def tiny() -> str:
    """A config for `gapg experiment --config`, whose runs take about a second each."""
    return str(Path(__file__).with_name("tiny.yaml"))


@pytest.fixture
def predicted() -> Callable[..., dict[str, Any]]:
    """`predicted(i, outcome, margin, …)`: a row as `gapg.evaluation.evaluate.prediction` makes it, its id from i."""

    def make(i: int, outcome: str, margin: float | None = None, **more: Any) -> dict[str, Any]:
        row = {"id": f"p{i}", "outcome": outcome, "help_margin": margin, "oracle_score": 1.0, "problem": f"problem {i}"}
        row |= {"logprob_mean": -1.0, "response": "<answer>1</answer>"} | more
        answer = {"answer_logprob_mean": row["logprob_mean"], "answer_logprob_min": -2.0}
        return answer | row

    return make


@pytest.fixture
def finish(tmp_path: Path) -> Callable[..., Finished]:
    """`finish(unit, products, metrics)`: a finished run of the quickstart with these files."""

    def make(unit: Unit, products: dict[str, Rows], metrics: Sequence[dict[str, Any]] = ()) -> Finished:
        folder = tmp_path / f"{unit.label}-{unit.seed}".replace("/", "-")
        (folder / "products").mkdir(parents=True)
        for name, rows in products.items():
            product_path(folder, name).write_text("".join(json.dumps(row) + "\n" for row in rows))
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in metrics))
        return Finished(unit, folder, load_config("quickstart", {**unit.overrides, "seed": str(unit.seed)}))

    return make
