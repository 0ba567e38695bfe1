"""What a failed request means: whom it concerns, whether to try again, how long to wait, whether it may be billed."""

from __future__ import annotations

import email.utils
import math
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Literal

import openai

from gapg_rollout.oracle.connection import ReplyTooLarge
from gapg_rollout.oracle.reply import FREE, UNCOUNTED, Counts, ReplyError, passes, plain, read_reply

HINTS = {
    401: "check the key in the environment variable that api_key_env names",
    402: "the account must be paid up",
    403: "the key may not use this model",
    404: "check base_url (most end in /v1) and model",
    400: "the server refuses the request: check model, temperature, max_tokens",
    422: "the server refuses the request: check model, temperature, max_tokens",
}

PAID_UP = "no waiting helps: fill the account up or raise its limit"

MAX_SHOWN = 300
"""Characters of a server's words in an error."""

_WORDS = r"(?:[a-z]{1,20}[ _]){0,3}"
_MONEY = r"(?:quota|balance|credits?|funds?)"
_LIMIT = r"(?:spend|spending|usage|credit|key|budget)[ _](?:limits?|cap)"
NO_MONEY = re.compile(
    rf"(?<![a-z])(?:insufficient|not[ _]enough|out[ _]of|used[ _]all|no|any)[ _]{_WORDS}{_MONEY}\b"
    rf"|{_MONEY}[ _]{_WORDS}(?:exhausted|depleted|insufficient|too[ _]low|not[ _]enough|used[ _]up)"
    r"|exceeded[ _](?:(?:your|its|the)[ _])?(?:current[ _]quota|monthly[ _](?:spending|included|budget))"
    rf"|(?:reached|hit|exceeded)[ _]{_WORDS}{_LIMIT}|{_LIMIT}[ _]{_WORDS}(?:reached|exceeded)"
    rf"|budget[ _]{_WORDS}exceeded|check your (?:plan and )?billing|credit balance|payment required"
    r"|billing[ _](?:hard[ _]limit|not[ _]active|error)|account (?:is|has been) (?:suspended|deactivated)"
    r"|arrearage|余额不足|欠费",
    re.IGNORECASE,
)
"""The spellings of an exhausted account; with any status, 400 and 429 among them."""

NO_KEY = re.compile(r"invalid_api_key|authentication_error|invalid_authentication|api key (?:not valid|expired)", re.I)
"""The spellings of a refused key, where no status says it."""

PASSES = re.compile(r"(retry|try again) (in|after)|retry_?(after|delay)|per[ _-](minute|hour|day)|concurren", re.I)
"""Words of a rate limit, which some servers call a quota too."""

ONE_QUESTION = re.compile(
    r"moderation|flagged|content[ _-]?(policy|filter|management)|safety|inappropriate|responsibleai|data_inspection"
    r"|context[ _]length|maximum context|too long|too many tokens|string_above_max",
    re.IGNORECASE,
)
"""Words of a refusal that is about the question's own text or length."""

About = Literal["question", "request", "server", "account"]


@dataclass(frozen=True, slots=True)
class Failure:
    """Why one request failed.

    Attributes:
        error: The reason, with the server's words and the fix: one line, without the key.
        about: Whom it concerns. "question": this one alone; also "wait", which says nothing of others. "request": every
            question asked like this (the model's name, the URL, the settings). "server": everyone, for now. "account":
            everyone, for good.
        retry: Whether another try may cure it.
        counts: What the server says it bills, at least. Complete: that is all, none for what was not run; else it may
            have cost anything.
        status: The HTTP status, or the one that the reply's text stands for; None without one.
        retry_after_s: What the server asked to wait, in seconds; 0 if it did not ask.
    """

    error: str
    about: About
    retry: bool
    counts: Counts = UNCOUNTED
    status: int | None = None
    retry_after_s: float = 0.0


def classify(error: Exception, url: str, limit_s: float, clean: Callable[[str], str]) -> Failure:
    """The failure that an exception of the connection or of the reader stands for.

    Args:
        url: The endpoint, as it may be shown.
        limit_s: The request's time limit.
        clean: Takes the key out of a text.
    """

    if isinstance(error, openai.APIStatusError):
        return _of_status(error, url, clean)
    if isinstance(error, ReplyError):
        return _of_reply(error, url, clean)
    if isinstance(error, TimeoutError | openai.APITimeoutError):
        return Failure(f"no reply from {url} within {limit_s:.3g} s", "server", retry=True)
    if isinstance(error, openai.APIConnectionError):
        cause = error.__cause__
        why = shorten(f"{type(cause).__name__}: {cause}", clean)
        if type(cause).__name__ in ("ConnectError", "ConnectTimeout"):
            return Failure(f"cannot connect to {url} ({why})", "server", retry=True, counts=FREE)
        return Failure(f"the connection to {url} broke ({why})", "server", retry=True)
    return Failure(shorten(f"{type(error).__name__}: {error}", clean), "server", retry=False)


def shorten(words: str, clean: Callable[[str], str]) -> str:
    """The words in one line of at most `MAX_SHOWN` characters. They are cleaned before they are cut."""
    line = plain(clean(words))
    return line if len(line) <= MAX_SHOWN else line[: MAX_SHOWN - 1] + "\u2026"


def _of_status(error: openai.APIStatusError, url: str, clean: Callable[[str], str]) -> Failure:
    status, body = error.status_code, error.response.content
    try:  # mostly an error object
        reply = read_reply(body, max_prompt_tokens=0, max_completion_tokens=0)
        words, counts = reply.text, reply.counts
    except ReplyError as refusal:
        words = refusal.words.removeprefix("the server says: ") if body.strip() else str(error.message)
        counts = refusal.counts
    said = body[:4000].decode(errors="replace")
    about = _about(status, said)
    return Failure(
        f"HTTP {status} from {url}: {shorten(words, clean)}{_hint(status, about, said)}",
        about,
        retry=about != "account" and passes(status),
        counts=replace(counts, complete=True),
        status=status,
        retry_after_s=retry_after_s(error.response.headers),
    )


def _of_reply(error: ReplyError, url: str, clean: Callable[[str], str]) -> Failure:
    words = f"{error.code} {error.words}"
    about = _about(error.status or 400, words)
    if error.billed:  # it ran
        about = "server" if error.retry or isinstance(error, ReplyTooLarge) else "question"
    elif about == "request" and error.retry:
        about = "server"
    return Failure(
        f"no answer from {url}: {shorten(error.words, clean)}{_hint(error.status, about, words)}",
        about,
        retry=error.retry and about != "account",
        counts=error.counts if error.billed else replace(error.counts, complete=True),
        status=error.status,
    )


def _about(status: int, text: str) -> About:
    if status < 500 and status != 422 and NO_MONEY.search(text) and not PASSES.search(text):  # 422 repeats the question
        return "account"
    if status in (401, 402) or (status < 500 and NO_KEY.search(text)):
        return "account"
    if status in (413, 429) or (status < 500 and ONE_QUESTION.search(text)):
        return "question"
    if status == 403:
        return "account"
    return "server" if passes(status) else "request"


def _hint(status: int | None, about: About, text: str) -> str:
    if about == "account" and status not in (401, 402):
        if NO_MONEY.search(text):
            return f" ({PAID_UP})"
        if NO_KEY.search(text):
            status = 401
    return f" ({HINTS[status]})" if status in HINTS and about != "question" else ""


def retry_after_s(headers: Mapping[str, str], now: float | None = None) -> float:
    """Seconds that the server asks to wait (`Retry-After-Ms`, or `Retry-After` in seconds or as a date), or 0."""
    value = headers.get("retry-after", "0")
    try:
        if "retry-after-ms" in headers:
            asked_s = float(headers["retry-after-ms"]) / 1000
        elif ":" in value:
            asked_s = email.utils.parsedate_to_datetime(value).timestamp() - (time.time() if now is None else now)
        else:
            asked_s = float(value)
    except (ValueError, OverflowError):
        return 0.0
    return max(0.0, asked_s) if math.isfinite(asked_s) else 0.0


def backoff_s(attempt: int, asked_s: float, jitter: float) -> float:
    """Seconds before the next try: 0.5, 1, 2, ... 30, spread over half of that by `jitter` in [0, 1).

    Never under `asked_s`; the spread comes on top of it, so that clients told the same do not return together.
    """
    own = min(30.0, 0.5 * 2 ** min(attempt, 6))
    return max(own * (0.5 + 0.5 * jitter), asked_s + own * 0.25 * jitter if asked_s else 0.0)
