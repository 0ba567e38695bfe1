"""Whether a request may be sent: not while the server is down, and never again once it has refused for good."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import NoReturn

from gapg_rollout.oracle.retry import Failure

logger = logging.getLogger(__name__)

ROW = 10
"""Requests that must fail, one after another, before that says something of the server."""

PAUSE_S = 5.0
"""Seconds that they must have failed for (shorter troubles are what the back-off is for), and until a probe is sent."""


class Unavailable(Exception):
    """No request may be sent. `permanent`: none ever will be."""

    def __init__(self, error: str, *, permanent: bool) -> None:
        super().__init__(error)
        self.permanent = permanent


@dataclass(eq=False, slots=True)
class Attempt:
    """One request, from its wait for a turn to its end. `number` counts what was sent; 0 is not sent yet."""

    cut: asyncio.Timeout = field(default_factory=lambda: asyncio.timeout(None))
    number: int = 0
    sent_at: float = 0.0


class Breaker:
    """Shared by all open questions of one oracle: what one of them learns of the server, all know. One event loop only.

    It opens when `ROW` requests or more failed in a row, over `PAUSE_S` seconds or the requests' time limit, and what
    was sent before the first of them has ended too, so that no slow but good answer is still on its way. Then all
    questions fail at once, those whose requests are open a moment later. After `PAUSE_S` seconds the next question is
    the probe, and others wait for what becomes of it: a right answer closes the breaker.

    A refusal for good (the key, the account, the spending cap; or nothing but the same refusal from the start) is
    final: requests that are open may end, and no other is sent.

    Args:
        name: The server's URL, as messages show it.
        timeout_s: The time limit of one request.
    """

    def __init__(self, name: str, timeout_s: float) -> None:
        self._name = name
        self._pause_s = min(PAUSE_S, timeout_s)
        self._attempts: set[Attempt] = set()
        self._sent = 0
        self._row = 0  # failures since the last right answer
        self._row_since_s = 0.0  # when the first of them was sent
        self._row_begins = 0  # how many were sent when it failed
        self._row_says = ""
        self._refusals = 0
        self._refusal: int | None = None
        self._ever_right = False
        self._verdict: str | None = None
        self._opened_at = 0.0
        self._again_at: float | None = None  # None: closed
        self._probed = asyncio.Event()
        self._probed.set()

    @asynccontextmanager
    async def attempt(self) -> AsyncIterator[Attempt]:
        """Surrounds one request and the waits before it.

        Raises:
            Unavailable: Nothing may be sent, or the breaker opened meanwhile.
        """
        probe = await self._let_in()
        attempt = Attempt()
        self._attempts.add(attempt)
        try:
            async with attempt.cut:
                yield attempt
        except TimeoutError:
            raise self._unavailable() from None
        finally:
            self._attempts.discard(attempt)
            if probe:
                if self._again_at is not None:
                    self._again_at = _now() + self._pause_s
                self._probed.set()

    async def _let_in(self) -> bool:
        """Waits while a probe is out. Whether the caller is the next one."""
        while self._verdict is None:
            if self._again_at is None:
                return False
            if _now() < self._again_at:
                break
            if self._probed.is_set():
                self._probed.clear()
                return True
            await self._probed.wait()
        raise self._unavailable()

    def send(self, attempt: Attempt) -> None:
        """Marks the attempt as sent."""
        self._sent += 1
        attempt.number, attempt.sent_at = self._sent, _now()

    def right(self, attempt: Attempt) -> None:
        """The attempt was answered; nothing cuts it any more."""
        self._attempts.discard(attempt)
        attempt.cut.reschedule(None)
        self._ever_right = True
        self._refusals = 0
        self._row = 0
        if self._again_at is not None:
            logger.warning("the oracle at %s answers again, after %.0f s", self._name, _now() - self._opened_at)
            self._again_at = None

    def failed(self, attempt: Attempt, failure: Failure) -> None:
        """The attempt failed.

        Raises:
            Unavailable: It says that no other will be answered either.
        """
        self._attempts.discard(attempt)
        if failure.about == "account":
            self.stop(failure.error)
        elif failure.about == "request":
            self._refusals = self._refusals + 1 if failure.status == self._refusal else 1
            self._refusal = failure.status
            if self._refusals >= ROW and not self._ever_right:
                self.stop(f"{failure.error}; {self._refusals} requests in a row ended so")
        elif failure.about == "server":
            self._refusals = 0
            self._count(attempt, failure.error)

    def _count(self, attempt: Attempt, error: str) -> None:
        if not self._row:
            self._row_since_s, self._row_begins = attempt.sent_at, self._sent
        self._row += 1
        self._row_says = f"the oracle is down: {self._row} requests in a row failed, the last one: {error}"
        pending = any(0 < other.number <= self._row_begins for other in self._attempts)
        lasted_s = _now() - self._row_since_s
        if self._again_at is None and self._row >= ROW and lasted_s >= self._pause_s and not pending:
            self._opened_at = _now()
            self._again_at = self._opened_at + self._pause_s
            logger.warning("%s", self._unavailable())
            self._cut(self._attempts)

    def _cut(self, attempts: Iterable[Attempt]) -> None:
        for attempt in list(attempts):
            self._attempts.discard(attempt)
            # what is on its way has a moment to end by itself: cut, it counts as billed
            attempt.cut.reschedule(_now() + self._pause_s / 10 if attempt.number else 0)

    def stop(self, words: str) -> NoReturn:
        """Ends the asking for good: the first words given are those that every question fails with.

        Raises:
            Unavailable: Always.
        """
        if self._verdict is None:
            self._verdict = words
            self._cut(attempt for attempt in self._attempts if not attempt.number)
        raise self._unavailable()

    def _unavailable(self) -> Unavailable:
        if self._verdict is not None:
            return Unavailable(self._verdict, permanent=True)
        wait_s = max(0.0, (self._again_at or 0.0) - _now())
        return Unavailable(f"{self._row_says}; asked again in {wait_s:.1f} s", permanent=False)


def _now() -> float:
    return asyncio.get_running_loop().time()
