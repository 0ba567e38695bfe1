"""What one sees of a record of `bench/heads.py`: tables for the terminal and the docs, and a picture."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pictures
from peers.losses import ENTROPY
from record import Row, by_case, markdown, medians

FLOOR = "bare GEMMs"
NOT_OURS = ("gapg control", "gapg fused_policy_loss, patched")
MARKERS = ("<!-- errors:begin -->", "<!-- errors:end -->")
ERRORS = {"dH_error": "dH", "dW_error": "dW", "logprob_error": "logprob", "e_error": "E"}
"""Metrics of errors, and their headings."""


def by_metric(rows: list[Row]) -> dict[str, dict[str, Row]]:
    """{implementation: {metric: row}} of one case; an implementation that failed has the metric "error"."""
    found: dict[str, dict[str, Row]] = defaultdict(dict)
    for row in rows:
        found[row["impl"]]["error" if "error" in row else row["metric"]] = row
    return found


def table(case: str, rows: list[Row]) -> str:
    """One case of `bench/heads.py` or `bench/tiles.py`: an implementation a line, the fastest first, the failed last.

    "of floor" is the floor's time over this one; "of ours" this one over the fastest of ours.
    """
    found = by_metric(rows)
    ours = fastest(times_of(rows, case)[0], ours=True)
    errors = [metric for metric in ERRORS if any(metric in row for row in found.values())]
    columns = ("ms", "p20", "p80", "TFLOP/s", "of floor", "of ours", "peak MiB", *(ERRORS[metric] for metric in errors))
    lines = ["", case, f"{'':36}" + "".join(f"{name:>10}" for name in columns)]
    for impl in sorted(found, key=lambda impl: found[impl].get("time", {}).get("median", float("inf"))):
        row = found[impl]
        if "time" not in row:
            lines.append(f"{impl:36}  {row['error']['error'][:90]}" if "error" in row else impl)
            continue
        time, peak = row["time"], row.get("peak_memory")
        cells = [f"{time[key] * 1e3:.2f}" for key in ("median", "p20", "p80")]
        cells += [f"{time[key]:.2f}" if key in time else "" for key in ("tflops", "floor_share")]
        cells.append(f"{time['median'] / found[ours]['time']['median']:.2f}" if ours else "")
        cells.append(f"{peak['median'] / 2**20:.1f}" if peak else "")
        cells += [f"{row[metric]['median']:.1e}" if metric in row else "" for metric in errors]
        note = "  sums a cross entropy" if time.get("computes") == ENTROPY else ""
        lines.append(f"{impl:36}{''.join(f'{cell:>10}' for cell in cells)}{note}".rstrip())
    return "\n".join(lines)


def summary(rows: list[Row]) -> str:
    """Two lines a case: ours beside the floor, and the fastest other that has the policy's loss; then the fastest of
    the losses that only sum a cross entropy, which are not the policy's."""
    lines = ["", f"{'':48}{'floor ms':>10}{'ours':>10}{'of floor':>10}{'other':>10}{'other/ours':>11}"]
    for case in by_case(rows, "time"):
        times, sums = times_of(rows, case)
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
    for row in by_case(rows, "time").get(case, []):
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


def error_table(rows: list[Row]) -> str:
    """Markdown: implementations by entropies; in a cell the relative error of dH and the worst error of a log-prob."""
    found, cases = medians(rows), list(by_case(rows))
    failed = {row["impl"] for row in rows if "error" in row}
    lines = {row["impl"]: [row["impl"]] for row in rows if row["impl"] not in failed}
    for impl, cells in lines.items():
        for case in cases:
            keys = [(case, impl, "dH_error"), (case, impl, "logprob_error")]
            shown = [f"{found[key]:{form}}" for key, form in zip(keys, (".1e", ".0e"), strict=True) if key in found]
            cells.append(", ".join(shown) or "–")
    head = ["entropy, nats", *(case.removesuffix(" nats") for case in cases)]
    return markdown(head, lines.values()).replace("e-0", "e-").replace("e+0", "e+")


def panels(rows: list[Row], prefix: str = "") -> list[Callable[[Any], None]]:
    """Times as multiples of the bare products, a panel a case, beside each its peak memory over the inputs."""
    found: list[Callable[[Any], None]] = []
    for case, part in by_case(rows).items():
        metrics = by_metric(part)
        times = {impl: row["time"] for impl, row in metrics.items() if "time" in row}
        notes = {impl: f", {time['median'] * 1e3:.1f} ms" for impl, time in times.items()}
        for impl, time in times.items():
            if "peak_memory" in metrics[impl]:
                notes[impl] += f", {metrics[impl]['peak_memory']['median'] / 2**20:,.0f} MiB"
            notes[impl] += ", sums a cross entropy" * (time.get("computes") == ENTROPY)
        if FLOOR in times:
            found.append(partial(pictures.bars, rows=times, title=prefix + case, base=FLOOR, notes=notes))
    return found


def plot(found: dict[str, Any], path: Path) -> None:
    """The picture of a record; none where nothing was timed."""
    machine = found["machine"]
    clock = "device time" if machine["device"] != "cpu" else "processor time"
    title = f"{machine['device']}, {machine['cpu']}: {clock} over that of the bare products, and peak memory"
    pictures.grid(panels(found["rows"]), path, title)
