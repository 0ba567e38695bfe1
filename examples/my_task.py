"""A task of your own: `PYTHONPATH=examples gapg train examples/my_config.yaml`."""

import random
from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from gapg.tasks.base import HELP_PHRASE, Demonstration, Prompt, Split, Verdict
from gapg.tasks.templates import ANSWER_ONLY, ENDINGS, encode_prompt, render_instruction
from gapg.tasks.vocabulary import word_tokenizer
from gapg_rollout.records import OracleQuestion


class Sums:
    """Adding two numbers below `limit`; every fifth problem is held out."""

    name = "sums"

    def __init__(self, limit: int = 30) -> None:
        self.limit, pairs = limit, [(a, b) for a in range(limit) for b in range(limit)]
        self._all = [Prompt(f"{a}+{b}", f"What is {a} + {b} ?", str(a + b), self.name) for a, b in pairs]

    def prompts(self, split: Split) -> Sequence[Prompt]:
        return [p for i, p in enumerate(self._all) if (i % 5 == 0) == (split == "heldout")]

    def render(self, prompt: Prompt, tokenizer: PreTrainedTokenizerBase) -> list[int]:
        if tokenizer.chat_template:  # a model that can be told of its two endings
            return render_instruction(f"{prompt.text} {ENDINGS}", tokenizer)
        return encode_prompt(prompt.text, tokenizer)

    def verify(self, prompt: Prompt, answers: Sequence[str]) -> list[Verdict]:
        return [Verdict.CORRECT if a.strip() == prompt.answer else Verdict.WRONG for a in answers]

    def question(self, prompt: Prompt) -> OracleQuestion:
        return OracleQuestion(prompt.id, ({"role": "user", "content": f"{prompt.text} {ANSWER_ONLY}"},))

    # The rest is for my_config.yaml: a model made from scratch wants a tokenizer and demonstrations to start from, and
    # a cloud that costs nothing wants a solver.

    def tokenizer(self) -> PreTrainedTokenizerBase:
        return word_tokenizer(["What", "is", "+", "?", *map(str, range(2 * self.limit))])

    def demonstrations(self, seed: int) -> Sequence[Demonstration]:
        """The larger the sum, the likelier help: calls that follow from nothing die out in training."""
        rng, made = random.Random(seed), []
        for prompt in self.prompts("train"):
            calls = rng.random() < int(prompt.answer) / (3 * self.limit)
            made.append(Demonstration(prompt, HELP_PHRASE if calls else f"<answer> {prompt.answer} </answer>"))
        return made

    def solve(self, question_id: str) -> str:
        return f"<answer> {sum(map(int, question_id.split('+')))} </answer>"
