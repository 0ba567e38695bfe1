"""Another oracle for predictions that are there: what it would have answered, and the study by hand."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure

from gapg.build import make_oracle, make_task
from gapg.config import ConfigError, load_config
from gapg.studies import oracle_swap
from gapg.studies.oracle_swap import SWAPPED, TRAINED, with_oracle
from gapg.studies.study import Finished

N = 400


def test_a_swapped_oracle_answers_as_the_configs_own_would(predicted: Callable[..., dict[str, Any]]) -> None:
    """What a run records of the cloud under a config is what swapping that oracle in gives."""
    config = load_config(
        "quickstart", {"task.args": "{max_number: 5, max_target: 20}", "oracle.accuracy": "0.6", "oracle.samples": "4"}
    )
    task = make_task(config)
    oracle = make_oracle(config, task, Path("unused"))
    prompts = task.prompts("heldout")
    rows = [predicted(i, "local_wrong") | {"id": p.id} for i, p in enumerate(prompts)]
    for row, prompt in zip(with_oracle(rows, 0.6, 4), prompts, strict=True):
        texts = [a.text or "" for a in oracle.ask(task.question(prompt)).result()]
        assert row["oracle_score"] == sum("answer" in text for text in texts) / 4
        assert row["outcome"] == "local_wrong"


def test_a_weaker_oracle_knows_a_part_of_what_a_stronger_one_does(predicted: Callable[..., dict[str, Any]]) -> None:
    rows = [predicted(i, "cloud_correct") for i in range(2000)]
    scores = {a: np.array([row["oracle_score"] for row in with_oracle(rows, a)]) for a in (1.0, 0.8, 0.4)}
    assert (scores[1.0] == 1).all()
    assert (scores[0.4] <= scores[0.8]).all()
    assert scores[0.4].mean() == pytest.approx(0.4, abs=0.05)
    outcomes = {row["outcome"] for row in with_oracle(rows, 0.4)}
    assert outcomes == {"cloud_correct", "cloud_wrong"}


@pytest.fixture
def finished(finish: Callable[..., Finished], predicted: Callable[..., dict[str, Any]]) -> list[Finished]:
    """On two seeds: wrong alone on the first half, of which it calls most; the 80% run ranks problems backwards."""
    runs = []
    for seed in (20, 21):
        for unit in oracle_swap.oracle_units(seed):
            sign = -1 if unit.label == "oracle 80%" else 1
            alone = ["local_wrong" if i < N // 2 else "local_correct" for i in range(N)]
            masked = [predicted(i, alone[i], sign * (N / 2 - i)) for i in range(N)]
            sampled = [predicted(i, "cloud_correct" if i < 120 else alone[i]) for i in range(N)]
            metrics = [{"step": s, "call_fraction": 0.3, "alpha_c": 0.4} for s in range(1, 31)]
            runs.append(finish(unit, {"heldout-masked": masked, "heldout-sampled": sampled}, metrics))
    return runs


def test_the_study_on_a_table_made_by_hand(finished: list[Finished], tmp_path: Path) -> None:
    report = oracle_swap.analyse_oracle(finished)
    at = {(row["how"], row["oracle_accuracy"], row["oracle_samples"], row["seed"]): row for row in report.rows}
    assert len(at) == 2 * (1 + 4 + 1 + 4)
    # always right: the 120 called are gained, half the problems are right alone
    assert at[TRAINED, 1.0, 1, 20]["accuracy_at_c"] == pytest.approx(0.5 + 0.3)
    assert at[TRAINED, 1.0, 1, 20]["random_at_c"] == pytest.approx(0.7 * 0.5 + 0.3)
    known = sum(row["oracle_score"] for row in with_oracle([{"id": f"p{i}", "outcome": ""} for i in range(120)], 0.4))
    assert at[SWAPPED, 0.4, 1, 21]["accuracy_at_c"] == pytest.approx(0.5 + known / N)
    assert at[SWAPPED, 0.4, 1, 21]["accuracy"] == pytest.approx(0.5 + known / N)
    less = {c["a"]: c["mean"] for c in report.comparisons}
    assert less["oracle 100%"] == less["oracle 60%"] == less["oracle 60%, 4 samples"] == 0
    assert less["oracle 80%"] < -0.2, "it calls on what it is right on"
    assert len(report.conclusions) == 2
    assert all(len(cells) == len(report.tables[0].columns) for cells in report.tables[0].cells)
    figure = Figure(layout="constrained")
    report.draw(figure)
    figure.savefig(tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size > 10_000


def test_a_real_cloud_cannot_be_swapped() -> None:
    config = load_config("quickstart")
    check = oracle_swap.ORACLE.check
    assert check is not None
    check(config)
    with pytest.raises(ConfigError, match=r"needs --oracle\.kind solver"):
        check(config.model_copy(update={"oracle": config.oracle.model_copy(update={"kind": "openai"})}))
