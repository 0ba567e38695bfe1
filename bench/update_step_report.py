"""What one sees of a record of `bench/update_step.py`: tables for the terminal and the docs, and a picture."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import pictures
from record import Row, by_case, markdown, medians

MARKERS = ("<!-- update step: drawn by bench/update_step.py --table -->", "<!-- end of update step -->")

OURS = ("gapg, no saving", "+ packing", "+ response positions", "+ zero-advantage skipping", "+ shared prompt")
"""Each has its saving and those before it."""
MARGINAL = ("marginal, 2 places a response", "marginal, every token")
"""`method: marginal` by the places where the help phrase could begin; with all savings but zero-advantage skipping, as
no two responses are worth exactly the same."""
TRL = "TRL 1.16"
GOAL = 3.0
"""How many times TRL's speed ours is to have, with all savings, at 1.5B on a GPU."""
MARGINAL_GOAL = 1.02
"""Most flops of `method: marginal` at few places, of our own update with all savings where no group can be skipped."""

SEQUENCES = ("sequences a micro-batch", "sequences")
TOKEN_CAP = ("token cap", "tokens")
"""Metric and unit: what a peer, and what we, had in memory at once."""
WORK = "counted work over measured time"


def summary(rows: list[Row]) -> str:
    """Of the timed rows, a block a case: a line an implementation, and ours beside the goal."""
    blocks = []
    for case, mine in by_case(rows).items():
        found = {(impl, metric): value for (_, impl, metric), value in medians(mine).items()}
        errors = {r["impl"]: r["error"] for r in mine if "error" in r}
        head = f"  {'':26}{'ms':>10} {'of TRL':>8} {'of no saving':>13} {'peak GiB':>9} {'TFLOP/s':>8}  micro-batch"
        impls = sorted({row["impl"]: 0 for row in mine}, key=lambda impl: (*OURS, *MARGINAL, impl).index(impl))
        lines = [_line(impl, found, errors.get(impl)) for impl in impls]
        blocks.append("\n".join([case, head, *lines, _verdict(found)]))
    return "\n\n".join(blocks)


def _line(impl: str, found: dict[tuple[str, str], float], error: str | None) -> str:
    def cell(value: float | None, form: str, width: int) -> str:
        return f"{'–' if value is None else format(value, form):>{width}}"

    if (impl, "time") not in found and error is not None:
        return f"  {impl:26} {error}"
    seconds, peak = found.get((impl, "time")), found.get((impl, "peak memory"))
    shares = [seconds / found[base, "time"] if seconds and (base, "time") in found else None for base in (TRL, OURS[0])]
    cells = (
        cell(seconds and 1e3 * seconds, ".1f", 10), cell(shares[0], ".2f", 8), cell(shares[1], ".2f", 13),
        cell(peak and peak / 2**30, ".1f", 9), cell(found.get((impl, WORK)), ".4g", 8),
    )  # fmt: skip
    sizes = [f"{found[impl, m]:.0f} {unit}" for m, unit in (SEQUENCES, TOKEN_CAP) if (impl, m) in found]
    return f"  {impl:26}{' '.join(cells)}  {', '.join(sizes)}" + (f" (then {error})" if error else "")


def _verdict(found: dict[tuple[str, str], float]) -> str:
    ours, theirs = found.get((OURS[-1], "time")), found.get((TRL, "time"))
    if not ours or not theirs:
        return f"  no verdict: it needs both {OURS[-1]!r} and {TRL!r}"
    speed = f"{theirs / ours:.2f} times as fast as {TRL}"
    return f"  ours with all savings is {speed} (the goal, at 1.5B on a GPU: {GOAL:g})"


def counts(rows: list[Row], peers: Iterable[str]) -> str:
    """The table of the counted rows, who could not be counted, and which goals were met: that sharing halves the flops
    of our own update without it, at 1.5B with prompts of 1,024 tokens; and that of `method: marginal`."""
    found = [counted_table(rows, peers), ""]
    found += [f"{r['case']}: {r['impl']} could not be counted: {r['error']}" for r in rows if "error" in r]
    flops = {(case, impl): value for (case, impl, metric), value in medians(rows).items() if metric == "flops"}
    for case in by_case(rows):
        if case.startswith("1.5B") and "P=1024" in case and {(case, OURS[3]), (case, OURS[4])} <= flops.keys():
            share = flops[case, OURS[4]] / flops[case, OURS[3]]
            found.append(f"{case}: shared / unshared flops {share:.3f}, {'' if share <= 0.5 else 'not '}at most half")
    for case, times in _times_ours(rows, MARGINAL[0], equal=False).items():
        verdict = "met" if times <= MARGINAL_GOAL else "missed"
        found.append(f"{case}: {MARGINAL[0]}: {times:.4f} times ours (goal: at most {MARGINAL_GOAL:g}, {verdict})")
    return "\n".join(found)


def _times_ours(rows: list[Row], impl: str, *, equal: bool) -> dict[str, float]:
    """Flops over those of our own update with all savings, by case: those in which groups are all equal, or others."""
    flops = {(case, impl): value for (case, impl, metric), value in medians(rows).items() if metric == "flops"}
    return {
        case: flops[case, impl] / flops[case, OURS[-1]]
        for case in by_case(rows)
        if (", 0% all" not in case) == equal and {(case, impl), (case, OURS[-1])} <= flops.keys()
    }


def _marginal_cost(rows: list[Row]) -> str:
    """A paragraph; empty where nothing was counted of it."""

    def between(impl: str, equal: bool) -> str:
        times = sorted(_times_ours(rows, impl, equal=equal).values())
        return f"{times[0]:.3f} to {times[-1]:.3f}" if times else "–"

    if not any(row["impl"] in MARGINAL for row in rows):
        return ""
    few, every = MARGINAL
    return (
        f"\n\n`method: marginal`, over the last line of ours: {between(few, False)} times its flops where the phrase\n"
        f"can begin at 2 places of a response and no group is all equal, {between(every, False)} where at every\n"
        f"token. Groups that are all equal it cannot skip: with those of the table {between(few, True)} and\n"
        f"{between(every, True)}."
    )


def counted_table(rows: list[Row], peers: Iterable[str]) -> str:
    """Markdown: flops of an update and bytes of a micro-batch, a line an implementation, a column a model and prompt;
    and what `method: marginal` costs.

    Of the cases in which some groups are all equal, so that every saving shows, where there are any.
    """
    found = medians(rows)
    cases = [case for case in by_case(rows) if ", 0% all" not in case] or list(by_case(rows))
    lines = []
    for impl in [*OURS, *MARGINAL, *peers]:
        cells = (
            f"{found[case, impl, 'flops'] / 1e15:.2f}, {found[case, impl, 'bytes'] / 2**30:.1f}"
            if (case, impl, "flops") in found
            else "–"
            for case in cases
        )
        lines.append([impl, *cells])
    heads = [re.sub(r"^(\S+), .*?P=(\d+).*", r"\1, P=\2", case) for case in cases]
    return markdown(["", *heads], lines, right=range(1, len(cases) + 1)) + _marginal_cost(rows)


def panels(rows: list[Row]) -> list[Callable[[Any], None]]:
    """Flops and times, a panel a case, relative to our own with no saving, else to the first that is there."""
    found: list[Callable[[Any], None]] = []
    for metric, kind in (("flops", "counted"), ("time", "measured")):
        for case, part in by_case(rows, metric).items():
            shown = {row["impl"]: row for row in part}
            base = OURS[0] if OURS[0] in shown else next(iter(shown))
            title = f"{metric} ({kind}), of {base!r}: {case}"
            found.append(partial(pictures.bars, rows=shown, title=title, base=base, by_time=False))
    return found
