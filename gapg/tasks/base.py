"""What a task is: problems, how a model is asked, and when an answer is right. Bring your own by import path.

Anything with the four members of `Task` can be trained on (`task: {name: mypkg.mytask:MyTask}` in a config).
`Solvable`, `Budgeted`, `Demonstrated` and `Tokenized` are what a task may add.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Literal, Protocol, runtime_checkable

from gapg_rollout.records import OracleQuestion

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ANSWER_OPEN, ANSWER_CLOSE = "<answer>", "</answer>"
HELP_OPEN, HELP_CLOSE = "<unknown>", "</unknown>"
HELP_PHRASE = f"{HELP_OPEN} I need external assistance {HELP_CLOSE}"
STOP = (ANSWER_CLOSE, HELP_CLOSE)
"""Both endings stop generation: a response ends in an answer block or in the help phrase."""

Split = Literal["train", "heldout"]


@dataclass(frozen=True, slots=True)
class Prompt:
    """One problem: `text` as the data has it, `answer` the gold, `id` stable over runs, `task` the task's name."""

    id: str
    text: str
    answer: str
    task: str


@dataclass(frozen=True, slots=True)
class Demonstration:
    """A supervised pair for the warm start; `response` ends in an answer block or the help phrase."""

    prompt: Prompt
    response: str


class Verdict(Enum):
    """LIMIT: the answer made the verifier hit its limits. It counts as wrong, and is counted apart."""

    CORRECT = "correct"
    WRONG = "wrong"
    LIMIT = "limit"


class Task(Protocol):
    """A source of problems and their judge."""

    name: str

    def prompts(self, split: Split) -> Sequence[Prompt]:
        """Problems of a split, in a fixed order; train and heldout are disjoint. Raises ValueError naming bad data."""

    def render(self, prompt: Prompt, tokenizer: PreTrainedTokenizerBase) -> list[int]:
        """The prompt's token ids as the device model sees them: template applied, both endings explained."""

    def verify(self, prompt: Prompt, answers: Sequence[str]) -> list[Verdict]:
        """A verdict for each answer (the text inside the answer block, or a cloud model's whole reply)."""

    def question(self, prompt: Prompt) -> OracleQuestion:
        """What the cloud is asked."""


@runtime_checkable
class Solvable(Protocol):
    """Has an exact solver, which can stand in for the cloud (`oracle.kind: solver`)."""

    def solve(self, question_id: str) -> str:
        """A right answer to the prompt with this id, as the oracle would reply."""


@runtime_checkable
class Budgeted(Protocol):
    """Bounds the time that verifying takes, from one `start_step` to the next."""

    def start_step(self) -> None:
        """Called before every training step and every evaluation: the time budget begins anew."""


@runtime_checkable
class Demonstrated(Protocol):
    """Makes its own warm-start demonstrations."""

    def demonstrations(self, seed: int) -> Sequence[Demonstration]:
        """One demonstration for each training prompt (the same ones for the same seed)."""


@runtime_checkable
class Tokenized(Protocol):
    """Brings a tokenizer for models made from scratch."""

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Made without a download; has pad and EOS tokens, and numbers its tokens from 0 on without gaps."""
