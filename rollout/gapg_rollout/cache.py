"""Answers that were paid for, and what was paid: one SQLite file that several processes may use at once."""

from __future__ import annotations

import asyncio
import hashlib
import json
import sqlite3
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any, TypeVar

T = TypeVar("T")

LAYOUT = 1
"""Version of the tables, kept in the file's `user_version`. Files from before the money was kept have only `answers`,
and get the other tables when they are opened."""

TABLES = (
    "CREATE TABLE IF NOT EXISTS answers (key TEXT PRIMARY KEY, text TEXT NOT NULL,"
    " prompt_tokens INTEGER NOT NULL, completion_tokens INTEGER NOT NULL, cost REAL NOT NULL) WITHOUT ROWID",
    "CREATE TABLE IF NOT EXISTS spend (account TEXT PRIMARY KEY, cost REAL NOT NULL, requests INTEGER NOT NULL,"
    " prompt_tokens INTEGER NOT NULL, completion_tokens INTEGER NOT NULL) WITHOUT ROWID",
    "CREATE TABLE IF NOT EXISTS reservations (id INTEGER PRIMARY KEY AUTOINCREMENT, account TEXT NOT NULL,"
    " worst REAL NOT NULL, expires REAL NOT NULL)",
)


class CacheError(Exception):
    """The cache's file cannot be used. The message says what to do about it."""


class CacheLocked(CacheError):
    """Another process held the file for too long; it may let go later."""


@dataclass(frozen=True, slots=True)
class CachedAnswer:
    """One answer as it was paid for: its text, tokens, and cost in the config's currency."""

    text: str
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cost: float = 0.0


@dataclass(frozen=True, slots=True)
class Spend:
    """Money in the config's currency, and what it was spent on."""

    cost: float = 0.0
    requests: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Room:
    """What `AnswerCache.reserve` found: the reservation, or None for no room, and the account's money before it."""

    reservation: int | None
    spent: float
    open: float


def cache_key(
    endpoint: str,
    model: str,
    messages: Sequence[Mapping[str, str]],
    sampling: Mapping[str, float | int | None],
    sample: int,
) -> str:
    """The hex SHA-256 of everything an answer depends on. API keys are no part of it: another key hits the same row."""
    parts = [endpoint, model, [dict(m) for m in messages], dict(sampling), sample]
    canonical = json.dumps(parts, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    return hashlib.sha256(canonical.encode()).hexdigest()


class AnswerCache:
    """A table from key to answer, and the accounts they were paid from, for any number of threads and processes.

    Neither questions nor credentials are stored, so the file can be shared. Without a path it lives in memory.
    What was written outlives the process, killed or not; a power cut may take the last seconds before it along.

    Args:
        path: The file; it and its folder are made when missing. It must be on a local disk: WAL needs shared memory,
            which network file systems lack.
        busy_timeout_s: Seconds to wait for another process's lock.

    Raises:
        CacheError: The file is no usable cache, here and in every method.
    """

    def __init__(self, path: str | Path | None = None, *, busy_timeout_s: float = 20.0) -> None:
        self.path = None if path is None else Path(path)
        self._timeout_s = busy_timeout_s
        self._lock = Lock()
        self._queue = Lock()
        self._lockout: CacheLocked | None = None
        self.lockouts = 0
        """How many calls of `submit` found the file locked."""
        self._db: sqlite3.Connection | None = None
        try:
            if self.path is not None:
                self.path.parent.mkdir(parents=True, exist_ok=True)
            name = ":memory:" if self.path is None else str(self.path)
            self._db = sqlite3.connect(name, timeout=busy_timeout_s, check_same_thread=False, isolation_level=None)
            self._prepare(self._db)
        except (sqlite3.Error, OSError) as error:
            self.close()
            raise self._explain(error) from error
        except CacheError:
            self.close()
            raise

    def submit(self, lockouts: int, method: Callable[..., T], *args: object) -> asyncio.Future[T]:
        """Calls a method of this cache on a thread of the running loop, one call after another.

        `lockouts` is the value of that name when the caller began to wait. If a call found the file locked since, this
        one fails with the same error at once: everyone who waits would otherwise wait as long, in turn.
        """
        return asyncio.get_running_loop().run_in_executor(None, self._call, lockouts, method, args)

    def check(self, lockouts: int) -> None:
        """Raises CacheLocked if a call of `submit` found the file locked since `lockouts` was read."""
        if self._lockout is not None and self.lockouts != lockouts:
            raise CacheLocked(str(self._lockout))

    def _call(self, lockouts: int, method: Callable[..., T], args: tuple[object, ...]) -> T:
        with self._queue:
            self.check(lockouts)
            try:
                return method(*args)
            except CacheLocked as error:
                self._lockout = error
                self.lockouts += 1
                raise

    def get(self, key: str) -> CachedAnswer | None:
        """The answer stored under `key`, or None."""
        row = self._run("SELECT text, prompt_tokens, completion_tokens, cost FROM answers WHERE key = ?", (key,))
        return None if row is None else CachedAnswer(*row)

    def reserve(self, account: str, worst: float, cap: float | None, lifetime_s: float) -> Room:
        """Sets `worst` aside for one request, if all that is spent and open leaves room for it under `cap`.

        A reservation that was not settled after `lifetime_s` counts as spent: its request may have been billed to a
        process that was killed. It may still be settled.
        """
        now = time.time()
        with self._transaction() as db:
            spent, still_open = db.execute(
                "SELECT (SELECT total(cost) FROM spend WHERE account = ?1) + total(worst) FILTER (WHERE expires <= ?2),"
                " total(worst) FILTER (WHERE expires > ?2) FROM reservations WHERE account = ?1",
                (account, now),
            ).fetchone()
            if cap is not None and spent + still_open + worst > cap:
                return Room(None, spent, still_open)
            row = db.execute(
                "INSERT INTO reservations (account, worst, expires) VALUES (?, ?, ?)",
                (account, worst, now + lifetime_s),
            )
            return Room(row.lastrowid, spent, still_open)

    def settle(
        self, account: str, reservation: int, spent: Spend, key: str = "", answer: CachedAnswer | None = None
    ) -> None:
        """Turns a reservation into what was spent and, in the same transaction, stores the answer it was spent on.

        The first answer stored under a key stays.
        """
        with self._transaction() as db:
            db.execute("DELETE FROM reservations WHERE id = ?", (reservation,))
            db.execute(
                "INSERT INTO spend VALUES (?, ?, ?, ?, ?) ON CONFLICT (account) DO UPDATE SET"
                " cost = cost + excluded.cost, requests = requests + excluded.requests,"
                " prompt_tokens = prompt_tokens + excluded.prompt_tokens,"
                " completion_tokens = completion_tokens + excluded.completion_tokens",
                (account, spent.cost, spent.requests, spent.prompt_tokens, spent.completion_tokens),
            )
            if answer is not None:
                db.execute(
                    "INSERT OR IGNORE INTO answers VALUES (?, ?, ?, ?, ?)",
                    (key, answer.text, answer.prompt_tokens, answer.completion_tokens, answer.cost),
                )

    def forget_empty(self) -> None:
        """Removes answers without text: earlier versions kept replies that were none, and gave them for ever."""
        with self._transaction() as db:
            db.execute("DELETE FROM answers WHERE trim(text, char(9, 10, 13, 32)) = ''")

    def spent(self, account: str) -> Spend:
        """The account's totals. `cost` includes reservations that ran out, whose requests may have been billed."""
        row = self._run(
            "SELECT total(cost) + (SELECT total(worst) FROM reservations WHERE account = ?1 AND expires <= ?2),"
            " coalesce(sum(requests), 0), coalesce(sum(prompt_tokens), 0), coalesce(sum(completion_tokens), 0)"
            " FROM spend WHERE account = ?1",
            (account, time.time()),
        )
        assert row is not None
        return Spend(*row)

    def raise_spent(self, account: str, cost: float) -> None:
        """Makes the account's cost at least `cost`: what a checkpoint knows and this file does not."""
        with self._transaction() as db:
            db.execute(
                "INSERT INTO spend VALUES (?, ?, 0, 0, 0)"
                " ON CONFLICT (account) DO UPDATE SET cost = max(cost, excluded.cost)",
                (account, cost),
            )

    def __len__(self) -> int:
        row = self._run("SELECT COUNT(*) FROM answers", ())
        assert row is not None
        return int(row[0])

    def close(self) -> None:
        """Closes the file; calling it twice is harmless."""
        with self._lock:
            if self._db is not None:
                self._db.close()
                self._db = None

    def _run(self, sql: str, values: tuple[object, ...]) -> tuple[Any, ...] | None:
        with self._using() as db:
            row: tuple[Any, ...] | None = db.execute(sql, values).fetchone()
            return row

    @contextmanager
    def _using(self) -> Iterator[sqlite3.Connection]:
        with self._lock:
            if self._db is None:
                raise CacheError("the answer cache was closed")
            try:
                yield self._db
            except sqlite3.Error as error:
                raise self._explain(error) from error

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        with self._using() as db:
            db.execute("BEGIN IMMEDIATE")
            try:
                yield db
                db.execute("COMMIT")
            finally:
                if db.in_transaction:
                    with suppress(sqlite3.Error):
                        db.execute("ROLLBACK")

    def _prepare(self, db: sqlite3.Connection) -> None:
        # SQLite does not wait for locks while it switches a file to WAL, so two processes that start together collide.
        deadline = time.monotonic() + self._timeout_s
        while True:
            try:
                db.execute("PRAGMA journal_mode = WAL")
                break
            except sqlite3.OperationalError as error:
                if "locked" not in str(error) or time.monotonic() > deadline:
                    raise
                time.sleep(0.05)
        db.execute("PRAGMA synchronous = NORMAL")
        db.execute("BEGIN IMMEDIATE")
        layout = db.execute("PRAGMA user_version").fetchone()[0]
        if layout not in (0, LAYOUT):
            raise CacheError(
                f"the answer cache {self.path} has layout {layout}, and this version reads {LAYOUT}: "
                "use another file, or the version that wrote it"
            )
        for table in TABLES:
            db.execute(table)
        db.execute(f"PRAGMA user_version = {LAYOUT}")
        db.execute("COMMIT")

    def _explain(self, error: sqlite3.Error | OSError) -> CacheError:
        text = str(error)
        kind = CacheError
        if "locked" in text or "locking" in text:
            kind = CacheLocked
            fix = (
                f"another process held it for over {self._timeout_s:g} s, or its file system has no locks: "
                "end that process, or move the cache to a local disk"
            )
        elif isinstance(error, sqlite3.DatabaseError) and ("not a database" in text or "malformed" in text):
            fix = (
                "the file is damaged or is no cache: move it away (with its -wal and -shm) to start an empty one, "
                "or try `sqlite3 FILE .recover`"
            )
        elif "full" in text:
            fix = "the disk is full: free some space"
        else:
            fix = "check that the folder exists on a local disk and can be written"
        return kind(f"the answer cache {self.path} cannot be used ({text}): {fix}")
