"""The study of a real model, on tables made by hand; and that a study may start from a preset of its own."""

import json
from collections.abc import Callable
from typing import Any

import pytest

import study
from gapg.config import load_config
from gapg.errors import ConfigError
from studies.arms import Finished
from studies.by_problem import stacked, validation_answers
from studies.catalog import STUDIES
from studies.probe import PROBE
from studies.report import Record, Study, command
from studies.runs import place
from studies.self_check import UNTRAINED
from studies.word_problems import MASKED, OURS, WORD_PROBLEMS, check, word_arms


def answered(predicted: Callable[..., dict[str, Any]], first: int, n: int, sign: int) -> list[dict[str, Any]]:
    """The first half is wrong alone, and is of new templates but for every second; `sign` calls these first."""
    rows = []
    for i in range(n):
        wrong = i < n // 2
        row = predicted(
            first + i,
            "local_wrong" if wrong else "local_correct",
            sign * (0.5 - (i + 0.5) / n),
            answer_logprob_mean=-3.0 if wrong else -1.0,
            stays=0.2 if wrong else 0.8,
            gold="4",
        )
        rows.append(row | {"id": f"{'template' if i % 2 else 'numbers'}/kind-{i // 5}/{first + i}"})
    return rows


def test_the_study_on_tables_made_by_hand(
    finish: Callable[..., Finished],
    predicted: Callable[..., dict[str, Any]],
    drawn: Callable[[Study, list[Finished]], Record],
) -> None:
    """The marginal method calls the wrong half first, the others the right one; the mean log-prob tells all."""
    step = {
        "step": 1, "local_accuracy": 0.4, "accuracy": 0.6, "call_fraction": 0.3, "response_tokens": 50.0,
        "tokens_sampled": 600, "tokens/given": 900, "seconds/rollout": 2.0, "seconds/update": 3.0,
    }  # fmt: skip
    runs = []
    for arm in word_arms(1):
        sign = 1 if arm.label == OURS else -1
        heldout, train = answered(predicted, 0, 40, sign), answered(predicted, 100, 200, sign)
        sampled = [row | {"outcome": "cloud_correct"} for row in heldout[:10]] + heldout[10:]
        files = {"heldout-masked": heldout, "heldout-sampled": sampled, "train-masked": train}
        made = finish(arm, files, [] if arm.label == "warm start" else [step, step | {"step": 2}])
        split = {"validation": validation_answers(made), "heldout": heldout}
        rows = [{"id": row["id"], "split": name, "score": 0.0} for name, of_split in split.items() for row in of_split]
        for wanted in {PROBE, UNTRAINED} & {*arm.predictions}:
            wanted.path(made.folder).write_text("".join(json.dumps(row) + "\n" for row in rows))
        runs.append(made)
    record = drawn(WORD_PROBLEMS, runs)
    of = {row["method"]: row for row in record["rows"]}
    # 12 of 40 calls on wrong answers; on right ones; by chance
    assert of[OURS]["at_0.3"] == pytest.approx(0.8) and of["GAPG"]["at_0.3"] == pytest.approx(0.5)
    assert of["+ mean log-prob"]["at_0.3"] == pytest.approx(0.8)
    assert of["+ P(true)"]["at_0.3"] == pytest.approx(0.65) and of[OURS]["at_0"] == 0.5
    low, high = of[OURS]["at_budget_interval"]
    assert low < 0.8 < high
    assert of[OURS]["new templates"] == {"called": pytest.approx(0.3), "alone": 0.5, "together": pytest.approx(0.8)}
    called, together = of[OURS]["landed"]
    assert 0.2 < called < 0.4 and together == pytest.approx(0.5 + called)
    assert of["GAPG"]["outcomes"]["cloud_correct"] == 0.25 and of["GAPG"]["forecast"]["brier"] == pytest.approx(0.04)
    cost = {"rollout": 2.0, "update": 3.0, "oracle": 0.0, "sync": 0.0, "sampled_per_s": 300.0, "updated_per_s": 300.0}
    assert of["GAPG"]["cost"] == pytest.approx(cost) and of["warm start"]["cost"] is None
    less = {(d["a"], d["b"], d["cloud_fraction"]): d["mean"] for d in record["comparisons"]}
    assert less[OURS, "GAPG", 0.3] == pytest.approx(0.3)
    assert less[stacked(OURS), stacked("GAPG"), 0.3] == pytest.approx(0.0)
    tables = {table.title: table for table in WORD_PROBLEMS.tables(record)}
    assert [cells[0] for cells in tables["A training step"].cells] == [OURS, "GAPG", MASKED]
    transcripts = tables["Responses, sampled"].cells
    assert {cells[1] for cells in transcripts} == {"cloud correct", "local correct", "local wrong"}
    assert all("<" not in cell for cells in transcripts for cell in cells)


def test_a_study_starts_from_its_own_preset(tmp_path: Any) -> None:
    own = {name: of.config for name, of in STUDIES.items() if of.config != study.QUICKSTART}
    assert own == {"word-problems": "arithmetic-smollm2"}
    check(load_config("arithmetic-smollm2"))
    with pytest.raises(ConfigError, match="arithmetic-smollm2"):
        check(load_config("quickstart"))
    (arm, *_) = word_arms(1)
    with pytest.raises(ConfigError, match="study measures"):
        place(arm, WORD_PROBLEMS.config, {"eval.every": "1"}, tmp_path)
    made = {"study": "word-problems", "seeds": [1], "own_seeds": [1], "overrides": {"model.path": "m"}}
    told = command(WORD_PROBLEMS, made | {"config": "arithmetic-smollm2"})
    assert told == "python bench/study.py word-problems --model.path m"
    assert "--config quickstart" in command(WORD_PROBLEMS, made | {"config": "quickstart"})
