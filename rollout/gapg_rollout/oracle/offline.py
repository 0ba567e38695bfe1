"""A cloud that must not be asked: what it has answered before, and nothing else. It needs no key and no client."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import Protocol

from gapg_rollout.oracle.cache import AnswerCache, CacheError, cache_key
from gapg_rollout.oracle.endpoint import check_url
from gapg_rollout.records import OracleAnswer, OracleQuestion, OracleUsage

NOT_ASKED = OracleAnswer(None, error="not asked: the run is connected to no cloud", offline=True)


class HeldAnswers(Protocol):
    """Answers that can be had without asking."""

    def recall(self, question: OracleQuestion) -> list[OracleAnswer]:
        """The answers to this question; empty where there are none. Raises CacheError where nobody can tell."""

    def close(self) -> None:
        """Frees what is held."""


class OfflineOracle:
    """Sends nothing: gives the answers that are held, and to every other question `NOT_ASKED`.

    Args:
        held: Where the answers are; None: nowhere.
    """

    def __init__(self, held: HeldAnswers | None = None) -> None:
        self._held = held
        self.usage = OracleUsage()
        """Totals so far, those given to `restore` included. Nothing is requested; an answer that was held is a hit."""

    def ask(self, question: OracleQuestion) -> Future[list[OracleAnswer]]:
        """A future, already done, of the answers that are held: as many as there are, or one that was not asked for."""
        try:
            answers = self._held.recall(question) if self._held else []
        except CacheError as error:
            answers = [OracleAnswer(None, error=str(error))]
        failed = sum(answer.text is None for answer in answers)
        hits = self.usage.cache_hits + len(answers) - failed
        self.usage = replace(self.usage, cache_hits=hits, failures=self.usage.failures + failed)
        future: Future[list[OracleAnswer]] = Future()
        future.set_result(answers or [NOT_ASKED])
        return future

    def restore(self, usage: OracleUsage) -> None:
        """Continues from these totals."""
        self.usage = usage

    def close(self) -> None:
        """Frees what is held; calling it twice is harmless."""
        if self._held:
            self._held.close()


class CachedAnswers:
    """What was paid for by an `OpenAIOracle` of the same endpoint, model and sampling: read from its cache.

    Args:
        base_url: As that oracle's.
        model: As that oracle's.
        sampling: As that oracle's (`gapg_rollout.oracle.cache.sampling_settings`).
        samples: The most answers to a question, k; those that are there are given.
        cache_path: The SQLite file.

    Raises:
        ValueError: An unusable URL.
        CacheError: The cache file is missing or cannot be used.
    """

    def __init__(
        self, base_url: str, model: str, sampling: Mapping[str, float | int | None], samples: int, cache_path: Path
    ) -> None:
        if not cache_path.is_file():
            raise CacheError(f"there is no answer cache {cache_path}: name the file of a run that asked the same cloud")
        self._url, self._model, self._sampling, self._samples = check_url(base_url), model, sampling, samples
        self._cache = AnswerCache(cache_path)
        self._cache.forget_empty()

    def recall(self, question: OracleQuestion) -> list[OracleAnswer]:
        """The samples that are there. Raises CacheError."""
        messages = question.messages
        keys = [cache_key(self._url, self._model, messages, self._sampling, i) for i in range(self._samples)]
        return [found for key in keys if (found := self._cache.get(key)) is not None]

    def close(self) -> None:
        """Closes the file; calling it twice is harmless."""
        self._cache.close()
