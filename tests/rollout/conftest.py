"""Prompts for the engine."""

from __future__ import annotations

import pytest
from transformers import PreTrainedTokenizerBase

from gapg.tasks.countdown import Countdown


@pytest.fixture(scope="module")
def prompts(countdown: Countdown, tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Of three to nine tokens, in no order of length."""
    rendered = [countdown.render(p, tokenizer) for p in countdown.prompts("train")[:24]]
    return [ids[-3 - i % 4 :] + ids[: i % 3] for i, ids in enumerate(rendered)]
