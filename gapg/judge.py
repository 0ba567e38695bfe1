"""What a response is worth: parse its ending, verify its answer, ask the cloud where it matters, reward it.

The hierarchical reward of arXiv 2509.24050, section 3. Judging and rewarding are apart because the price of a call
moves from step to step while an outcome does not.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from enum import Enum
from typing import Literal

from gapg.errors import ConfigError, one_line
from gapg.tasks.base import (
    ANSWER_CLOSE,
    ANSWER_OPEN,
    HELP_CLOSE,
    HELP_OPEN,
    HELP_PHRASE,
    Budgeted,
    Prompt,
    Task,
    Verdict,
)
from gapg_rollout.records import Completion, Oracle, OracleAnswer
from gapg_rollout.text import spoken

# A tokenizer whose tags are special tokens may put one blank more beside them, or swallow the one that is there.
_PHRASE = re.compile(HELP_PHRASE.replace(" ", " +").replace("> +", "> *").replace(" +<", " *<"))
_WORD = re.compile(r"[^\W_]")
_SPECIAL_TOKEN = re.compile(r"<(?!/?(?:answer|unknown)>)[^<>\s]{1,64}>|\[[/|]?[A-Za-z_]{1,64}\|?\]")


class Outcome(Enum):
    """What became of one response. UNKNOWN: it called, and the oracle failed; that is never a reward of 0."""

    LOCAL_CORRECT = "local_correct"
    CLOUD_CORRECT = "cloud_correct"
    CLOUD_WRONG = "cloud_wrong"
    LOCAL_WRONG = "local_wrong"
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True)
class Parsed:
    """A response's ending. `answer`: the text inside the answer block. `well_formed`: one ending and nothing else.

    `both` is an answer and the help phrase in one response, in any order: wrong, and counted, because it is how
    reward hacking starts. `none` is everything else that does not end in an answer block or in the phrase.
    """

    kind: Literal["answer", "help", "both", "none"]
    answer: str | None = None
    well_formed: bool = False


def parse(text: str, thinking: bool = False) -> Parsed:
    """How a response ends. Only a terminal ending counts, and nothing that is said inside a think block does.

    text: the response with its special tokens. thinking: its prompt opened a think block (see `spoken`). A response
    that is still inside one at its end has no ending.

    After the ending, punctuation, blanks and special tokens are tolerated: a token may hold the end of a stop tag and
    what follows (`>.`). Linear in the text, whatever is in it.
    """
    said = spoken(text, thinking)
    if said is None:
        return Parsed("none")
    close = said.rfind(ANSWER_CLOSE)
    open_ = said.rfind(ANSWER_OPEN, 0, close) if close >= 0 else -1
    phrase = max((found.end() for found in _PHRASE.finditer(said)), default=-1)
    if open_ >= 0 and phrase >= 0:
        return Parsed("both")
    tags = tuple(said.count(tag) for tag in (ANSWER_OPEN, ANSWER_CLOSE, HELP_OPEN, HELP_CLOSE))
    if open_ >= 0 and _ends(said, close + len(ANSWER_CLOSE)):
        return Parsed("answer", said[open_ + len(ANSWER_OPEN) : close].strip(), tags == (1, 1, 0, 0))
    if phrase >= 0 and _ends(said, phrase):
        return Parsed("help", None, tags == (0, 0, 1, 1))
    return Parsed("none")


def _ends(text: str, at: int) -> bool:
    return _WORD.search(_SPECIAL_TOKEN.sub("", text[at:])) is None


@dataclass(frozen=True, slots=True)
class Group:
    """The G responses to one prompt, judged.

    well_formed: for each response, whether it has exactly one terminal ending (for the format reward).
    oracle_score: mean correctness of the oracle's samples that came, in [0, 1]; None when not asked or failed.
    oracle_answers: what the oracle replied, for the record; empty when it was not asked.
    unknown: the group needed the oracle and did not get it; it belongs in no batch and has no rewards. An oracle that
    sends nothing (`OracleAnswer.offline`) fails nobody but the responses that call.
    limits: answers on which the verifier hit its limits. both_endings: responses with an answer and the phrase.
    thinking: the prompt opened a think block, which the responses have to close.
    """

    prompt: Prompt
    completions: tuple[Completion, ...]
    outcomes: tuple[Outcome, ...]
    well_formed: tuple[bool, ...]
    oracle_score: float | None = None
    oracle_answers: tuple[OracleAnswer, ...] = ()
    unknown: bool = False
    limits: int = 0
    both_endings: int = 0
    thinking: bool = False

    @property
    def oracle_asked(self) -> bool:
        return bool(self.oracle_answers) and not self.oracle_answers[0].offline

    @property
    def calls(self) -> int:
        """Responses that end in the help phrase, known outcome or not."""
        return sum(o in (Outcome.CLOUD_CORRECT, Outcome.CLOUD_WRONG, Outcome.UNKNOWN) for o in self.outcomes)

    @property
    def solved_locally(self) -> bool:
        """Membership of D1, if the group is known: at least one right local answer."""
        return Outcome.LOCAL_CORRECT in self.outcomes

    @property
    def cloud_correct(self) -> bool:
        """The oracle is right on this prompt: at least half of its samples are."""
        return self.oracle_score is not None and self.oracle_score >= 0.5


def rewards(group: Group, alpha_a: float, alpha_c: float, alpha_f: float = 0.0) -> list[float]:
    """One reward per response: alpha_a for a right local answer, alpha_c * oracle_score for a call, else 0.

    alpha_f is added for exactly one terminal ending. Raises ValueError on an unknown group: a failed server must
    never turn into a reward.
    """
    if group.unknown:
        raise ValueError(f"prompt {group.prompt.id!r}: the oracle failed, so the group has no rewards")
    worth = {
        Outcome.LOCAL_CORRECT: alpha_a,
        Outcome.CLOUD_CORRECT: alpha_c * (group.oracle_score or 0.0),
        Outcome.CLOUD_WRONG: alpha_c * (group.oracle_score or 0.0),
        Outcome.LOCAL_WRONG: 0.0,
    }
    return [worth[o] + alpha_f * f for o, f in zip(group.outcomes, group.well_formed, strict=True)]


@dataclass(slots=True)
class Judge:
    """Judges the responses to a prompt against a task and an oracle.

    The oracle is asked when any response calls, when no response is right (the prompt filter must know whether the
    cloud is; `ask_unsolved=False` where there is no filter), and otherwise only with `ask_always`.
    masked: the responses are sampled with help forbidden. One that writes the phrase all the same, in tokens that are
    not steered, is wrong; the oracle is asked with `ask_always` only, and then its failure makes the group unknown, but
    not that it sends nothing: how right it is stays open there.
    thinking: the task's prompts open a think block (`gapg.model.endings.opens_think`).
    """

    task: Task
    oracle: Oracle
    ask_always: bool = False
    ask_unsolved: bool = True
    thinking: bool = False
    masked: bool = False

    def start_step(self) -> None:
        """Begins the task's time budget anew, where it has one: before a training step and before an evaluation."""
        if isinstance(self.task, Budgeted):
            self.task.start_step()

    def submit(self, prompt: Prompt, completions: Sequence[Completion]) -> PendingGroup:
        """Parses and verifies at once and sends the question if there is one, so that the cloud works meanwhile."""
        parsed = [parse(c.text, self.thinking) for c in completions]
        answers = [p.answer for p in parsed if p.answer is not None]
        verdicts = iter(verify(self.task, prompt, answers))
        local = [next(verdicts) if p.answer is not None else None for p in parsed]
        if self.masked:
            parsed = [Parsed("both") if p.kind == "help" else p for p in parsed]
            needed = self.ask_always
        else:
            needed = any(p.kind == "help" for p in parsed) or (self.ask_unsolved and Verdict.CORRECT not in local)
        asked = self.oracle.ask(self.task.question(prompt)) if needed or self.ask_always else None
        return PendingGroup(self.task, prompt, tuple(completions), parsed, local, needed, asked, self.thinking)


@dataclass(frozen=True, slots=True)
class PendingGroup:
    """A judged group that may still wait for the cloud."""

    task: Task
    prompt: Prompt
    completions: tuple[Completion, ...]
    parsed: list[Parsed]
    local: list[Verdict | None]
    needed: bool
    asked: Future[list[OracleAnswer]] | None
    thinking: bool = False

    def result(self) -> Group:
        """Waits for the oracle, whose own deadlines bound the wait."""
        replies = tuple(self.asked.result()) if self.asked is not None else ()
        score = oracle_score(self.task, self.prompt, replies)
        outcomes = tuple(_outcome(p, v, score) for p, v in zip(self.parsed, self.local, strict=True))
        failed = self.needed and score is None and not any(reply.offline for reply in replies)
        return Group(
            self.prompt,
            self.completions,
            outcomes,
            tuple(p.well_formed for p in self.parsed),
            oracle_score=score,
            oracle_answers=replies,
            unknown=failed or Outcome.UNKNOWN in outcomes,
            limits=self.local.count(Verdict.LIMIT),
            both_endings=sum(p.kind == "both" for p in self.parsed),
            thinking=self.thinking,
        )


def oracle_score(task: Task, prompt: Prompt, replies: Sequence[OracleAnswer]) -> float | None:
    """Mean correctness of the cloud's replies; None when none came.

    A reply with an answer block is judged by what is inside the last one, any other as a whole (a cloud model may box
    its result instead: the maths task takes the last box), its think blocks aside: that an ending must be terminal is
    a rule for the policy, not for the cloud. When some of k samples failed, the mean is over those that came: it stays
    unbiased, and dropping the group would throw away paid answers.
    """
    texts = [reply.text for reply in replies if reply.text is not None]
    if not texts:
        return None
    verdicts = verify(task, prompt, [_result(text) for text in texts])
    return sum(v is Verdict.CORRECT for v in verdicts) / len(texts)


def verify(task: Task, prompt: Prompt, answers: list[str]) -> list[Verdict]:
    """The task's verdicts. Raises ConfigError where its code fails or returns something else."""
    if not answers:
        return []
    try:
        verdicts = list(task.verify(prompt, answers))
    except Exception as error:  # a task is anyone's
        raise ConfigError(f"task {task.name!r}: verify() failed on prompt {prompt.id!r}: {one_line(error)}") from error
    if len(verdicts) != len(answers) or not all(isinstance(v, Verdict) for v in verdicts):
        raise ConfigError(
            f"task {task.name!r}: verify() of prompt {prompt.id!r} returned {repr(verdicts)[:80]}, not one Verdict for "
            f"each of {len(answers)} answers"
        )
    return verdicts


def _result(reply: str) -> str:
    """What of a cloud's reply is judged; nothing of one that ends while it reasons."""
    said = spoken(reply) or ""
    last_close = said.rfind(ANSWER_CLOSE)
    start = said.rfind(ANSWER_OPEN, 0, last_close) if last_close >= 0 else -1
    return said[start + len(ANSWER_OPEN) : said.index(ANSWER_CLOSE, start)].strip() if start >= 0 else said


def _outcome(parsed: Parsed, verdict: Verdict | None, score: float | None) -> Outcome:
    if parsed.kind == "help":
        if score is None:
            return Outcome.UNKNOWN
        return Outcome.CLOUD_CORRECT if score >= 0.5 else Outcome.CLOUD_WRONG
    # LIMIT is wrong too: a policy must not be able to erase a bad group with pathological output.
    return Outcome.LOCAL_CORRECT if verdict is Verdict.CORRECT else Outcome.LOCAL_WRONG
