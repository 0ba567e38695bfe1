"""A fixed alpha_c, and oracles for predictions that are there, on tables made by hand."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gapg.build import make_oracle, make_task
from gapg.config import load_config
from gapg.errors import ConfigError
from studies.arms import Arm, Finished
from studies.cloud import ACCURACIES, ALPHAS, COLLAPSE, ORACLE, SWAPPED, TRAINED, fate, with_oracle
from studies.report import Record, Study

Run = Callable[..., Finished]
Drawn = Callable[[Study, list[Finished]], Record]
N = 100


@pytest.fixture
def run(finish: Run, predicted: Callable[..., dict[str, Any]]) -> Run:
    """A run on n problems that calls the first `called` of them and is right alone on all from `wrong` on; what it
    would call on first is its first problems, or with sign -1 its last."""

    def make(
        arm: Arm, called: int, *, wrong: int = 40, n: int = N, cloud: float = 1.0, sign: int = 1,
        fractions: Sequence[float] = (),
    ) -> Finished:  # fmt: skip
        alone = ["local_wrong" if i < wrong else "local_correct" for i in range(n)]
        outcomes = ["cloud_correct" if i < called else alone[i] for i in range(n)]
        predictions = {
            "heldout-masked": [predicted(i, alone[i], sign * (n / 2 - i), oracle_score=cloud) for i in range(n)],
            "heldout-sampled": [predicted(i, outcomes[i], oracle_score=cloud) for i in range(n)],
        }
        calls = fractions or [called / n] * 60
        metrics = [{"step": s + 1, "call_fraction": f, "alpha_c": 0.4} for s, f in enumerate(calls)]
        return finish(arm, predictions, metrics)

    return make


def test_a_run_that_stops_calling_died_at_the_step_after_which_it_never_came_back() -> None:
    # a dip at steps 21 to 40 that is recovered from, and the end of calling at step 60
    fractions = [0.3] * 20 + [0.0] * 20 + [0.3] * 20 + [0.0] * 40
    # the mean of steps 61 to 80 is the first of zeros; with one step of 0.3 it is 0.015, under 2%
    died = {"state": "never calls", "step": 79, "lowest": 0.0, "highest": pytest.approx(0.3)}
    assert fate(fractions) == died
    assert fate(fractions[:60])["state"] == "still calls"
    assert fate([1 - f for f in fractions])["state"] == "always calls"
    assert fate([0.0] * 30) == {"state": "never calls", "step": 20, "lowest": 0.0, "highest": 0.0}
    assert fate([0.0, 0.0, 0.0])["step"] == 3, "fewer steps than the window are one mean"


@given(st.lists(st.floats(0, 1), min_size=1, max_size=80))
def test_a_collapse_lasts_to_the_end_and_begins_no_later_than_it_must(fractions: list[float]) -> None:
    found = fate(fractions)
    window = min(20, len(fractions))

    def mean_at(step: int) -> float:
        return float(np.mean(fractions[step - window : step]))

    if found["step"] is None:
        assert 0.02 - 1e-9 <= mean_at(len(fractions)) <= 0.98 + 1e-9
        return
    few, steps = found["state"] == "never calls", range(found["step"], len(fractions) + 1)
    assert all(m < 0.02 + 1e-9 if few else m > 0.98 - 1e-9 for m in map(mean_at, steps))
    if found["step"] > window:
        before = mean_at(found["step"] - 1)
        assert before >= 0.02 - 1e-9 if few else before <= 0.98 + 1e-9


def test_what_a_policy_is_worth_at_two_prices(run: Run, drawn: Drawn) -> None:
    """It is wrong alone on 40; a call at 0.25 pays on those, one at 0.5 too, but calling on 100 pays at neither."""
    calls = zip(COLLAPSE.arms(20), (0, 20, 40, 70, 100), strict=True)
    record = drawn(COLLAPSE, [run(arm, called) for arm, called in calls])
    at = {row["label"]: row for row in record["rows"]}
    states = [at[f"alpha_c {a}"]["state"] for a in ALPHAS]
    assert states == ["never calls", "still calls", "still calls", "still calls", "always calls"]
    assert at["alpha_c 0.5"]["utility_0.25"] == pytest.approx(1.0 - 0.25 * 0.4)
    assert at["alpha_c 0.1"]["utility_0.5"] == pytest.approx(0.6)
    (table,) = COLLAPSE.tables(record)
    assert table.cells[0][:4] == ["0.1", "20", "never calls", "20"]
    # the oracle is always right
    assert table.columns[-2:] == ["at 0.25 (rule: alpha_c 0.75)", "at 0.5 (rule: alpha_c 0.50)"]
    assert [row[-2] for row in table.cells] == ["worse", "worse", "best", "worse", "worse"]


def test_the_best_changes_with_the_price_where_the_cloud_is_half_right(run: Run) -> None:
    """A call gains 0.4 of an answer: worth 0.15 at the first price, and less than nothing at the second."""
    calls = zip(COLLAPSE.arms(20), (0, 10, 20, 30, 40), strict=True)
    rows, comparisons = COLLAPSE.measure([run(arm, n, cloud=0.4, wrong=100) for arm, n in calls])
    assert rows[4]["utility_0.25"] == pytest.approx(0.4 * (0.4 - 0.25))
    best = {d["what"]: d["a"] for d in comparisons}
    assert best == {"utility at 0.25 a call": "alpha_c 0.9", "utility at 0.5 a call": "alpha_c 0.1"}
    assert all(d["mean"] > 0 for d in comparisons)


def test_a_swapped_oracle_answers_as_the_configs_own_would() -> None:
    """What a run records of the cloud under a config is what swapping that oracle in gives."""
    config = load_config(
        "quickstart", {"task.args": "{max_number: 5, max_target: 20}", "oracle.accuracy": "0.6", "oracle.samples": "4"}
    )
    task = make_task(config)
    oracle = make_oracle(config, task, Path("unused"))
    prompts = task.prompts("heldout")
    called = [float(i % 2) for i in range(len(prompts))]
    table = pd.DataFrame({"id": [p.id for p in prompts], "called": called, "correct": 0.125, "cloud": 1.0})
    swapped = with_oracle(table, 0.6, 4)
    for row, prompt in zip(swapped.to_dict("records"), prompts, strict=True):
        texts = [a.text or "" for a in oracle.ask(task.question(prompt)).result()]
        assert row["cloud"] == sum("answer" in text for text in texts) / 4
        assert row["correct"] == (row["cloud"] if row["called"] else 0.125)


def test_a_weaker_oracle_knows_a_part_of_what_a_stronger_one_does() -> None:
    table = pd.DataFrame({"id": [f"p{i}" for i in range(2000)], "called": 1.0, "correct": 1.0, "cloud": 1.0})
    known = {a: with_oracle(table, a)["cloud"] for a in ACCURACIES}
    assert known[1.0].all()
    for stronger, weaker in ((1.0, 0.8), (0.8, 0.6), (0.6, 0.4)):
        assert (known[stronger] >= known[weaker]).all()
    assert known[0.4].mean() == pytest.approx(0.4, abs=0.05)


def test_oracles_in_training_and_after_it(run: Run, drawn: Drawn) -> None:
    """On two seeds: wrong alone on the first half, of which it calls most; the 80% run ranks problems backwards."""
    finished = [
        run(arm, 120, wrong=200, n=400, sign=-1 if arm.label == "oracle 80%" else 1)
        for seed in (20, 21)
        for arm in ORACLE.arms(seed)
    ]
    record = drawn(ORACLE, finished)
    at = {(row["how"], row["oracle_accuracy"], row["oracle_samples"], row["seed"]): row for row in record["rows"]}
    assert len(at) == 2 * (1 + 4 + 1 + 4)
    # always right: the 120 called are gained, half the problems are right alone
    assert at[TRAINED, 1.0, 1, 20]["accuracy_at_c"] == pytest.approx(0.5 + 0.3)
    assert at[TRAINED, 1.0, 1, 20]["random_at_c"] == pytest.approx(0.7 * 0.5 + 0.3)
    first = pd.DataFrame({"id": [f"p{i}" for i in range(120)], "called": 1.0, "correct": 1.0})
    known = with_oracle(first, 0.4)["cloud"].sum()
    assert at[SWAPPED, 0.4, 1, 21]["accuracy_at_c"] == pytest.approx(0.5 + known / 400)
    assert at[SWAPPED, 0.4, 1, 21]["accuracy"] == pytest.approx(0.5 + known / 400)
    less = {d["a"]: d["mean"] for d in record["comparisons"]}
    assert less["oracle 100%"] == less["oracle 60%"] == less["oracle 60%, 4 samples"] == 0
    assert less["oracle 80%"] < -0.2, "it calls on what it is right on"
    lines = {(row[0], row[1]): row[-3:] for row in ORACLE.tables(record)[0].cells}
    assert lines["80%", TRAINED][::2] == ["GAPG", "worse"]
    assert lines["60% of each of 4 samples", TRAINED] == ["oracle 60%", "+0.0 (+0.0 to +0.0)", "same"]
    assert lines["80%", SWAPPED] == lines["95%", TRAINED] == ["", "", ""]


def test_a_real_cloud_cannot_be_swapped() -> None:
    config, check = load_config("quickstart"), ORACLE.check
    assert check is not None
    check(config)
    with pytest.raises(ConfigError, match=r"needs --oracle\.kind solver"):
        check(config.model_copy(update={"oracle": config.oracle.model_copy(update={"kind": "openai"})}))
