"""What a reply says and what it cost: bytes in, an answer or a reason out. Servers send everything; nothing is assumed.

A paid answer is kept whatever its counts say, and no count makes a request cheaper than what the server may bill.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

MAX_WORDS = 4000
"""Characters of a server's words that are passed on; who shows them cleans them of the key and cuts them."""
MAX_TOKENS = 10_000_000
"""No request of any model has as many tokens: a count above this, beside what was asked for, is not believed."""
PERMANENT = {
    "insufficient_quota", "invalid_api_key", "invalid_request_error", "model_not_found", "context_length_exceeded",
    "authentication_error", "permission_error", "not_found_error", "billing_error", "content_filter", "BadRequestError",
    "NotFoundError", "AuthenticationError",
}  # fmt: skip
"""Codes and types of errors that no second request cures."""
_TEXT_PARTS = ("text", "output_text", None)
_SAID = (
    "message", "msg", "detail", "error_description", "errors", "error_msg", "error_message", "status_msg", "base_resp",
    "Message", "title",
)  # fmt: skip
"""Where servers put an error's words; those that come first say most."""
_TWICE = object()  # the value of a key that an object holds twice: it has none


@dataclass(frozen=True, slots=True)
class Counts:
    """Tokens that the server says it billed. `complete` False: it did not say, or not all; then they are the least, and
    the request costs its worst."""

    prompt: int = 0
    completion: int = 0
    complete: bool = False


UNCOUNTED = Counts()
FREE = Counts(complete=True)


@dataclass(frozen=True, slots=True)
class Reply:
    """A reply's text, never blank, and its tokens."""

    text: str
    counts: Counts


class ReplyError(ValueError):
    """A reply without an answer. Its text is one line of at most `MAX_WORDS` and a few characters, not cleaned.

    Attributes:
        words: That line.
        billed: Whether the request may have cost money.
        retry: Whether another request may cure it.
        code: The server's own code or type of the error, "" if it gave none.
        status: The HTTP status that the code is, if it is one.
        counts: What it cost, if it is billed.
    """

    def __init__(self, words: str, *, billed: bool, retry: bool, code: str = "", counts: Counts = UNCOUNTED) -> None:
        super().__init__(words)
        self.words = words
        self.billed = billed
        self.retry = retry
        self.code = code
        self.status = int(code) if code.isdecimal() and len(code) == 3 else None
        self.counts = counts


def read_reply(body: bytes, *, max_prompt_tokens: int, max_completion_tokens: int) -> Reply:
    """The answer in the body of a reply with status 200.

    Args:
        body: The bytes of a chat completion, not compressed.
        max_prompt_tokens, max_completion_tokens: What the request can need. Honest counts may be far larger: hidden
            prompts, reasoning that no limit stops.

    Raises:
        ReplyError: There is none, and why. Nothing else is raised, whatever the bytes are.
    """
    try:
        return _read(_parse(body), MAX_TOKENS + max_prompt_tokens + max_completion_tokens)
    except RecursionError:
        raise ReplyError("the reply is nested too deeply", billed=True, retry=True) from None


def passes(status: int) -> bool:
    """Whether another request may cure this HTTP status, or such a number in a reply."""
    return status in (408, 409, 429) or status >= 500


def plain(text: str) -> str:
    """The text in one line of at most `MAX_WORDS` characters, without control sequences' control characters."""
    head = text[: 4 * MAX_WORDS]
    return " ".join("".join(char if char.isprintable() else " " for char in head).split())[:MAX_WORDS].rstrip()


def _dump(value: object) -> str:
    return json.dumps(value, ensure_ascii=False, default=lambda _: None)


def _parse(body: bytes) -> dict[str, Any]:
    try:
        reply = json.loads(body, object_pairs_hook=_object, parse_int=_integer)
    except ValueError:  # what is no JSON, and no UTF-8
        raise _no_json(body) from None
    if isinstance(reply, list) and len(reply) == 1:  # so Gemini wraps an error
        reply = reply[0]
    if not isinstance(reply, dict):
        raise ReplyError(f"the reply is no JSON object: {plain(_dump(reply))}", billed=True, retry=True)
    return reply


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        found[key] = _TWICE if key in found else value
    return found


def _integer(digits: str) -> float:
    return int(digits) if len(digits) < 20 else math.inf  # int() refuses thousands of digits, and no count has them


def _no_json(body: bytes) -> ReplyError:
    text = plain(body[: 4 * MAX_WORDS].decode(errors="replace"))
    if not text:
        return ReplyError("the reply is empty", billed=True, retry=True)
    if text.startswith(("data:", "event:", ": ")):
        return ReplyError(f"the reply is a stream of events, which was not asked for: {text}", billed=True, retry=False)
    if text.startswith("<"):
        return ReplyError(f"the reply is a web page, not the API's (check base_url): {text}", billed=True, retry=True)
    return ReplyError(f"the reply is no JSON: {text}", billed=True, retry=True)


def _read(reply: dict[str, Any], limit: int) -> Reply:
    counts = _counts(reply.get("usage"), limit)
    choices = reply.get("choices")
    choice = choices[0] if isinstance(choices, list) and choices else None
    error = _error_of(reply, choice)
    if error is not None:
        usage = reply.get("usage")
        ran = bool(_text_of(choice)[0].strip()) or (isinstance(usage, dict) and any(usage.values()))
        raise _refusal(error, ran, counts)
    if choice is None:
        raise ReplyError(f"the reply has no choices: {plain(_dump(reply))}", billed=True, retry=True, counts=counts)
    text, why = _text_of(choice)
    if text.strip():
        return Reply(text.encode(errors="replace").decode(), counts)  # no lone surrogates
    if not why:
        raise ReplyError(f"the reply is unreadable: {plain(_dump(choice))}", billed=True, retry=True, counts=counts)
    # asked again, it would be paid again
    raise ReplyError(why, billed=True, retry=False, counts=counts)


def _error_of(reply: dict[str, Any], choice: object) -> object:
    """The error that stands where an answer should be, or None. Empty ones ("error": null) are none."""
    if reply.get("error"):
        return reply["error"] if isinstance(reply["error"], str | dict | list) else reply
    if isinstance(choice, dict) and choice.get("error"):
        return choice["error"]
    if reply.get("object") == "error" or (not reply.get("choices") and any(reply.get(key) for key in _SAID)):
        return reply
    return None


def _refusal(error: object, billed: bool, counts: Counts) -> ReplyError:
    words, code = _words_of(error)
    kinds = {str(error.get(key)) for key in ("type", "code")} if isinstance(error, dict) else set()
    refusal = ReplyError(f"the server says: {words or 'nothing'}", billed=billed, retry=False, code=code, counts=counts)
    refusal.retry = passes(500 if refusal.status is None else refusal.status) and not PERMANENT & {code, *kinds}
    return refusal


def _words_of(error: object) -> tuple[str, str]:
    """(the server's words, its code or type, "" if none) of an error object, in whatever shape: one line, bounded."""
    if isinstance(error, list) and error:
        return _words_of(error[0])
    if not isinstance(error, Mapping):
        return plain(error if isinstance(error, str) else _dump(error)), ""
    inner = error.get("error")
    said = (error.get(key) for key in _SAID)
    first = inner if isinstance(inner, Mapping | str) and inner else next((value for value in said if value), error)
    words, code = (plain(_dump(error)), "") if first is error else _words_of(first)
    words = words or plain(_dump(error))
    codes = [error.get(key) for key in ("code", "type", "status", "error_code", "status_code")]
    own = next((plain(str(value)) for value in codes if isinstance(value, str | int | float) and value), "")
    return words, code or own


def _text_of(choice: object) -> tuple[str, str]:
    """(text, why there is none). Both "" if the choice is unreadable. `reasoning_content` is no text."""
    if not isinstance(choice, dict) or not isinstance(message := choice.get("message"), dict):
        piece = isinstance(choice, dict) and isinstance(choice.get("delta"), dict)
        return "", "the reply is a piece of a stream, which was not asked for" if piece else ""
    content = message.get("content")
    if not isinstance(content, str | dict | list | None):
        return "", ""
    text = _join(content)
    if text.strip():
        return text, ""
    finish = choice.get("finish_reason")
    refused = message.get("refusal") or next(
        (part["refusal"] for part in content or () if isinstance(part, dict) and part.get("refusal")), None
    )
    if refused:
        words = plain(refused if isinstance(refused, str) else _dump(refused))
        return "", f"the model refused: {words}" if words else "the model refused, and does not say why"
    if message.get("tool_calls") or message.get("function_call"):
        return "", "the reply has no text: it calls a tool, and none was offered"
    if finish == "length":
        why = "the model used its tokens up before it answered: raise max_tokens"
        return "", f"the reply has no text (finish_reason length): {why}"
    return "", f"the reply has no text (finish_reason {plain(_dump(finish))})"


def _join(content: object) -> str:
    """The text of a message's content: a string, a part, or a list of them; "" for thoughts and what is unknown."""
    if isinstance(content, str):
        return content
    if isinstance(content, list):
        return "".join(map(_join, content))
    if not isinstance(content, dict) or content.get("type") not in _TEXT_PARTS or content.get("thought") is True:
        return ""
    return _join(content["text"] if "text" in content else content.get("value"))


def _counts(usage: object, limit: int) -> Counts:
    """The tokens of a usage object. Reasoning that stands beside completion_tokens is counted to them."""
    if not isinstance(usage, dict):
        return UNCOUNTED

    def count(key: str, group: str = "") -> int | None:
        holder = usage.get(group) if group else usage
        return _count(holder.get(key), limit) if isinstance(holder, dict) else None

    prompt, completion, total = (count(f"{key}_tokens") for key in ("prompt", "completion", "total"))
    reasoning = max(count("reasoning_tokens", "completion_tokens_details") or 0, count("reasoning_tokens") or 0)
    read = count("cached_tokens", "prompt_tokens_details") or 0
    beside = reasoning if reasoning > (completion or 0) else 0  # more than the whole: no part of it
    said = max((completion or 0) + beside, (total or 0) - (prompt or 0))
    complete = None not in (prompt, completion) and (total is not None or usage.get("total_tokens") is None)
    return Counts(max(prompt or 0, read), said, complete)


def _count(value: object, limit: int) -> int | None:
    """The value as a count of tokens, None if it is none: 5.0 is 5; true, "5", -1, 5.5, NaN and 1e30 are none."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= limit or value != int(value):
        return None
    return int(value)
