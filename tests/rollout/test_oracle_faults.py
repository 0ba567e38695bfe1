"""Faults of every kind at random: no answer is lost that the server gave, and no cent that it billed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gapg_rollout.oracle.openai import OpenAIOracle
from tests.rollout.fault_server import FAULTS, ODD
from tests.rollout.oracle_checks import KEY, PRICES, many, question
from tests.rollout.random_replies import JSON, REPLIES, billed_at_least

FINAL = ("400", "404", "413", "422", "redirect", "stream", "endless", "bomb", "no text", "refusal")
"""Faults that no second request cures: it would be refused, or paid, again."""
MAX_TOKENS = 64


def soak(server: Any, model: str, path: Path, questions: int, *, retries: int = 5, **plan: Any) -> dict[str, int]:
    """Asks that many questions, a tenth of them twice; checks every answer and the money. What became of them."""
    server.plan(model, {"share": 0.22, "seed": 1, **plan})
    names = many(questions) + many(questions)[::10]
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


bodies = (REPLIES | JSON).map(json.dumps) | st.text(max_size=40)


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
        return billed_at_least(json.loads(body)["usage"])
    except (ValueError, TypeError, LookupError):
        return 0


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
