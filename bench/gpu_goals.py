"""What a card has to show: every goal of the design beside what a card's records say of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import heads_report
from record import Row
from update_step_report import GOAL, OURS, TRL

SHAPE = "(16384, 2048, 151936)"
"""T, H, V where the head is judged: Qwen2.5-3B's."""

FUSED, EAGER = "gapg fused_policy_loss", "PyTorch eager"


class HasRows(Protocol):
    def rows(self, name: str) -> list[Row]:
        """Those of a record; none where it did not come back."""


@dataclass(frozen=True)
class Goal:
    """``shown``: the figure and what it is of. ``met``: None where nothing was measured."""

    what: str
    wanted: str
    shown: str = "–"
    met: bool | None = None


def goals(results: HasRows) -> list[Goal]:
    """All of them, in the order of the stages."""
    kernels = results.rows("kernels")
    forward, train = f"{SHAPE} random, forward only", f"{SHAPE} random"
    return [
        _at_most("forward beside one bare GEMM", 1.10, *_of_bare(kernels, forward)),
        _at_most("forward and backward beside three bare GEMMs", 1.15, *_of_bare(kernels, train)),
        _logprob_error(results.rows("errors")),
        _gradient_error(results.rows("errors")),
        _at_least("TRL's update beside ours", GOAL, _update(results.rows("update"))),
        _at_least("the fastest other policy loss beside ours", 1.15, *_other(results, train, sums=False)),
        _at_least(
            "the fastest loss that only sums a cross entropy beside ours", 1.0, *_other(results, train, sums=True)
        ),
    ]


def _at_most(what: str, bound: float, value: float | None, of: str = "") -> Goal:
    return _judged(what, f"at most {bound:.2f}x", value, of, value is not None and value <= bound)


def _at_least(what: str, bound: float, value: float | None, of: str = "") -> Goal:
    return _judged(what, f"at least {bound:.2f}x", value, of, value is not None and value >= bound)


def _judged(what: str, wanted: str, value: float | None, of: str, met: bool) -> Goal:
    if value is None:
        return Goal(what, wanted)
    return Goal(what, wanted, f"{value:.2f}x" + (f" ({of})" if of else ""), met)


def _of_bare(rows: list[Row], case: str) -> tuple[float | None, str]:
    """The fastest of ours."""
    times, _ = heads_report.times_of(rows, case)
    ours = heads_report.fastest(times, ours=True)
    return (times[ours] / times[heads_report.FLOOR], ours) if ours and heads_report.FLOOR in times else (None, "")


def _other(results: HasRows, case: str, *, sums: bool) -> tuple[float | None, str]:
    """The fastest of the peers, each beside ours of its own run; stage C only, as A has none but eager."""
    found: dict[str, float] = {}
    for name in ("peers", "cutlass"):
        times = heads_report.times_of(results.rows(name), case)
        ours = heads_report.fastest(times[0], ours=True)
        other = heads_report.fastest(times[sums], ours=False)
        if ours and other:
            found[other] = times[sums][other] / times[0][ours]
    fastest = min(found, key=found.__getitem__, default="")
    return found.get(fastest), fastest


def _logprob_error(rows: list[Row]) -> Goal:
    what, wanted = "worst error of a log-prob, in nats", "at most 1e-03"
    worst = max(_of_entropy(rows, "logprob_error", FUSED).values(), default=None)
    return Goal(what, wanted) if worst is None else Goal(what, wanted, f"{worst:.0e}", worst <= 1e-3)


def _gradient_error(rows: list[Row]) -> Goal:
    """At the entropy where it compares worst."""
    ours, eager = (_of_entropy(rows, "dH_error", impl) for impl in (FUSED, EAGER))
    ratios = [value / eager[case] for case, value in ours.items() if case in eager]
    return _at_most("error of dH beside eager's, where it compares worst", 1.0, max(ratios, default=None))


def _of_entropy(rows: list[Row], metric: str, impl: str) -> dict[str, float]:
    return {row["case"]: row["median"] for row in rows if (row.get("metric"), row["impl"]) == (metric, impl)}


def _update(rows: list[Row]) -> float | None:
    """At the case where it compares worst."""
    times = {(row["case"], row["impl"]): row["median"] for row in rows if row.get("metric") == "time"}
    ours = {case: seconds for (case, impl), seconds in times.items() if impl == OURS[-1] and (case, TRL) in times}
    return min((times[case, TRL] / seconds for case, seconds in ours.items()), default=None)
