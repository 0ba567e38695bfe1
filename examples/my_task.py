"""A task of your own: `PYTHONPATH=examples gapg train … --task.name my_task:Sums`."""

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from gapg.tasks.base import Prompt, Split, Verdict
from gapg.tasks.templates import ANSWER_ONLY, ENDINGS, render_instruction
from gapg_rollout.records import OracleQuestion


class Sums:
    """Adding two numbers below `limit`; every fifth problem is held out."""

    name = "sums"

    def __init__(self, limit: int = 30) -> None:
        pairs = [(a, b) for a in range(limit) for b in range(limit)]
        self._all = [Prompt(f"{a}+{b}", f"What is {a} + {b}?", str(a + b), self.name) for a, b in pairs]

    def prompts(self, split: Split) -> Sequence[Prompt]:
        return [p for i, p in enumerate(self._all) if (i % 5 == 0) == (split == "heldout")]

    def render(self, prompt: Prompt, tokenizer: PreTrainedTokenizerBase) -> list[int]:
        return render_instruction(f"{prompt.text} {ENDINGS}", tokenizer)

    def verify(self, prompt: Prompt, answers: Sequence[str]) -> list[Verdict]:
        return [Verdict.CORRECT if a.strip() == prompt.answer else Verdict.WRONG for a in answers]

    def question(self, prompt: Prompt) -> OracleQuestion:
        return OracleQuestion(prompt.id, ({"role": "user", "content": f"{prompt.text} {ANSWER_ONLY}"},))
