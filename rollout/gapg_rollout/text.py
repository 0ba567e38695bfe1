"""From tokens back to text, one way for all engines: stop strings are looked for in what the judge will read."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

THINK = (
    ("<think>", "</think>"),  # Qwen, DeepSeek, GLM, Phi, SmolLM, OLMo, Nemotron, MiniMax and most others
    ("<thinking>", "</thinking>"),
    ("<thought>", "</thought>"),  # EXAONE Deep
    ("<reasoning>", "</reasoning>"),  # what many GRPO recipes teach
    ("<seed:think>", "</seed:think>"),
    ("<mm:think>", "</mm:think>"),  # MiniMax M3
    ("[THINK]", "[/THINK]"),  # Magistral
    ("◁think▷", "◁/think▷"),  # Kimi-VL
    ("<|begin_of_thought|>", "<|end_of_thought|>"),  # Sky-T1, OpenThinker
    ("<|START_THINKING|>", "<|END_THINKING|>"),  # Command A Reasoning
    ("<|channel>thought", "<channel|>"),  # Gemma 4
    ("<|channel|>analysis<|message|>", "<|channel|>final<|message|>"),  # gpt-oss
)
"""What opens and closes a block of reasoning in the text of open models, in letters of either case."""

_CLOSE_OF = {begin.lower(): end.lower() for begin, end in THINK}
_THINK_MARK = re.compile("|".join(re.escape(mark) for pair in THINK for mark in pair), re.IGNORECASE)


def plain_text(tokenizer: PreTrainedTokenizerBase, token_ids: Sequence[int]) -> str:
    """What the tokens say: special tokens included, and no space taken away."""
    text = tokenizer.decode(list(token_ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return str(text)


def response_text(
    tokenizer: PreTrainedTokenizerBase,
    token_ids: Sequence[int],
    end_ids: Collection[int],
    stop: Sequence[str] = (),
) -> str:
    """Text of a response: every special token kept but the final end and padding.

    Tags such as `<answer>` are special tokens in some tokenizers, and they are what is judged.

    Args:
        token_ids: the response, the end token included; several end and padding tokens may follow one another.
        end_ids: the tokens that end a response; the tokenizer's padding token is added.
        stop: the stop strings. An end token that holds one (`</answer>` may be the end token) stays in the text.
    """
    silent = {*end_ids, tokenizer.pad_token_id}
    length = len(token_ids)
    while length and token_ids[length - 1] in silent:
        last = plain_text(tokenizer, token_ids[length - 1 : length])
        if any(s in last for s in stop):
            break
        length -= 1
    return plain_text(tokenizer, token_ids[:length])


def has_stopped(text: str, stop: Sequence[str], thinking: bool = False) -> bool:
    """Whether a stop string stands in what the response says outside think blocks, and it is outside one now."""
    said = spoken(text, thinking)
    return said is not None and any(s in said for s in stop)


def think_marks(text: str, thinking: bool = False) -> int:
    """How often a think block is opened or closed in the text; marks inside a block, which do neither, do not count."""
    return sum(1 for _ in _turns(text, thinking))


def spoken(text: str, thinking: bool = False) -> str | None:
    """The text outside think blocks; None where it ends inside one.

    thinking: the prompt opened a block, so the text begins inside it. A close without an open says the same of all
    before it.
    """
    outside: list[str] = []
    start, inside = 0, thinking
    for found, opens in _turns(text, thinking):
        if opens:
            outside.append(text[start : found.start()])
        else:
            if not inside:
                outside.clear()
            start = found.end()
        inside = opens
    # joined by what is in no tag: a block must not hold the halves of one together
    return None if inside else "\n".join([*outside, text[start:]])


def _turns(text: str, thinking: bool) -> Iterator[tuple[re.Match[str], bool]]:
    """Each mark that opens a block or closes one, and whether it opens it."""
    awaited = "" if thinking else None  # what closes the block; a block of the prompt's is closed by anything
    for found in _THINK_MARK.finditer(text):
        mark = found[0].lower()
        if mark in _CLOSE_OF:
            if awaited is None:
                awaited = _CLOSE_OF[mark]
                yield found, True
        elif not awaited or mark == awaited:
            awaited = None
            yield found, False
