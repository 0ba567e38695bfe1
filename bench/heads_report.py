"""What one sees of a record of `bench/heads.py`: tables for the terminal and the README, and a picture."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

import matplotlib

from peers.heads import ENTROPY
from record import Row, draw_between

matplotlib.use("agg")
from matplotlib import pyplot as plt

FLOOR = "bare GEMMs"
NOT_OURS = ("gapg control", "gapg fused_policy_loss, patched")
MARKERS = ("<!-- errors:begin -->", "<!-- errors:end -->")


def by_metric(rows: list[Row]) -> dict[str, dict[str, Row]]:
    """{implementation: {metric: row}} of one case; an implementation that failed has the metric "error"."""
    found: dict[str, dict[str, Row]] = defaultdict(dict)
    for row in rows:
        found[row["impl"]]["error" if "error" in row else row["metric"]] = row
    return found


def table(case: str, rows: list[Row]) -> str:
    """One case, one line an implementation, the fastest first and the failed last."""
    columns = ("ms", "p20", "p80", "TFLOP/s", "of floor", "peak MiB", "dH", "dW", "logprob")
    lines = ["", f"{case}", f"{'':36}" + "".join(f"{name:>10}" for name in columns)]
    found = by_metric(rows)
    for impl in sorted(found, key=lambda impl: found[impl].get("time", {}).get("median", float("inf"))):
        row = found[impl]
        if "error" in row:
            lines.append(f"{impl:36}  {row['error']['error'][:90]}")
            continue
        time = row["time"]
        cells = [f"{time[key] * 1e3:10.2f}" for key in ("median", "p20", "p80")]
        cells += [f"{time['tflops']:10.2f}", f"{time['floor_share']:10.2f}"]
        cells.append(f"{row['peak_memory']['median'] / 2**20:10.1f}" if "peak_memory" in row else f"{'':10}")
        for metric in ("dH_error", "dW_error", "logprob_error"):
            cells.append(f"{row[metric]['median']:10.1e}" if metric in row else f"{'':10}")
        note = "  its own loss" if time.get("computes") == ENTROPY else ""
        lines.append(f"{impl:36}{''.join(cells)}{note}")
    return "\n".join(lines)


def summary(record: dict[str, Any]) -> str:
    """Two lines a case: ours beside the floor, and the fastest other that has the policy's loss; then the fastest of
    the losses that only sum a cross entropy, which are not the policy's."""
    lines = ["", f"{'':48}{'floor ms':>10}{'ours':>10}{'of floor':>10}{'other':>10}{'other/ours':>11}"]
    for case in dict.fromkeys(row["case"] for row in record["rows"] if row.get("metric") == "time"):
        times, sums = times_of(record["rows"], case)
        floor = times.pop(FLOOR)
        ours = fastest(times, ours=True)
        if ours is None:
            continue
        seconds = times[ours]
        lines.append(f"{case:48}{floor * 1e3:10.2f}{seconds * 1e3:10.2f}{floor / seconds:10.2f}".rstrip())
        for found, note in ((times, ""), (sums, " (sums a cross entropy: not a policy loss)")):
            other = fastest(found, ours=False)
            if other is not None:
                ratio = f"{found[other] * 1e3:10.2f}{found[other] / seconds:11.2f}"
                lines.append(f"{'':78}{ratio}  {other}{note}")
    return "\n".join(lines)


def times_of(rows: list[Row], case: str) -> tuple[dict[str, float], dict[str, float]]:
    """Median seconds by implementation of one case: of what computes the policy's loss, and of what only sums."""
    found: tuple[dict[str, float], dict[str, float]] = {}, {}
    for row in rows:
        if row["case"] == case and row.get("metric") == "time":
            found[row.get("computes") == ENTROPY][row["impl"]] = row["median"]
    return found


def fastest(times: dict[str, float], *, ours: bool) -> str | None:
    """The fastest of ours or of the others. Of ours neither the control counts nor the patched target, which is no more
    exact than eager at high entropy: no default takes them."""
    names = [n for n in times if n.startswith("gapg") == ours and not n.startswith(NOT_OURS) and n != FLOOR]
    return min(names, key=times.__getitem__, default=None)


def ours_failed(rows: list[Row]) -> str | None:
    """What of ours ran into an error, in one line; not what says of itself that it cannot run here."""
    errors = {row["impl"]: row["error"] for row in rows if "error" in row and row["impl"].startswith(("gapg", FLOOR))}
    found = [f"{impl}: {error}" for impl, error in errors.items() if not error.startswith("Unavailable")]
    return "; ".join(found) or None


def error_table(record: dict[str, Any]) -> str:
    """Markdown: implementations by entropies; in a cell the relative error of dH and the worst error of a log-prob."""
    cases = list(dict.fromkeys(row["case"] for row in record["rows"]))
    found = {case: by_metric([row for row in record["rows"] if row["case"] == case]) for case in cases}
    lines = ["| entropy, nats | " + " | ".join(case.removesuffix(" nats") for case in cases) + " |"]
    lines.append("|---" * (len(cases) + 1) + "|")
    for impl in dict.fromkeys(row["impl"] for row in record["rows"]):
        if any("error" in found[case].get(impl, {}) for case in cases):
            continue
        cells = []
        for case in cases:
            row = found[case].get(impl, {})
            if "dH_error" not in row:
                cells.append("–")
                continue
            logprob = f", {row['logprob_error']['median']:.0e}" if "logprob_error" in row else ""
            cells.append(f"{row['dH_error']['median']:.1e}{logprob}")
        lines.append(f"| {impl} | " + " | ".join(cells) + " |")
    return "\n".join(lines).replace("e-0", "e-").replace("e+0", "e+")


def draw_into(readme: Path, record: dict[str, Any]) -> None:
    """Replace what stands between the markers by the table of errors.

    Raises:
        ValueError: the file lacks the markers.
    """
    draw_between(readme, MARKERS, error_table(record))


def plot(record: dict[str, Any], path: Path) -> None:
    """Median times with 20% and 80% quantiles, a panel a case; the bare products as a line, peak memory.

    Draws nothing where nothing was timed.
    """
    cases = list(dict.fromkeys(row["case"] for row in record["rows"] if row.get("metric") == "time"))
    if not cases:
        return
    lines = -(-len(cases) // 2)
    figure, axes = plt.subplots(lines, 2, figsize=(15, 3.6 * lines), squeeze=False, layout="constrained")
    for axis, case in zip(axes.flat, cases, strict=False):
        found = by_metric([row for row in record["rows"] if row["case"] == case])
        timed = {impl: row for impl, row in found.items() if "time" in row}
        order = sorted(timed, key=lambda impl: -timed[impl]["time"]["median"])
        for y, impl in enumerate(order):
            time = timed[impl]["time"]
            median, low, high = (time[key] * 1e3 for key in ("median", "p20", "p80"))
            colour = "black" if impl == FLOOR else "tab:orange" if impl.startswith("gapg") else "tab:blue"
            axis.barh(y, median, xerr=[[median - low], [high - median]], color=colour, height=0.7)
            peak = timed[impl].get("peak_memory")
            text = f" {median:.1f} ms" + (f", {peak['median'] / 2**20:,.0f} MiB" if peak else "")
            axis.text(max(high, median), y, text, va="center", fontsize=7)
        axis.axvline(timed[FLOOR]["time"]["median"] * 1e3, color="black", linewidth=0.8, linestyle="--")
        axis.set_yticks(range(len(order)), order, fontsize=7)
        axis.set_title(case, fontsize=9)
        axis.margins(x=0.25)
    for axis in axes.flat[len(cases) :]:
        axis.remove()
    machine = record["machine"]
    clock = "device time" if machine["device"] != "cpu" else "processor time"
    figure.suptitle(f"{machine['device']}, {machine['cpu']}: {clock} in ms, and peak memory over the inputs")
    figure.savefig(path, dpi=90)
    plt.close(figure)
