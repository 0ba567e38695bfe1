"""Shifted problems, and the study of calls against failures on tables made by hand."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure

from gapg.config import ConfigError, load_config
from gapg.runs.run import Run
from gapg.studies import shift
from gapg.studies.shift import PRODUCT, TRAINED, boundary, decisions, make_problems, shapes, ways
from gapg.studies.study import Finished
from gapg.tasks.base import Verdict
from gapg.tasks.countdown import Countdown


@pytest.mark.parametrize("name", ["4 numbers", "numbers of 21 to 40", "targets of 61 to 100"])
def test_shifted_problems_are_new_solvable_and_in_the_vocabulary(name: str) -> None:
    config = load_config("quickstart")
    assert set(shapes(config)) == {"4 numbers", "numbers of 21 to 40", "targets of 61 to 100"}
    shape = shapes(config)[name]
    prompts = make_problems(shape, 200, seed=1)
    task = Countdown()
    known = {p.id for split in ("train", "heldout") for p in task.prompts(split)}  # type: ignore[arg-type]
    tokenizer = task.tokenizer()
    assert len({p.id for p in prompts}) == 200
    for prompt in prompts:
        numbers, target = prompt.id.split(" = ")
        given = [int(n) for n in numbers.split()]
        assert prompt.id not in known
        assert len(given) == shape.count and shape.over_number < max(given) <= shape.number
        assert shape.over_target < int(target) <= shape.target
        assert task.verify(prompt, [prompt.answer]) == [Verdict.CORRECT]
        assert tokenizer.unk_token_id not in task.render(prompt, tokenizer)
        assert ways(prompt.id, 100) >= 1
    assert make_problems(shape, 200, seed=1) == prompts


def test_as_many_problems_as_there_are() -> None:
    shape = shift.Shape(count=2, number=3, over_number=0, target=5, over_target=0, max_value=5)
    # 1+1 1+2 2-1 1+3 3-1 2+2 2*2 2+3 3-2, by numbers and target; 3+3 and 3*3 are over the values allowed
    assert len(make_problems(shape, 100, seed=0)) == 8


def test_no_set_where_the_vocabulary_leaves_no_room() -> None:
    config = load_config("quickstart", {"task.args": "{max_target: 100, max_number: 12}"})
    assert list(shapes(config)) == ["4 numbers", "numbers of 13 to 24"]


def test_another_task_is_refused() -> None:
    config, check = load_config("quickstart"), shift.SHIFT.check
    assert check is not None
    check(config)
    with pytest.raises(ConfigError, match=r"task\.name=countdown"):
        check(config.model_copy(update={"task": config.task.model_copy(update={"name": "maths"})}))


def test_ways_are_computations() -> None:
    assert ways("1 2 = 3", 100) == 1
    assert ways("2 2 = 4", 100) == 2  # 2 + 2 and 2 * 2
    assert ways("1 1 1 = 59", 100) == 0


def test_precision_and_recall() -> None:
    found = decisions([True, True, True, False, False], [True, True, False, True, False])
    assert found == {"called": 0.6, "failed": 0.6, "precision": pytest.approx(2 / 3), "recall": pytest.approx(2 / 3)}
    assert decisions([False], [False]) == {"called": 0.0, "failed": 0.0, "precision": None, "recall": None}


def test_success_at_the_boundary() -> None:
    margins = np.array([-np.inf, -3.0, -0.5, 0.5, 0.9, 3.0])
    local = np.array([1.0, 1.0, 1.0, 0.0, 0.0, 0.0])
    found = boundary(margins, local)
    assert (found["near"], found["right_near"]) == (3, pytest.approx(1 / 3))
    assert [b["n"] for b in found["bins"]] == [1, 1, 0, 1, 2, 0, 1, 0]
    assert found["bins"][3] == {"n": 1, "right": 1.0}
    assert boundary(np.array([9.0]), np.array([0.0]))["right_near"] is None


def rows_of(predicted: Callable[..., dict[str, Any]], ids: list[str], wrong: int, **more: Any) -> list[dict[str, Any]]:
    """Wrong alone on the first `wrong`; the margin falls from 2.0 by 0.1 a problem."""
    return [
        predicted(i, "local_wrong" if i < wrong else "local_correct", 2.05 - 0.1 * i) | {"id": name, **more}
        for i, name in enumerate(ids)
    ]


@pytest.fixture
def finished(finish: Callable[..., Finished], predicted: Callable[..., dict[str, Any]]) -> list[Finished]:
    """40 problems a set. In the threshold's set 12 of 40 are called (margins over 0.9), as in the one trained on."""
    runs = []
    for seed in (20, 21):
        (unit,) = shift.shift_units(seed)
        ids = [f"1 {i} = {i + 1}" for i in range(2, 42)]
        elsewhere = []
        for name in shapes(load_config("quickstart")):
            of_set = rows_of(predicted, ids, 40, set=name)
            # every margin a logit higher: ten more problems are called
            elsewhere += [row | {"help_margin": row["help_margin"] + 1.0} for row in of_set]
        products = {
            "heldout-masked": rows_of(predicted, ids, 20),
            "train-masked": rows_of(predicted, ids, 20),
            PRODUCT: elsewhere,
        }
        metrics = [{"step": s, "call_fraction": 0.3, "alpha_c": 0.5} for s in range(1, 31)]
        runs.append(finish(unit, products, metrics))
    return runs


def test_the_study_on_a_table_made_by_hand(finished: list[Finished], tmp_path: Path) -> None:
    report = shift.analyse_shift(finished)
    assert len(report.rows) == 2 * 4
    trained = next(row for row in report.rows if row["set"] == TRAINED)
    assert (trained["called"], trained["failed"]) == (pytest.approx(0.3), 0.5)
    assert (trained["precision"], trained["recall"]) == (1.0, pytest.approx(0.6))
    # 12 called rightly, 20 right alone
    assert trained["accuracy"] == pytest.approx(0.8)
    assert trained["implied"] == 0.5
    # margins from -1.0 to 1.0 are problems 11 to 30; right from 20 on
    assert (trained["boundary"]["near"], trained["boundary"]["right_near"]) == (20, pytest.approx(11 / 20))
    four = next(row for row in report.rows if row["set"] == "4 numbers")
    assert (four["called"], four["failed"], four["recall"]) == (pytest.approx(0.55), 1.0, pytest.approx(0.55))
    assert all(c["mean"] == pytest.approx(0.25) and c["low"] == pytest.approx(0.25) for c in report.comparisons)
    assert report.conclusions[0].startswith("Calling rises with the shift: from 30.0%")
    assert "right on 55.0% of the problems like those trained on" in report.conclusions[1]
    assert "is 50.0%" in report.conclusions[1]
    assert all(len(cells) == len(table.columns) for table in report.tables for cells in table.cells)
    figure = Figure(layout="constrained")
    report.draw(figure)
    figure.savefig(tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size > 10_000


def test_one_seed_has_no_interval_and_is_told_all_the_same(finished: list[Finished]) -> None:
    report = shift.analyse_shift(finished[:1])
    assert all(c["low"] is None for c in report.comparisons)
    assert len(report.conclusions) == 2


def test_the_product_on_a_real_policy(start: Callable[..., Run], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shift, "PROBLEMS", 20)
    run = start("run")
    limit = run.config.rollout.max_new_tokens
    rows = shift.shifted(run)
    names = list(shapes(run.config))
    assert [row["set"] for row in rows] == [name for name in names for _ in range(20)]
    assert {row["outcome"] for row in rows} <= {"local_correct", "local_wrong"}
    assert all(row["oracle_score"] is not None for row in rows)
    assert run.config.rollout.max_new_tokens == limit, "longer responses are the product's own affair"
    again = replace(run)
    assert [row["response"] for row in shift.shifted(again)] == [row["response"] for row in rows]
