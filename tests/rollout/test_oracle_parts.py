"""What the cloud client is made of: the cache, the rate limiter, the ledger, the back-off."""

from __future__ import annotations

import asyncio
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gapg_rollout.oracle.cache import AnswerCache, CacheError, cache_key
from gapg_rollout.oracle.limits import Ledger, RateLimiter
from gapg_rollout.oracle.retry import backoff_s, retry_after_s
from gapg_rollout.records import OracleAnswer, OracleUsage
from tests.rollout.oracle_checks import spend

MESSAGES = ({"role": "user", "content": "q"},)


def put(cache: AnswerCache, key: str, text: str, cost: float = 0.0) -> None:
    reservation, _ = cache.reserve("run", 1.0, None, 60)
    assert reservation is not None
    cache.settle("run", reservation, spend(cost, 1), key, OracleAnswer(text, None, False, 3, 4, cost))


def stored(text: str) -> OracleAnswer:
    """As it is given again."""
    return OracleAnswer(text, None, True, 3, 4)


def test_the_key_depends_on_everything_an_answer_depends_on() -> None:
    greedy = {"temperature": 0.0, "max_tokens": 8}
    base = cache_key("http://a", "m", MESSAGES, greedy, 0)
    assert base == cache_key("http://a", "m", ({"content": "q", "role": "user"},), dict(reversed(greedy.items())), 0)
    others = [
        cache_key("http://b", "m", MESSAGES, greedy, 0),
        cache_key("http://a", "n", MESSAGES, greedy, 0),
        cache_key("http://a", "m", MESSAGES * 2, greedy, 0),
        cache_key("http://a", "m", MESSAGES, {**greedy, "temperature": 0.1}, 0),
        cache_key("http://a", "m", MESSAGES, greedy, 1),
    ]
    assert len({base, *others}) == 6


@pytest.mark.parametrize("text", ["", "x", "é\u2028\0z", "a" * 100_000])
def test_what_is_stored_comes_back(tmp_path: Path, text: str) -> None:
    cache = AnswerCache(tmp_path / "c.sqlite")
    put(cache, "k", text, cost=0.5)
    put(cache, "k", "another")
    cache.close()
    cache = AnswerCache(tmp_path / "c.sqlite")
    assert cache.get("k") == stored(text)
    assert cache.get("other") is None
    cache.close()


def test_processes_write_at_once_without_loss(tmp_path: Path) -> None:
    program = """
import sys
from gapg_rollout.oracle.cache import AnswerCache
from gapg_rollout.records import OracleAnswer, OracleUsage
cache, spent = AnswerCache(sys.argv[1]), OracleUsage(requests=1, cost=2.0)
for i in range(150):
    for key, text in [(f"{sys.argv[2]}-{i}", "x" * 500), (f"both-{i}", "y")]:
        cache.settle("run", cache.reserve("run", 3.0, None, 60)[0], spent, key, OracleAnswer(text))
"""
    command = [sys.executable, "-c", program, str(tmp_path / "c.sqlite")]
    processes = [subprocess.Popen([*command, name]) for name in "ab"]
    assert [p.wait(timeout=30) for p in processes] == [0, 0]
    cache = AnswerCache(tmp_path / "c.sqlite")
    assert all(cache.get(f"{name}-{i}") for name in ("a", "b", "both") for i in range(150))
    assert cache.spent("run") == spend(1200.0, 600)


def test_a_reservation_is_open_then_spent_and_may_be_settled_late() -> None:
    cache = AnswerCache()
    (kept, before), (died, between) = cache.reserve("a", 3.0, 10.0, 60), cache.reserve("a", 4.0, 10.0, -1)
    assert (before, between) == (0, 0)
    assert cache.reserve("a", 3.5, 10.0, 60) == (None, 4)
    assert cache.reserve("a", 3.0, 10.0, -1)[0] is not None  # 4 spent and 3 open leave 3
    assert cache.spent("a") == spend(7.0)
    assert cache.reserve("b", 10.0, 10.0, 60)[0] is not None
    assert kept is not None and died is not None
    cache.settle("a", kept, spend(1.0, 1, 2, 3))
    cache.settle("a", died, spend(2.0, 1, 4, 5))
    assert cache.spent("a") == spend(6.0, 2, 6, 8)
    cache.raise_spent("a", 2.0)
    assert cache.spent("a").cost == 6
    cache.raise_spent("a", 6.0)
    assert cache.spent("a") == spend(9.0, 2, 6, 8)  # with what died unsettled
    assert cache.reserve("a", 1.5, 10.0, 60)[0] is None


def test_answer_and_money_are_written_together_or_not_at_all(tmp_path: Path) -> None:
    cache = AnswerCache(tmp_path / "c.sqlite")
    sqlite3.connect(tmp_path / "c.sqlite", isolation_level=None).execute("ALTER TABLE answers RENAME TO moved")
    with pytest.raises(CacheError, match="no such table"):
        put(cache, "k", "x", cost=1.0)
    assert cache.spent("run") == spend()
    assert cache.reserve("run", 1.0, 1.5, 60) == (None, 0)  # what was set aside is open still
    cache.close()
    with pytest.raises(CacheError, match="was closed"):
        cache.spent("run")


def test_a_file_from_before_the_money_was_kept(tmp_path: Path) -> None:
    db = sqlite3.connect(tmp_path / "c.sqlite", isolation_level=None)
    db.execute(
        "CREATE TABLE answers (key TEXT PRIMARY KEY, text TEXT NOT NULL, prompt_tokens INTEGER NOT NULL,"
        " completion_tokens INTEGER NOT NULL, cost REAL NOT NULL) WITHOUT ROWID"
    )
    db.execute("INSERT INTO answers VALUES ('k', 'x', 3, 4, 3.0)")
    db.execute("PRAGMA user_version = 1")
    db.close()
    cache = AnswerCache(tmp_path / "c.sqlite")
    assert cache.get("k") == stored("x")
    put(cache, "k2", "y", cost=0.5)
    assert cache.spent("run") == spend(0.5, 1)


def test_a_locked_file_is_an_error_that_says_so(tmp_path: Path) -> None:
    cache = AnswerCache(tmp_path / "c.sqlite", busy_timeout_s=0.1)
    holder = sqlite3.connect(tmp_path / "c.sqlite", isolation_level=None)
    holder.execute("BEGIN EXCLUSIVE")
    with pytest.raises(CacheError, match=r"another process held it for over 0\.1 s"):
        put(cache, "k", "x")
    holder.execute("ROLLBACK")
    put(cache, "k", "x")
    assert cache.get("k") == stored("x")


def test_a_page_damaged_later_is_an_error_with_the_fix(tmp_path: Path) -> None:
    path = tmp_path / "c.sqlite"
    cache = AnswerCache(path)
    for i in range(200):
        put(cache, f"{i:03}", "x" * 100)
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
    assert all(times[i + 4] - times[i] >= 0.27 for i in range(6))
    assert times[-1] - times[0] < 20  # 0.6 s, where nobody waits for more than the window


def test_no_window_holds_more_tokens_than_allowed_and_a_giant_passes_alone() -> None:
    times = asyncio.run(admissions(RateLimiter(None, 100, period_s=1.0), [60, 40, 500, 10]))
    assert times[1] - times[0] < 0.9
    assert times[2] - times[1] >= 0.97
    assert times[3] - times[2] >= 0.97


def test_what_was_not_used_is_free_again() -> None:
    async def run() -> float:
        limiter = RateLimiter(None, 100, period_s=120)
        limiter.correct(await limiter.admit(100), 20)
        start = time.monotonic()
        await limiter.admit(80)
        return time.monotonic() - start

    assert asyncio.run(run()) < 30


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.tuples(st.floats(0, 50), st.floats(0, 1), st.integers(0, 1)), max_size=20),
    st.floats(0, 100),
    st.floats(0, 20),
)
def test_no_ledger_of_an_account_passes_its_cap(
    costs: list[tuple[float, float, int]], cap: float, restored: float
) -> None:
    async def send(ledger: Ledger, worst: float, part: float) -> None:
        reservation, before = await ledger.reserve(worst, lockouts=0)
        if reservation is None:
            assert before + worst > cap
        else:
            await ledger.settle(reservation, spend(worst * part))

    async def run() -> tuple[float, float]:
        cache = AnswerCache()
        ledgers = [Ledger(cap, cache, "run", 60) for _ in range(2)]
        ledgers[0].restore(OracleUsage(cost=restored))
        await asyncio.wait_for(asyncio.gather(*(send(ledgers[which], worst, part) for worst, part, which in costs)), 9)
        return sum(ledger.usage.cost for ledger in ledgers), cache.spent("run").cost

    counted, stored = asyncio.run(run())
    assert counted <= max(cap, restored) * (1 + 1e-12)
    assert counted == pytest.approx(stored, rel=1e-12)


def test_what_is_given_up_before_it_is_sent_is_not_left_open(tmp_path: Path) -> None:
    async def run() -> None:
        cache = AnswerCache(tmp_path / "c.sqlite")
        holder = sqlite3.connect(tmp_path / "c.sqlite", isolation_level=None)
        holder.execute("BEGIN IMMEDIATE")
        waiting = asyncio.create_task(Ledger(10, cache, "run", 60).reserve(6, lockouts=0))
        await asyncio.sleep(0.1)
        waiting.cancel()
        holder.execute("ROLLBACK")
        with pytest.raises(asyncio.CancelledError):
            await waiting
        assert cache.reserve("run", 10, 10, 60)[0] is not None  # all of it is free

    asyncio.run(run())


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
