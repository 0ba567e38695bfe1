"""How a model is told about its two endings, through its chat template or as plain text."""

from __future__ import annotations

from transformers import PreTrainedTokenizerBase

from gapg.tasks.base import ANSWER_CLOSE, ANSWER_OPEN, HELP_PHRASE

ENDINGS = (
    "Think step by step, then end in exactly one of two ways. "
    f"If you are confident, give your final answer as {ANSWER_OPEN} your answer {ANSWER_CLOSE} and stop. "
    f"If you are not, end with exactly this phrase instead, and a stronger model will answer: {HELP_PHRASE}"
)
"""For the device model: an answer block or the help phrase (arXiv 2509.24050, section 3)."""

ANSWER_ONLY = f"Think step by step, then give your final answer as {ANSWER_OPEN} your answer {ANSWER_CLOSE}."
"""For the cloud model, which has nobody to ask."""


def render_instruction(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Token ids of one user turn and the assistant's opening; without a chat template, the plain text and a newline.

    One user message and no system message: some chat templates refuse the latter.
    """
    if getattr(tokenizer, "chat_template", None):
        turns = [{"role": "user", "content": text}]
        rendered = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        # The template writes its own special tokens, a BOS among them.
        return list(tokenizer.encode(str(rendered), add_special_tokens=False))
    return list(tokenizer.encode(f"{text}\n"))
