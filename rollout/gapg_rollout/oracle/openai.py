"""A cloud model behind the OpenAI API: bounded in time, in rate and in money; no answer is paid for twice."""

from __future__ import annotations

import asyncio
import json
import logging
import math
import random
import traceback
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from threading import Lock, Thread
from typing import Literal

from gapg_rollout.oracle.breaker import Attempt, Breaker, Unavailable
from gapg_rollout.oracle.cache import AnswerCache, CacheError, cache_key, sampling_settings
from gapg_rollout.oracle.connection import connect, most_bytes, post
from gapg_rollout.oracle.endpoint import read_endpoint
from gapg_rollout.oracle.limits import Ledger, RateLimiter
from gapg_rollout.oracle.reply import Reply, read_reply
from gapg_rollout.oracle.retry import Failure, backoff_s, classify, shorten
from gapg_rollout.records import OracleAnswer, OracleQuestion, OracleUsage

logger = logging.getLogger(__name__)

CLOSED = "the oracle was closed"


class OpenAIOracle:
    """Asks a chat model over HTTP. Whatever goes wrong comes back as an answer without text, and is never cached.

    Requests run on one background thread. A question that is open already is not sent again; answers are kept in a
    SQLite file, which other processes may share. The key is read from the environment and goes nowhere but into the
    request's header. When the server is down all questions fail at once until it answers a probe; when it refuses for
    good, or the money is spent, they do for ever (see `Breaker`).

    Args:
        base_url: The API's root, usually ending in /v1. Answers are cached per (base_url, model).
        model: The model's name there.
        api_key_env: The environment variable that holds the key. A server on this machine needs none.
        samples: Answers a question, k; each is a request of its own.
        temperature: The cloud's sampling temperature; None leaves it out, for models that refuse it.
        max_tokens: The longest answer, in tokens.
        max_tokens_field: What the API calls that; OpenAI's reasoning models want "max_completion_tokens".
        concurrency: Most requests open at once. Who waits before a retry is none of them.
        timeout_s: Seconds until one request is given up, and tried again.
        deadline_s: Seconds that an answer's requests and the waits between them may take together. To wait for one's
            turn among other questions is no fault of the server, and not counted.
        max_retries: Further requests after the first that failed.
        requests_per_minute: The most requests in any 60 seconds.
        tokens_per_minute: The most tokens, prompt and answer, in any 60 seconds (estimated until they are known).
        spending_cap: The most that `account` may spend. Before a request is sent its worst price is set aside: a token
            for every byte of the prompt, and `max_tokens`. A request that ended without an HTTP status, or with its
            process, may have been billed, so it is counted at that price.
        price_per_million_prompt: In the cap's currency; needed with a cap (0 for a free server).
        price_per_million_completion: Likewise.
        cache_path: The SQLite file; None keeps answers and accounts in memory only.
        account: Whose money is spent. What was spent is kept in the cache's file, so the cap holds for all objects and
            processes with this file and account together, over kills and resumes.

    Raises:
        ValueError: No key, an unusable URL or setting, a cap without prices.
        CacheError: The cache file cannot be used.
    """

    def __init__(
        self,
        base_url: str,
        model: str,
        *,
        api_key_env: str = "OPENAI_API_KEY",
        samples: int = 1,
        temperature: float | None = 0.0,
        max_tokens: int = 1024,
        max_tokens_field: Literal["max_tokens", "max_completion_tokens"] = "max_tokens",
        concurrency: int = 32,
        timeout_s: float = 60.0,
        deadline_s: float = 300.0,
        max_retries: int = 6,
        requests_per_minute: int | None = None,
        tokens_per_minute: int | None = None,
        spending_cap: float | None = None,
        price_per_million_prompt: float | None = None,
        price_per_million_completion: float | None = None,
        cache_path: str | Path | None = None,
        account: str = "run",
    ) -> None:
        prices = (price_per_million_prompt, price_per_million_completion)
        if spending_cap is not None and None in prices:
            raise ValueError(
                "a spending cap needs price_per_million_prompt and price_per_million_completion (0 is a price)"
            )
        if min(samples, max_tokens, concurrency) < 1 or min(timeout_s, deadline_s) <= 0 or max_retries < 0:
            raise ValueError("samples, max_tokens, concurrency, timeout_s and deadline_s must be positive")
        if not all(math.isfinite(money) and money >= 0 for money in (*prices, spending_cap) if money is not None):
            raise ValueError("spending_cap and the prices must be finite numbers of 0 or more")
        endpoint = read_endpoint(base_url, api_key_env)
        self._url = endpoint.url
        self._clean = endpoint.secret.clean
        self._client = connect(endpoint, timeout_s=timeout_s, max_bytes=most_bytes(max_tokens))
        self._model = model
        self._samples = samples
        self._max_tokens = max_tokens
        self._sampling = sampling_settings(temperature, max_tokens, max_tokens_field)
        self._timeout_s = timeout_s
        self._deadline_s = deadline_s
        self._max_retries = max_retries
        self._prices = (prices[0] or 0.0, prices[1] or 0.0)
        self._limiter = RateLimiter(requests_per_minute, tokens_per_minute)
        self._slots = asyncio.Semaphore(concurrency)
        self._breaker = Breaker(self._url, timeout_s)
        self._jitter = random.Random()  # its own: the run's seeded generators stay untouched
        self._cache = AnswerCache(cache_path)
        self._cache.forget_empty()
        self._ledger = Ledger(spending_cap, self._cache, account, timeout_s)
        self._open: dict[str, asyncio.Task[OracleAnswer]] = {}
        self._futures: set[Future[list[OracleAnswer]]] = set()
        self._closed = False
        self._lock = Lock()
        self._loop = asyncio.new_event_loop()
        self._thread = Thread(target=self._loop.run_forever, name="oracle", daemon=True)
        self._thread.start()

    def __repr__(self) -> str:
        return f"OpenAIOracle({self._url!r}, {self._model!r})"

    def ask(self, question: OracleQuestion) -> Future[list[OracleAnswer]]:
        """Sends the question. The future ends with `samples` answers, at the latest when the oracle is closed.

        A cached answer costs 0; its token counts are those that were paid for.
        """
        future: Future[list[OracleAnswer]] = Future()
        future.set_running_or_notify_cancel()  # others may wait for the same request, so it cannot be cancelled
        with self._lock:
            if self._closed:
                future.set_result(self._failed(CLOSED))
                return future
            self._futures.add(future)
            asyncio.run_coroutine_threadsafe(self._answer_all(question, future), self._loop)
        return future

    @property
    def usage(self) -> OracleUsage:
        """Totals of this object, those given to `restore` included. `requests` counts retries; a request of which
        nobody said what it cost counts at its worst, and without tokens."""
        return self._ledger.usage

    def restore(self, usage: OracleUsage) -> None:
        """Continues from these totals. If the account knows of less money than they do, it is raised to theirs.

        Raises:
            ValueError: They are no totals: not finite, negative or no numbers.
            CacheError: The cache file cannot be used.
        """
        self._ledger.restore(usage)

    def close(self) -> None:
        """Cancels what is open, whose futures end with failures, and frees the oracle. Calling it twice is harmless."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
        asyncio.run_coroutine_threadsafe(self._shut_down(), self._loop)
        self._thread.join(timeout=10)
        for future in list(self._futures):  # cancelled before they began, or held by a thread that hangs
            if not future.done():
                future.set_result(self._failed(CLOSED))
        if not self._thread.is_alive():
            self._loop.close()
        self._cache.close()

    async def _shut_down(self) -> None:
        others = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        try:
            with suppress(TimeoutError):
                await asyncio.wait_for(self._client.close(), timeout=5)
            await self._loop.run_in_executor(None, self._cache.close)  # after answers on their way into it
        finally:
            self._loop.stop()

    async def _answer_all(self, question: OracleQuestion, future: Future[list[OracleAnswer]]) -> None:
        answers = self._failed(CLOSED)
        try:
            answers = list(await asyncio.gather(*(self._answer(question, i) for i in range(self._samples))))
        except Exception as error:  # a failure is an answer, never an exception
            logger.debug("%s", self._clean(traceback.format_exc()))
            answers = self._failed(shorten(f"{type(error).__name__}: {error}", self._clean))
        finally:
            self._futures.discard(future)
            if not future.done():
                future.set_result(answers)

    def _failed(self, words: str) -> list[OracleAnswer]:
        return [OracleAnswer(None, error=words)] * self._samples

    async def _answer(self, question: OracleQuestion, sample: int) -> OracleAnswer:
        """One answer: shared with an open request for the same, or cached, or asked for."""
        key = cache_key(self._url, self._model, question.messages, self._sampling, sample)
        if (task := self._open.get(key)) is not None:
            answer = await asyncio.shield(task)
            if answer.text is None:
                return answer
            self._ledger.count(cache_hits=1)
            return replace(answer, cached=True, cost=0.0)
        task = self._open[key] = asyncio.create_task(self._look_up_or_ask(question, key))
        task.add_done_callback(lambda _: self._open.pop(key, None))
        return await task

    async def _look_up_or_ask(self, question: OracleQuestion, key: str) -> OracleAnswer:
        try:
            found = await self._cache.submit(self._cache.lockouts, self._cache.get, key)
            if found is not None:
                self._ledger.count(cache_hits=1)
                return found
            answer = await self._ask_with_retries(question, key)
        except CacheError as error:  # without it the same answer would be paid for again, and the money not counted
            answer = OracleAnswer(None, error=str(error))
        except Unavailable as why:
            answer = OracleAnswer(None, error=str(why), permanent=why.permanent)
        if answer.text is None:
            self._ledger.count(failures=1)
        return answer

    async def _ask_with_retries(self, question: OracleQuestion, key: str) -> OracleAnswer:
        left_s, pause_s = self._deadline_s, 0.0
        for tried in range(1, self._max_retries + 2):
            lockouts = self._cache.lockouts
            async with self._breaker.attempt() as attempt:
                await asyncio.sleep(pause_s)
                async with self._slots:
                    result = await self._take_turn(question, key, attempt, left_s - pause_s, lockouts)
            if isinstance(result, OracleAnswer):
                return result
            error = result.error
            if not result.retry:
                return OracleAnswer(None, error=error, own=result.about == "question")
            left_s -= pause_s + self._loop.time() - attempt.sent_at
            pause_s = backoff_s(tried - 1, result.retry_after_s, self._jitter.random())
            if tried <= self._max_retries and pause_s >= left_s:
                late = f"no answer within the deadline of {self._deadline_s:g} s; last: {error}"
                return OracleAnswer(None, error=late)
        return OracleAnswer(None, error=f"no answer after {tried} requests; the last one: {error}")

    async def _take_turn(
        self, question: OracleQuestion, key: str, attempt: Attempt, left_s: float, lockouts: int
    ) -> OracleAnswer | Failure:
        """One request, after the waits for the rates and the money, settled in the account whatever becomes of it."""
        self._cache.check(lockouts)
        size = len(json.dumps(question.messages, ensure_ascii=False).encode())
        entry = await self._limiter.admit(size // 3 + self._max_tokens)
        # No tokenizer makes more tokens than bytes; the rest is for the chat template.
        most = (size + 16 * (len(question.messages) + 1), self._max_tokens)
        worst = self._cost(*most)
        reservation, before = await self._ledger.reserve(worst, lockouts)
        if reservation is None:
            self._breaker.stop(
                f"spending cap of {self._ledger.cap:g} reached: {before:.6g} is spent, and a request may cost "
                f"{worst:.3g}; raise the cap to go on"
            )
        spent, answer = OracleUsage(requests=1, cost=worst), None  # what it counts as if it is cancelled
        try:
            self._breaker.send(attempt)
            result = await self._request(question, most, min(self._timeout_s, left_s))
            counts = result.counts
            cost = self._cost(counts.prompt, counts.completion)
            if not counts.complete:
                cost = max(worst, cost)
            spent = OracleUsage(1, 0, 0, counts.prompt, counts.completion, cost)
            if isinstance(result, Failure):
                self._breaker.failed(attempt, result)
                return result
            self._breaker.right(attempt)
            if counts.complete:
                self._limiter.correct(entry, counts.prompt + counts.completion)
            answer = OracleAnswer(result.text, None, False, counts.prompt, counts.completion, cost)
            return answer
        finally:
            await self._ledger.settle(reservation, spent, key, answer)

    async def _request(self, question: OracleQuestion, most: tuple[int, int], limit_s: float) -> Reply | Failure:
        body = {"model": self._model, "messages": list(question.messages), **self._sampling}
        try:
            # The client's own timeout is per read, which a server that trickles never meets.
            async with asyncio.timeout(limit_s):
                reply = await post(self._client, body)
            return read_reply(reply, max_prompt_tokens=most[0], max_completion_tokens=most[1])
        except Exception as error:
            return classify(error, self._url, limit_s, self._clean)

    def _cost(self, prompt_tokens: int, completion_tokens: int) -> float:
        return (prompt_tokens * self._prices[0] + completion_tokens * self._prices[1]) / 1e6
