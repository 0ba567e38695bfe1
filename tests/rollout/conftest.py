"""Prompts for the engines, and oracles that ask the server of faults."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

from gapg.tasks.countdown import Countdown
from gapg_rollout.oracle.openai import OpenAIOracle
from tests.rollout.oracle_checks import Make


@pytest.fixture(scope="module")
def prompts(countdown: Countdown, tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Of three to nine tokens, in no order of length."""
    rendered = [countdown.render(p, tokenizer) for p in countdown.prompts("train")[:24]]
    return [ids[-3 - i % 4 :] + ids[: i % 3] for i, ids in enumerate(rendered)]


@pytest.fixture
def make(server: Any) -> Iterator[Make]:
    """`make(model, **settings)`: an oracle of the shared server, closed after the test."""
    made: list[OpenAIOracle] = []

    def build(model: str, **settings: Any) -> OpenAIOracle:
        made.append(OpenAIOracle(model=model, **{"base_url": server.url, "timeout_s": 5.0, **settings}))
        return made[-1]

    yield build
    for oracle in made:
        oracle.close()


@pytest.fixture
def bare_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the variables that a client reads by itself."""
    for name in list(os.environ):
        if name.lower().endswith("_proxy") or name.startswith(("SSL", "OPENAI_")):
            monkeypatch.delenv(name)
