"""What a failed request is taken for: which words concern everyone for good, and which one question only."""

from __future__ import annotations

import json
from typing import Any

import httpx
import openai
import pytest

from gapg_rollout.oracle.connection import ReplyTooLarge
from gapg_rollout.oracle.endpoint import Secret
from gapg_rollout.oracle.reply import Counts, ReplyError, read_reply
from gapg_rollout.oracle.retry import MAX_SHOWN, Failure, classify

URL = "https://api.example.com/v1"
SECRET = Secret("sk-proj-Zq81Lw/mT0+secret", "CLOUD_KEY")


def of_status(status: int, body: str, headers: dict[str, str] | None = None) -> Failure:
    request = httpx.Request("POST", URL)
    response = httpx.Response(status, content=body.encode(), headers=headers, request=request)
    return classify(openai.APIStatusError("failed", response=response, body=None), URL, 60.0, SECRET.clean)


def of_error(status: int, **error: Any) -> Failure:
    return of_status(status, json.dumps({"error": error}))


def of_reply(body: Any) -> Failure:
    with pytest.raises(ReplyError) as failure:
        read_reply(json.dumps(body).encode(), max_prompt_tokens=10, max_completion_tokens=10)
    return classify(failure.value, URL, 60.0, SECRET.clean)


@pytest.mark.parametrize(
    "failure",
    [
        of_error(401, message="Incorrect API key provided"),
        of_error(402, message="Insufficient credits"),
        of_error(403, message="Country, region, or territory not supported"),
        of_error(429, message="You exceeded your current quota, please check your plan", code="insufficient_quota"),
        of_error(429, message="no more", type="insufficient_quota"),
        of_error(429, message="the account is suspended", type="exceeded_current_quota_error"),
        of_error(400, message="Billing hard limit has been reached", code="billing_hard_limit_reached"),
        of_error(400, message="Your credit balance is too low to access the API"),
        of_error(403, message="Sorry, your account balance is insufficient"),
        of_error(429, message="Insufficient balance or no resource package. Please recharge."),
        of_error(429, message="Your team has either used all available credits or reached its limit"),
        of_error(403, message="Key limit exceeded (total limit)"),
        of_error(429, message="You have exceeded your monthly included credits"),
        of_error(429, message="The free quota has been exhausted"),
        of_error(429, message="token quota is not enough", code="insufficient_user_quota"),
        of_error(400, message="You have reached your specified API usage limits."),
        of_error(400, message="Budget has been exceeded! Current cost: 2, max budget: 1"),
        of_error(429, message="No credits remaining"),
        of_error(400, message="API key not valid. Please pass a valid API key."),
        of_status(403, "<html><title>Forbidden</title></html>"),
        of_status(401, ""),
        of_reply({"error": {"message": "Insufficient Balance", "code": 402}}),
        of_reply({"error": {"message": "no such key", "type": "authentication_error"}}),
        of_reply({"error": {"message": "You exceeded your current quota"}}),
    ],
    ids=lambda failure: failure.error[-60:],
)
def test_an_account_that_is_refused_concerns_everyone_for_good(failure: Failure) -> None:
    assert failure.about == "account" and not failure.retry and failure.counts.complete
    assert failure.error.endswith(")")  # the fix


@pytest.mark.parametrize(
    ("failure", "about", "retry"),
    [
        (of_error(403, message="Your input was flagged by moderation"), "question", False),
        (of_error(400, message="The response was filtered", code="content_filter"), "question", False),
        (of_error(400, message="This model's maximum context length is 4096 tokens"), "question", False),
        (of_error(413, message="Request Entity Too Large"), "question", False),
        (of_error(429, message="Rate limit reached for requests: limit 3 per minute"), "question", True),
        (of_error(429, message="You exceeded your current quota. Please retry in 12.3s."), "question", True),
        (of_error(429, message="Resource has been exhausted (e.g. check quota)."), "question", True),
        (of_error(429, message="Rate limit exceeded: free-models-per-day. Add 10 credits"), "question", True),
        (of_error(429, message="Quota exceeded for requests per minute"), "question", True),
        (of_error(429, message="Not enough quota", details=[{"retryDelay": "35s"}]), "question", True),
        (of_status(422, '{"detail": [{"msg": "too odd", "input": "Bob has insufficient funds."}]}'), "request", False),
        (of_error(404, message="no such model"), "request", False),
        (of_error(400, message="temperature is not supported"), "request", False),
        (of_status(405, "Method Not Allowed"), "request", False),
        (of_error(500, message="check your billing"), "server", True),
        (
            of_status(529, '{"type": "error", "error": {"type": "overloaded_error", "message": "Overloaded"}}'),
            "server",
            True,
        ),
        (of_reply({"error": {"message": "overloaded", "code": 502}}), "server", True),
        (of_reply({"error": {"message": "slow down", "code": 429}}), "question", True),
        (of_reply({"error": {"message": "no such model", "code": 404}}), "request", False),
        (of_reply({"choices": [{"message": {"content": None}, "finish_reason": "length"}]}), "question", False),
        (of_reply({"choices": []}), "server", True),
        (classify(ReplyTooLarge(5), URL, 60.0, SECRET.clean), "server", False),
        (classify(TimeoutError(), URL, 60.0, SECRET.clean), "server", True),
        (classify(KeyError("x"), URL, 60.0, SECRET.clean), "server", False),
    ],
    ids=lambda value: value.error[-60:] if isinstance(value, Failure) else str(value),
)
def test_other_failures_concern_the_question_the_request_or_the_server(
    failure: Failure, about: str, retry: bool
) -> None:
    assert (failure.about, failure.retry) == (about, retry)


def test_what_a_refusal_bills_is_counted() -> None:
    usage = {"prompt_tokens": 10, "completion_tokens": 5, "total_tokens": 100}
    for failure in (of_status(500, json.dumps({"usage": usage})), of_reply({"choices": [], "usage": usage})):
        assert failure.counts == Counts(10, 90, True)


@pytest.mark.parametrize("before", range(MAX_SHOWN - 40, MAX_SHOWN + 3, 2))
def test_the_key_is_out_before_the_words_are_cut(before: int) -> None:
    key = SECRET.value
    for body in (
        "x " * (before // 2) + key,
        json.dumps({"error": {"message": f"{'x ' * (before // 2)}{key}\x1b[2J\n{key}"}}),
    ):
        error = of_status(400, body).error
        assert key[:3] not in error and not any(key[i : i + 8] in error for i in range(len(key) - 7))
        assert error.isprintable() and error.endswith("temperature, max_tokens)")
