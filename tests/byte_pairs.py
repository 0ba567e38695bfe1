"""Tokenizers as real models have them, that join the tags of an ending with what stands before them."""

from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from transformers import PreTrainedTokenizerFast

from gapg.tasks.base import HELP_PHRASE

ENDINGS = ("so {} = 39 ", "so {} = 39\n", "so {} = 39.\n\n", "so {} = 39.")
"""How a response goes on to its ending: after a blank, on a line of its own, and right after a full stop."""


def byte_pairs() -> PreTrainedTokenizerFast:
    """A byte-level BPE as real models have it: ` <` and `.<` are tokens of their own beside `<`."""
    inner = Tokenizer(BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    trainer = BpeTrainer(
        vocab_size=420, special_tokens=["<|end|>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    texts = [f"{e.format(i)}{tag}" for e in ENDINGS for i in range(9) for tag in (HELP_PHRASE, "<answer> 4 </answer>")]
    inner.train_from_iterator([*texts, "a <b> and .<c>" * 9], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token="<|end|>", pad_token="<|end|>", clean_up_tokenization_spaces=False
    )


def metaspace() -> PreTrainedTokenizerFast:
    """A BPE as SentencePiece makes it: a blank is a letter of the word after it, and a text loses its first one."""
    inner = Tokenizer(BPE(unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    inner.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    letters = [*HELP_PHRASE, *"ab1.()\"'<>/=:,-\nwrx4"]
    trainer = BpeTrainer(vocab_size=72, special_tokens=["<unk>", "</s>"], initial_alphabet=letters)
    inner.train_from_iterator(
        [f"a{mark}<{c}" for mark in (' "', " ", ".", "") for c in "ab1(=" for _ in range(9)], trainer
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token="</s>", pad_token="</s>", clean_up_tokenization_spaces=False
    )
