"""Methods from predictions: who called, and what a call costs."""

import json
from collections.abc import Callable
from typing import Any

import pytest

from gapg.config import load_config
from gapg.studies.methods import accuracy, as_trained, called, prices
from gapg.studies.study import Finished, Unit


def test_a_call_that_failed_is_a_call(predicted: Callable[..., dict[str, Any]]) -> None:
    outcomes = ["local_correct", "local_wrong", "cloud_correct", "cloud_wrong", "unknown"]
    result = as_trained("x", [predicted(i, outcome) for i, outcome in enumerate(outcomes)])
    assert result.called == [False, False, True, True, True]
    assert (called(result), accuracy(result)) == (0.6, 0.5)


def test_prices_are_the_configs_of_today_for_the_tokens_of_training(finish: Callable[..., Finished]) -> None:
    """Also where the run was made without prices."""
    runs = []
    for seed in (20, 21):
        run = finish(Unit("GAPG", {}, seed), {}, [{"step": 1, "oracle/requests": 50, "oracle/cost": 0.0}])
        usage = {"requests": 50, "prompt_tokens": 60_000, "completion_tokens": 20_000, "cost": 0.0}
        (run.folder / "done.json").write_text(json.dumps({"oracle": usage}))
        runs.append(run)
    assert prices(runs).call == 1, "the config names no price"
    priced = {"oracle.price_per_million_prompt": "1", "oracle.price_per_million_completion": "2"}
    found = prices([Finished(run.unit, run.folder, load_config("quickstart", priced)) for run in runs])
    assert found.call == pytest.approx(0.002)
    assert found.local == pytest.approx(0.00002)
    assert "the mean of 100 paid" in found.text
