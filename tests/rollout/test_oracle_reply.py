"""Replies of every shape: an answer or a reason, never another exception, and never less than the bill."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gapg_rollout.oracle.endpoint import Secret
from gapg_rollout.oracle.reply import MAX_WORDS, Counts, Reply, ReplyError, plain, read_reply
from tests.rollout.oracle_checks import KEY
from tests.rollout.random_replies import REPLIES, billed_at_least

USAGE = {"prompt_tokens": 10, "completion_tokens": 5, "total_tokens": 15}


def completion(content: Any = "4", usage: Any = USAGE, **message: Any) -> dict[str, Any]:
    choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": content, **message}}
    return {"id": "x", "object": "chat.completion", "choices": [choice], "usage": usage}


def read(reply: Any) -> Reply:
    body = reply if isinstance(reply, bytes) else json.dumps(reply).encode()
    return read_reply(body, max_prompt_tokens=100, max_completion_tokens=1000)


def fail(reply: Any) -> ReplyError:
    with pytest.raises(ReplyError) as failure:
        read(reply)
    assert failure.value.words == str(failure.value) == " ".join(str(failure.value).split())
    assert len(failure.value.words) < MAX_WORDS + 100
    return failure.value


@pytest.mark.parametrize(
    "content",
    [
        "<a>4</a>",
        ["<a>4", "</a>"],
        [{"type": "text", "text": "<a>4"}, {"type": "output_text", "text": "</a>"}],
        [{"type": "thinking", "thinking": [{"type": "text", "text": "2+2"}]}, {"type": "text", "text": "<a>4</a>"}],
        [{"type": "reasoning", "text": "2+2"}, {"text": "<a>4</a>"}],
        [{"type": "text", "text": {"value": "<a>4</a>", "annotations": []}}],
        [{"type": "text", "text": ["<a>", {"type": "text", "text": "4"}, "</a>"]}],
        [{"type": "image_url", "image_url": {}}, None, 7, {"type": "text", "text": None}, "<a>4</a>"],
        [{"text": "2+2", "thought": True}, {"text": "<a>4</a>"}],
        {"type": "text", "text": "<a>4</a>"},
    ],
)
def test_content_is_a_string_or_parts(content: Any) -> None:
    assert read(completion(content)) == Reply("<a>4</a>", Counts(10, 5, True))


@pytest.mark.parametrize("content", [5, 0, True])
def test_other_content_is_unreadable(content: Any) -> None:
    error = fail(completion(content))
    assert "unreadable" in error.words and error.billed and error.retry
    assert error.counts == Counts(10, 5, True)


@pytest.mark.parametrize(
    ("message", "finish", "words"),
    [
        ({"content": None}, "stop", 'no text (finish_reason "stop")'),
        ({"content": ""}, None, "no text (finish_reason null)"),
        ({"content": " \n"}, "content_filter", "content_filter"),
        ({"content": []}, "stop", "no text"),
        ({}, "stop", "no text"),
        ({"content": None, "reasoning_content": "2+2=4"}, "length", "used its tokens up before it answered"),
        ({"content": None, "refusal": "I won't."}, "stop", "the model refused: I won't."),
        ({"content": [{"type": "refusal", "refusal": "I won't."}]}, "stop", "the model refused: I won't."),
        ({"content": "", "refusal": " "}, "stop", "the model refused, and does not say why"),
        ({"content": None, "tool_calls": [{"id": "x"}]}, "tool_calls", "calls a tool"),
    ],
)
def test_a_reply_without_text_is_paid_for_and_not_asked_again(message: dict[str, Any], finish: Any, words: str) -> None:
    error = fail({"choices": [{"finish_reason": finish, "message": message}], "usage": USAGE})
    assert words in error.words and "2+2" not in error.words
    assert error.billed and not error.retry and error.counts == Counts(10, 5, True)


def test_lone_surrogates_are_no_text() -> None:
    assert read(completion("a\ud800b")).text == "a?b"


@pytest.mark.parametrize(
    ("usage", "prompt", "completion_"),
    [
        ({"total_tokens": 1015}, 10, 1005),
        ({"completion_tokens": 900, "total_tokens": 60_910}, 10, 60_900),
        ({"completion_tokens": 100_000, "total_tokens": 100_010}, 10, 100_000),
        ({"completion_tokens": 3_000_000, "total_tokens": None}, 10, 3_000_000),
        ({"total_tokens": 3}, 10, 5),
        ({"prompt_tokens": 10.0, "completion_tokens": 5.0}, 10, 5),
        ({"total_tokens": None, "completion_tokens_details": {"reasoning_tokens": 900}}, 10, 905),
        ({"total_tokens": None, "completion_tokens_details": {"reasoning_tokens": 4}}, 10, 5),
        ({"total_tokens": 915, "completion_tokens_details": {"reasoning_tokens": 900}}, 10, 905),
        ({"completion_tokens_details": {"reasoning_tokens": 900}}, 10, 905),
        ({"reasoning_tokens": 900}, 10, 905),
        ({"prompt_tokens_details": {"cached_tokens": 4}, "completion_tokens_details": None}, 10, 5),
        ({"prompt_tokens_details": {"cached_tokens": 40}, "completion_tokens_details": [1]}, 40, 5),
        ({"prompt_tokens": 0, "completion_tokens": 0, "total_tokens": 0}, 0, 0),
    ],
)
def test_the_bill_is_what_the_counts_say_at_most(usage: dict[str, Any], prompt: int, completion_: int) -> None:
    assert read(completion(usage={**USAGE, **usage})) == Reply("4", Counts(prompt, completion_, True))


@pytest.mark.parametrize("bad", [None, -1, 5.5, math.nan, math.inf, -math.inf, "5", True, 10**9, 10**30, [5], {}])
@pytest.mark.parametrize("key", ["prompt_tokens", "completion_tokens", "total_tokens"])
def test_a_count_that_is_none_costs_the_worst_and_keeps_the_answer(key: str, bad: Any) -> None:
    reply = read(completion(usage={**USAGE, key: bad}))
    assert reply.text == "4" and reply.counts.complete == (key == "total_tokens" and bad is None)
    assert reply.counts.prompt <= 15 and reply.counts.completion <= 15


@pytest.mark.parametrize("usage", [None, [], [1], "10", 10, {}, {"prompt_tokens": 10, "total_tokens": 15}])
def test_no_counts_cost_the_worst_and_keep_the_answer(usage: Any) -> None:
    reply = read(completion(usage=usage))
    assert reply.text == "4" and not reply.counts.complete


def test_what_can_be_read_of_broken_counts_is_the_least() -> None:
    reply = read(completion(usage={"prompt_tokens": 10, "completion_tokens": None, "total_tokens": 60_910}))
    assert reply.counts == Counts(10, 60_900, False)


@pytest.mark.parametrize(
    ("reply", "words", "code", "retry"),
    [
        ({"error": {"message": "model is overloaded", "code": 502}}, "model is overloaded", "502", True),
        ({"error": {"message": "slow down", "code": 429, "type": "rate_limit"}}, "slow down", "429", True),
        ({"error": {"message": "no such model", "code": 404}, "choices": None}, "no such model", "404", False),
        ({"error": {"message": "pay", "type": "insufficient_quota", "code": None}}, "pay", "insufficient_quota", False),
        ({"error": "it broke\n\x1b[31m"}, "it broke [31m", "", True),
        ({"error": True, "message": "it broke"}, "it broke", "", True),
        ({"error": {"error": {"message": "deep", "code": 400}}}, "deep", "400", False),
        ({"error": {"message": {"a": 1}}}, '{"a": 1}', "", True),
        ({"error": {"message": "odd", "type": ["x"], "code": {"y": 1}}}, "odd", "", True),
        ({"object": "error", "message": "bad", "type": "BadRequestError", "code": 400}, "bad", "400", False),
        ({"detail": [{"loc": ["body"], "msg": "field required"}]}, "field required", "", True),
        ({"code": 1113, "msg": "no more"}, "no more", "1113", True),
        ({"error_code": 17, "error_msg": "limit reached"}, "limit reached", "17", True),
        ({"base_resp": {"status_code": 1004, "status_msg": "login fail"}, "choices": None}, "login fail", "1004", True),
        ({"status": 503, "title": "Service Unavailable"}, "Service Unavailable", "503", True),
        ({"error": {"message": "no", "code": "000"}}, "no", "000", False),
        ([{"error": {"code": 401, "message": "API key not valid", "status": "X"}}], "API key not valid", "401", False),
        ({"choices": [{"error": {"code": 502, "message": "gone"}, "message": {"content": ""}}]}, "gone", "502", True),
    ],
)
def test_an_error_in_a_reply_is_the_servers_words_and_costs_nothing(
    reply: Any, words: str, code: str, retry: bool
) -> None:
    error = fail(reply)
    assert error.words == f"the server says: {words}"
    assert (error.code, error.retry, error.billed) == (code, retry, False)


def test_an_error_with_a_bill_is_billed() -> None:
    error = fail({**completion(None), "error": {"message": "cut off"}})
    assert error.billed and error.counts == Counts(10, 5, True)
    half = fail({"choices": [{"error": {"message": "cut off"}, "message": {"content": "half an answ"}}]})
    assert half.billed and not half.counts.complete
    assert not fail({**completion(None, None), "error": {"message": "never ran"}}).billed


def test_an_empty_error_is_none() -> None:
    assert read({**completion(), "error": None}).text == read({**completion(), "error": {}}).text == "4"


@pytest.mark.parametrize("choices", [None, [], {}, "4", [None], ["4"], [{}], [{"message": None}], [{"message": "4"}]])
def test_a_reply_without_a_choice_is_billed_by_its_counts(choices: Any) -> None:
    error = fail({"choices": choices, "usage": USAGE})
    assert error.billed and error.retry and error.counts.complete


def test_of_several_choices_the_first_counts() -> None:
    assert read({"choices": completion("4")["choices"] + completion("5")["choices"], "usage": USAGE}).text == "4"


def test_a_piece_of_a_stream_is_no_answer() -> None:
    error = fail({"object": "chat.completion.chunk", "choices": [{"delta": {"content": "4"}}]})
    assert "piece of a stream" in error.words and not error.retry


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"", "empty"),
        (b" \r\n ", "empty"),
        (b"<html><h1>502 Bad Gateway</h1></html>", "a web page, not the API's (check base_url): <html><h1>502 Bad"),
        (b'data: {"choices": []}\n\ndata: [DONE]\n\n', "a stream of events"),
        (b'{"choices": [{"mess', 'is no JSON: {"choices": [{"mess'),
        (b"\xff\xfe\xfd", "no JSON"),
        (b'{"choices": "\xff"}', "no JSON"),
        (b"upstream\x1b[2J\x00 down", "no JSON: upstream [2J down"),
        (b"[" * 200_000, "nested too deeply"),
        (b'{"error": ' * 100_000, "nested too deeply"),
        (b"null", "no JSON object: null"),
        (b"[1, 2]", "no JSON object"),
        (b'{"choices": [{"message": {"content": "4", "content": "5"}}]}', "unreadable"),
        (b"x" * 100_000, "no JSON: xxx"),
    ],
)
def test_a_body_that_is_no_reply(body: bytes, words: str) -> None:
    error = fail(body)
    assert words in error.words and error.billed and not error.counts.complete


def test_odd_json_keeps_its_answer() -> None:
    body = json.dumps(completion()).encode()
    assert read(b"\xef\xbb\xbf" + body) == Reply("4", Counts(10, 5, True))
    assert not read(body.replace(b"10", b"9" * 5000)).counts.complete
    assert not read(body.replace(b'"usage"', b'"usage": {}, "usage"')).counts.complete
    assert read(body.replace(b'"id"', b'"p": NaN, "id"')).counts.complete


def test_words_are_one_line_of_printable_text() -> None:
    assert plain("a\ud800\u200b\x07b" + "c" * 9999) == "a b" + "c" * (MAX_WORDS - 3)
    assert plain("a" * (MAX_WORDS - 1) + " b") == "a" * (MAX_WORDS - 1)


@settings(max_examples=300)
@given(REPLIES, st.integers(0, 60), st.sampled_from([b"", b"\xff", b"\x00", b'"', b"data: "]))
def test_any_json_is_an_answer_or_a_reason_and_never_too_cheap(reply: Any, cut: int, noise: bytes) -> None:
    body = json.dumps(reply).encode()
    for text in (body, body[:cut] + noise + body[cut:], body[: -cut or None]):
        result: Reply | ReplyError
        try:
            result = read(text)
            assert result.text.strip()
            result.text.encode()
        except ReplyError as error:
            result = error
            assert str(error) == " ".join(str(error).split()) and error.words.isprintable()
            shown = Secret(KEY, "K").clean(error.words)
            assert KEY not in shown and KEY[:6] not in shown
        assert result.counts.prompt >= 0 and result.counts.completion >= 0
        usage = reply.get("usage") if isinstance(reply, dict) and text == body else None
        if isinstance(result, Reply) or result.billed:
            # what is not counted costs the worst, and not less than these
            assert result.counts.prompt + result.counts.completion >= billed_at_least(usage)
        else:
            assert billed_at_least(usage) == 0
