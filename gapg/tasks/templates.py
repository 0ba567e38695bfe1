"""How a model is told about its two endings, through its chat template or as plain text."""

from __future__ import annotations

from datetime import date

from transformers import PreTrainedTokenizerBase

from gapg.errors import ConfigError, one_line
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
    (`strftime_now`) it is always `TODAY`. Raises ConfigError, with the template's own words, where the template fails,
    and where it leaves the text out.
    """
    if not getattr(tokenizer, "chat_template", None):
        return encode_prompt(f"{text}\n", tokenizer)
    rendered = _apply_template(text, tokenizer)
    # a template may change the text; one for images, say, may look for a list of parts and find none in it
    if text.strip() not in rendered and rendered == _apply_template(f"? {text}", tokenizer):
        raise ConfigError(
            f"model.path: the chat template of {named(tokenizer)} leaves out a message that is plain text; mend the "
            "template, or delete it"
        )
    # The template writes its own special tokens, a BOS among them.
    return list(tokenizer.encode(rendered, add_special_tokens=False))


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
        f"model.path: the tokenizer of {named(tokenizer)} writes {text[:40]!r} otherwise with its special tokens than "
        "without; give it a chat template"
    )


def named(tokenizer: PreTrainedTokenizerBase) -> str:
    """Whose tokenizer it is: the path it came from, or the task that made it."""
    return tokenizer.name_or_path or "the task"


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
        raise ConfigError(
            f"model.path: the chat template of {named(tokenizer)} fails on one user message ({one_line(error)}); mend "
            "the template, or delete it"
        ) from None
    return str(rendered)
