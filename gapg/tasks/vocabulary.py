"""A tokenizer for models made from scratch, whose task is written in few words."""

from __future__ import annotations

from collections.abc import Iterable

from tokenizers import AddedToken, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from gapg.tasks.base import ANSWER_CLOSE, ANSWER_OPEN, HELP_PHRASE


def word_tokenizer(words: Iterable[str]) -> PreTrainedTokenizerBase:
    """A token for each of these words, which blanks divide, for both answer tags, and for the whole help phrase.

    Raises ValueError for a word that holds a blank, and so would never be found in a text.
    """
    vocabulary = list(dict.fromkeys(["<pad>", "<eos>", "<unk>", *words, ANSWER_OPEN, ANSWER_CLOSE, HELP_PHRASE]))
    if divided := [word for word in vocabulary if word.split() != [word] and word != HELP_PHRASE]:
        raise ValueError(f"word_tokenizer: {divided[0]!r} is not one word: blanks divide words, so give each by itself")
    inner = Tokenizer(WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token="<unk>"))
    inner.pre_tokenizer = WhitespaceSplit()
    # Not special: decoding that skips special tokens must keep the phrase.
    inner.add_tokens([AddedToken(HELP_PHRASE, normalized=False)])
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        clean_up_tokenization_spaces=False,
    )
