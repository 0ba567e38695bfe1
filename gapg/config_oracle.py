"""The section of the cloud in a run's settings."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, model_validator

from gapg.config_sections import Count, Fraction01, Section, Whole
from gapg_rollout.oracle.endpoint import check_api_key_env, check_url


def _of_oracle(check: Callable[[str], str]) -> Callable[[str], str]:
    """The check with the section's name before the key that its error begins with."""

    def checked(value: str) -> str:
        try:
            return check(value)
        except ValueError as error:
            raise ValueError(f"oracle.{error}") from None

    return checked


class OracleConfig(Section):
    """The cloud model, and what asking it may cost."""

    kind: Literal["solver", "openai"] = "solver"
    """`openai`: any OpenAI-compatible server. `solver`: the task's own exact solver, a stand-in for a cloud model."""
    accuracy: Fraction01 = 0.95
    """solver: how often it is right."""
    base_url: Annotated[str, AfterValidator(_of_oracle(check_url))] = "https://api.openai.com/v1"
    """openai: where the server is."""
    model: str = ""
    """openai: the model's name there."""
    api_key_env: Annotated[str, AfterValidator(_of_oracle(check_api_key_env))] = "OPENAI_API_KEY"
    """Name of the environment variable with the key; the key itself is never stored."""
    samples: Count = 1
    """Answers to each question; the cloud's score is their mean correctness."""
    temperature: Annotated[float, Field(ge=0)] | None = 0.0
    """Empty leaves it out of the request, for models that refuse it."""
    max_tokens: Count = 1024
    """Most tokens of an answer."""
    max_tokens_field: Literal["max_tokens", "max_completion_tokens"] = "max_tokens"
    """What the server calls the limit; reasoning models of OpenAI want `max_completion_tokens`."""
    concurrency: Count = 16
    """Requests on their way at once."""
    timeout_s: Annotated[float, Field(gt=0)] = 60.0
    """Seconds that one request may take."""
    deadline_s: Annotated[float, Field(gt=0)] = 300.0
    """Seconds that one question may take, all tries together."""
    max_retries: Whole = 5
    """Further tries of a request that failed for a while."""
    requests_per_minute: Count | None = None
    """Most requests a minute (empty: no limit)."""
    tokens_per_minute: Count | None = None
    """Most tokens a minute (empty: no limit)."""
    spending_cap: Annotated[float, Field(ge=0)] | None = None
    """No new request is sent that could take the run's cost over this; needs both prices."""
    price_per_million_prompt: Annotated[float, Field(ge=0)] | None = None
    """Price of a million prompt tokens, in the currency of `spending_cap`."""
    price_per_million_completion: Annotated[float, Field(ge=0)] | None = None
    """Price of a million answer tokens."""
    local_share: Fraction01 = 0.01
    """What a response of the device model costs, as a part of one cloud call; for studies' accounts of money."""
    cache: str | None = None
    """SQLite file of paid answers, shared by runs; empty: `oracle.sqlite` in the output folder."""
    account: str | None = None
    """Runs that share a cache and this name share one spending cap (empty: each run its own)."""

    @model_validator(mode="after")
    def _complete(self) -> OracleConfig:
        if self.spending_cap is not None and None in (self.price_per_million_prompt, self.price_per_million_completion):
            raise ValueError(
                "oracle.spending_cap needs oracle.price_per_million_prompt and oracle.price_per_million_completion"
            )
        return self
