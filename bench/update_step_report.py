"""What one sees of a record of `bench/update_step.py`: tables for the terminal and the README, and a picture."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from bench.record import Row, draw_between

MARKERS = ("<!-- update step: drawn by bench/update_step.py --table -->", "<!-- end of update step -->")


def table(rows: list[Row], ours: Sequence[str]) -> str:
    """Markdown: a line a row's implementation, relative to our own with no saving."""
    lines = ["| case | impl | metric | value | unit | of no saving |", "|---|---|---|---|---|---|"]
    base = {(r["case"], r["metric"]): r["median"] for r in rows if r["impl"] == ours[0] and "median" in r}
    for r in rows:
        if "error" in r:
            lines.append(f"| {r['case']} | {r['impl']} | error | {r['error'].replace('|', '/')} | | |")
            continue
        share = r["median"] / base[r["case"], r["metric"]]
        lines.append(f"| {r['case']} | {r['impl']} | {r['metric']} | {r['median']:.4g} | {r['unit']} | {share:.2f} |")
    return "\n".join(lines)


def goal(rows: list[Row], ours: Sequence[str]) -> str:
    """Whether sharing halves the flops of our own run without it, at 1.5B with prompts of 1,024 tokens."""
    flops = {(r["case"], r["impl"]): r["median"] for r in rows if r.get("metric") == "flops"}
    lines = []
    for case in dict.fromkeys(case for case, _ in flops if case.startswith("1.5B") and "P=1024" in case):
        share = flops[case, ours[4]] / flops[case, ours[3]]
        lines.append(f"{case}: shared / unshared flops {share:.3f}, {'' if share <= 0.5 else 'not '}at most half")
    return "\n".join(lines)


def counted_table(rows: list[Row], ours: Sequence[str], peers: Sequence[str]) -> str:
    """Markdown: flops of an update and bytes of a micro-batch, a line an implementation, a column a model and prompt.

    Of the cases in which some groups are all equal, so that every saving shows.
    """
    found = {(r["case"], r["impl"], r["metric"]): r["median"] for r in rows if "median" in r}
    cases = [case for case in dict.fromkeys(r["case"] for r in rows) if ", 0% all" not in case]
    heads = [re.sub(r"^(\S+), .*?P=(\d+).*", r"\1, P=\2", case) for case in cases]
    lines = ["| | " + " | ".join(heads) + " |", "|---|" + "---:|" * len(cases)]
    for impl in [*ours, *peers]:
        cells = (
            f"{found[case, impl, 'flops'] / 1e15:.2f}, {found[case, impl, 'bytes'] / 2**30:.1f}"
            if (case, impl, "flops") in found
            else "–"
            for case in cases
        )
        lines.append(f"| {impl} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def draw_into(readme: Path, rows: list[Row], ours: Sequence[str], peers: Sequence[str]) -> None:
    """Replace what stands between the markers by the table of counts.

    Raises:
        ValueError: the file lacks the markers.
    """
    draw_between(readme, MARKERS, counted_table(rows, ours, peers))


def plot(rows: list[Row], ours: Sequence[str], path: Path) -> None:
    """Bars of flops and times relative to our own with no saving, a panel a case."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    shown = [r for r in rows if r.get("metric") in ("flops", "time")]
    cases = list(dict.fromkeys((r["case"], r["metric"]) for r in shown))
    lines = -(-len(cases) // 2)
    figure, axes = plt.subplots(lines, 2, figsize=(14, 2.6 * lines), squeeze=False, layout="constrained")
    for axis, (case, metric) in zip(axes.flat, cases, strict=False):
        found = {r["impl"]: r["median"] for r in shown if (r["case"], r["metric"]) == (case, metric)}
        names = list(found)[::-1]
        shares = [found[name] / found[ours[0]] for name in names]
        bars = axis.barh(names, shares, color=["tab:orange" if n in ours else "tab:blue" for n in names])
        axis.bar_label(bars, [f" {x:.2f}" for x in shares], fontsize=8)
        axis.set_title(f"{metric} ({'counted' if metric == 'flops' else 'measured'}): {case}", fontsize=8)
        axis.tick_params(labelsize=8)
        axis.margins(x=0.12)
    for axis in axes.flat[len(cases) :]:
        axis.remove()
    figure.suptitle("One update, relative to our own with no saving")
    figure.savefig(path, dpi=90)
    plt.close(figure)
