"""How a model is told about its two endings, through its chat template or as plain text."""

from __future__ import annotations

from datetime import date

from transformers import PreTrainedTokenizerBase

from gapg.config import ConfigError
from gapg.tasks.base import ANSWER_CLOSE, ANSWER_OPEN, HELP_PHRASE

ENDINGS = (
    "Think step by step, then end in exactly one of two ways. "
    f"If you are confident, give your final answer as {ANSWER_OPEN} your answer {ANSWER_CLOSE} and stop. "
    f"If you are not, end with exactly this phrase instead, and a stronger model will answer: {HELP_PHRASE}"
)
"""For the device model: an answer block or the help phrase (arXiv 2509.24050, section 3)."""

ANSWER_ONLY = f"Think step by step, then give your final answer as {ANSWER_OPEN} your answer {ANSWER_CLOSE}."
"""For the cloud model, which has nobody to ask."""

TODAY = date(2024, 7, 26)
"""The day that chat templates are told. It is the one that Llama 3's templates write where they are told none."""


def render_instruction(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Token ids of one user turn and the assistant's opening; without a chat template, the plain text and a newline.

    One user message and no system message: some chat templates refuse the latter. For a template that writes the date
    (`strftime_now`) it is always `TODAY`. Raises ConfigError, with the template's own words, where the template fails.
    """
    if not getattr(tokenizer, "chat_template", None):
        return encode_prompt(f"{text}\n", tokenizer)
    # The template writes its own special tokens, a BOS among them.
    return list(tokenizer.encode(_apply_template(text, tokenizer), add_special_tokens=False))


def encode_prompt(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Token ids of a text that a response follows: what the tokenizer puts before a text (BOS) stays, and what it puts
    after one (EOS, SEP) is left out, since nothing follows those.

    Raises ConfigError for a tokenizer that writes the text itself otherwise when it adds special tokens.
    """
    bare, whole = list(tokenizer.encode(text, add_special_tokens=False)), list(tokenizer.encode(text))
    for start in range(len(whole) - len(bare) + 1):
        if whole[start : start + len(bare)] == bare:
            return whole[: start + len(bare)]
    raise ConfigError(
        f"model.path: its tokenizer writes {text[:40]!r} otherwise with its special tokens than without; "
        "give the tokenizer a chat template"
    )


def _apply_template(text: str, tokenizer: PreTrainedTokenizerBase) -> str:
    try:
        rendered = tokenizer.apply_chat_template(
            [{"role": "user", "content": text}],
            tokenize=False,
            add_generation_prompt=True,
            # a prompt that changes at midnight is another prompt for a resumed run, and for a later evaluation
            strftime_now=TODAY.strftime,
        )
    except Exception as error:  # a template is a program, and may raise anything
        cause = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise ConfigError(
            f"model.path: its chat template fails on one user message ({cause}); mend the template, or delete it"
        ) from None
    return str(rendered)
