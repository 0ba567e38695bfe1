"""What training takes, from metrics and done.json made by hand."""

import json
from collections.abc import Callable

import pytest

from studies.arms import Finished
from studies.report import Record, Study
from studies.training_cost import TRAINING_COST, cost_arms


def test_a_runs_cost_is_summed_over_its_steps(
    finish: Callable[..., Finished], drawn: Callable[[Study, list[Finished]], Record]
) -> None:
    runs = []
    for arm in (arm for seed in (20, 21) for arm in cost_arms(seed)):
        step = {"call_fraction": 0.3, "tokens_sampled": 4000, "groups/with_gradient": 30, "seconds/rollout": 0.25}
        steps = [{"step": s, **step, "seconds/update": 0.1, "seconds/evaluate": 9.0} for s in range(1, 11)]
        run = finish(arm, {}, steps)
        requests = 0 if "marginal" in arm.overrides.get("method", "") else 60
        (run.folder / "done.json").write_text(
            json.dumps({"oracle": {"requests": requests}, "seconds": 198.0 if arm.label == "RLCR" else 99.0})
        )
        runs.append(run)
    record = drawn(TRAINING_COST, runs)
    row = record["rows"][0]
    assert (row["updates"], row["samples"], row["tokens"], row["groups"]) == (10, 10 * 32 * 8, 40_000, 300)
    assert row["seconds"] == pytest.approx(3.5) and row["seconds_update"] == pytest.approx(1.0)
    cells = {line[0]: line[1:] for line in TRAINING_COST.tables(record)[0].cells}
    assert cells["GAPG"][:6] == ["10", "2,560", "40,000", "300", "60", "4 (4 to 4)"]
    assert cells["GAPG"][-1] == "1.00x (1.00 to 1.00)" and cells["RLCR"][-1] == "2.00x (2.00 to 2.00)"
    assert cells["marginal"][4] == cells["task-tuned, masked"][4] == "0"
