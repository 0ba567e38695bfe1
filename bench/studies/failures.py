"""What a wrong response to a Countdown problem is wrong by: whether its own steps show that it missed the target."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from gapg.tasks.base import ANSWER_OPEN
from studies.arms import Finished
from studies.report import Column, mean_of
from studies.statistics import FloatArray, help_margins, shares_at

SHOWN, HIDDEN, OTHER, RIGHT = "misses the target", "hits it by a wrong step", "otherwise wrong", "right"
"""The last step says another value than the target; it says the target, and a step before or there is computed wrong;
neither (numbers that are not given, an answer that its steps do not say, no steps)."""
KINDS = (SHOWN, HIDDEN, OTHER, RIGHT)

_STEP = re.compile(r"\s*(\d+) ([-+*]) (\d+) = (\d+)\s*")
_COMPUTE: dict[str, Callable[[int, int], int]] = {"+": operator.add, "-": operator.sub, "*": operator.mul}


def kind(row: Mapping[str, Any]) -> str:
    """Of a prediction whose id is the problem, `3 8 15 = 39`."""
    if row["outcome"] == "local_correct":
        return RIGHT
    steps = [_STEP.fullmatch(step) for step in row["response"].partition(ANSWER_OPEN)[0].split(";")]
    found = [(int(x), sign, int(y), int(value)) for x, sign, y, value in (s.groups() for s in steps if s)]
    if len(found) < len(steps):
        return OTHER
    if found[-1][-1] != int(row["id"].rpartition("=")[2]):
        return SHOWN
    return HIDDEN if any(_COMPUTE[sign](x, y) != value for x, sign, y, value in found) else OTHER


def by_kind(run: Finished, called: float) -> dict[str, float | None]:
    """Of the greedy answers with help masked: the part of each kind, and the part of the kind that is called where
    exactly `called` of the problems are (None where there are none)."""
    rows = run.rows("heldout-masked")
    kinds, share = np.array([kind(row) for row in rows]), shares_at(help_margins(rows), called)
    figures: dict[str, float | None] = {}
    for name in KINDS:
        of_kind: FloatArray = share[kinds == name]
        figures |= {name: len(of_kind) / len(rows), f"{name}, called": float(of_kind.mean()) if len(of_kind) else None}
    return figures


def columns() -> list[Column]:
    """The part of each kind, and of it the part that is called."""
    return [(f"{name}{what}", mean_of(f"{name}{what}")) for name in KINDS for what in ("", ", called")]
