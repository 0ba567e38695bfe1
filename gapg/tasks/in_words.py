"""What tasks share whose problems are told in words and whose answers math-verify checks."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from gapg.tasks.base import Prompt, Verdict
from gapg.tasks.mathcheck import MathChecker
from gapg.tasks.templates import ANSWER_ONLY, ENDINGS, render_instruction
from gapg_rollout.records import OracleQuestion


class InWords:
    """How a problem is asked and its answers are checked; where problems come from is the task's own."""

    def __init__(self, checker: MathChecker) -> None:
        self.checker = checker

    def render(self, prompt: Prompt, tokenizer: PreTrainedTokenizerBase) -> list[int]:
        """One user turn of the model's chat template: the problem, then the two endings. Plain text without one."""
        return render_instruction(f"{prompt.text}\n\n{ENDINGS}", tokenizer)

    def verify(self, prompt: Prompt, answers: Sequence[str]) -> list[Verdict]:
        """math-verify's verdicts against the gold, in worker processes under limits."""
        return self.checker.check(prompt.answer, answers)

    def start_step(self) -> None:
        """Begins the checker's time budget anew."""
        self.checker.start_step()

    def question(self, prompt: Prompt) -> OracleQuestion:
        """One user message: the problem, and a request for an answer block."""
        return OracleQuestion(prompt.id, ({"role": "user", "content": f"{prompt.text}\n\n{ANSWER_ONLY}"},))
