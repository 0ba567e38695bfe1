"""What the cloud client is made of: the cache, the rate limiter, the ledger, the back-off."""

from __future__ import annotations

import asyncio
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gapg.rollout.cache import AnswerCache, CachedAnswer, CacheError, cache_key
from gapg.rollout.oracle_limits import Ledger, RateLimiter
from gapg.rollout.oracle_retry import backoff_s, retry_after_s
from gapg.rollout.records import OracleUsage

MESSAGES = ({"role": "user", "content": "q"},)


def test_the_key_depends_on_everything_an_answer_depends_on() -> None:
    base = cache_key("http://a", "m", MESSAGES, {"temperature": 0.0, "max_tokens": 8}, 0)
    assert base == cache_key(
        "http://a", "m", ({"content": "q", "role": "user"},), {"max_tokens": 8, "temperature": 0.0}, 0
    )
    others = [
        cache_key("http://b", "m", MESSAGES, {"temperature": 0.0, "max_tokens": 8}, 0),
        cache_key("http://a", "n", MESSAGES, {"temperature": 0.0, "max_tokens": 8}, 0),
        cache_key("http://a", "m", MESSAGES * 2, {"temperature": 0.0, "max_tokens": 8}, 0),
        cache_key("http://a", "m", MESSAGES, {"temperature": 0.1, "max_tokens": 8}, 0),
        cache_key("http://a", "m", MESSAGES, {"temperature": 0.0, "max_tokens": 8}, 1),
    ]
    assert len({base, *others}) == 6


@pytest.mark.parametrize("text", ["", "x", "é\u2028\0z", "a" * 100_000])
def test_what_is_stored_comes_back(tmp_path: Path, text: str) -> None:
    cache = AnswerCache(tmp_path / "c.sqlite")
    cache.put("k", CachedAnswer(text, 3, 4, 0.5))
    cache.put("k", CachedAnswer("another"))
    cache.close()
    cache = AnswerCache(tmp_path / "c.sqlite")
    assert cache.get("k") == CachedAnswer(text, 3, 4, 0.5)
    assert cache.get("other") is None
    assert len(cache) == 1
    cache.close()


def test_processes_write_at_once_without_loss(tmp_path: Path) -> None:
    program = """
import sys
from gapg.rollout.cache import AnswerCache, CachedAnswer
cache = AnswerCache(sys.argv[1])
for i in range(150):
    cache.put(f"{sys.argv[2]}-{i}", CachedAnswer("x" * 500))
    cache.put(f"both-{i}", CachedAnswer("y"))
"""
    command = [sys.executable, "-c", program, str(tmp_path / "c.sqlite")]
    processes = [subprocess.Popen([*command, name]) for name in "ab"]
    assert [p.wait(timeout=30) for p in processes] == [0, 0]
    assert len(AnswerCache(tmp_path / "c.sqlite")) == 450


def test_a_locked_file_is_an_error_that_says_so(tmp_path: Path) -> None:
    cache = AnswerCache(tmp_path / "c.sqlite", busy_timeout_s=0.1)
    holder = sqlite3.connect(tmp_path / "c.sqlite", isolation_level=None)
    holder.execute("BEGIN EXCLUSIVE")
    with pytest.raises(CacheError, match=r"another process held it for over 0\.1 s"):
        cache.put("k", CachedAnswer("x"))
    holder.execute("ROLLBACK")
    cache.put("k", CachedAnswer("x"))
    assert cache.get("k") == CachedAnswer("x")


def test_a_page_damaged_later_is_an_error_with_the_fix(tmp_path: Path) -> None:
    path = tmp_path / "c.sqlite"
    cache = AnswerCache(path)
    for i in range(200):
        cache.put(f"{i:03}", CachedAnswer("x" * 100))
    cache.close()
    data = bytearray(path.read_bytes())
    data[4096:] = b"\xff" * (len(data) - 4096)
    path.write_bytes(data)
    with pytest.raises(CacheError, match="move it away"):
        AnswerCache(path).get("100")


def test_a_file_of_another_version_or_place_is_refused(tmp_path: Path) -> None:
    db = sqlite3.connect(tmp_path / "c.sqlite")
    db.execute("PRAGMA user_version = 99")
    db.close()
    with pytest.raises(CacheError, match="layout 99"):
        AnswerCache(tmp_path / "c.sqlite")
    (tmp_path / "file").write_text("")
    with pytest.raises(CacheError, match="check that the folder exists"):
        AnswerCache(tmp_path / "file" / "c.sqlite")


async def admissions(limiter: RateLimiter, tokens: list[int]) -> list[float]:
    async def one(n: int) -> float:
        await limiter.admit(n)
        return time.monotonic()

    return sorted(await asyncio.gather(*(one(n) for n in tokens)))


def test_no_window_holds_more_requests_than_allowed() -> None:
    times = asyncio.run(admissions(RateLimiter(4, None, period_s=0.3), [1] * 10))
    assert all(times[i + 4] - times[i] >= 0.29 for i in range(6))
    assert times[-1] - times[0] < 1.2


def test_no_window_holds_more_tokens_than_allowed_and_a_giant_passes_alone() -> None:
    times = asyncio.run(admissions(RateLimiter(None, 100, period_s=0.3), [60, 40, 500, 10]))
    assert times[1] - times[0] < 0.1
    assert times[2] - times[1] >= 0.29
    assert times[3] - times[2] >= 0.29


def test_what_was_not_used_is_free_again() -> None:
    async def run() -> float:
        limiter = RateLimiter(None, 100, period_s=30)
        limiter.correct(await limiter.admit(100), 20)
        start = time.monotonic()
        await limiter.admit(80)
        return time.monotonic() - start

    assert asyncio.run(run()) < 0.5


@given(st.lists(st.tuples(st.floats(0, 50), st.floats(0, 1)), max_size=30), st.floats(0, 100))
def test_the_ledger_never_passes_its_cap(costs: list[tuple[float, float]], cap: float) -> None:
    async def spend(ledger: Ledger, worst: float, part: float) -> None:
        if await ledger.reserve(worst):
            await asyncio.sleep(0)
            ledger.settle(worst, cost=worst * part)
        else:
            assert ledger.usage.cost + worst > cap

    async def run() -> OracleUsage:
        ledger = Ledger(cap)
        await asyncio.wait_for(asyncio.gather(*(spend(ledger, worst, part) for worst, part in costs)), 5)
        return ledger.usage

    assert asyncio.run(run()).cost <= cap * (1 + 1e-12)


def test_retry_after_in_every_form() -> None:
    assert retry_after_s({"retry-after": "3"}) == 3
    assert retry_after_s({"retry-after-ms": "1500", "retry-after": "3"}) == 1.5
    assert retry_after_s({"retry-after": "Thu, 01 Jan 1970 00:01:40 GMT"}, now=90.0) == 10
    assert retry_after_s({"retry-after": "Thu, 01 Jan 1970 00:01:40 GMT"}, now=900.0) == 0
    assert retry_after_s({}) == retry_after_s({"retry-after": "soon"}) == retry_after_s({"retry-after": "-5"}) == 0


@given(st.integers(0, 30), st.floats(0, 100), st.floats(0, 1, exclude_max=True))
def test_the_back_off_grows_to_a_bound_and_never_undercuts_the_server(
    attempt: int, asked: float, jitter: float
) -> None:
    own = min(30.0, 0.5 * 2**attempt)
    assert max(asked, own / 2) <= backoff_s(attempt, asked, jitter) <= max(own, asked + own / 4)
