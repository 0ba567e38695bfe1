"""Outages and refusals: what is hopeless fails at once for all, says why, and what was paid for is given."""

from __future__ import annotations

import asyncio
import logging
import socket
import sqlite3
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from gapg_rollout.oracle import openai as oracle_openai
from gapg_rollout.oracle.breaker import ROW, Attempt, Breaker, Unavailable
from gapg_rollout.oracle.cache import AnswerCache
from gapg_rollout.oracle.retry import Failure
from gapg_rollout.records import OracleAnswer, OracleUsage
from tests.rollout.oracle_checks import PRICES, Make, ask, many, question, spend


def test_a_hanging_server_costs_one_time_limit_and_its_return_is_noticed(
    make: Make, server: Any, caplog: pytest.LogCaptureFixture
) -> None:
    # the default settings, 60 times as fast
    oracle = make("hanging", concurrency=16, timeout_s=1.0, deadline_s=5.0, max_retries=5, **PRICES)
    server.plan("hanging", {"kind": "hang"})
    start = time.monotonic()
    answers = ask(oracle, *many(160))
    assert time.monotonic() - start < 25  # each on its own, ten rounds of 5 s
    down = [a for a in answers if a.error and a.error.startswith("the oracle is down: ")]
    assert len(down) == 160 and not any(a.permanent for a in answers)
    assert "no reply from" in answers[-1].error and "asked again in" in answers[-1].error
    sent = server.seen("hanging")["requests"]
    assert ROW <= sent <= 32 and oracle.usage.failures == 160
    assert oracle.usage.cost >= sent * 15  # whatever became of them at the server
    assert ask(oracle, "again")[0].error.startswith("the oracle is down")
    assert server.seen("hanging")["requests"] == sent

    server.plan("hanging", {})
    time.sleep(1.0)
    assert [a.text for a in ask(oracle, *many(20))] == [f"answer to {q}" for q in many(20)]
    said = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert len(said) == 2 and "is down" in said[0] and "answers again" in said[1]


def test_a_dead_port_costs_moments(make: Make) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
    oracle = make("dead", base_url=url, timeout_s=0.5, concurrency=16, max_retries=8)
    start = time.monotonic()
    answers = ask(oracle, *many(160))
    assert time.monotonic() - start < 25  # not its back-offs' 45 s
    assert all(f"cannot connect to {url}" in (a.error or "") for a in answers)


def test_a_short_trouble_is_waited_out(make: Make, server: Any) -> None:
    server.plan("blip", *[{"status": 503}] * 30, {})
    answers = ask(make("blip", concurrency=16), *many(30))
    assert all(a.text is not None for a in answers)


PERMANENT = {
    "revoked": {"status": 401, "message": "Incorrect API key provided"},
    "in-a-200": {"kind": "raw", "text": '{"error": {"message": "Insufficient Balance", "code": 402}}'},
}


@pytest.mark.parametrize("name", PERMANENT)
def test_a_refusal_for_good_in_the_middle_stops_all(make: Make, server: Any, name: str) -> None:
    server.plan(name, {"sleep": 0.1}, {}, {"sleep": 0.1, **PERMANENT[name]})
    oracle = make(name, concurrency=3)
    first, second = ask(oracle, "first", "second")
    assert first.text and second.text
    answers = ask(oracle, *many(30))
    assert {(a.text, a.permanent) for a in answers} == {(None, True)}
    (words,) = {a.error for a in answers}  # the same for all
    said = PERMANENT[name].get("message", "Insufficient Balance")
    assert words is not None and said in words and "(" in words
    assert server.seen(name)["requests"] <= 2 + 3
    known, unknown = ask(oracle, "first", "new")
    assert known.cached and unknown.error == words and unknown.permanent
    assert server.seen(name)["requests"] <= 2 + 3
    assert ask(make(name), "third")[0].error is not None  # another object asks again
    assert server.seen(name)["requests"] <= 2 + 4


def test_what_concerns_one_question_stops_no_other(make: Make, server: Any) -> None:
    server.plan("flagged", {}, {"status": 403, "message": "flagged by moderation"}, {})
    oracle = make("flagged")
    (first,), (refused,), (last,) = ask(oracle, "a"), ask(oracle, "b"), ask(oracle, "c")
    assert (first.text, last.text) == ("answer to a", "answer to c")
    assert refused.text is None and "flagged by moderation" in (refused.error or "") and not refused.permanent


def test_the_same_refusal_from_the_start_is_one_for_good(make: Make, server: Any) -> None:
    server.plan("misspelt", {"status": 404, "message": "no such model"})
    answers = ask(make("misspelt", concurrency=2), *many(40))
    assert all("no such model" in (a.error or "") for a in answers)
    assert sum(a.permanent for a in answers) > 25 and answers[-1].permanent
    assert server.seen("misspelt")["requests"] <= ROW + 2

    server.plan("renamed", {}, {"status": 404, "message": "no such model"})
    assert not any(a.permanent for a in ask(make("renamed", concurrency=1), *many(20)))


def test_a_request_that_is_open_when_the_money_ends_is_given(make: Make, server: Any) -> None:
    server.plan("last", {"sleep": 0.3}, {"status": 402, "message": "pay"})
    oracle = make("last", concurrency=2)
    paid = oracle.ask(question("a"))
    while server.seen("last")["requests"] < 1:
        time.sleep(0.01)
    assert ask(oracle, "b")[0].permanent and paid.result(20)[0].text == "answer to a"


def test_a_wait_before_a_retry_holds_nobody_up(make: Make, server: Any) -> None:
    server.plan("patient", {"status": 503, "headers": {"Retry-After": "2"}}, {})
    oracle = make("patient", concurrency=1)
    slow = oracle.ask(question("slow"))
    while server.seen("patient")["requests"] < 1:
        time.sleep(0.01)
    assert all(a.text for a in ask(oracle, *many(10)))
    assert not slow.done()
    assert slow.result(20)[0].text == "answer to slow"
    assert server.seen("patient")["most_open"] == 1


def test_a_locked_cache_fails_all_who_wait_at_once(
    make: Make, server: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(oracle_openai, "AnswerCache", partial(AnswerCache, busy_timeout_s=0.4))
    oracle = make("locked", cache_path=tmp_path / "c.sqlite", concurrency=30)
    holder = sqlite3.connect(tmp_path / "c.sqlite", isolation_level=None)
    holder.execute("BEGIN EXCLUSIVE")
    start = time.monotonic()
    answers = ask(oracle, *many(60))
    assert time.monotonic() - start < 12  # one after another, 24 s
    assert all("another process held it" in (a.error or "") and not a.permanent for a in answers)
    assert server.seen("locked")["requests"] == 0
    holder.execute("ROLLBACK")
    assert all(a.text for a in ask(oracle, *many(5)))

    server.plan("locked", {"sleep": 0.2})  # locked while requests are open: they were paid for
    texts = many(30, "paid")
    futures = [oracle.ask(question(t)) for t in texts]
    while server.seen("locked")["requests"] < 35:
        time.sleep(0.01)
    holder.execute("BEGIN EXCLUSIVE")
    start = time.monotonic()
    assert [f.result(20)[0].text for f in futures] == [f"answer to {t}" for t in texts]
    assert time.monotonic() - start < 8  # one after another, 12 s
    holder.close()


def test_a_full_disk_loses_no_answer(make: Make, server: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    oracle = make("full", cache_path=tmp_path / "c.sqlite", **PRICES)
    assert ask(oracle, "small")[0].text
    db = oracle._cache._db
    assert db is not None
    ((pages,),) = db.execute("PRAGMA page_count").fetchall()
    db.execute(f"PRAGMA max_page_count = {pages}")
    (answer,) = ask(oracle, "x" * 20_000)
    assert answer.text == "answer to " + "x" * 20_000 and answer.cost == 15
    assert oracle.usage == OracleUsage(2, 0, 0, 20, 10, 30.0)
    assert "an oracle answer was paid for but not cached" in caplog.text and "free some space" in caplog.text


def test_a_reply_without_text_is_billed_and_asked_again(make: Make, server: Any, tmp_path: Path) -> None:
    server.plan("null", {"kind": "empty"}, {"kind": "empty"}, {})
    oracle = make("null", cache_path=tmp_path / "c.sqlite", **PRICES)
    answers = [ask(oracle, "q")[0] for _ in range(3)]
    assert [a.text for a in answers] == [None, None, "answer to q"]
    assert "finish_reason length" in (answers[0].error or "")
    assert oracle.usage == OracleUsage(3, 0, 2, 30, 15, 45.0)


def test_an_empty_answer_of_an_earlier_version_is_asked_again(make: Make, tmp_path: Path) -> None:
    first = make("old", cache_path=tmp_path / "c.sqlite")
    assert ask(first, "q")[0].text
    first.close()
    db = sqlite3.connect(tmp_path / "c.sqlite", isolation_level=None)
    db.execute("UPDATE answers SET text = ''")
    db.close()
    second = make("old", cache_path=tmp_path / "c.sqlite")
    assert [ask(second, "q")[0].cached for _ in range(2)] == [False, True]


@pytest.mark.parametrize(
    ("name", "total"),
    [
        ("cost", float("nan")), ("cost", float("inf")), ("cost", -0.5), ("cost", "3"), ("cost", None),
        ("cost", 10**400),
        ("requests", -1), ("requests", 2.5), ("failures", True), ("prompt_tokens", float("nan")),
        ("completion_tokens", [1]), ("cache_hits", "7"),
    ],
)  # fmt: skip
def test_totals_that_are_none_are_refused(make: Make, name: str, total: Any) -> None:
    oracle = make("restored", spending_cap=10.0, **PRICES)
    with pytest.raises(ValueError, match=f"^the oracle's total of {name} must be .* number of 0 or more, not"):
        oracle.restore(OracleUsage(**{name: total}))
    assert oracle.usage == OracleUsage()


def test_a_bill_over_what_was_set_aside_is_counted_in_full(make: Make, server: Any) -> None:
    usage = {"prompt_tokens": 10, "completion_tokens": 900, "total_tokens": 60_910}
    server.plan("reasons", {"usage": usage})
    oracle = make("reasons", spending_cap=5000.0, max_tokens=1000, **PRICES)
    answers = ask(oracle, "a"), ask(oracle, "b")
    assert answers[0][0].text and answers[1][0].permanent
    assert oracle.usage.cost == 60_910


DOWN = Failure("HTTP 503", "server", retry=True, status=503)


async def fail(breaker: Breaker) -> None:
    async with breaker.attempt() as attempt:
        breaker.send(attempt)
        await asyncio.sleep(0.025)
        breaker.failed(attempt, DOWN)


async def wait(breaker: Breaker) -> Attempt:
    async with breaker.attempt() as attempt:
        await asyncio.sleep(9)
    return attempt


def test_the_breaker_waits_for_what_was_sent_before_the_first_failure() -> None:
    async def run() -> None:
        breaker = Breaker("u", timeout_s=0.2)
        async with breaker.attempt() as slow:
            breaker.send(slow)
            for _ in range(ROW + 2):
                await fail(breaker)  # a slow answer may still come
            breaker.right(slow)
        for _ in range(ROW - 1):
            await fail(breaker)
        waiting = asyncio.create_task(wait(breaker))
        await asyncio.sleep(0)
        await fail(breaker)
        with pytest.raises(Unavailable, match="is down: 10 requests in a row failed, the last one: HTTP 503"):
            await waiting
        with pytest.raises(Unavailable, match=r"asked again in 0\.\d s"):
            await wait(breaker)

    asyncio.run(run())


def test_one_probe_goes_out_and_the_others_wait_for_it() -> None:
    async def run() -> None:
        breaker = Breaker("u", timeout_s=0.2)
        for _ in range(ROW):
            await fail(breaker)
        for right in (False, True):
            await asyncio.sleep(0.21)
            async with breaker.attempt() as probe:
                breaker.send(probe)
                others = [asyncio.create_task(fail(breaker)) for _ in range(5)]
                await asyncio.sleep(0.03)
                assert not any(other.done() for other in others)
                breaker.right(probe) if right else breaker.failed(probe, DOWN)
            ends = await asyncio.gather(*others, return_exceptions=True)
            assert [isinstance(end, Unavailable) for end in ends] == [not right] * 5

    asyncio.run(run())


def test_an_account_that_lapses_is_settled(tmp_path: Path) -> None:
    cache = AnswerCache(tmp_path / "c.sqlite")
    reservation, _ = cache.reserve("run", 3.0, 10.0, 60)
    assert reservation is not None
    cache.settle("run", reservation, spend(12.0, 1), "k", OracleAnswer("x"))
    assert cache.reserve("run", 0.1, 10.0, 60)[0] is None  # what it was more is seen by the next
    cache.forget_empty()
    assert cache.get("k") == OracleAnswer("x", cached=True)
