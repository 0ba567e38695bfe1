"""Whether a tokenizer can say both endings, and whether a task's prompts leave a think block open."""

from __future__ import annotations

from collections.abc import Collection

from transformers import PreTrainedTokenizerBase

from gapg.errors import ConfigError, one_line
from gapg.judge import parse
from gapg.tasks.base import ANSWER_CLOSE, ANSWER_OPEN, HELP_PHRASE, STOP, Task
from gapg.tasks.templates import named
from gapg_rollout.text import THINK, plain_text, response_text

_BEFORE = ("", "x ", "x\n")


def check_endings(tokenizer: PreTrainedTokenizerBase, end_ids: Collection[int]) -> None:
    """Encodes both endings, reads them back as an engine does, and parses them, with and without an end token after.

    The answer is a 3, or whatever the tokenizer makes of one: a task's own tokenizer may write words only.
    end_ids: the tokens that end a response. Raises ConfigError naming the ending that is lost and what came back.
    """
    digit = plain_text(tokenizer, _encode("3", tokenizer)).strip() or "3"
    # an end token that is itself a stop tag belongs to an ending, and does not follow one
    ends = [i for i in sorted(end_ids) if not any(tag in plain_text(tokenizer, [i]) for tag in STOP)]
    # where a line break ends a response, none comes before an ending
    befores = [before for before in _BEFORE if not any(i in end_ids for i in _encode(before, tokenizer))]
    for what, ending, wanted in (
        ("answer block", f"{ANSWER_OPEN} 3 {ANSWER_CLOSE}", ("answer", digit)),
        ("help phrase", HELP_PHRASE, ("help", None)),
    ):
        for text in (before + ending for before in befores):
            said = _encode(text, tokenizer)
            for ids in (said, *([*said, end] for end in ends)):
                # an engine stops at the first end token, which may be a part of the ending
                length = next((n for n, token in enumerate(ids, 1) if token in end_ids), len(ids))
                back = response_text(tokenizer, ids[:length], end_ids, STOP)
                parsed = parse(back)
                if (parsed.kind, parsed.answer) != wanted:
                    raise ConfigError(_lost(tokenizer, what, text, back))


def opens_think(task: Task, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the task's prompts end inside a think block, which chat templates of reasoning models open there.

    The first prompt tells: what a template adds after the problem is the same for all.
    """
    first = (task.prompts("train") or task.prompts("heldout"))[0]
    prompt = plain_text(tokenizer, task.render(first, tokenizer))
    return prompt.rstrip().endswith(tuple(open_ for open_, _ in THINK))


def _encode(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    try:
        return list(tokenizer.encode(text, add_special_tokens=False))
    except Exception as error:  # the tokenizers library raises nothing more special
        raise ConfigError(
            f"model.path: the tokenizer of {named(tokenizer)} cannot write {text!r} ({one_line(error)}); give it an "
            "unknown token"
        ) from None


def _lost(tokenizer: PreTrainedTokenizerBase, what: str, text: str, back: str) -> str:
    return (
        f"model.path: the tokenizer of {named(tokenizer)} loses the {what}: {text!r} comes back as {back!r}; take one "
        "that keeps case, blanks and punctuation, or add the tags to it, and let no ending hold an end or padding token"
    )
