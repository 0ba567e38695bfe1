"""A stand-in for a cloud model that needs no network: it solves the problem, and errs at a chosen rate."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import replace

from gapg_rollout.records import OracleAnswer, OracleQuestion, OracleUsage


class SolverOracle:
    """An embedded stand-in for a cloud model: right with probability `accuracy`, wrong otherwise.

    It is *not* a cloud model: `solve` computes the right answer, so runs with it are free, offline and repeatable.
    Whether a question is answered rightly depends on (`seed`, question id) alone, as a deterministic cloud would: the
    same in every process, at every step, in any order of asking. With several samples a question each has a chance of
    its own, so that their mean correctness is a fraction; the first is the one that a single sample would be.

    Args:
        solve: Maps a question's id to the text of its right answer. An exception that it raises becomes a failed
            answer, and so does what is no text.
        accuracy: The share of questions answered rightly, in [0, 1].
        wrong: The text of a wrong answer.
        seed: Chooses which questions are answered wrongly.
        samples: Answers a question.

    Raises:
        ValueError: `accuracy` is outside [0, 1], or `samples` is below 1.
    """

    def __init__(
        self, solve: Callable[[str], str], accuracy: float, wrong: str, seed: int = 0, samples: int = 1
    ) -> None:
        if not 0.0 <= accuracy <= 1.0:
            raise ValueError(f"the oracle's accuracy must be in [0, 1], not {accuracy}")
        if samples < 1:
            raise ValueError(f"the oracle's samples must be 1 or more, not {samples}")
        self._solve = solve
        self._accuracy = accuracy
        self._wrong = wrong
        self._seed = seed
        self._samples = samples
        self.usage = OracleUsage()
        """Totals so far, those given to `restore` included."""

    def knows(self, question_id: str, sample: int = 0) -> bool:
        """Whether this sample of the question's answers is right."""
        own = f"\0{sample}" if sample else ""
        digest = hashlib.sha256(f"{self._seed}\0{question_id}{own}".encode()).digest()
        return int.from_bytes(digest[:7], "big") / 2**56 < self._accuracy

    def score(self, question_id: str) -> float:
        """The mean correctness of the question's samples, without asking."""
        return sum(self.knows(question_id, k) for k in range(self._samples)) / self._samples

    def ask(self, question: OracleQuestion) -> Future[list[OracleAnswer]]:
        """A future, already done, of all samples. Each counts as a request: nothing here is worth a cache."""
        future: Future[list[OracleAnswer]] = Future()
        answers = self.recall(question)
        failed = sum(answer.text is None for answer in answers)
        requests, failures = self.usage.requests + len(answers), self.usage.failures + failed
        self.usage = replace(self.usage, requests=requests, failures=failures)
        future.set_result(answers)
        return future

    def recall(self, question: OracleQuestion) -> list[OracleAnswer]:
        """The same answers, counted nowhere: a solver knows them without being asked."""
        return [self._answer(question.id, k) for k in range(self._samples)]

    def _answer(self, question_id: str, sample: int) -> OracleAnswer:
        try:
            text = self._solve(question_id) if self.knows(question_id, sample) else self._wrong
            if not isinstance(text, str):
                raise TypeError(f"{text!r:.60} is no text")
            return OracleAnswer(text)
        except Exception as error:  # a failed oracle is an answer without text, never an exception
            return OracleAnswer(None, error=f"the solver failed on {question_id!r}: {type(error).__name__}: {error}")

    def restore(self, usage: OracleUsage) -> None:
        """Continues from these totals."""
        self.usage = usage

    def close(self) -> None:
        """Nothing to free."""
