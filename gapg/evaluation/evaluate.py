"""How good a policy is: accuracy together with the cloud, alone, and how often it calls; with 95% intervals."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from gapg.config_sections import RewardConfig
from gapg.console import Display
from gapg.evaluation.statistics import wilson
from gapg.judge import Group, Judge, Outcome, rewards
from gapg.runs import stop
from gapg.tasks.base import Prompt, Task
from gapg_rollout.records import Completion, Engine, OracleAnswer, Sampling


def respond(
    engine: Engine,
    task: Task,
    tokenizer: PreTrainedTokenizerBase,
    judge: Judge,
    prompts: Sequence[Prompt],
    sampling: Sampling,
    *,
    title: str | None = None,
    known: Mapping[int, Completion] | None = None,
) -> list[Group]:
    """One judged response a prompt, in the order of the prompts. Raises Stopped where it is no part of a step.

    known: the responses that need no decoding, by the index of their prompt.
    """
    known = known or {}
    open_ = [i for i in range(len(prompts)) if i not in known]
    ids = [task.render(prompts[i], tokenizer) for i in open_]
    judge.start_step()
    pending = {i: judge.submit(prompts[i], [completion]) for i, completion in known.items()}
    with Display(title or "evaluate", len(prompts), done=len(known), quiet=title is None) as display:
        for j, completions in engine.generate(ids, 1, sampling):
            pending[open_[j]] = judge.submit(prompts[open_[j]], completions)
            display.advance()
            stop.look()
    return [pending[i].result() for i in range(len(prompts))]


@dataclass(frozen=True, slots=True)
class Result:
    """Judged once: per problem whether it went to the cloud, and whether the right answer came out of it.

    correct: without the calls whose oracle failed, which nobody can judge; these are called, and not right locally.
    """

    name: str
    called: list[bool]
    correct: list[bool]
    local_correct: list[bool]

    def row(self) -> dict[str, Any]:
        """The figures of `summary.json`. Of all `n` problems: `call_fraction`, and `local_accuracy` (answered locally
        and right). Of those where no oracle failed: `accuracy`. NaN, which is null in files, of none."""
        row: dict[str, Any] = {"name": self.name, "n": len(self.called)}
        for key, hits in (
            ("accuracy", self.correct),
            ("local_accuracy", self.local_correct),
            ("call_fraction", self.called),
        ):
            n = len(hits)
            low, high = wilson(sum(hits), n)
            row |= {key: sum(hits) / n if n else math.nan, f"{key}_low": low, f"{key}_high": high}
        return row


def as_result(name: str, groups: Sequence[Group]) -> Result:
    """Single-response groups as a result. A call whose oracle failed is a call all the same; only `correct` leaves it
    out (report their count beside it). Where calls were not asked about at all it is empty: without them all it would
    be a precision."""
    outcomes = [g.outcomes[0] for g in groups]
    known = [] if any(g.unknown and not g.oracle_asked for g in groups) else outcomes
    return Result(
        name,
        called=[g.calls > 0 for g in groups],
        correct=[o in (Outcome.LOCAL_CORRECT, Outcome.CLOUD_CORRECT) for o in known if o is not Outcome.UNKNOWN],
        local_correct=[o is Outcome.LOCAL_CORRECT for o in outcomes],
    )


def answer_logprobs(completion: Completion) -> tuple[float, float] | None:
    """(mean, min) of the log-probs of a response's tokens given that it does not call; None without `HelpControl`.

    log pi(token) + log(1 + odds of the help phrase): the policy's log-prob of a token that goes on holds its decision
    not to call, and so tells a router what the help phrase would. Means nothing for a response that calls. Where the
    phrase cannot begin at every token, it is open which tokens its odds belong to: the minimum is then the recorded
    one, which is at most that.
    """
    odds = completion.help_log_odds
    if odds is None or not completion.logprobs:
        return None
    gains = [max(x, 0.0) + math.log1p(math.exp(-abs(x))) for x in odds]
    n = len(completion.logprobs)
    lowest = min(a + b for a, b in zip(completion.logprobs, gains if len(gains) == n else [0.0] * n, strict=True))
    return (sum(completion.logprobs) + sum(gains)) / n, lowest


def oracle_error(replies: Sequence[OracleAnswer]) -> str | None:
    """Why the first that failed did."""
    return next((reply.error or "no reason given" for reply in replies if reply.text is None), None)


def finite(margin: float | None) -> float | None:
    """None where it is infinite, for which JSON has no word."""
    return margin if margin is not None and math.isfinite(margin) else None


def prediction(group: Group, reward: RewardConfig) -> dict[str, Any]:
    """One line of `predictions.jsonl`: all that is needed to judge again.

    `reward` is None where the oracle failed, and `oracle_error` says why it gave no answer, or fewer than it was asked.
    """
    completion = group.completions[0]
    answer = answer_logprobs(completion)
    return {
        "id": group.prompt.id,
        "problem": group.prompt.text,
        "gold": group.prompt.answer,
        "response": completion.text,
        "thinking": group.thinking,
        "finish_reason": completion.finish_reason,
        "outcome": group.outcomes[0].value,
        "reward": None if group.unknown else rewards(group, reward.alpha_a, reward.alpha_c, reward.alpha_f)[0],
        "logprob_mean": sum(completion.logprobs) / len(completion.logprobs) if completion.logprobs else None,
        "answer_logprob_mean": answer and answer[0],
        "answer_logprob_min": answer and answer[1],
        "help_margin": finite(completion.help_margin),
        "oracle_score": group.oracle_score,
        "oracle_answers": [a.text for a in group.oracle_answers],
        "oracle_error": oracle_error(group.oracle_answers),
    }
