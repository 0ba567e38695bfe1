"""An oracle that must send nothing: what is cached comes back, all else is a question that nobody was asked."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest

from gapg_rollout.oracle.cache import CacheError, sampling_settings
from gapg_rollout.oracle.offline import NOT_ASKED, CachedAnswers, OfflineOracle
from gapg_rollout.oracle.solver import SolverOracle
from gapg_rollout.records import Oracle, OracleUsage
from tests.rollout.oracle_checks import Make, question

SAMPLING = sampling_settings(0.0, 1024, "max_tokens")


def cached(url: str, model: str, path: Path, samples: int = 1, sampling: Any = SAMPLING) -> OfflineOracle:
    return OfflineOracle(CachedAnswers(url, model, sampling, samples, path))


def test_without_answers_nobody_is_asked() -> None:
    before = threading.active_count()
    oracle: Oracle = OfflineOracle()
    assert oracle.ask(question()).result(0) == [NOT_ASKED]
    assert NOT_ASKED.text is None and NOT_ASKED.offline and not NOT_ASKED.permanent
    assert oracle.usage == OracleUsage(), "nobody was asked, so nobody failed"
    assert threading.active_count() == before
    oracle.restore(OracleUsage(requests=3))
    assert oracle.usage == OracleUsage(requests=3)
    oracle.close()
    oracle.close()


@pytest.mark.parametrize("temperature", [None, 0.7])
@pytest.mark.parametrize("field", ["max_tokens", "max_completion_tokens"])
def test_what_was_paid_for_is_found_and_nothing_else(
    temperature: float | None, field: Any, make: Make, server: Any, tmp_path: Path, bare_environment: None
) -> None:
    """Two of three samples are there: the third failed. Other settings are another cloud."""
    model = f"paid-{temperature}-{field}"
    server.plan(model, {}, {}, {"status": 400, "message": "flagged"})
    path, settings = tmp_path / "oracle.sqlite", {"temperature": temperature, "max_tokens_field": field}
    asked = make(model, samples=3, cache_path=path, max_retries=0, **settings)
    assert sum(a.text is None for a in asked.ask(question()).result(20)) == 1
    assert server.seen(model)["last"].get("temperature") == temperature
    sampling = sampling_settings(temperature, 1024, field)
    oracle = cached(server.url + "/", model, path, samples=3, sampling=sampling)
    answers = oracle.ask(question()).result(0)
    assert [(a.text, a.cached, a.cost, a.offline) for a in answers] == [("answer to q", True, 0.0, False)] * 2
    assert oracle.ask(question("other")).result(0) == [NOT_ASKED]
    assert oracle.usage == OracleUsage(cache_hits=2)
    for other in (
        cached(server.url, "another", path, sampling=sampling),
        cached(server.url + "/v2", model, path, sampling=sampling),
        cached(server.url, model, path, sampling=sampling | {field: 9}),
    ):
        assert other.ask(question()).result(0) == [NOT_ASKED]
        other.close()
    assert server.seen(model)["requests"] == 3
    oracle.close()
    oracle.close()
    (broken,) = oracle.ask(question()).result(0)
    assert not broken.offline and "closed" in str(broken.error), "nobody can tell is another thing than none"
    assert oracle.usage.failures == 1


def test_a_missing_cache_is_not_made(tmp_path: Path) -> None:
    with pytest.raises(CacheError, match=r"no answer cache .*none\.sqlite"):
        cached("https://cloud.invalid/v1", "m", tmp_path / "none.sqlite")
    assert not list(tmp_path.iterdir())


def test_a_solver_knows_all_answers_without_being_asked() -> None:
    solver = SolverOracle(str, accuracy=0.5, wrong="no", samples=3)
    oracle = OfflineOracle(solver)
    for name in "abcdef":
        assert oracle.ask(question(name)).result(0) == solver.ask(question(name)).result(0)
    assert oracle.usage == OracleUsage(cache_hits=18)
    assert solver.usage == OracleUsage(requests=18), "only what it was asked itself"
