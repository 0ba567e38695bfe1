"""The hierarchical reward of arXiv 2509.24050 as a reward function of TRL's trainers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from itertools import groupby
from typing import Any

from transformers import PreTrainedTokenizerBase

from gapg.errors import ConfigError
from gapg.judge import Group, Judge, Outcome, rewards
from gapg.tasks.base import STOP, Task
from gapg_rollout.records import Completion, OracleAnswer, OracleQuestion, OracleUsage
from gapg_rollout.text import response_text

Replies = str | Sequence[str | None] | None
"""What the cloud said to a question: one text, several, or nothing."""


class HierarchicalReward:
    """alpha_a for a right local answer, alpha_c times the cloud's correctness for a call, else 0: `gapg.judge.rewards`.

    Beside `prompt` the dataset has the columns `id`, a problem of the task, and
    `cloud_answer`, the cloud's reply to it: a text, a list of texts, or None where it gave none. A group that needs a
    reply and has none gets no rewards, and TRL then gives it no advantage.

    A response has to end where its answer ends: train a model that stops there by itself, or give the engine the
    strings of `gapg.tasks.base.STOP` in `generation_kwargs`.

    Args:
        task: finds its problems by `id` and verifies answers.
        tokenizer: the trainer's. TRL's own texts lack special tokens, which the tags of an answer may be.
        alpha_a, alpha_c, alpha_f: what a right local answer, a right call, and exactly one ending more are worth.
        thinking: the prompts open a think block (see `gapg.judge.parse`).

    Raises ValueError unless alpha_c < alpha_a.
    """

    def __init__(
        self,
        task: Task,
        tokenizer: PreTrainedTokenizerBase,
        *,
        alpha_a: float = 1.0,
        alpha_c: float = 0.25,
        alpha_f: float = 0.0,
        thinking: bool = False,
    ) -> None:
        if not alpha_c < alpha_a:
            raise ValueError(f"alpha_c={alpha_c} must be below alpha_a={alpha_a}, or every question is worth a call")
        self.task, self.tokenizer, self.thinking = task, tokenizer, thinking
        self.prices = (alpha_a, alpha_c, alpha_f)
        self.groups: list[Group] = []
        """The groups of the last call, in its order."""
        self._prompts = {p.id: p for p in (*task.prompts("train"), *task.prompts("heldout"))}

    def __call__(
        self,
        completion_ids: Sequence[Sequence[int]],
        id: Sequence[str] | None = None,
        cloud_answer: Sequence[Replies] | None = None,
        log_metric: Callable[[str, float], None] | None = None,
        **others: Any,
    ) -> list[float | None]:
        """One reward a completion; None for all of a group that needs the cloud and has no reply.

        Raises ConfigError where the dataset lacks a column, or an id is none of the task's.
        """
        if id is None or cloud_answer is None:
            raise ConfigError("hierarchical_reward: the dataset needs the columns 'id' and 'cloud_answer'")
        if unknown := set(id) - self._prompts.keys():
            raise ConfigError(f"hierarchical_reward: task {self.task.name!r} has no problem {min(unknown)!r:.80}")
        judge = Judge(self.task, _Given(), thinking=self.thinking)
        judge.start_step()
        self.groups = []
        for _, rows in groupby(range(len(id)), key=id.__getitem__):
            members = list(rows)
            judge.oracle = _Given(cloud_answer[members[0]])
            completions = [self._completion(completion_ids[i]) for i in members]
            self.groups.append(judge.submit(self._prompts[id[members[0]]], completions).result())
        if log_metric is not None:
            outcomes = [o for g in self.groups for o in g.outcomes]
            log_metric("call_fraction", sum(g.calls for g in self.groups) / len(outcomes))
            log_metric("local_accuracy", outcomes.count(Outcome.LOCAL_CORRECT) / len(outcomes))
        return [r for g in self.groups for r in ([None] * len(g.outcomes) if g.unknown else rewards(g, *self.prices))]

    def _completion(self, ids: Sequence[int]) -> Completion:
        end = self.tokenizer.eos_token_id
        text = response_text(self.tokenizer, ids, {end}, STOP)
        return Completion(tuple(ids), (), text, "stop" if end in ids[-1:] else "length")


class _Given:
    """An oracle that has already answered."""

    usage = OracleUsage()

    def __init__(self, replies: Replies = None) -> None:
        texts = [replies] if isinstance(replies, str) or replies is None else replies
        self.answers = [OracleAnswer(text, None if text else "the dataset has no reply") for text in texts]

    def ask(self, question: OracleQuestion) -> Future[list[OracleAnswer]]:
        future = Future[list[OracleAnswer]]()
        future.set_result(self.answers)
        return future

    def restore(self, usage: OracleUsage) -> None:
        """Nothing is counted."""

    def close(self) -> None:
        """Nothing is open."""
