"""Work in other processes: each piece in one of its own, its messages in a log of its own."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor, wait
from multiprocessing import resource_tracker
from pathlib import Path

from gapg.console import say, warn

Work = tuple[Path, Callable[[], object]]
"""(its log, what to do: a function of a module, or a partial of one)."""


EVERY_S = 30.0


class WorkFailed(RuntimeError):
    """What went wrong, in one line."""


class Process:
    """Does the work in a process that Ctrl-C does not reach, and that ends with this one."""

    def __init__(self, work: Work) -> None:
        self.log = work[0]
        self.log.parent.mkdir(parents=True, exist_ok=True)
        self.process = multiprocessing.get_context("spawn").Process(target=_work, args=work, daemon=True)
        resource_tracker.ensure_running()  # here, because starting it would let the signal through
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            self.process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})

    def check(self) -> None:
        """Raises WorkFailed where it has ended otherwise than well."""
        if self.process.exitcode:
            died = f"its process died (exit code {self.process.exitcode})"
            raise WorkFailed((self.process.exitcode == 1 and self.said()) or died)

    def said(self) -> str:
        """The last line of its log."""
        lines = self.log.read_bytes()[-2000:].decode(errors="replace").split("\n") if self.log.exists() else []
        return next((line.strip() for line in reversed(lines) if line.strip()), "")


def do_all(jobs: Mapping[str, Work], workers: int, title: str, total: int) -> dict[str, str]:
    """Does all jobs in their order, up to `workers` at a time; returns what went wrong, one line a failed job's title.

    A failure is said at once, and the others go on. Every half minute, and whenever one has ended, a line says how
    many of `total` are there (what is missing of it was done before), and what is done now.
    """
    failed, running, ending, due = dict[str, str](), dict[str, Process](), threading.Event(), 0.0

    def do(name: str) -> None:
        running[name] = here = Process(jobs[name])
        if ending.is_set():
            here.process.kill()
        here.process.join()
        del running[name]
        here.check()

    # threads of processes, not a ProcessPoolExecutor: a worker that is killed would break that for all others
    with ThreadPoolExecutor(workers) as threads:
        try:
            waiting = {threads.submit(do, name): name for name in jobs}
            while True:
                if time.monotonic() >= due:
                    due = time.monotonic() + EVERY_S
                    now = "  |  ".join(f"{name}: {p.said()[:80]}" for name, p in list(running.items()))
                    say(f"{title} {total - len(waiting)}/{total}  {now}")
                if not waiting:
                    break
                for future in wait(waiting, 1.0, "FIRST_COMPLETED").done:
                    name, due = waiting.pop(future), 0.0
                    if error := future.exception():
                        failed[name] = str(error)
                        warn(f"{name}: {error} (log: {jobs[name][0]})")
        finally:
            ending.set()
            threads.shutdown(wait=False, cancel_futures=True)
            for here in list(running.values()):
                here.process.kill()
    return failed


def _work(log: Path, do: Callable[[], object]) -> None:
    """The life of a process: its log ends with what went wrong, in one line."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def end_with_parent() -> None:
        # a killed parent must not leave a child behind that writes into the folder of the run that resumes it
        parent.join()
        os._exit(2)

    threading.Thread(target=end_with_parent, daemon=True).start()
    with log.open("a") as file:
        for descriptor in (1, 2):
            os.dup2(file.fileno(), descriptor)
    try:
        do()
    except Exception as error:
        traceback.print_exc()
        print(" ".join(f"{type(error).__name__}: {error}".split()), file=sys.stderr)
        raise SystemExit(1) from None
