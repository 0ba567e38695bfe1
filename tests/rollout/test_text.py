"""Text of a response: what the judge must see stays in it, end and padding do not."""

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from gapg_rollout.text import response_text

TAGS = ("<answer>", "</answer>", "<unknown>", "</unknown>", "<think>")


def make(special: tuple[str, ...] = TAGS, **settings: object) -> PreTrainedTokenizerFast:
    """Every byte is a token, and so is each tag."""
    vocabulary = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    inner = Tokenizer(models.BPE(vocabulary, []))
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    names = {"eos_token": "<eos>", "pad_token": "<pad>", "additional_special_tokens": list(special), **settings}
    return PreTrainedTokenizerFast(tokenizer_object=inner, **names)


def ids(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


@pytest.mark.parametrize("special", [(), TAGS], ids=["plain tags", "special tags"])
@pytest.mark.parametrize("text", ["", "<think> so <answer> 3 </answer>", "I  do not , know\n<unknown> é </unknown> ."])
@pytest.mark.parametrize("end", ["", "<eos>", "<eos><pad><pad>", "<|turn|><eos>", "<pad>"])
def test_all_but_the_end_and_padding_stays(special: tuple[str, ...], text: str, end: str) -> None:
    tokenizer = make((*special, "<|turn|>"), clean_up_tokenization_spaces=True)
    end_ids = tokenizer.convert_tokens_to_ids(["<eos>", "<|turn|>"])
    assert response_text(tokenizer, ids(tokenizer, text + end), end_ids) == text


def test_an_end_or_padding_token_in_the_middle_stays() -> None:
    tokenizer = make()
    text = "a<pad><eos><|x|> b"
    assert response_text(tokenizer, ids(tokenizer, text), [tokenizer.eos_token_id]) == text


@pytest.mark.parametrize("role", ["eos_token", "pad_token"])
def test_a_stop_tag_that_is_the_end_token_stays(role: str) -> None:
    tokenizer = make(**{role: "</answer>"})
    text, end_ids = "<answer> 3 </answer>", [tokenizer.eos_token_id]
    for end in ("", "<eos>" if role == "pad_token" else "<pad>"):
        assert response_text(tokenizer, ids(tokenizer, text + end), end_ids, stop=("</answer>", "</unknown>")) == text
    assert response_text(tokenizer, ids(tokenizer, text), end_ids) == "<answer> 3 "


def test_a_tokenizer_without_padding() -> None:
    tokenizer = make(pad_token=None)
    assert response_text(tokenizer, ids(tokenizer, "a<eos>"), {tokenizer.eos_token_id}) == "a"
