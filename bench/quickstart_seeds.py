"""The quickstart on several seeds: one summary a seed, their spread as a table (also in README.md) and a picture.

python bench/quickstart_seeds.py --seeds 20 21 22 23 24      # about five minutes a seed on two cores
python bench/quickstart_seeds.py                             # redraws from bench/results/quickstart/
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import platform
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("agg")
from matplotlib import pyplot as plt

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results" / "quickstart"
MARKERS = ("<!-- quickstart table: drawn by bench/quickstart_seeds.py -->", "<!-- end of quickstart table -->")
PACKAGES = ("torch", "transformers", "numpy")


def run_seed(seed: int) -> None:
    """One whole quickstart, as its user runs it; goes on where a killed one stopped."""
    folder = ROOT / "runs" / f"quickstart-seed-{seed}"
    command = [sys.executable, "-m", "gapg", "train", "quickstart", "--seed", str(seed), "--output-dir", str(folder)]
    resumed = (folder / "config.yaml").exists()
    start = time.perf_counter()
    subprocess.run(command + ["--resume"] * resumed, check=True, cwd=ROOT)
    summary = json.loads((folder / "summary.json").read_text())
    summary["command"] = f"gapg train quickstart --seed {seed}"
    # a resumed run's time is not the time of a run
    summary["wall_seconds"] = None if resumed else round(time.perf_counter() - start, 1)
    summary["revision"] = subprocess.check_output(["git", "rev-parse", "HEAD"], cwd=ROOT, text=True).strip()
    summary["machine"] = {"cpu": _cpu(), "python": platform.python_version()}
    summary["versions"] = {name: importlib.metadata.version(name) for name in PACKAGES}
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / f"seed-{seed}.json").write_text(json.dumps(summary, indent=1) + "\n")


def _cpu() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{len(names)} cores, {names[0]}" if names else platform.processor()


def table(summaries: list[dict[str, Any]]) -> str:
    """Markdown: mean over seeds and, in brackets, the lowest and highest seed."""
    seeds = ", ".join(str(s["seed"]) for s in summaries)
    lines = ["| | together | local | called |", "|---|---|---|---|"]
    for i, row in enumerate(summaries[0]["rows"]):
        cells = []
        for key in ("accuracy", "local_accuracy", "call_fraction"):
            values = [s["rows"][i][key] for s in summaries]
            cells.append(f"{statistics.mean(values):.3f} ({min(values):.3f} to {max(values):.3f})")
        lines.append(f"| {row['name']} | {' | '.join(cells)} |")
    n = summaries[0]["rows"][0]["n"]
    times = sorted(s["wall_seconds"] for s in summaries if s["wall_seconds"])
    took = f" The quickest run took {times[0] / 60:.1f} minutes on {summaries[0]['machine']['cpu']}." if times else ""
    worst = {t["b"]: max(u["p"] for s in summaries for u in s["paired_tests"] if u["b"] == t["b"])
             for t in summaries[0]["paired_tests"] if "router" in t["b"]}  # fmt: skip
    tests = "; ".join(f'against "{name.removeprefix("+ ")}" at most {p:.1g}' for name, p in worst.items())
    return (
        "\n".join(lines)
        + f"\n\nMean over seeds {seeds} (lowest to highest seed), {n} held-out problems each, cloud budget "
        + f"{summaries[0]['cloud_fraction']:.0%}.{took}\n"
        + f"Exact McNemar test on the same problems, p over the seeds: {tests}.\n"
    )


def plot(summaries: list[dict[str, Any]], path: Path) -> None:
    """Every seed of every method: accuracy together against call fraction."""
    figure, axis = plt.subplots(figsize=(8.5, 5.5), layout="constrained")
    colours = plt.get_cmap("tab10").colors  # type: ignore[attr-defined]
    for i, row in enumerate(summaries[0]["rows"]):
        if row["name"] == "cloud only":
            continue
        x, y = ([s["rows"][i][key] for s in summaries] for key in ("call_fraction", "accuracy"))
        axis.scatter(x, y, s=26, color=colours[i % 10], marker="*" if "GAPG" in row["name"] else "o", label=row["name"])
    axis.axvline(summaries[0]["cloud_fraction"], color="black", linewidth=0.8, linestyle="--")
    title = f"quickstart, {len(summaries)} seeds, held-out problems"
    axis.set(xlabel="call fraction", ylabel="accuracy together", title=title)
    axis.legend(fontsize=8, loc="center left", bbox_to_anchor=(0.05, 0.75))
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="*", default=[], help="seeds to run; none: only redraw")
    for seed in parser.parse_args().seeds:
        run_seed(seed)
    files = sorted(RESULTS.glob("seed-*.json"))
    if not files:
        sys.exit("nothing measured yet: give --seeds 20 21 22 23 24")
    summaries = [json.loads(file.read_text()) for file in files]
    plot(summaries, RESULTS / "quickstart.png")
    text = table(summaries)
    print(text)
    readme = ROOT / "README.md"
    begin, end = map(re.escape, MARKERS)
    block = f"{MARKERS[0]}\n{text}{MARKERS[1]}"
    readme.write_text(re.sub(f"{begin}.*?{end}", lambda _: block, readme.read_text(), flags=re.DOTALL))


if __name__ == "__main__":
    main()
