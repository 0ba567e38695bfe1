"""What holds an oracle back: requests and tokens a minute, and the money that may be spent."""

from __future__ import annotations

import asyncio
import logging
import sys
from collections import deque
from contextlib import suppress
from dataclasses import asdict, replace
from threading import Lock

from gapg_rollout.oracle.cache import AnswerCache, CacheError
from gapg_rollout.records import OracleAnswer, OracleUsage

logger = logging.getLogger(__name__)

GRACE_S = 1.0
"""Seconds that a request which ended has to settle its reservation before that counts as spent."""

POLL_S = 0.1
"""Seconds between looks at what other processes have settled, while waiting for room."""


class RateLimiter:
    """At most `requests` and `tokens` in any window of `period_s` seconds, first come first served.

    Tokens are admitted by an estimate, which `correct` replaces by what was used. A request that is larger than the
    whole limit is admitted when the window is empty. None means no limit. One event loop only.
    """

    def __init__(self, requests: int | None, tokens: int | None, period_s: float = 60.0) -> None:
        for name, limit in (("requests", requests), ("tokens", tokens)):
            if limit is not None and limit < 1:
                raise ValueError(f"{name} per minute must be at least 1, or None for no limit; not {limit}")
        self._requests = requests
        self._tokens = tokens
        self._period_s = period_s
        self._window: deque[list[float]] = deque()  # [time, tokens], the oldest first
        self._turn = asyncio.Lock()

    async def admit(self, tokens: int) -> list[float]:
        """Waits for room, then takes it. Returns the entry that `correct` needs."""
        loop = asyncio.get_running_loop()
        async with self._turn:
            while not self._has_room(tokens, loop.time()):
                await asyncio.sleep(self._window[0][0] + self._period_s - loop.time() + 1e-3)
            entry = [loop.time(), float(tokens)]
            self._window.append(entry)
            return entry

    def _has_room(self, tokens: int, now: float) -> bool:
        while self._window and self._window[0][0] <= now - self._period_s:
            self._window.popleft()
        if not self._window:
            return True
        if self._requests is not None and len(self._window) >= self._requests:
            return False
        return self._tokens is None or sum(entry[1] for entry in self._window) + tokens <= self._tokens

    @staticmethod
    def correct(entry: list[float], tokens: int) -> None:
        """Replaces an entry's estimate by the tokens that were used."""
        entry[1] = float(tokens)


class Ledger:
    """The totals of one oracle, and the spending cap of its account. Totals may be read and restored from any thread.

    The worst cost of a request is set aside before it is sent, in the cache's file, so neither requests that are open
    together nor other processes nor a kill can take what is spent over the cap.

    Args:
        cap: The most that the account may spend; None counts only.
        cache: Holds the account. All that share its file share the account of that name.
        account: The account's name.
        request_s: The longest that a request lasts. One that is open for longer than that died with its process.
    """

    def __init__(self, cap: float | None, cache: AnswerCache, account: str, request_s: float) -> None:
        self.cap = cap
        self._cache = cache
        self._account = account
        self._lifetime_s = request_s + GRACE_S
        self._usage = OracleUsage()
        self._lock = Lock()
        self._turn = asyncio.Lock()
        self._settled = asyncio.Event()

    @property
    def usage(self) -> OracleUsage:
        return self._usage

    def restore(self, usage: OracleUsage) -> None:
        """Raises ValueError for totals that are no numbers: one that is not finite or negative would lift the cap."""
        for name, total in asdict(usage).items():
            kinds, wanted = (int | float, "a finite number") if name == "cost" else (int, "a whole number")
            # compared, not asked of math.isfinite: no float holds every integer
            if isinstance(total, bool) or not isinstance(total, kinds) or not 0 <= total <= sys.float_info.max:
                raise ValueError(f"the oracle's total of {name} must be {wanted} of 0 or more, not {str(total)[:40]!r}")
        self._cache.raise_spent(self._account, usage.cost)
        with self._lock:
            self._usage = usage

    def count(self, **more: int | float) -> None:
        """Adds to the totals named."""
        with self._lock:
            self._usage = replace(self._usage, **{name: getattr(self._usage, name) + n for name, n in more.items()})

    async def reserve(self, worst: float, lockouts: int) -> tuple[int | None, float]:
        """(reservation, what was spent before it); first come, first served within this object.

        The reservation is None when the cap leaves no room, even if all that is open costs nothing. `lockouts` is the
        cache's count of that name when the caller began to wait.

        Raises:
            CacheError: The file cannot be used, so nothing may be sent.
        """
        async with self._turn:
            while True:
                self._settled.clear()
                reservation, spent = await self._reserve_now(worst, lockouts)
                if reservation is not None or (self.cap is not None and spent + worst > self.cap):
                    return reservation, spent
                # Open requests mostly cost less than their worst: what they give back may be enough. Those of other
                # processes do not tell.
                with suppress(TimeoutError):
                    async with asyncio.timeout(POLL_S):
                        await self._settled.wait()

    async def _reserve_now(self, worst: float, lockouts: int) -> tuple[int | None, float]:
        cache = self._cache
        future = cache.submit(lockouts, cache.reserve, self._account, worst, self.cap, self._lifetime_s)
        try:
            return await asyncio.shield(future)
        except asyncio.CancelledError:
            await asyncio.wait([future])  # nothing is sent, so what was set aside meanwhile is given back
            with suppress(CacheError):
                if (reservation := future.result()[0]) is not None:
                    await cache.submit(cache.lockouts, cache.settle, self._account, reservation, OracleUsage())
            raise

    async def settle(
        self, reservation: int, spent: OracleUsage, key: str = "", answer: OracleAnswer | None = None
    ) -> None:
        """Gives back what was set aside, counts what was spent, and caches the answer, even if it is cancelled."""
        self.count(**asdict(spent))
        cache = self._cache
        try:
            await asyncio.shield(
                cache.submit(cache.lockouts, cache.settle, self._account, reservation, spent, key, answer)
            )
        except CacheError as error:  # the reservation stays, and counts as spent
            what = "a request was not counted" if answer is None else "an oracle answer was paid for but not cached"
            logger.warning("%s: %s", what, error)
        finally:
            self._settled.set()
