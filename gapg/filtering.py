"""Adaptive prompt filtering: which groups a step learns from (arXiv 2509.24050)."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import floor

from gapg.judge import Group


@dataclass(frozen=True, slots=True)
class Selection:
    """`kept` is D, in the order of the groups; the counts say what became of the rest."""

    kept: list[Group]
    d1: int
    d2: int
    d2_kept: int
    unsolved: int
    unknown: int


def select(groups: Sequence[Group], rho: Fraction | None, rng: random.Random) -> Selection:
    """All of D1 and at most floor(rho |D1|) of D2, drawn by `rng`; with `rho=None` every judged group.

    D1: prompts with at least one right local answer. D2: prompts with none, whose cloud answer is right. A group the
    oracle failed is in neither. Everything else, the prompts that nobody solves, is dropped by the filter.
    """
    judged = [g for g in groups if not g.unknown]
    d1 = [i for i, g in enumerate(judged) if g.solved_locally]
    in_d1 = set(d1)
    d2 = [i for i, g in enumerate(judged) if i not in in_d1 and g.cloud_correct]
    unknown = len(groups) - len(judged)
    unsolved = len(judged) - len(d1) - len(d2)
    if rho is None:
        return Selection(judged, len(d1), len(d2), len(d2), unsolved, unknown)
    chosen = rng.sample(d2, min(len(d2), floor(rho * len(d1))))
    kept = sorted(d1 + chosen)
    return Selection([judged[i] for i in kept], len(d1), len(d2), len(chosen), unsolved, unknown)
