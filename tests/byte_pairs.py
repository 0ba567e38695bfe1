"""A tokenizer as real models have it, that joins the tags of an ending with what stands before them."""

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
