"""What one sees of a record of `bench/update_step.py`: tables for the terminal and the README, and a picture."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from record import Row, draw_between

MARKERS = ("<!-- update step: drawn by bench/update_step.py --table -->", "<!-- end of update step -->")

OURS = ("gapg, no saving", "+ packing", "+ response positions", "+ zero-advantage skipping", "+ shared prompt")
"""Each has its saving and those before it."""
TRL = "TRL 1.16"
GOAL = 3.0
"""How many times TRL's speed ours is to have, with all savings, at 1.5B on a GPU."""

SEQUENCES = ("sequences a micro-batch", "sequences")
TOKEN_CAP = ("token cap", "tokens")
"""Metric and unit: what a peer, and what we, had in memory at once."""
WORK = "counted work over measured time"


def summary(rows: list[Row]) -> str:
    """Of the timed rows, a block a case: a line an implementation, and ours beside the goal."""
    blocks = []
    for case in dict.fromkeys(row["case"] for row in rows):
        mine = [row for row in rows if row["case"] == case]
        found = {(r["impl"], r["metric"]): r["median"] for r in mine if "median" in r}
        errors = {r["impl"]: r["error"] for r in mine if "error" in r}
        head = f"  {'':26}{'ms':>10} {'of TRL':>8} {'of no saving':>13} {'peak GiB':>9} {'TFLOP/s':>8}  micro-batch"
        impls = sorted({row["impl"]: 0 for row in mine}, key=lambda impl: (*OURS, impl).index(impl))
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
    return (
        f"  ours with all savings is {theirs / ours:.2f} times as fast as {TRL} (the goal, at 1.5B on a GPU: {GOAL:g})"
    )


def counts(rows: list[Row]) -> str:
    """Of the counted rows: all of them, and what sharing saves."""
    return f"{table(rows)}\n\n{goal(rows)}"


def table(rows: list[Row]) -> str:
    """Markdown: a line a row's implementation, relative to our own with no saving where that is there."""
    lines = ["| case | impl | metric | value | unit | of no saving |", "|---|---|---|---|---|---|"]
    base = {(r["case"], r["metric"]): r["median"] for r in rows if r["impl"] == OURS[0] and "median" in r}
    for r in rows:
        if "error" in r:
            lines.append(f"| {r['case']} | {r['impl']} | error | {r['error'].replace('|', '/')} | | |")
            continue
        of = base.get((r["case"], r["metric"]))
        share = f"{r['median'] / of:.2f}" if of else ""
        lines.append(f"| {r['case']} | {r['impl']} | {r['metric']} | {r['median']:.4g} | {r['unit']} | {share} |")
    return "\n".join(lines)


def goal(rows: list[Row]) -> str:
    """Whether sharing halves the flops of our own run without it, at 1.5B with prompts of 1,024 tokens."""
    flops = {(r["case"], r["impl"]): r["median"] for r in rows if r.get("metric") == "flops"}
    lines = []
    for case in dict.fromkeys(case for case, _ in flops if case.startswith("1.5B") and "P=1024" in case):
        if not {(case, OURS[3]), (case, OURS[4])} <= flops.keys():
            continue
        share = flops[case, OURS[4]] / flops[case, OURS[3]]
        lines.append(f"{case}: shared / unshared flops {share:.3f}, {'' if share <= 0.5 else 'not '}at most half")
    return "\n".join(lines)


def counted_table(rows: list[Row], peers: Sequence[str]) -> str:
    """Markdown: flops of an update and bytes of a micro-batch, a line an implementation, a column a model and prompt.

    Of the cases in which some groups are all equal, so that every saving shows.
    """
    found = {(r["case"], r["impl"], r["metric"]): r["median"] for r in rows if "median" in r}
    cases = [case for case in dict.fromkeys(r["case"] for r in rows) if ", 0% all" not in case]
    heads = [re.sub(r"^(\S+), .*?P=(\d+).*", r"\1, P=\2", case) for case in cases]
    lines = ["| | " + " | ".join(heads) + " |", "|---|" + "---:|" * len(cases)]
    for impl in [*OURS, *peers]:
        cells = (
            f"{found[case, impl, 'flops'] / 1e15:.2f}, {found[case, impl, 'bytes'] / 2**30:.1f}"
            if (case, impl, "flops") in found
            else "–"
            for case in cases
        )
        lines.append(f"| {impl} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def draw_into(readme: Path, rows: list[Row], peers: Sequence[str]) -> None:
    """Replace what stands between the markers by the table of counts.

    Raises:
        ValueError: the file lacks the markers.
    """
    draw_between(readme, MARKERS, counted_table(rows, peers))


def plot(rows: list[Row], path: Path) -> None:
    """Bars of flops and times, a panel a case, relative to our own with no saving, else to the first that is there.

    Draws nothing where no row has either.
    """
    shown = [r for r in rows if r.get("metric") in ("flops", "time")]
    if not shown:
        return
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    cases = list(dict.fromkeys((r["case"], r["metric"]) for r in shown))
    lines = -(-len(cases) // 2)
    figure, axes = plt.subplots(lines, 2, figsize=(14, 2.6 * lines), squeeze=False, layout="constrained")
    for axis, (case, metric) in zip(axes.flat, cases, strict=False):
        found = {r["impl"]: r["median"] for r in shown if (r["case"], r["metric"]) == (case, metric)}
        names = list(found)[::-1]
        base = OURS[0] if OURS[0] in found else names[-1]
        shares = [found[name] / found[base] for name in names]
        bars = axis.barh(names, shares, color=["tab:orange" if n in OURS else "tab:blue" for n in names])
        axis.bar_label(bars, [f" {x:.2f}" for x in shares], fontsize=8)
        kind = "counted" if metric == "flops" else "measured"
        axis.set_title(f"{metric} ({kind}), of {base!r}: {case}", fontsize=8)
        axis.tick_params(labelsize=8)
        axis.margins(x=0.12)
    for axis in axes.flat[len(cases) :]:
        axis.remove()
    figure.suptitle("One update")
    figure.savefig(path, dpi=90)
    plt.close(figure)
