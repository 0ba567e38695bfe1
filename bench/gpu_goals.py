"""What a card has to show: every goal of the design beside what a card's records say of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import heads_report
from record import Row, medians
from update_step_report import GOAL, OURS, TRL

SHAPE = "(16384, 2048, 151936)"
"""T, H, V where the head is judged: Qwen2.5-3B's."""

FUSED, EAGER = "gapg fused_policy_loss", "PyTorch eager"

Rows = Callable[[str], list[Row]]
"""Those of a record, by its name; none where it did not come back."""
Figure = tuple[float | None, str]
"""A figure, None where nothing was measured, and what it is of."""


@dataclass(frozen=True)
class Goal:
    """``shown``: the figure and what it is of. ``met``: None where nothing was measured."""

    what: str
    wanted: str
    shown: str
    met: bool | None


def goals(rows: Rows) -> list[Goal]:
    """All of them, in the order of the stages."""
    train, summed = f"{SHAPE} random", "the fastest loss that only sums a cross entropy beside ours"
    return [
        _judged("forward beside one bare GEMM", 1.10, _of_bare(rows, f"{train}, forward only")),
        _judged("forward and backward beside three bare GEMMs", 1.15, _of_bare(rows, train)),
        _judged("worst error of a log-prob, in nats", 1e-3, _logprob_error(rows), form="{:.0e}"),
        _judged("error of dH beside eager's, where it compares worst", 1.0, _gradient_error(rows)),
        _judged("TRL's update beside ours", GOAL, _update(rows), least=True),
        _judged("the fastest other policy loss beside ours", 1.15, _other(rows, train, sums=False), least=True),
        _judged(summed, 1.0, _other(rows, train, sums=True), least=True),
    ]


def _judged(what: str, bound: float, found: Figure, *, least: bool = False, form: str = "{:.2f}x") -> Goal:
    value, of = found
    wanted = f"at {'least' if least else 'most'} {form.format(bound)}"
    if value is None:
        return Goal(what, wanted, "–", None)
    met = value >= bound if least else value <= bound
    return Goal(what, wanted, form.format(value) + (f" ({of})" if of else ""), met)


def _of_bare(rows: Rows, case: str) -> Figure:
    """The fastest of ours."""
    times, _ = heads_report.times_of(rows("kernels"), case)
    ours = heads_report.fastest(times, ours=True)
    return (times[ours] / times[heads_report.FLOOR], ours) if ours and heads_report.FLOOR in times else (None, "")


def _other(rows: Rows, case: str, *, sums: bool) -> Figure:
    """The fastest of the peers, each beside ours of its own run; stage C only, as A has none but eager."""
    found: dict[str, float] = {}
    for name in ("peers", "cutlass"):
        times = heads_report.times_of(rows(name), case)
        ours = heads_report.fastest(times[0], ours=True)
        other = heads_report.fastest(times[sums], ours=False)
        if ours and other:
            found[other] = times[sums][other] / times[0][ours]
    fastest = min(found, key=found.__getitem__, default="")
    return found.get(fastest), fastest


def _logprob_error(rows: Rows) -> Figure:
    found = medians(rows("errors"))
    return max((x for (_, *of), x in found.items() if of == [FUSED, "logprob_error"]), default=None), ""


def _gradient_error(rows: Rows) -> Figure:
    """At the entropy where it compares worst."""
    found = medians(rows("errors"))
    errors = {case: x for (case, *of), x in found.items() if of == [EAGER, "dH_error"]}
    ratios = [found[case, FUSED, "dH_error"] / x for case, x in errors.items() if (case, FUSED, "dH_error") in found]
    return max(ratios, default=None), ""


def _update(rows: Rows) -> Figure:
    """At the case where it compares worst."""
    found = medians(rows("update"))
    theirs = {case: x for (case, *of), x in found.items() if of == [TRL, "time"]}
    ours = (OURS[-1], "time")
    return min((x / found[case, *ours] for case, x in theirs.items() if (case, *ours) in found), default=None), ""
