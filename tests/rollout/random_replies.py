"""Replies of random JSON, most of them nearly right, with the key in them; and what they bill."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

from tests.rollout.oracle_checks import KEY

KEYS = (KEY, f"no such key: {KEY[:12]}\u2026", KEY.encode().hex())

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.sampled_from(KEYS),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(
        st.sampled_from(["type", "text", "value", "error", "message", "content", "code", "refusal", "x"]), inner
    ),
    max_leaves=8,
)  # fmt: skip


def mostly(strategy: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """Seven times in eight."""
    return st.integers(0, 7).flatmap(lambda chance: JSON if chance == 7 else strategy)


def some(**keys: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.fixed_dictionaries({}, optional=keys)


COUNT = mostly(st.integers(0, 200_000))
DETAILS = mostly(some(reasoning_tokens=COUNT, cached_tokens=COUNT))
USAGES = mostly(
    some(
        prompt_tokens=COUNT, completion_tokens=COUNT, total_tokens=COUNT,
        completion_tokens_details=DETAILS, prompt_tokens_details=DETAILS,
    )
)  # fmt: skip
TYPES = mostly(st.sampled_from(["text", "text", "thinking", "refusal"]))
PARTS = mostly(st.fixed_dictionaries({"type": TYPES, "text": mostly(st.text())}))
CONTENTS = mostly(st.text() | st.lists(PARTS, max_size=3))
MESSAGES = mostly(
    st.fixed_dictionaries({"content": CONTENTS}, optional={"refusal": JSON, "tool_calls": JSON, "reasoning": JSON})
)
CHOICE = mostly(st.fixed_dictionaries({"message": MESSAGES}, optional={"finish_reason": JSON, "delta": JSON}))
CHOICES = mostly(st.lists(CHOICE, min_size=1, max_size=2))
FULL = st.fixed_dictionaries({"choices": CHOICES, "usage": USAGES})
REPLIES = mostly(FULL | FULL | some(choices=CHOICES, usage=USAGES, error=JSON, object=JSON, message=JSON, detail=JSON))


def billed_at_least(usage: Any) -> int:
    """Tokens that a server may bill which sends this usage, read on its own."""

    def count(value: Any) -> int:
        return value if type(value) is int and 0 <= value <= 200_000 else 0

    if not isinstance(usage, dict):
        return 0
    prompt, said, total = (count(usage.get(key)) for key in ("prompt_tokens", "completion_tokens", "total_tokens"))
    return max(prompt + said, total)
