"""What a failed request means: whether to try again, how long to wait, whether it may have cost money."""

from __future__ import annotations

import email.utils
import time
from collections.abc import Mapping
from dataclasses import dataclass

import openai

RETRIED = (408, 409, 429)
"""Statuses under 500 that another try may cure. Those from 500 on are all tried again."""

HINTS = {
    401: "check the key in the environment variable that api_key_env names",
    403: "the key may not use this model",
    404: "check base_url (most end in /v1) and model",
    400: "the server refuses the request: check model, temperature, max_tokens",
    422: "the server refuses the request: check model, temperature, max_tokens",
}


@dataclass(frozen=True, slots=True)
class Failure:
    """Why one request failed. `retry_after_s` is what the server asked for, in seconds; 0 if it did not ask."""

    error: str
    retry: bool
    may_be_billed: bool
    retry_after_s: float = 0.0


def classify(error: Exception, endpoint: str, limit_s: float) -> Failure:
    """The failure that an exception of the client stands for. `limit_s` is the request's time limit."""
    if isinstance(error, openai.APIStatusError):
        return _classify_status(error, endpoint)
    if isinstance(error, TimeoutError | openai.APITimeoutError):
        return Failure(f"no reply from {endpoint} within {limit_s:.3g} s", retry=True, may_be_billed=True)
    if isinstance(error, openai.APIConnectionError):
        cause = error.__cause__
        refused = type(cause).__name__ in ("ConnectError", "ConnectTimeout")
        what = f"cannot connect to {endpoint}" if refused else f"the connection to {endpoint} broke"
        return Failure(f"{what} ({type(cause).__name__}: {cause})", retry=True, may_be_billed=not refused)
    if isinstance(error, ValueError | openai.APIResponseValidationError):
        return Failure(f"unreadable reply from {endpoint} ({error})", retry=True, may_be_billed=True)
    return Failure(f"{type(error).__name__}: {error}", retry=False, may_be_billed=True)


def _classify_status(error: openai.APIStatusError, endpoint: str) -> Failure:
    status = error.status_code
    hint = f" ({HINTS[status]})" if status in HINTS else ""
    text = f"HTTP {status} from {endpoint}: {error.message[:300]}{hint}"
    # An exhausted account is a 429 too, but no waiting fills it.
    retry = (status in RETRIED or status >= 500) and error.code != "insufficient_quota"
    return Failure(text, retry=retry, may_be_billed=False, retry_after_s=retry_after_s(error.response.headers))


def retry_after_s(headers: Mapping[str, str], now: float | None = None) -> float:
    """Seconds that the server asks to wait (`Retry-After-Ms`, or `Retry-After` in seconds or as a date), or 0."""
    try:
        if "retry-after-ms" in headers:
            return max(0.0, float(headers["retry-after-ms"]) / 1000)
        value = headers.get("retry-after", "0")
        try:
            return max(0.0, float(value))
        except ValueError:
            date = email.utils.parsedate_to_datetime(value).timestamp()
            return max(0.0, date - (time.time() if now is None else now))
    except ValueError:
        return 0.0


def backoff_s(attempt: int, asked_s: float, jitter: float) -> float:
    """Seconds before the next try: 0.5, 1, 2, ... 30, spread over half of that by `jitter` in [0, 1).

    Never under `asked_s`; the spread comes on top of it, so that clients told the same do not return together.
    """
    own = min(30.0, 0.5 * 2**attempt)
    return max(own * (0.5 + 0.5 * jitter), asked_s + own * 0.25 * jitter if asked_s else 0.0)
