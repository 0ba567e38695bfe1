"""Jobs on a few worker processes: each in one at a time, after what it needs, its messages in a log of its own."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import traceback
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from multiprocessing import connection
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Any

from gapg.runs.tracking import Display, warn

POLL_SECONDS = 1.0


@dataclass(frozen=True)
class Job:
    """Something to do in another process."""

    key: str
    title: str
    log: Path
    work: Callable[[], object]
    """Can be pickled: a function of a module, or a partial of one."""
    after: str | None = None
    """Key of the job that must be done first; where that fails, this one does too."""
    counted: bool = True
    """Whether the progress bar counts it."""


@dataclass
class Worker:
    process: SpawnProcess
    pipe: connection.Connection[Any, Any]
    job: Job | None = None


def run_jobs(jobs: Sequence[Job], workers: int, title: str, total: int) -> dict[str, str]:
    """Does all jobs, up to `workers` at a time; returns what went wrong, one line a failed job, by key.

    Jobs start in their order, as soon as what they come after is done. A failure is said at once, and the others go
    on. `total`: what the progress bar counts to; what is missing of it was done before.
    """
    waiting, failed = list(jobs), dict[str, str]()
    pool: list[Worker] = []
    done = total - sum(job.counted for job in jobs)
    with Display(title, total, done, every=60.0) as display:
        try:
            while waiting or any(w.job for w in pool):
                _hand_out(waiting, pool, workers, failed)
                display.advance("  |  ".join(_now(w.job) for w in pool if w.job), by=0)
                ready = connection.wait([w.pipe for w in pool if w.job], POLL_SECONDS)
                for worker in [w for w in pool if w.pipe in ready]:
                    job, error = _collect(worker, pool)
                    if error is not None:
                        failed[job.key] = error
                        warn(f"{job.title}: {error} (log: {job.log})")
                    display.advance(by=int(job.counted))
        finally:
            for worker in pool:
                worker.process.kill()
                worker.process.join()
    return failed


def _hand_out(waiting: list[Job], pool: list[Worker], workers: int, failed: dict[str, str]) -> None:
    """Gives every idle worker, or a new one, the first job that can start; drops those that never can."""
    for job in list(waiting):
        if job.after in failed:
            waiting.remove(job)
            failed[job.key] = f"not tried: {failed[job.after]}"
            continue
        undone = {other.key for other in waiting} | {w.job.key for w in pool if w.job}
        if job.after in undone:
            continue
        idle = next((w for w in pool if w.job is None), None)
        if idle is None and len(pool) < workers:
            pool.append(idle := _start())
        if idle is None:
            return
        waiting.remove(job)
        idle.job = job
        idle.pipe.send(job)


def _start() -> Worker:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_work, args=(theirs,), daemon=True)
    process.start()
    theirs.close()  # so that its death is an end of file here
    return Worker(process, ours)


def _collect(worker: Worker, pool: list[Worker]) -> tuple[Job, str | None]:
    """The worker's job, which has ended, and what went wrong. A worker that died leaves the pool."""
    job = worker.job
    assert job is not None
    worker.job = None
    try:
        return job, worker.pipe.recv()
    except (EOFError, ConnectionResetError):
        worker.process.join()
        pool.remove(worker)
        return job, f"its process died (exit code {worker.process.exitcode})"


def _now(job: Job) -> str:
    """What it says at the moment: the last line of its log."""
    try:
        with job.log.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - 500))
            lines = file.read().decode(errors="replace").split("\n")
    except FileNotFoundError:
        lines = []
    said = next((line.strip() for line in reversed(lines) if line.strip()), "")
    return f"{job.title}: {said[:60]}"


def _work(pipe: connection.Connection[Any, Any]) -> None:
    """The life of a worker: a job, one line of what went wrong or None, and so on."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which ends this process
    threading.Thread(target=end_with_parent, daemon=True).start()
    while True:
        job = pipe.recv()
        job.log.parent.mkdir(parents=True, exist_ok=True)
        error = None
        with job.log.open("a", buffering=1) as log, redirect_stdout(log), redirect_stderr(log):
            try:
                job.work()
            except Exception as failure:
                traceback.print_exc()
                error = " ".join(f"{type(failure).__name__}: {failure}".split())
        pipe.send(error)


def end_with_parent() -> None:
    """A killed parent must not leave a child behind that writes into the folder of the run that resumes it."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
