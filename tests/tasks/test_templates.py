"""Prompts: no end token behind them, the same on every day, and a template's own error in one line."""

from datetime import datetime

import pytest
from tokenizers import processors
from transformers import PreTrainedTokenizerFast
from transformers.utils import chat_template_utils

from gapg.errors import ConfigError
from gapg.tasks.templates import encode_prompt, render_instruction

SPECIAL = ["<s>", "</s>", "[CLS]", "[SEP]", "<eod>"]


def with_post_processor(tokenizer: PreTrainedTokenizerFast, template: str) -> PreTrainedTokenizerFast:
    tokenizer.add_special_tokens({"additional_special_tokens": SPECIAL})
    pairs = [(token, tokenizer.convert_tokens_to_ids(token)) for token in SPECIAL]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=pairs)
    return tokenizer


@pytest.mark.parametrize(
    ("template", "before"),
    [
        ("$A", ""),
        ("<s> $A", "<s>"),
        ("<s> $A </s>", "<s>"),
        ("$A </s>", ""),
        ("[CLS] $A [SEP]", "[CLS]"),
        ("$A </s> <eod>", ""),
        ("<s> <s> $A </s> </s>", "<s><s>"),
    ],
)
@pytest.mark.parametrize("text", ["What is 1 + 2?", "</s> ends nothing here </s>", "<s>"])
def test_what_a_tokenizer_puts_after_a_text_is_left_out(
    byte_tokenizer: PreTrainedTokenizerFast, template: str, before: str, text: str
) -> None:
    tokenizer = with_post_processor(byte_tokenizer, template)
    assert tokenizer.decode(render_instruction(text, tokenizer)) == f"{before}{text}\n"
    assert tokenizer.decode(encode_prompt(f"{text} ?", tokenizer)) == f"{before}{text} ?"


def test_a_chat_template_writes_all_special_tokens_itself(byte_tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer = with_post_processor(byte_tokenizer, "<s> $A </s>")
    tokenizer.chat_template = "<s>{{ messages[0].content }}[SEP]"
    assert tokenizer.decode(render_instruction("1 + 2", tokenizer)) == "<s>1 + 2[SEP]"


DATED = {
    "plain": "{{ strftime_now('%d %b %Y') }}",
    "keyword": "{{ strftime_now(format='%d %b %Y') }}",
    "condition": "{% if strftime_now is defined %}{% set day = strftime_now('%d %b %Y') %}{% endif %}{{ day }}",
    "macro": "{% macro today() %}{{ strftime_now('%d %b %Y') }}{% endmacro %}{{ today() }}",
    "loop": "{% for m in messages %}{{ strftime_now('%d %b %Y') }}{% endfor %}",
    "generation": "{% generation %}{{ strftime_now('%d %b %Y') }}{% endgeneration %}",
}


@pytest.mark.parametrize("template", DATED.values(), ids=DATED)
def test_a_template_is_told_the_same_day_every_day(
    byte_tokenizer: PreTrainedTokenizerFast, template: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    byte_tokenizer.chat_template = template + " {{ messages[0].content }}"
    rendered = set()
    for year in (2025, 2026):

        class Clock(datetime):
            @classmethod
            def now(cls, tz: object = None, year: int = year) -> "Clock":
                return cls(year, 1, 1)

        monkeypatch.setattr(chat_template_utils, "datetime", Clock)
        rendered.add(tuple(render_instruction("1 + 2", byte_tokenizer)))
    assert [byte_tokenizer.decode(ids) for ids in rendered] == ["26 Jul 2024 1 + 2"]


@pytest.mark.parametrize(
    ("template", "cause"),
    [
        ("{{ raise_exception('a system message\n must come first') }}", "a system message must come first"),
        ("{{ messages[0].content", "TemplateSyntaxError"),
        ("{{ messages[0].nothing.at_all }}", "UndefinedError"),
        ("{{ 1 + messages[0].content }}", "TypeError"),
        ("{{ 1 // 0 }}", "ZeroDivisionError"),
        ("{% include 'other' %}", "no loader"),
    ],
)
def test_a_template_that_fails_is_named_in_one_line(
    byte_tokenizer: PreTrainedTokenizerFast, template: str, cause: str
) -> None:
    byte_tokenizer.chat_template = template
    with pytest.raises(ConfigError, match=r"^model\.path: the chat template of the task fails") as error:
        render_instruction("1 + 2", byte_tokenizer)
    assert cause in str(error.value)
    assert "\n" not in str(error.value)


PARTS = "{% for part in messages[0].content %}{% if part.type == 'text' %}{{ part.text }}{% endif %}{% endfor %}"


@pytest.mark.parametrize("template", ["Hello", " ", "{{ messages[0].content[0].text }} ?", PARTS])
def test_a_template_that_leaves_the_text_out_is_refused(byte_tokenizer: PreTrainedTokenizerFast, template: str) -> None:
    byte_tokenizer.chat_template = template
    with pytest.raises(ConfigError, match=r"^model\.path: the chat template of the task leaves out a message"):
        render_instruction("1 + 2", byte_tokenizer)


@pytest.mark.parametrize(
    ("template", "rendered"),
    [("trim", "1 <b"), ("upper", " 1 <B "), ("replace('b', 'c')", " 1 <c "), ("tojson", '" 1 <b "')],
)
def test_a_template_may_change_the_text(byte_tokenizer: PreTrainedTokenizerFast, template: str, rendered: str) -> None:
    byte_tokenizer.chat_template = f"{{{{ messages[0].content | {template} }}}}"
    assert byte_tokenizer.decode(render_instruction(" 1 <b ", byte_tokenizer)) == rendered
