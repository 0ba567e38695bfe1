"""Intervals and tests of figures that count problems."""

from __future__ import annotations

from collections.abc import Sequence

from scipy.stats import binomtest


def wilson(hits: int, n: int) -> tuple[float, float]:
    """95% Wilson interval of a proportion; of nothing, that it may be anything."""
    if n == 0:
        return (0.0, 1.0)
    interval = binomtest(hits, n).proportion_ci(method="wilson")
    return (float(interval.low), float(interval.high))


def mcnemar(a: Sequence[bool], b: Sequence[bool]) -> tuple[int, int, float]:
    """(right in a only, right in b only, two-sided exact p) on the same problems.

    Raises ValueError when the lengths differ.
    """
    only_a = sum(x and not y for x, y in zip(a, b, strict=True))
    only_b = sum(y and not x for x, y in zip(a, b, strict=True))
    n = only_a + only_b
    return only_a, only_b, float(binomtest(only_a, n).pvalue) if n else 1.0
