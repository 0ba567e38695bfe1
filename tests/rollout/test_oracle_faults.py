"""Faults of every kind at random: no answer is lost that the server gave, and no cent that it billed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gapg_rollout.oracle_openai import OpenAIOracle
from gapg_rollout.records import OracleQuestion
from tests.rollout.fault_server import FAULTS, ODD

PRICES = {"price_per_million_prompt": 1e6, "price_per_million_completion": 1e6}
FINAL = ("400", "404", "413", "422", "redirect", "stream", "endless", "bomb", "no text", "refusal")
"""Faults that no second request cures: it would be refused, or paid, again."""
KEY = "sk-proj-Zq81Lw/mT0+secret"
MAX_TOKENS = 64


def question(text: str) -> OracleQuestion:
    return OracleQuestion(text, ({"role": "user", "content": text},))


def soak(server: Any, model: str, path: Path, questions: int, *, retries: int = 5, **plan: Any) -> dict[str, int]:
    """Asks that many questions, a tenth of them twice; checks every answer and the money. What became of them."""
    server.plan(model, {"share": 0.22, "seed": 1, **plan})
    names = [f"q{i:05}" for i in range(questions)] + [f"q{i:05}" for i in range(0, questions, 10)]
    oracle = OpenAIOracle(
        server.url,
        model,
        cache_path=path,
        timeout_s=2.0,
        max_retries=retries,
        max_tokens=MAX_TOKENS,
        concurrency=32,
        **PRICES,
    )
    try:
        answers = [future.result(300)[0] for future in [oracle.ask(question(name)) for name in names]]
        usage = oracle.usage
    finally:
        oracle.close()
    seen = server.seen(model)
    for name, answer in zip(names, answers, strict=True):
        came = seen["book"][name]
        if answer.text is not None:
            assert answer.text == f"answer to {name}" and came[-1] in ("ok", *ODD)
            continue
        assert answer.error is not None and answer.error.isprintable() and not answer.permanent
        assert all(kind in FAULTS for kind in came), (came, answer)
        assert came[-1] in FINAL or len(came) == retries + 1, (came, answer)
    assert usage.requests >= seen["requests"]  # one may break before the server knows of it
    assert usage.cost >= seen["billed"]
    count = {
        "answered": sum(a.text is not None and not a.cached for a in answers),
        "cached": sum(a.cached for a in answers),
        "unknown": sum(a.text is None for a in answers),
        "requests": usage.requests,
        "faulty": sum(kind != "ok" for kinds in seen["book"].values() for kind in kinds),
        "billed": seen["billed"],
        "counted": round(usage.cost),
    }
    assert count["answered"] + count["cached"] + count["unknown"] == len(names)
    return count


def test_unknown_only_where_the_server_failed(server: Any, tmp_path: Path) -> None:
    slow = ["hang", "hang midway", "trickle"]  # their time limits have tests of their own
    count = soak(server, "soak", tmp_path / "c.sqlite", 300, retries=2, without=slow)
    assert count["faulty"] > 40 and 0 < count["unknown"] < 40 and count["cached"] > 20


leaves = st.none() | st.booleans() | st.integers(-(10**6), 10**6) | st.floats() | st.text(max_size=8)
leaves |= st.sampled_from(
    [KEY, f"no such key: {KEY[:12]}\u2026", KEY.encode().hex(), "overloaded", "", 10**30, -1, 5.0]
)
names = st.sampled_from(
    ["id", "object", "choices", "message", "content", "usage", "error", "code", "type", "text", "delta", "refusal"]
)
anything = st.recursive(leaves, lambda more: st.lists(more, max_size=3) | st.dictionaries(names, more, max_size=4))
counts = st.integers(0, 200_000) | leaves
usages = st.fixed_dictionaries(
    {}, optional={f"{kind}_tokens": counts for kind in ("prompt", "completion", "total")} | {"more": anything}
)
messages = st.fixed_dictionaries({"role": st.just("assistant"), "content": st.just("4") | anything}) | anything
choices = st.lists(st.fixed_dictionaries({"message": messages}, optional={"error": anything}) | anything, max_size=2)
completions = st.fixed_dictionaries(
    {"choices": choices | anything, "usage": usages | anything}, optional={"error": anything, "object": anything}
)
bodies = (completions | anything).map(json.dumps) | st.text(max_size=40)


@pytest.fixture(scope="module")
def mirror(server: Any) -> Iterator[OpenAIOracle]:
    """An oracle whose server replies what the question says."""
    server.plan("mirror", {"kind": "mirror"})
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("OPENAI_API_KEY", KEY)
        oracle = OpenAIOracle(server.url, "mirror", max_retries=0, max_tokens=MAX_TOKENS, **PRICES)
    yield oracle
    oracle.close()


def bill(body: str) -> int:
    """The tokens that a reply says it bills; 0 where it does not say."""
    try:
        usage = json.loads(body)["usage"]
        prompt, completion = usage["prompt_tokens"], usage["completion_tokens"]
        total = usage.get("total_tokens") or 0
    except (ValueError, TypeError, LookupError, AttributeError):
        return 0
    if not all(type(count) is int and 0 <= count <= 10**7 for count in (prompt, completion, total)):
        return 0
    return prompt + max(completion, total - prompt)


def ask_mirror(oracle: OpenAIOracle, status: int, body: str) -> None:
    before = oracle.usage
    (answer,) = oracle.ask(question(json.dumps({"status": status, "text": body}))).result(20)
    after = oracle.usage
    assert (after.requests - before.requests == 1 or answer.cached) and not answer.permanent
    assert answer.cached or after.cost - before.cost >= bill(body) * (1 - 1e-9)
    if answer.text is None:
        assert answer.error and answer.error.isprintable() and len(answer.error) < 700
        assert not any(KEY[i : i + 8] in answer.error for i in range(len(KEY) - 7)), answer.error
    else:
        assert status == 200 and answer.text.strip()


@settings(max_examples=150)
@given(status=st.sampled_from([200, 200, 200, 400, 404, 429, 500, 503]), body=bodies)
def test_no_reply_raises_or_costs_less_than_its_bill_or_shows_the_key(
    mirror: OpenAIOracle, status: int, body: str
) -> None:
    ask_mirror(mirror, status, body)
    ask_mirror(mirror, 200, json.dumps({"choices": [{"message": {"content": body + "."}}]}))  # it is not down
