"""The reward function that a config names: called with checks, and tried before anything slow."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Set, Sized
from decimal import Decimal
from inspect import iscoroutine
from itertools import cycle, islice
from math import ceil, inf
from numbers import Real
from typing import TYPE_CHECKING, Any

import torch

from gapg.errors import ConfigError
from gapg.judge import Group, Outcome, parse
from gapg.tasks.base import ANSWER_CLOSE, ANSWER_OPEN, HELP_PHRASE, Prompt, Task
from gapg_rollout.records import Completion, OracleAnswer

if TYPE_CHECKING:
    from gapg.config import RunConfig

RewardFunction = Callable[[Group, float, float, float], Iterable[Any]]
"""(group, alpha_a, alpha_c, alpha_f) -> one finite number a response, in any ordered collection."""

LARGEST = torch.finfo(torch.float32).max
"""Rewards are float32 in training."""


class RewardError(ValueError):
    """A reward function raised, or did not return a finite number for each response: one line, with the prompt's id."""


def group_rewards(
    function: RewardFunction, path: str, group: Group, alpha_a: float, alpha_c: float, alpha_f: float
) -> list[float]:
    """The function's G rewards of a group, each finite in float32; `path` is its import path, for the error.

    It may return them as a list, a tuple, a generator, a 1-D array or tensor, of any real numbers. Raises RewardError.
    """
    size = len(group.outcomes)
    try:
        return _numbers(function(group, alpha_a, alpha_c, alpha_f), size)
    except (Exception, SystemExit) as error:
        said = " ".join((str(error) if isinstance(error, _Wrong) else f"raised {_raised(error)}").split())
        raise RewardError(f"reward.function={path}: prompt {group.prompt.id!r:.80}: {said}") from error


def try_reward(function: RewardFunction, config: RunConfig, task: Task) -> None:
    """Calls the function on made-up responses to the first training prompt: every ending and outcome, two prices.

    Raises ConfigError where it fails, and what `task.prompts` raises.
    """
    reward = config.reward
    moved = (reward.alpha_c + reward.alpha_a) / 2 if config.budget.controller else reward.alpha_c
    groups = _made_up(task.prompts("train")[0], config.rollout.samples_per_prompt)
    for group, price in zip(groups, cycle((reward.alpha_c, moved)), strict=False):
        try:
            group_rewards(function, reward.function, group, reward.alpha_a, price, reward.alpha_f)
        except RewardError as error:
            raise ConfigError(
                f"{error} (tried on made-up responses, alpha_c={price:g}); it is given (group, alpha_a, alpha_c, "
                "alpha_f) and must return one finite number for each of group.completions"
            ) from None


class _Wrong(Exception):
    """What came instead of G finite numbers."""


def _numbers(returned: Any, size: int) -> list[float]:
    listed = returned.tolist() if hasattr(returned, "tolist") else returned
    if iscoroutine(listed):
        listed.close()
        raise _Wrong("is async; make it a plain function")
    if not isinstance(listed, Iterable) or isinstance(listed, str | bytes | bytearray | Mapping | Set):
        raise _Wrong(f"returned {listed!r:.60}, not {size} numbers in order")
    values = list(listed if isinstance(listed, Sized) else islice(listed, size + 1))
    if len(values) != size:
        raise _Wrong(f"returned {len(values)} rewards for {size} responses")
    return [_number(value, f"reward {i} of {size}") for i, value in enumerate(values, 1)]


def _number(value: Any, which: str) -> float:
    plain = value.item() if getattr(value, "ndim", None) == 0 else value
    if not isinstance(plain, Real | Decimal):
        raise _Wrong(f"{which} is {value!r:.60}, not a number")
    try:
        number = float(plain)
    except OverflowError:
        number = inf
    if not abs(number) <= LARGEST:
        raise _Wrong(f"{which} is {value!r:.60}, not finite in float32")
    return number


def _raised(error: BaseException) -> str:
    """The error and the function's own line; without a line where it was never entered."""
    text = "".join(traceback.format_exception_only(error)).strip()
    frames = [f for f in traceback.extract_tb(error.__traceback__) if f.filename != __file__]
    return f"{text:.300}" + (f" ({frames[0].filename}:{frames[0].lineno})" if frames else "")


def _made_up(prompt: Prompt, size: int) -> Iterator[Group]:
    """Groups of G responses with every ending: the cloud is right, it is wrong, it was not asked as nobody called."""
    right, wrong = (f"{ANSWER_OPEN} {answer} {ANSWER_CLOSE}" for answer in (prompt.answer, "0"))
    alone = {
        f"so it is {right}": Outcome.LOCAL_CORRECT,
        f"it may be {wrong}": Outcome.LOCAL_WRONG,
        f"{right} or {HELP_PHRASE}": Outcome.LOCAL_WRONG,
        "on and on and": Outcome.LOCAL_WRONG,
        "": Outcome.LOCAL_WRONG,
    }
    calls = f"this is hard {HELP_PHRASE}"
    for outcome, score, replies in (
        (Outcome.CLOUD_CORRECT, 1.0, (right,)),
        (Outcome.CLOUD_WRONG, 0.0, (wrong,)),
        (None, None, ()),
    ):
        responses = list((alone if outcome is None else {calls: outcome, **alone}).items())
        several = cycle(responses)
        for _ in range(ceil(len(responses) / size)):
            texts, outcomes = zip(*islice(several, size), strict=True)
            parsed = [parse(text) for text in texts]
            yield Group(
                prompt,
                tuple(_completion(text) for text in texts),
                outcomes,
                tuple(p.well_formed for p in parsed),
                oracle_score=score,
                oracle_answers=tuple(OracleAnswer(text) for text in replies),
                both_endings=sum(p.kind == "both" for p in parsed),
            )


def _completion(text: str) -> Completion:
    """A token a word and one that ends it; a text without an ending was cut off."""
    n = len(text.split()) + 1
    return Completion(tuple(range(n)), (-0.5,) * n, text, "length" if text and parse(text).kind == "none" else "stop")
