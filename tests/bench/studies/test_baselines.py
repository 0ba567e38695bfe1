"""The baselines' comparison on tables made by hand: ten problems, of which everything can be counted."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gapg.config import load_config
from studies import arms
from studies.arms import Finished
from studies.baselines import BASELINES, GRID, LOCAL, METHODS, PROMPT, RANDOM, VOTES, prices
from studies.predictions import CALIBRATION_SAMPLES, HELDOUT_SAMPLES
from studies.prompt_router import PROMPT_ROUTER
from studies.report import Record, Study, Table
from studies.runs import place

N = 10
Runs = Callable[..., list[Finished]]
Drawn = Callable[[Study, list[Finished]], Record]


@pytest.fixture
def runs(finish: Callable[..., Finished], predicted: Callable[..., dict[str, Any]]) -> Runs:
    """All runs of a seed. Alone everyone solves problems 4 to 9; the cloud solves all but problem 9.

    GAPG asks for 0, 1, 2 first. Its log-prob is lowest on problems it solves, those of the others have no order; with
    help in it, it is as its help phrase says. On the calibration problems all score `shift` higher.
    """

    def make(seed: int, ours: tuple[int, ...] = (0, 1, 2), shift: float = 0.0) -> list[Finished]:
        found = []
        for arm in BASELINES.arms(seed):
            first = ours if arm.label == "GAPG" else (9, 8, 7)
            margin = [5.0 - first.index(i) if i in first else -5.0 - i for i in range(N)]
            rows = [
                predicted(i, "local_correct" if i > 3 else "local_wrong", margin[i], oracle_score=float(i != 9))
                | {"logprob_mean": -margin[i], "answer_logprob_mean": -float(i) if arm.label == "GAPG" else -1.0}
                for i in range(N)
            ]
            sampled = [row | {"outcome": "cloud_correct"} if row["id"] in ("p0", "p5") else row for row in rows]
            train = [row | {"help_margin": row["help_margin"] + shift} for row in rows]
            predictions = {"heldout-masked": rows, "train-masked": train, "heldout-sampled": sampled}
            if arm.predictions:
                texts = [row | {"response": f"<answer>{k * (i < 4)}</answer>"} for i, row in enumerate(rows)
                         for k in range(5)]  # fmt: skip
                predictions |= {HELDOUT_SAMPLES.name: texts, CALIBRATION_SAMPLES.name: texts}
                scores = {"calibration": -1.0 + shift, "heldout": -1.0}
                predictions[PROMPT_ROUTER.name] = [
                    {"id": f"p{i}", "score": top - i, "split": split} for split, top in scores.items() for i in range(N)
                ]
            found.append(finish(arm, predictions))
        return found

    return make


def line(table: Table, method: str) -> list[str]:
    return list(next(row for row in table.cells if row[0] == method))


def of(record: Record, method: str, key: str) -> list[Any]:
    return [row[key] for row in record["rows"] if row["method"] == method]


def test_every_run_is_one_of_those_the_studies_share() -> None:
    found = BASELINES.arms(20)
    overrides = [arm.overrides for arm in found]
    assert arms.gapg(20).overrides in overrides
    assert arms.collaboration_aware(20).overrides in overrides
    assert load_config("quickstart", found[0].overrides).steps == 0
    assert load_config("quickstart", found[1].overrides).reward.alpha_c == 0


def test_at_equal_calls(runs: Runs, drawn: Drawn) -> None:
    record = drawn(BASELINES, runs(20) + runs(21, ours=(0, 1, 9)))
    at_budget = {name: of(record, name, "at_budget") for name in METHODS}
    # 6 alone and 3 from the cloud; on seed 21 one call goes to the problem that the cloud gets wrong and GAPG right
    assert at_budget["GAPG"] == pytest.approx([0.9, 0.7])
    # three tenths of each problem: 0.7 * 6 + 0.3 * 9
    assert at_budget[RANDOM] == pytest.approx([0.69, 0.69])
    # problems 9, 8, 7: one right answer is lost
    assert at_budget["DA-GRPO"] == pytest.approx([0.5, 0.5])
    assert at_budget[PROMPT] == pytest.approx([0.9, 0.9])
    # 0 to 3 have five answers in five samples, and nobody can say which three of the four are called
    assert at_budget[VOTES] == pytest.approx([0.9, 0.9])
    # GAPG's least likely responses are 9, 8, 7
    assert at_budget["GAPG, its log-prob"] == pytest.approx([0.5, 0.5])
    # and with help in it 0, 1, 2 as the help phrase has it
    assert at_budget["GAPG, its log-prob with help in it"] == pytest.approx([0.9, 0.7])
    less = {(d["b"], d.get("cloud_fraction", "apgr")): d for d in record["comparisons"]}
    assert {at for _, at in less} == {0.1, 0.2, 0.3, 0.5, 0.7, 0.9, "apgr"}
    assert less[PROMPT, 0.3]["per_seed"] == pytest.approx((0.0, -0.2))
    assert less[PROMPT, 0.3]["wins"] == 0
    table = BASELINES.tables(record)[0]
    assert line(table, "DA-GRPO")[1:3] == ["50.0%", "50.0%"]
    assert line(table, "DA-GRPO")[4] == "2 of 2"
    assert line(table, "GAPG")[2:] == ["70.0 to 90.0%", "", "", ""]
    assert table.cells[0][:2] == ["task-tuning only (no calls)", "60.0%"]
    assert table.cells[-1][:2] == ["cloud only (all calls)", "90.0%"]
    assert "over 2 seeds (Student's t), the held-out problems are the same in all" in table.title


def test_a_method_that_beats_gapg_is_named_with_where(runs: Runs, drawn: Drawn) -> None:
    """GAPG wastes its first call on a problem that it solves and the cloud does not, the prompt router no call."""
    record = drawn(BASELINES, runs(20, ours=(9, 0, 1, 2)) + runs(21, ours=(9, 0, 1, 2)))
    less = {d.get("cloud_fraction", "apgr"): d for d in record["comparisons"] if d["b"] == PROMPT}
    # alone 6 are right; one, two, three calls by the router: 7, 8, 9; by GAPG: 5, 6, 7; at five both lose none or one
    assert [less[f]["per_seed"] for f in (0.1, 0.2, 0.3)] == [pytest.approx((-0.2, -0.2))] * 3
    # the gap is 3 of 10 problems; APGR is the area between the curves over it, which at every twentieth are exact
    ours, theirs = (np.trapezoid(of(record, name, "curve")[0], GRID) for name in ("GAPG", PROMPT))
    assert less["apgr"]["mean"] == pytest.approx((ours - theirs) / 0.3, abs=1e-4)
    row = line(BASELINES.tables(record)[1], PROMPT)
    assert row[1] == "-20.0 (-20.0 to -20.0)" and len(row) == 9
    assert row[-1].startswith("worse at 10% called, 20% called, 30% called") and row[-1].endswith("APGR")
    assert line(BASELINES.tables(record)[0], PROMPT)[-1] == "worse"
    assert line(BASELINES.tables(record)[0], "DA-GRPO")[-1] == "better"


def test_thresholds_come_from_calibration_problems(runs: Runs) -> None:
    record: Record = dict(zip(("rows", "comparisons"), BASELINES.measure(runs(20)), strict=True), seeds=[20])
    assert of(record, PROMPT, "calibrated_called") == [0.3]
    # no order among equal log-probs: of no call and all calls no call is nearer to three
    assert of(record, "+ mean log-prob", "calibrated_called") == [0.0]
    table = BASELINES.tables(record)[2]
    assert line(table, "GAPG")[1:] == ["30.0%", "30.0%", "90.0%", "20.0%", "20.0%", "70.0%"]
    assert line(table, RANDOM)[1:] == ["–"] * 6


def test_calibration_problems_that_score_higher_leave_fewer_calls(runs: Runs) -> None:
    rows, _ = BASELINES.measure(runs(20, shift=2.0))
    assert of({"rows": rows}, PROMPT, "calibrated_called") == [0.1]


def test_gap_and_money(runs: Runs, drawn: Drawn) -> None:
    record = drawn(BASELINES, runs(20))
    _, _, _, gap, money = BASELINES.tables(record)
    # 60% alone, 90% the cloud: 20, 50, 80% of the gap are 0.6, 1.5 and 2.4 more right answers, one a call
    assert line(gap, "GAPG")[3:] == ["6.0%", "15.0%", "24.0%"]
    assert line(gap, RANDOM)[2:] == ["0.500", "20.0%", "50.0%", "80.0%"]
    assert "(60.0%) to the cloud (90.0%)" in gap.title
    # 0.3 buys a local response and 0.29 calls: at the money, not at the best point below it
    assert of(record, "GAPG", "for_0.3_calls_of_money") == [pytest.approx(0.6 + 0.29)]
    # what is called needs no local response: 0.01 (1 - f) + f = 0.1
    assert of(record, RANDOM, "for_0.1_calls_of_money") == [pytest.approx(0.6 + 0.3 * 0.09 / 0.99)]
    # five responses leave 0.05 for calls, each of which gains an answer
    assert of(record, VOTES, "for_0.1_calls_of_money") == [pytest.approx(0.65)]
    assert line(money, LOCAL)[1:] == ["60.0%"] * 4
    assert line(money, "cloud only")[1:] == ["–", "–", "–", "90.0%"]


def test_the_devices_share_of_a_call_comes_from_the_config(runs: Runs, drawn: Drawn, tmp_path: Path) -> None:
    at = [place(arms.gapg(20), "quickstart", {"oracle.local_share": x}, tmp_path).folder for x in ("0.01", "0.2")]
    assert at[0] == at[1], "it is the same run"
    dear = [
        Finished(f.arm, f.folder, load_config("quickstart", {**f.arm.overrides, "oracle.local_share": "0.2"}))
        for f in runs(20)
    ]
    money = BASELINES.tables(drawn(BASELINES, dear))[-1]
    assert "taken to cost 0.2 of it" in money.title
    # a fifth of a call buys the device's answers to all problems, and less buys nobody's
    assert line(money, LOCAL)[1:] == ["–", "60.0%", "60.0%", "60.0%"]
    assert line(money, "GAPG")[1:3] == ["–", "70.0%"]


def test_prices_are_the_configs_of_today_for_the_tokens_of_training(finish: Callable[..., Finished]) -> None:
    """Also where the run was made without prices."""
    made = []
    for seed in (20, 21):
        run = finish(arms.gapg(seed), {})
        usage = {"requests": 50, "prompt_tokens": 60_000, "completion_tokens": 20_000, "cost": 0.0}
        (run.folder / "done.json").write_text(json.dumps({"oracle": usage}))
        made.append(run)
    assert prices(made)["call_price"] == 1, "the config names no price"
    priced = load_config(
        "quickstart", {"oracle.price_per_million_prompt": "1", "oracle.price_per_million_completion": "2"}
    )
    found = prices([Finished(run.arm, run.folder, priced) for run in made])
    assert found == {"call_price": pytest.approx(0.002), "local_price": pytest.approx(0.00002)}


def test_one_seed_has_an_interval_over_problems(runs: Runs) -> None:
    d = next(d for d in BASELINES.measure(runs(20))[1] if d["b"] == "DA-GRPO" and d["cloud_fraction"] == 0.3)
    assert d["low"] < d["mean"] < d["high"]
