"""What a reward function may return, how what it may not is told, and the trial before a run."""

import itertools
import math
import sys
from collections.abc import Callable
from dataclasses import replace
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gapg.config import RunConfig
from gapg.errors import ConfigError
from gapg.judge import Group, Outcome, parse, rewards
from gapg.reward import RewardError, group_rewards, try_reward
from gapg.tasks.base import Prompt
from gapg.tasks.countdown import Countdown
from gapg_rollout.records import Completion
from studies import da_grpo

OUTCOMES = (Outcome.LOCAL_CORRECT, Outcome.CLOUD_CORRECT, Outcome.LOCAL_WRONG)
GROUP = Group(
    Prompt("3 8 = 5", "3 8 = 5 :", "8 - 3", "countdown"),
    (Completion((1,), (-0.1,), "x", "stop"),) * 3,
    OUTCOMES,
    (True, True, False),
    oracle_score=1.0,
)


def returns(value: Any) -> Any:
    return lambda group, alpha_a, alpha_c, alpha_f: value


def error_of(function: Any) -> str:
    with pytest.raises(RewardError) as error:
        group_rewards(function, "mine:paid", GROUP, 1.0, 0.25, 0.0)
    message = str(error.value)
    assert message.startswith("reward.function=mine:paid: prompt '3 8 = 5': ")
    assert "\n" not in message
    return message


@pytest.mark.parametrize(
    "value",
    [
        [1, 0, 2.5],
        (True, False, Fraction(5, 2)),
        [Decimal(1), np.float32(0), np.float64(2.5)],
        [np.bool_(True), torch.tensor(0), np.array(2.5)],
        torch.tensor([1.0, 0.0, 2.5], requires_grad=True),
        torch.tensor([1.0, 0.0, 2.5], dtype=torch.bfloat16),
        np.array([1, 0, 2.5], dtype=np.float16),
        {"a": 1.0, "b": 0.0, "c": 2.5}.values(),
    ],
    ids=repr,
)
def test_any_ordered_collection_of_real_numbers(value: Any) -> None:
    found = group_rewards(returns(value), "mine:paid", GROUP, 1.0, 0.25, 0.0)
    assert found == [1.0, 0.0, 2.5]
    assert {type(x) for x in found} == {float}


def test_a_generator_and_what_the_function_is_given() -> None:
    def paid(group: Group, alpha_a: float, alpha_c: float, alpha_f: float) -> Any:
        return (worth + alpha_f for worth in (alpha_a, alpha_c, len(group.completions)))

    assert group_rewards(paid, "mine:paid", GROUP, 1.0, 0.25, 0.5) == [1.5, 0.75, 3.5]
    assert group_rewards(rewards, "mine:paid", GROUP, 1.0, 0.25, 0.5) == rewards(GROUP, 1.0, 0.25, 0.5)


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (None, "returned None, not 3 numbers"),
        (0.5, "returned 0.5, not 3"),
        ("123", "returned '123', not 3"),
        (b"123", "not 3"),
        ({0: 1.0, 1: 0.0, 2: 1.0}, "returned {0: 1.0, 1: 0.0, 2: 1.0}, not 3"),
        ({1.0, 2.0, 3.0}, "in order"),
        (torch.tensor(1.0), "returned 1.0, not 3"),
        ([], "returned 0 rewards for 3 responses"),
        ([1.0, 0.0], "returned 2 rewards for 3 responses"),
        ([1.0, 0.0, 0.0, 0.0], "returned 4 rewards for 3 responses"),
        (itertools.repeat(1.0), "rewards for 3 responses"),
        (torch.ones(1, 3), "returned 1 rewards"),
        (torch.ones(3, 1), "reward 1 of 3 is [1.0], not a number"),
        ([[1.0], [0.0], [0.0]], "reward 1 of 3 is [1.0], not a number"),
        ([1.0, None, 0.0], "reward 2 of 3 is None, not a number"),
        (["1", "0", "0"], "reward 1 of 3 is '1', not a number"),
        (np.array(["1", "0", "0"]), "reward 1 of 3 is '1', not a number"),
        ([1.0, 0.0, 1j], "reward 3 of 3 is 1j, not a number"),
        ([1.0, math.nan, 0.0], "reward 2 of 3 is nan, not finite"),
        ([1.0, 0.0, -math.inf], "reward 3 of 3 is -inf, not finite"),
        (torch.tensor([1.0, math.inf, 0.0]), "reward 2 of 3 is inf, not finite"),
        ([1e39, 0.0, 0.0], "reward 1 of 3 is 1e+39, not finite in float32"),
        ([0, 10**400, 0], "reward 2 of 3 is 1000"),
        ([0, Fraction(10) ** 400, 0], "not finite in float32"),
        ([Decimal("NaN"), 0, 0], "not finite in float32"),
        (list, "not 3 numbers"),
    ],
    ids=repr,
)
def test_anything_else_is_told(value: Any, said: str) -> None:
    assert said in error_of(returns(value))


@given(st.lists(st.floats(width=64) | st.integers() | st.booleans() | st.none() | st.text(max_size=3), max_size=5))
def test_what_is_accepted_is_finite_in_float32(value: list[Any]) -> None:
    try:
        found = group_rewards(returns(value), "mine:paid", GROUP, 1.0, 0.25, 0.0)
    except RewardError as error:
        assert "\n" not in str(error)
    else:
        assert found == [float(x) for x in value]
        assert torch.tensor(found, dtype=torch.float32).isfinite().all() and len(found) == 3


async def asynchronous(*_: Any) -> list[float]:
    return [1.0, 0.0, 0.0]


def breaks_late(*_: Any) -> Any:
    return (1 / n for n in (2, 1, 0))


def leaves(*_: Any) -> Any:
    sys.exit(0)


def takes_two(group: Group, alpha_a: float) -> list[float]:
    return [alpha_a] * len(group.outcomes)


class Wordy(Exception):
    def __str__(self) -> str:
        return "one\ntwo"


class Scorer:
    def __call__(self, *_: Any) -> Any:
        raise Wordy


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    ("function", "said"),
    [
        (asynchronous, "is async; make it a plain function"),
        (breaks_late, "raised ZeroDivisionError: division by zero ("),
        (leaves, "raised SystemExit: 0 ("),
        (takes_two, "raised TypeError: takes_two() takes 2 positional arguments but 4 were given"),
        (Scorer(), "Wordy: one two ("),
    ],
)
def test_what_it_raises_is_told_with_its_line(function: Any, said: str) -> None:
    message = error_of(function)
    assert said in message
    assert (f"({__file__}:" in message) == said.endswith("(")


def test_responses_are_counted_before_it_is_called() -> None:
    def empties(group: Group, *_: float) -> list[float]:
        object.__setattr__(group, "outcomes", ())
        return []

    with pytest.raises(RewardError, match="returned 0 rewards for 3 responses"):
        group_rewards(empties, "mine:paid", replace(GROUP), 1.0, 0.25, 0.0)


def test_an_interruption_is_nobody_s_mistake() -> None:
    def interrupted(*_: Any) -> Any:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        group_rewards(interrupted, "mine:paid", GROUP, 1.0, 0.25, 0.0)


# --- the trial -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("function", [rewards, da_grpo.rewards])
@pytest.mark.parametrize("size", ["2", "5", "16"])
def test_our_own_pass(
    function: Any, size: str, small_config: Callable[..., RunConfig], countdown: Countdown, tmp_path: Path
) -> None:
    try_reward(function, small_config(tmp_path, rollout__samples_per_prompt=size, reward__alpha_f="0.1"), countdown)


@pytest.mark.parametrize("size", [2, 3, 8])
def test_it_sees_what_a_run_may_give_it(
    size: int, small_config: Callable[..., RunConfig], countdown: Countdown, tmp_path: Path
) -> None:
    groups: list[Group] = []
    alphas: set[tuple[float, ...]] = set()

    def watch(group: Group, *given: float) -> list[float]:
        groups.append(group)
        alphas.add(given)
        return [0.0] * len(group.completions)

    config = small_config(tmp_path, rollout__samples_per_prompt=str(size), budget__controller="true")
    try_reward(watch, config, countdown)
    assert {g.prompt for g in groups} == {countdown.prompts("train")[0]}
    assert {len(g.completions) for g in groups} == {len(g.outcomes) for g in groups} == {size}
    assert {o for g in groups for o in g.outcomes} == set(Outcome) - {Outcome.UNKNOWN}
    assert {g.oracle_score for g in groups} == {0.0, 1.0, None}
    assert all(g.oracle_asked == (g.oracle_score is not None) and not g.unknown for g in groups)
    assert len(alphas) == 2, "the price of a call moves"
    assert all(0 < c < a for a, c, _ in alphas)
    completions = [c for g in groups for c in g.completions]
    assert {parse(c.text).kind for c in completions} == {"answer", "help", "both", "none"}
    assert all(len(c.token_ids) == len(c.logprobs) > 0 for c in completions)
    for group in groups:
        kinds = [parse(c.text).kind for c in group.completions]
        assert group.calls == kinds.count("help") and group.both_endings == kinds.count("both")


def test_without_a_controller_the_price_stays(
    small_config: Callable[..., RunConfig], countdown: Countdown, tmp_path: Path
) -> None:
    prices = set()

    def watch(group: Group, alpha_a: float, alpha_c: float, alpha_f: float) -> list[float]:
        prices.add(alpha_c)
        return [0.0] * len(group.completions)

    try_reward(watch, small_config(tmp_path, budget__controller="false", reward__alpha_c="0.3"), countdown)
    assert prices == {0.3}


def scores_the_cloud(group: Group, *_: float) -> list[float]:
    return [group.oracle_score * c.logprobs[0] for c in group.completions]  # type: ignore[operator]


def per_price(group: Group, alpha_a: float, alpha_c: float, alpha_f: float) -> list[float]:
    return [alpha_a / alpha_c] * len(group.completions)


def per_character(group: Group, *_: float) -> list[float]:
    return [1 / len(c.text) for c in group.completions]


def grows_with_the_price(group: Group, alpha_a: float, alpha_c: float, alpha_f: float) -> list[float]:
    return [1e39 if alpha_c > 0.5 else 0.0] * len(group.completions)


@pytest.mark.parametrize(
    ("function", "said"),
    [
        (takes_two, "takes 2 positional arguments but 4 were given"),
        (returns([1.0, 0.0]), "returned 2 rewards for 4 responses"),
        (returns([math.inf] * 4), "reward 1 of 4 is inf"),
        (scores_the_cloud, "raised TypeError"),  # nobody called, so the cloud was not asked
        (per_character, "raised ZeroDivisionError"),  # a response may be empty
        (grows_with_the_price, "1e+39"),
    ],
)
def test_a_wrong_one_is_refused_in_a_line(
    function: Any, said: str, small_config: Callable[..., RunConfig], countdown: Countdown, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError) as error:
        try_reward(function, small_config(tmp_path, reward__function="mine:paid"), countdown)
    message = str(error.value)
    assert message.startswith(f"reward.function=mine:paid: prompt {countdown.prompts('train')[0].id!r}: ")
    assert "\n" not in message
    assert said in message
    assert "must return one finite number for each of group.completions" in message
