"""Shifted problems, and the study of calls against failures on tables made by hand."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.figure import Figure

from gapg.config import load_config
from gapg.errors import ConfigError
from gapg.help_phrase import help_control
from gapg.runs.run import Run
from gapg.tasks.base import Verdict
from gapg.tasks.countdown import Countdown
from studies import shift
from studies.arms import Finished
from studies.predictions import heldout
from studies.report import Record, Study
from studies.shift import SHIFT, SHIFTED, TRAINED, boundary, decisions, make_problems, shapes, ways

RESULTS = Path(__file__).parents[3] / "bench" / "results" / "studies"


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
    config, check = load_config("quickstart"), SHIFT.check
    assert check is not None
    check(config)
    with pytest.raises(ConfigError, match=r"task\.name=countdown"):
        check(config.model_copy(update={"task": config.task.model_copy(update={"name": "maths"})}))


def test_ways_are_computations() -> None:
    assert ways("1 2 = 3", 100) == 1
    assert ways("2 2 = 4", 100) == 2  # 2 + 2 and 2 * 2
    assert ways("1 1 1 = 59", 100) == 0


def test_precision_and_recall() -> None:
    found = decisions(pd.DataFrame({"called": [1.0, 1, 1, 0, 0], "local": [0.0, 0, 1, 0, 1]}))
    assert found == {"called": 0.6, "failed": 0.6, "precision": pytest.approx(2 / 3), "recall": pytest.approx(2 / 3)}
    never = decisions(pd.DataFrame({"called": [0.0], "local": [1.0]}))
    assert never == {"called": 0.0, "failed": 0.0, "precision": None, "recall": None}


def test_success_at_the_boundary() -> None:
    found = boundary(pd.Series([-np.inf, -3.0, -0.5, 0.5, 0.9, 3.0]), pd.Series([1.0, 1.0, 1.0, 0.0, 0.0, 0.0]))
    assert (found["near"], found["right_near"]) == (3, pytest.approx(1 / 3))
    assert [b["n"] for b in found["bins"]] == [1, 1, 0, 1, 2, 0, 1, 0]
    assert found["bins"][3] == {"n": 1, "right": 1.0}
    assert boundary(pd.Series([9.0]), pd.Series([0.0]))["right_near"] is None


@pytest.fixture
def finished(finish: Callable[..., Finished], predicted: Callable[..., dict[str, Any]]) -> list[Finished]:
    """40 problems a set, the margin falling from 2.05 by 0.1 a problem, wrong alone on the first 20. At the threshold
    12 of 40 are called (margins over 0.9); elsewhere every margin is a logit higher and nothing is right alone. S is
    a half everywhere for GAPG; the marginal method's is 0.1 where it is wrong on the trained set, and 0.9 elsewhere."""
    runs = []
    for arm in (arm for seed in (20, 21) for arm in SHIFT.arms(seed)):
        surely = [0.5, 0.5] if arm.label == "GAPG" else [0.1, 0.9]
        rows = [
            predicted(i, "local_wrong" if i < 20 else "local_correct", 2.05 - 0.1 * i)
            | {"id": f"1 {i + 2} = {i + 3}", "set": TRAINED, "stays": surely[i >= 20]}
            for i in range(40)
        ]
        elsewhere = [
            row | {"set": name, "help_margin": row["help_margin"] + 1.0, "outcome": "local_wrong", "stays": surely[1]}
            for name in shapes(load_config("quickstart"))
            for row in rows
        ]
        metrics = [{"step": s, "call_fraction": 0.3, "alpha_c": 0.5} for s in range(1, 31)]
        runs.append(finish(arm, {"train-masked": rows, SHIFTED.name: rows + elsewhere}, metrics))
    return runs


def test_the_study_on_a_table_made_by_hand(
    finished: list[Finished], drawn: Callable[[Study, list[Finished]], Record]
) -> None:
    record = drawn(SHIFT, finished)
    assert len(record["rows"]) == 2 * 2 * 4
    trained = next(row for row in record["rows"] if row["set"] == TRAINED)
    assert (trained["called"], trained["failed"]) == (pytest.approx(0.3), 0.5)
    assert (trained["precision"], trained["recall"]) == (1.0, pytest.approx(0.6))
    # 12 called rightly, 20 right alone
    assert trained["accuracy"] == pytest.approx(0.8)
    assert trained["implied"] == 0.5
    # margins from -1.0 to 1.0 are problems 11 to 30; right from 20 on
    assert (trained["boundary"]["near"], trained["boundary"]["right_near"]) == (20, pytest.approx(11 / 20))
    # ten more problems are called
    four = next(row for row in record["rows"] if row["set"] == "4 numbers")
    assert (four["called"], four["failed"], four["recall"]) == (pytest.approx(0.55), 1.0, pytest.approx(0.55))
    more = [d for d in record["comparisons"] if d["what"] == "called"]
    assert all(d["mean"] == pytest.approx(0.25) and d["low"] == pytest.approx(0.25) for d in more)
    sets, by_ways, edge, forecast = SHIFT.tables(record)
    assert [row[-1] for row in sets.cells] == ["", "more", "more", "more"] * 2
    assert sets.cells[0][:4] == [f"GAPG, {TRAINED}", "40", "30.0% (30.0 to 30.0%)", "50.0% (50.0 to 50.0%)"]
    assert by_ways.cells[2][:4] == [f"GAPG, {TRAINED}", "3 to 4", "0", "–"]
    # the marginal method stands at no price, so nothing is implied
    assert edge.cells[0] == [f"GAPG, {TRAINED}", "20", "0.550", "0.500"] and len(edge.cells) == 4
    # Brier, calibration error, its part by chance, AUROC
    assert forecast.cells[0][3:] == ["0.250", "0.000", "0.063", "0.500", ""]
    ours, elsewhere = forecast.cells[4], forecast.cells[5]
    assert ours[0] == f"marginal, {TRAINED}" and [*ours[3:5], *ours[6:]] == ["0.010", "0.100", "1.000", "better"]
    assert [elsewhere[3], elsewhere[4], *elsewhere[6:]] == ["0.810", "0.900", "–", "worse"]


def test_one_seed_tells_nothing_of_another(finished: list[Finished]) -> None:
    rows, comparisons = SHIFT.measure(finished[:2])
    assert [(d["low"], d["high"]) for d in comparisons] == [(-1.0, 1.0)] * (2 * 3 + 4)
    sets, _, _, forecast = SHIFT.tables({"rows": rows, "comparisons": comparisons, "seeds": [20]})
    assert [row[-1] for row in sets.cells] == ["", "same", "same", "same"] * 2
    assert [row[-1] for row in forecast.cells[4:]] == ["same"] * 4


def test_a_record_of_gapg_alone_is_drawn_as_it_was() -> None:
    """Older records have no method and no S."""
    record = json.loads((RESULTS / "shift.json").read_text())
    new = {"method", "stays", "brier", "ece", "ece_by_chance", "auroc", "reliability"}
    old = [{key: value for key, value in row.items() if key not in new} for row in record["rows"]]
    record = record | {"rows": [row for row in old if row["alpha_c"] is not None]}
    sets, _, _ = SHIFT.tables(record)
    assert [row[0] for row in sets.cells] == [TRAINED, "4 numbers", "numbers of 21 to 40", "targets of 61 to 100"]
    figure = Figure(layout="constrained")
    SHIFT.draw(figure, record)
    assert len(figure.axes) == 4


def test_the_predictions_of_a_real_policy(start: Callable[..., Run], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shift, "PROBLEMS", 20)
    run = start("run")
    limit = run.config.rollout.max_new_tokens
    rows = shift.shifted(run)
    known = len(heldout(run))
    assert [row["set"] for row in rows[:known]] == [TRAINED] * known
    assert [row["set"] for row in rows[known:]] == [name for name in shapes(run.config) for _ in range(20)]
    assert {row["outcome"] for row in rows} <= {"local_correct", "local_wrong"}
    assert all(row["oracle_score"] is not None for row in rows)
    assert run.config.rollout.max_new_tokens == limit, "longer responses are the study's own affair"
    assert [row["response"] for row in shift.shifted(run)] == [row["response"] for row in rows]
    # S is the product of the chances, token by token, of not beginning the phrase
    (phrase,) = [s.token_id for s in help_control(run.tokenizer).spellings]
    for prompt, row in list(zip(heldout(run), rows, strict=False))[:5]:
        given = run.task.render(prompt, run.tokenizer)
        response = run.tokenizer.encode(row["response"], add_special_tokens=False)
        with torch.no_grad():
            logits = run.engine.model(torch.tensor([[*given, *response]])).logits[0].double()  # type: ignore[attr-defined]
        p = logits.softmax(1)[len(given) - 1 : -1, phrase]
        assert row["stays"] == pytest.approx(float((1 - p).prod()), rel=1e-4)
