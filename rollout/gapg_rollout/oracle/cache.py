"""Answers that were paid for, and what was paid: one SQLite file that several processes may use at once."""

from __future__ import annotations

import asyncio
import hashlib
import json
import sqlite3
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from threading import Lock
from typing import TypeVar

from gapg_rollout.records import OracleAnswer, OracleUsage

T = TypeVar("T")

LAYOUT = 1
"""Version of the tables, kept in the file's `user_version`. Files from before the money was kept have only `answers`,
and get the other tables when they are opened."""

TABLES = f"""
BEGIN IMMEDIATE;
CREATE TABLE IF NOT EXISTS answers (key TEXT PRIMARY KEY, text TEXT NOT NULL,
    prompt_tokens INTEGER NOT NULL, completion_tokens INTEGER NOT NULL, cost REAL NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS spend (account TEXT PRIMARY KEY, cost REAL NOT NULL, requests INTEGER NOT NULL,
    prompt_tokens INTEGER NOT NULL, completion_tokens INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS reservations (id INTEGER PRIMARY KEY AUTOINCREMENT, account TEXT NOT NULL,
    worst REAL NOT NULL, expires REAL NOT NULL);
PRAGMA user_version = {LAYOUT};
COMMIT;
"""


class CacheError(Exception):
    """The cache's file cannot be used. The message says what to do about it."""


class CacheLocked(CacheError):
    """Another process held the file for too long; it may let go later."""


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


def sampling_settings(
    temperature: float | None, max_tokens: int, max_tokens_field: str
) -> dict[str, float | int | None]:
    """What a request says of sampling, and a cached answer depends on. A temperature of None is left out."""
    return {max_tokens_field: max_tokens} | ({} if temperature is None else {"temperature": temperature})


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
        self.lockouts = 0
        """How many calls of `submit` found the file locked."""
        self._lockout = ""
        self._timeout_s = busy_timeout_s
        self._lock = Lock()
        self._thread = ThreadPoolExecutor(1, "answer cache")
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
        """Calls a method of this cache on its thread, one call after another.

        `lockouts` is the value of that name when the caller began to wait. If a call found the file locked since, this
        one fails with the same error at once: everyone who waits would otherwise wait as long, in turn.
        """
        return asyncio.get_running_loop().run_in_executor(self._thread, self._call, lockouts, method, args)

    def check(self, lockouts: int) -> None:
        """Raises CacheLocked if a call of `submit` found the file locked since `lockouts` was read."""
        if self.lockouts != lockouts:
            raise CacheLocked(self._lockout)

    def _call(self, lockouts: int, method: Callable[..., T], args: tuple[object, ...]) -> T:
        self.check(lockouts)
        try:
            return method(*args)
        except CacheLocked as error:
            self._lockout = str(error)
            self.lockouts += 1
            raise

    def get(self, key: str) -> OracleAnswer | None:
        """The answer stored under `key`, which costs nothing now, or None."""
        with self._using() as db:
            row = db.execute("SELECT text, prompt_tokens, completion_tokens FROM answers WHERE key = ?", (key,))
            found = row.fetchone()
        return None if found is None else OracleAnswer(found[0], None, True, found[1], found[2])

    def reserve(self, account: str, worst: float, cap: float | None, lifetime_s: float) -> tuple[int | None, float]:
        """Sets `worst` aside for one request, if all that is spent and open leaves room for it under `cap`.

        A reservation that was not settled after `lifetime_s` counts as spent: its request may have been billed to a
        process that was killed. It may still be settled. Returns the reservation, or None for no room, and what was
        spent before it.
        """
        now = time.time()
        with self._transaction() as db:
            spent, still_open = db.execute(
                "SELECT (SELECT total(cost) FROM spend WHERE account = ?1) + total(worst) FILTER (WHERE expires <= ?2),"
                " total(worst) FILTER (WHERE expires > ?2) FROM reservations WHERE account = ?1",
                (account, now),
            ).fetchone()
            if cap is not None and spent + still_open + worst > cap:
                return None, spent
            row = (account, worst, now + lifetime_s)
            made = db.execute("INSERT INTO reservations (account, worst, expires) VALUES (?, ?, ?)", row)
            return made.lastrowid, spent

    def settle(
        self, account: str, reservation: int, spent: OracleUsage, key: str = "", answer: OracleAnswer | None = None
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
                row = (key, answer.text, answer.prompt_tokens, answer.completion_tokens, answer.cost)
                db.execute("INSERT OR IGNORE INTO answers VALUES (?, ?, ?, ?, ?)", row)

    def forget_empty(self) -> None:
        """Removes answers without text: earlier versions kept replies that were none, and gave them for ever."""
        with self._transaction() as db:
            db.execute("DELETE FROM answers WHERE trim(text, char(9, 10, 13, 32)) = ''")

    def spent(self, account: str) -> OracleUsage:
        """The account's totals. `cost` includes reservations that ran out, whose requests may have been billed."""
        with self._using() as db:
            requests, prompt, completion, cost = db.execute(
                "SELECT coalesce(sum(requests), 0), coalesce(sum(prompt_tokens), 0),"
                " coalesce(sum(completion_tokens), 0), total(cost) + (SELECT total(worst) FROM reservations"
                " WHERE account = ?1 AND expires <= ?2) FROM spend WHERE account = ?1",
                (account, time.time()),
            ).fetchone()
        return OracleUsage(requests=requests, prompt_tokens=prompt, completion_tokens=completion, cost=cost)

    def raise_spent(self, account: str, cost: float) -> None:
        """Makes the account's cost at least `cost`: what a checkpoint knows and this file does not."""
        with self._transaction() as db:
            db.execute(
                "INSERT INTO spend VALUES (?, ?, 0, 0, 0)"
                " ON CONFLICT (account) DO UPDATE SET cost = max(cost, excluded.cost)",
                (account, cost),
            )

    def close(self) -> None:
        """Closes the file, after what was submitted; calling it twice is harmless."""
        self._thread.shutdown()
        with self._lock:
            if self._db is not None:
                self._db.close()
                self._db = None

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
        with self._using() as db, db:  # the second commits or rolls back
            db.execute("BEGIN IMMEDIATE")
            yield db

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
        (layout,) = db.execute("PRAGMA user_version").fetchone()
        if layout not in (0, LAYOUT):
            raise CacheError(
                f"the answer cache {self.path} has layout {layout}, and this version reads {LAYOUT}: "
                "use another file, or the version that wrote it"
            )
        db.executescript(TABLES)

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
