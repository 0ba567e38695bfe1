"""What tests of studies share: a config whose runs take a second, and finished runs made by hand."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure

from gapg.config import load_config
from studies.arms import Arm, Finished, Rows, predictions_path
from studies.report import Record, Study


@pytest.fixture(scope="session")
def tiny() -> str:
    """A config for `study.py --config`, whose runs take about a second each."""
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
    """`finish(arm, predictions, metrics)`: a finished run of the quickstart with these files."""

    def make(arm: Arm, predictions: dict[str, Rows], metrics: Sequence[dict[str, Any]] = ()) -> Finished:
        folder = tmp_path / f"{arm.label}-{arm.seed}".replace("/", "-")
        (folder / "products").mkdir(parents=True)
        for name, rows in predictions.items():
            predictions_path(folder, name).write_text("".join(json.dumps(row) + "\n" for row in rows))
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in metrics))
        return Finished(arm, folder, load_config("quickstart", {**arm.overrides, "seed": str(arm.seed)}))

    return make


@pytest.fixture
def drawn(tmp_path: Path) -> Callable[[Study, list[Finished]], Record]:
    """`drawn(study, finished)`: its record, through JSON; its tables have whole rows, and its picture is no blank."""

    def draw(study: Study, finished: list[Finished]) -> Record:
        rows, comparisons = study.measure(finished)
        seeds = sorted({run.arm.seed for run in finished})
        record: Record = json.loads(json.dumps({"rows": rows, "comparisons": comparisons, "seeds": seeds}))
        assert all(len(cells) == len(table.columns) for table in study.tables(record) for cells in table.cells)
        figure = Figure(layout="constrained")
        study.draw(figure, record)
        figure.savefig(tmp_path / "a.png")
        assert (tmp_path / "a.png").stat().st_size > 10_000
        return record

    return draw
