"""The packer against other projects': processor time, bins, caps broken and the ranks' balance, in one run.

    python bench/packing.py                  # most of its half hour is spent in Karmarkar-Karp
    python bench/packing.py --counts 1000    # only so many lengths
    python bench/packing.py --report --output bench/results/packing    # the table and the picture of a record, no run

Every ratio is of calls that took turns in the same rounds. Who the peers are stands in `peers.packers`.
"""

from __future__ import annotations

import importlib.metadata
import itertools
import os
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np

import record
from gapg_packing.pack import Cost, pack
from peers.packers import OURS, PEERS, Lengths, Peer
from record import Row

SEED, CAP, RANKS = 0, 16_384, 8
COUNTS = (1_000, 10_000, 100_000)
COST = Cost(linear=24_576, quadratic=1)
"""verl's workload model for a transformer of 7B (verl.utils.seqlen_balancing.calculate_workload, 0.9.1)"""

TIERS = ((0.02, 41), (2.0, 7))
"""Calls of up to so many seconds are timed in so many rounds; longer ones once, ours right after."""
SAMPLE = 0.005
"""seconds: shorter calls are repeated until a sample takes about this"""

TIME, RATIO, OVER, BROKEN = "time", "time / gapg's", "bins over the lower bound", "bins over the cap"
BALANCE = "max/mean"


def lognormal(random: np.random.Generator, n: int) -> Lengths:
    """Median 900, sigma 0.9, clipped to 16..8192."""
    return np.clip(random.lognormal(np.log(900), 0.9, n), 16, 8192).astype(np.int64)


def uniform(random: np.random.Generator, n: int) -> Lengths:
    """16..8192."""
    return random.integers(16, 8193, n)


def bimodal(random: np.random.Generator, n: int) -> Lengths:
    """Four in five of 100..600, the others of 4000..8192: short answers among long reasoning."""
    return np.where(random.random(n) < 0.8, random.integers(100, 601, n), random.integers(4000, 8193, n))


DISTRIBUTIONS = (lognormal, uniform, bimodal)


def measured(case: str, lengths: Lengths) -> list[Row]:
    """One case: what each packing is worth, and the times in tiers of like speed, ours in each of them."""
    print(case, file=sys.stderr, flush=True)
    ours = OURS.prepare(lengths, CAP)
    groups, prompts = np.arange(len(lengths)) // 8, np.full(len(lengths), int(lengths.min()))
    tiers: list[dict[str, Callable[[], Any]]] = [{} for _ in TIERS]
    tiers[0] = {
        OURS.name: ours,
        f"gapg, {RANKS} ranks": lambda: pack(lengths, CAP, ranks=RANKS, cost=COST),
        "gapg, groups of 8": lambda: pack(lengths, CAP, groups=groups, prompt_lengths=prompts),
    }
    rows = worth(case, OURS, OURS.bins(ours(), lengths), lengths)
    for peer in PEERS:
        if len(lengths) > peer.most:
            rows.append(record.error_row(case, peer.name, "not run: a call takes minutes"))
            continue
        try:
            run = peer.prepare(lengths, CAP)
            result, seconds = timed(run)
        except Exception as error:  # a peer may raise anything: its reason is the result
            rows.append(record.error_row(case, peer.name, error))
            continue
        rows += worth(case, peer, peer.bins(result, lengths), lengths)
        at = next((i for i, (most, _) in enumerate(TIERS) if seconds <= most), None)
        if at is None:
            rows += times(case, {peer.name: [seconds], OURS.name: [timed(ours)[1]]})
        else:
            tiers[at][peer.name] = run
    for tier, (_, rounds) in zip(tiers, TIERS, strict=True):
        impls = tier | {OURS.name: ours}
        calls = {name: max(1, int(SAMPLE / max(timed(run)[1], 1e-6))) for name, run in impls.items()}
        turns = {name: partial(repeat, run, calls[name]) for name, run in impls.items()}
        samples = record.interleaved(turns, rounds=rounds, clock="cpu")
        per_call = {name: [sample / calls[name] for sample in samples[name]] for name in impls}
        rows += times(case, per_call, with_ours=tier is tiers[0])
    return rows


def times(case: str, seconds: dict[str, list[float]], with_ours: bool = False) -> list[Row]:
    """Rows of times, and of their ratios to ours round by round."""
    mine = seconds[OURS.name]
    others = {name: theirs for name, theirs in seconds.items() if name != OURS.name}
    ratios = {name: [a / b for a, b in zip(theirs, mine, strict=True)] for name, theirs in others.items()}
    timings = record.timing_rows(case, seconds if with_ours else others)
    packages = {peer.name: peer.package for peer in PEERS}
    for row in timings:
        package = packages.get(row["impl"])
        row["version"] = package and f"{package} {importlib.metadata.version(package)}"
    return timings + record.timing_rows(case, ratios, RATIO, "x")


def timed(run: Callable[[], Any]) -> tuple[Any, float]:
    start = time.process_time()
    result = run()
    return result, time.process_time() - start


def repeat(run: Callable[[], Any], times: int) -> None:
    for _ in range(times):
        run()


def worth(case: str, peer: Peer, bins: list[Lengths], lengths: Lengths) -> list[Row]:
    """Bins over the lower bound, bins over the cap, and the dearest of 8 ranks over their mean.

    Ours is balanced by itself; the others' bins are dealt dearest first, each to the cheapest rank.
    """
    loads = [int(members.sum()) for members in bins]
    if sum(loads) != int(lengths.sum()) or sum(map(len, bins)) != len(lengths):
        raise AssertionError(f"{peer.name} lost or invented a sequence")
    totals = np.zeros(RANKS)
    if peer is OURS:
        for b, members in enumerate(pack(lengths, CAP, ranks=RANKS, cost=COST).bins):
            totals[b % RANKS] += COST(lengths[members]).sum()
    else:
        for cost in sorted((float(COST(members).sum()) for members in bins), reverse=True):
            totals[totals.argmin()] += cost
    lower_bound = -(-int(lengths.sum()) // CAP)
    values = (
        (OVER, "bins", len(bins) - lower_bound),
        (BROKEN, "bins", sum(load > CAP for load in loads)),
        (BALANCE, "x", float(totals.max() / totals.mean())),
    )
    return [row for metric, unit, v in values for row in record.timing_rows(case, {peer.name: [v]}, metric, unit)]


Cells = dict[tuple[str, str, str], float]


def table(rows: list[Row]) -> str:
    """Markdown: a table for each distribution, then what could not run."""
    found, blocks = record.medians(rows), []
    columns = ((time_text, "ms (x gapg's)"), (bins_text, OVER), (balance_text, f"{BALANCE} of {RANKS} ranks"))
    for name, cases in itertools.groupby(record.by_case(rows), lambda case: case.split(",")[0]):
        shown = list(itertools.product(columns, list(cases)))
        head = ["", *(f"{title}, n = {case.split('n=')[1]}" for (_, title), case in shown)]
        impls = dict.fromkeys(row["impl"] for row in rows)
        lines = [[impl, *(text(found, case, impl) for (text, _), case in shown)] for impl in impls]
        blocks.append(f"**{name}**\n\n{record.markdown(head, lines)}")
    errors = {row["impl"]: row["error"] for row in rows if "error" in row and not row["error"].startswith("not run")}
    return "\n\n".join([*blocks, *(f"{impl} could not run: {error}" for impl, error in errors.items())])


def time_text(found: Cells, case: str, impl: str) -> str:
    seconds, ratio = found.get((case, impl, TIME)), found.get((case, impl, RATIO))
    return "–" if seconds is None else short(seconds * 1e3) + ("" if ratio is None else f" ({short(ratio)}x)")


def short(value: float) -> str:
    """Three digits that count."""
    return f"{value:.3g}" if value < 100 else f"{value:,.0f}"


def bins_text(found: Cells, case: str, impl: str) -> str:
    if (case, impl, OVER) not in found:
        return "–"
    broken = found[case, impl, BROKEN]
    return f"{found[case, impl, OVER]:.0f}" + (f", {broken:.0f} over the cap" if broken else "")


def balance_text(found: Cells, case: str, impl: str) -> str:
    return f"{found[case, impl, BALANCE]:.4f}" if (case, impl, BALANCE) in found else "–"


def plot(rows: list[Row], path: Path, title: str) -> None:
    """Lognormal lengths: time over their number; bins over the lower bound and balance where most peers ran."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    found = record.medians(rows)
    counts = sorted(int(case.split("n=")[1]) for case in record.by_case(rows) if case.startswith("lognormal,"))
    names = [peer.name for peer in (OURS, *PEERS)]
    colors = {name: "black" if name == OURS.name else f"C{i}" for i, name in enumerate(names)}
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(15, 4.6), layout="constrained")
    for name in names:
        points = {n: found[key] * 1e3 for n in counts if (key := (f"lognormal, n={n}", name, TIME)) in found}
        width = 2.5 if name == OURS.name else 1.2
        left.loglog(points.keys(), points.values(), "o-", color=colors[name], label=name, linewidth=width, markersize=4)
    left.set(xlabel="sequences", ylabel="processor time, ms", title="Time of one packing")
    left.set_xticks(counts, [f"{n:,}" for n in counts])
    left.minorticks_off()
    figure.legend(loc="outside lower center", ncols=len(names), fontsize=8)
    most = counts[min(1, len(counts) - 1)]
    middle.set(title=f"Bins over the lower bound, n = {most:,}", xlabel="bins")
    right.set(title=f"Dearest of {RANKS} ranks over their mean, n = {counts[0]:,}", xlabel="max/mean - 1")
    for axis, n, metric, text, least, margin in (
        (middle, most, OVER, bins_text, 0.0, 0.5),
        (right, counts[0], BALANCE, balance_text, 1.0, 0.2),
    ):
        case = f"lognormal, n={n}"
        shown = [name for name in names if (case, name, metric) in found][::-1]
        widths = [found[case, name, metric] - least for name in shown]
        bars = axis.barh(shown, widths, color=[colors[name] for name in shown])
        axis.bar_label(bars, [text(found, case, name) for name in shown], padding=3, fontsize=8)
        axis.margins(x=margin)
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = record.parser(__doc__, "packing")
    parser.add_argument("--counts", type=record.positive, nargs="+", default=COUNTS, help="how many lengths")
    parser.add_argument("--report", action="store_true", help="only draw the record that is there")
    given = parser.parse_args()
    path = given.output / "packing.json"
    if not given.report:
        rows: list[Row] = []
        for distribution, n in itertools.product(DISTRIBUTIONS, given.counts):
            lengths = distribution(np.random.default_rng(SEED), n)
            rows += measured(f"{distribution.__name__}, n={n}", lengths)
        record.write("packing", rows, path)
    with record.refusing(parser):
        found = record.read(path)
    print(table(found["rows"]))
    title = f"Lognormal lengths, {found['machine']['cpu']}, one thread, cap {CAP:,}, seed {SEED}"
    plot(found["rows"], path.with_suffix(".png"), title)


if __name__ == "__main__":
    main()
