"""What the tests of the cloud client share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from gapg_rollout.oracle.openai import OpenAIOracle
from gapg_rollout.records import OracleAnswer, OracleQuestion, OracleUsage

Make = Callable[..., OpenAIOracle]

KEY = "sk-proj-Ab3dEfGh1jKlMn0pQrStUvWx"
PRICES: dict[str, Any] = {"price_per_million_prompt": 1e6, "price_per_million_completion": 1e6}
"""A token costs 1."""


def question(text: str = "q") -> OracleQuestion:
    return OracleQuestion(text, ({"role": "user", "content": text},))


def ask(oracle: OpenAIOracle, *texts: str) -> list[OracleAnswer]:
    """The first answers to these questions, asked at once."""
    return [future.result(30)[0] for future in [oracle.ask(question(text)) for text in texts]]


def many(n: int, name: str = "q") -> list[str]:
    return [f"{name}{i:03}" for i in range(n)]


def spend(cost: float = 0.0, requests: int = 0, prompt_tokens: int = 0, completion_tokens: int = 0) -> OracleUsage:
    return OracleUsage(requests, 0, 0, prompt_tokens, completion_tokens, cost)
