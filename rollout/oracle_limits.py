"""What holds an oracle back: requests and tokens a minute, and the money that may be spent."""

from __future__ import annotations

import asyncio
from collections import deque
from dataclasses import replace
from threading import Lock

from gapg.rollout.records import OracleUsage


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
            while True:
                now = loop.time()
                while self._window and self._window[0][0] <= now - self._period_s:
                    self._window.popleft()
                if self._has_room(tokens):
                    break
                await asyncio.sleep(self._window[0][0] + self._period_s - now + 1e-3)
            entry = [loop.time(), float(tokens)]
            self._window.append(entry)
            return entry

    def _has_room(self, tokens: int) -> bool:
        if self._requests is not None and len(self._window) >= self._requests:
            return False
        used = sum(entry[1] for entry in self._window) if self._tokens is not None else 0.0
        return self._tokens is None or not self._window or used + tokens <= self._tokens

    @staticmethod
    def correct(entry: list[float], tokens: int) -> None:
        """Replaces an entry's estimate by the tokens that were used."""
        entry[1] = float(tokens)


class Ledger:
    """The oracle's totals, and its spending cap. Totals may be read and restored from any thread.

    The worst cost of a request is set aside before it is sent, so what is spent cannot pass the cap by requests that
    were open together.
    """

    def __init__(self, cap: float | None) -> None:
        self.cap = cap
        self._usage = OracleUsage()
        self._open: list[float] = []
        self._lock = Lock()
        self._settled = asyncio.Event()

    @property
    def usage(self) -> OracleUsage:
        return self._usage

    def restore(self, usage: OracleUsage) -> None:
        with self._lock:
            self._usage = usage

    def count(self, **more: int | float) -> None:
        """Adds to the totals named."""
        with self._lock:
            self._usage = replace(self._usage, **{name: getattr(self._usage, name) + n for name, n in more.items()})

    async def reserve(self, worst: float) -> bool:
        """Sets `worst` aside. False when the cap leaves no room for it, even if all that is open costs nothing."""
        if self.cap is None:
            return True
        while self._usage.cost + worst <= self.cap:
            if self._usage.cost + sum(self._open) + worst <= self.cap:
                self._open.append(worst)
                return True
            # Open requests mostly cost less than their worst: what they give back may be enough.
            self._settled.clear()
            await self._settled.wait()
        return False

    def settle(self, worst: float, **spent: int | float) -> None:
        """Gives back what was set aside and counts what was spent."""
        self.count(**spent)
        if self.cap is not None:
            self._open.remove(worst)
            self._settled.set()
