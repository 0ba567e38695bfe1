"""Shared by all tests: one thread, no hub, and a real model small enough to be made anew for every test."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from collections.abc import Callable

import pytest
import torch
from hypothesis import settings
from transformers import LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from gapg.tasks.countdown import Countdown

torch.set_num_threads(1)
# a busy machine is slow, not wrong
settings.register_profile("gapg", deadline=None)
settings.load_profile("gapg")


@pytest.fixture(scope="session")
def countdown() -> Countdown:
    """A small Countdown task: 3 numbers of 1..8."""
    return Countdown(max_number=8, max_target=30)


@pytest.fixture(scope="session")
def tokenizer(countdown: Countdown) -> PreTrainedTokenizerBase:
    return countdown.tokenizer()


@pytest.fixture(scope="session")
def make_model(tokenizer: PreTrainedTokenizerBase) -> Callable[..., PreTrainedModel]:
    """`make_model(seed, **LlamaConfig settings)`: a random Llama of two layers, packed attention, ready for training.

    Weights are four times the usual size, so that its distributions are far from uniform.
    """
    from transformers import LlamaConfig

    from gapg import attention

    def make(seed: int = 0, **settings: object) -> PreTrainedModel:
        attention.register()
        torch.manual_seed(seed)
        defaults = dict(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=128,
            initializer_range=0.08,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        config = LlamaConfig(**{**defaults, **settings})
        return LlamaForCausalLM._from_config(config, attn_implementation=attention.NAME).train()

    return make
