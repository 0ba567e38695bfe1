"""The cloud client against a real HTTP server that fails for real."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest

from gapg_rollout.oracle.cache import CacheError
from gapg_rollout.oracle.openai import OpenAIOracle
from gapg_rollout.records import Oracle, OracleAnswer, OracleUsage
from tests.rollout.oracle_checks import KEY, PRICES, Make, question


def get(future: Future[list[OracleAnswer]]) -> OracleAnswer:
    (answer,) = future.result(timeout=20)
    return answer


def test_an_answer_with_its_tokens_and_cost(make: Make, server: Any) -> None:
    oracle: Oracle = make("plain", price_per_million_prompt=1e6, price_per_million_completion=2e6, temperature=0.5)
    assert get(oracle.ask(question())) == OracleAnswer("answer to q", None, False, 10, 5, 20.0)
    assert oracle.usage == OracleUsage(requests=1, prompt_tokens=10, completion_tokens=5, cost=20.0)
    last = server.seen("plain")["last"]
    assert (last["temperature"], last["max_tokens"]) == (0.5, 1024)


def test_every_sample_is_a_request_of_its_own(make: Make, server: Any) -> None:
    oracle = make("samples", samples=3)
    assert [a.text for a in oracle.ask(question()).result(20)] == ["answer to q"] * 3
    assert [a.cached for a in oracle.ask(question()).result(20)] == [True] * 3
    assert server.seen("samples")["requests"] == 3
    assert (oracle.usage.requests, oracle.usage.cache_hits) == (3, 3)


@pytest.mark.parametrize(
    "fault",
    [{"status": 500}, {"status": 503}, {"status": 408}, {"kind": "reset"}, {"kind": "malformed"}, {"sleep": 2.0}],
    ids=lambda fault: "-".join(map(str, fault.values())),
)
def test_a_passing_fault_is_retried(make: Make, server: Any, fault: dict[str, Any]) -> None:
    model = "passing-" + "-".join(map(str, fault.values()))
    server.plan(model, fault, {})
    oracle = make(model, timeout_s=1.0)
    assert get(oracle.ask(question())).text == "answer to q"
    assert server.seen(model)["requests"] == oracle.usage.requests == 2
    assert oracle.usage.failures == 0


def test_retry_after_is_honoured(make: Make, server: Any) -> None:
    server.plan("patience", {"status": 429, "headers": {"Retry-After": "1"}}, {})
    assert get(make("patience").ask(question())).text == "answer to q"
    first, second = server.seen("patience")["times"]
    assert second - first >= 1.0


def test_a_wait_beyond_the_deadline_fails_at_once(make: Make, server: Any) -> None:
    server.plan("too-long", {"status": 429, "headers": {"Retry-After": "3600"}})
    start = time.monotonic()
    answer = get(make("too-long", deadline_s=20.0).ask(question()))
    assert answer.text is None and answer.error is not None and "deadline of 20 s" in answer.error
    assert time.monotonic() - start < 18


def test_the_deadline_ends_a_question_that_hangs(make: Make, server: Any) -> None:
    server.plan("hangs", {"sleep": 60})
    start = time.monotonic()
    answer = get(make("hangs", timeout_s=0.3, deadline_s=1.0, max_retries=8).ask(question()))
    assert time.monotonic() - start < 25  # not its back-offs' 45 s
    assert answer.text is None and answer.error is not None and "no reply" in answer.error


@pytest.mark.parametrize(
    ("status", "hint", "code"),
    [
        (400, "temperature", None), (401, "api_key_env", None), (403, "model", None), (404, "/v1", None),
        (429, "fill the account up", "insufficient_quota"),
    ],
)  # fmt: skip
def test_a_permanent_error_fails_at_once_and_says_what_to_do(
    make: Make, server: Any, status: int, hint: str, code: str | None
) -> None:
    model = f"permanent-{status}"
    server.plan(model, {"status": status, "code": code})
    oracle = make(model)
    answer = get(oracle.ask(question()))
    assert answer.text is None and answer.error is not None
    assert f"HTTP {status}" in answer.error and hint in answer.error
    assert server.seen(model)["requests"] == 1
    assert oracle.usage == OracleUsage(requests=1, failures=1)


def test_a_failure_is_not_cached(make: Make, server: Any) -> None:
    server.plan("not-cached", {"status": 400}, {})
    oracle = make("not-cached")
    assert get(oracle.ask(question())).text is None
    assert get(oracle.ask(question())) == OracleAnswer("answer to q", None, False, 10, 5)


def test_no_more_requests_are_open_than_allowed(make: Make, server: Any) -> None:
    server.plan("narrow", {"sleep": 0.1})
    oracle = make("narrow", concurrency=3)
    assert all(f.result(20)[0].text for f in [oracle.ask(question(f"q{i}")) for i in range(12)])
    assert server.seen("narrow")["most_open"] == 3


def test_waiting_for_a_turn_does_not_use_up_the_deadline(make: Make, server: Any) -> None:
    server.plan("queue", {"sleep": 0.3})
    oracle = make("queue", concurrency=1, deadline_s=0.9)
    assert all(f.result(20)[0].text for f in [oracle.ask(question(f"q{i}")) for i in range(5)])


def test_the_same_question_asked_meanwhile_is_paid_once(make: Make, server: Any) -> None:
    server.plan("twins", {"sleep": 0.2})
    oracle = make("twins", price_per_million_prompt=1e6, price_per_million_completion=0)
    answers = [get(f) for f in [oracle.ask(question()) for _ in range(5)]]
    assert sorted((a.cached, a.cost) for a in answers) == [(False, 10.0)] + [(True, 0.0)] * 4
    assert server.seen("twins")["requests"] == 1
    assert (oracle.usage.cache_hits, oracle.usage.cost) == (4, 10.0)


def test_the_spending_cap_is_never_passed_and_is_used_up(make: Make, server: Any) -> None:
    # A request costs 15 and may cost up to its bytes + 32 + 20 at these prices: far more than what it is billed.
    server.plan("capped", {"sleep": 0.02})
    oracle = make("capped", spending_cap=400.0, max_tokens=20, concurrency=8, **PRICES)
    answers = [f.result(20)[0] for f in [oracle.ask(question(f"q{i:02}")) for i in range(60)]]
    refused = [a for a in answers if a.text is None]
    assert all("spending cap of 400 reached" in (a.error or "") and "raise the cap" in (a.error or "") for a in refused)
    assert all(a.permanent for a in refused)
    assert get(oracle.ask(question(f"q{answers.index(next(a for a in answers if a.text)):02}"))).cached
    assert 400 - 120 < oracle.usage.cost <= 400
    assert server.seen("capped")["requests"] * 15 == oracle.usage.cost
    assert oracle.usage.failures == len(refused) > 0

    resumed = make("capped", spending_cap=400.0, max_tokens=20, **PRICES)
    resumed.restore(oracle.usage)
    assert get(resumed.ask(question("new"))).text is None
    assert server.seen("capped")["requests"] == oracle.usage.requests


def test_answers_outlive_the_oracle(make: Make, server: Any, tmp_path: Path) -> None:
    first = make("restart", cache_path=tmp_path / "deep" / "cache.sqlite")
    paid = [get(first.ask(question(f"q{i}"))) for i in range(3)]
    first.close()
    second = make("restart", cache_path=tmp_path / "deep" / "cache.sqlite")
    found = [get(second.ask(question(f"q{i}"))) for i in range(3)]
    assert [a.text for a in found] == [a.text for a in paid]
    assert all(a.cached for a in found)
    assert second.usage == OracleUsage(cache_hits=3)
    assert server.seen("restart")["requests"] == 3
    assert not get(
        make("restart", cache_path=tmp_path / "deep" / "cache.sqlite", max_tokens=7).ask(question("q0"))
    ).cached


def test_a_server_killed_midway_is_a_failure_and_its_return_is_noticed(
    make_server: Callable[..., Any], tmp_path: Path
) -> None:
    doomed = make_server()
    doomed.plan("dies", {}, {"sleep": 5})
    oracle = OpenAIOracle(doomed.url, "dies", max_retries=1, timeout_s=10, deadline_s=10)
    assert get(oracle.ask(question("early"))).text == "answer to early"
    late = oracle.ask(question("late"))
    while doomed.seen("dies")["requests"] < 2:
        time.sleep(0.01)
    doomed.kill()
    answer = get(late)
    assert answer.text is None and answer.error is not None and "after 2 requests" in answer.error
    make_server(doomed.port)
    assert get(oracle.ask(question("late"))).text == "answer to late"
    oracle.close()


def test_close_ends_open_requests_at_once(make: Make, server: Any) -> None:
    server.plan("open", {"sleep": 60})
    oracle = make("open", concurrency=2, timeout_s=60)
    futures = [oracle.ask(question(f"q{i}")) for i in range(5)]
    while server.seen("open")["requests"] < 2:
        time.sleep(0.01)
    start = time.monotonic()
    oracle.close()
    assert time.monotonic() - start < 30
    assert {get(f).error for f in futures} == {"the oracle was closed"}
    oracle.close()
    assert get(oracle.ask(question())).error == "the oracle was closed"
    assert not any(t.name == "oracle" and t.is_alive() for t in threading.enumerate())


def test_the_key_is_sent_and_kept_nowhere(
    make: Make, server: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    monkeypatch.setenv("CLOUD_KEY", KEY)
    server.plan("secret", {"status": 400, "message": f"no such key: {KEY}"}, {})
    oracle = make("secret", api_key_env="CLOUD_KEY", cache_path=tmp_path / "c.sqlite")
    refused, answered = get(oracle.ask(question())), get(oracle.ask(question()))
    assert server.seen("secret")["auth"] == f"Bearer {KEY}" and answered.text == "answer to q"
    assert refused.error is not None and "no such key: [CLOUD_KEY]" in refused.error
    assert KEY not in repr(oracle) + repr(refused) + repr(answered) + repr(oracle.usage) + caplog.text
    oracle.close()
    assert all(KEY.encode() not in file.read_bytes() for file in tmp_path.iterdir())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"base_url": "https://me:secret-word@127.0.0.1/v1"}, "must not hold credentials"),
        ({"spending_cap": 1.0}, "needs price_per_million"),
        ({"requests_per_minute": 0}, "at least 1"),
        ({"concurrency": 0}, "must be positive"),
    ],
)
def test_unusable_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as refused:
        OpenAIOracle(**{"base_url": "http://127.0.0.1:1/v1", "model": "m", **settings})
    assert "secret-word" not in str(refused.value)


def test_a_proxy_is_not_asked_for_this_machine(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    assert "no_proxy" not in os.environ
    assert get(make("proxied", max_retries=0).ask(question())).text == "answer to q"


def test_a_damaged_cache_is_refused_with_the_fix(make: Make, tmp_path: Path) -> None:
    (tmp_path / "c.sqlite").write_bytes(b"this is no database" * 100)
    with pytest.raises(CacheError, match="move it away"):
        make("damaged", cache_path=tmp_path / "c.sqlite")
