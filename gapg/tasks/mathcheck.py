"""Checks answers with math-verify in processes of their own, under limits on time, memory and length."""

from __future__ import annotations

import atexit
import contextlib
import json
import math
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import LifoQueue

from gapg.tasks.base import Verdict
from gapg.threads import cores

_WORKER = Path(__file__).with_name("_mathworker.py")
_START_SECONDS = 120.0
_FIRST_SECONDS = 0.2
_KEPT_ENVIRONMENT = ("PATH", "PYTHONPATH", "PYTHONHOME", "LD_LIBRARY_PATH", "VIRTUAL_ENV", "LANG")
_VERDICTS = {"correct": Verdict.CORRECT, "wrong": Verdict.WRONG}


class MathChecker:
    """A few worker processes, each started when it is first needed and again whenever it died. Thread-safe.

    Every answer first has 0.2 s of CPU time: of 2,800 golds and solutions of GSM8K and MATH-500, 99% took less than
    0.03 s and the slowest 0.15 s. Of those that need more, the first `slow_answers` of a step are asked again and have
    `seconds`; what is still not done is LIMIT. So a step's checks take at most slow_answers * seconds of CPU time
    beyond 0.2 s an answer, and a verdict depends on CPU times and on the order of the answers, never on the clock, on
    the number of workers or on which of them is faster.

    seconds: CPU time for one answer. The kernel ends the process at it, in C code too.
    max_chars: longer answers are LIMIT, unread.
    memory_bytes: a worker's address space; an answer that wants more is LIMIT.
    slow_answers: how many answers may take more than the first 0.2 s, from one `start_step` to the next.
    workers: None: one for each core this process may use, at most 4.
    A worker that is killed is replaced and asked once more: only an answer on which two are killed is LIMIT. So it is
    with one that hangs without using its CPU time, for ten times `seconds` on the clock: it is killed then.
    Raises ValueError on limits that are none.
    """

    def __init__(
        self,
        seconds: float = 2.0,
        max_chars: int = 20_000,
        memory_bytes: int = 2 << 30,
        slow_answers: int = 15,
        workers: int | None = None,
    ) -> None:
        if not isinstance(seconds, int | float) or not 0 < seconds < math.inf:
            raise ValueError(f"task.args.seconds: must be a number above 0, not {seconds!r}")
        if type(max_chars) is not int or max_chars < 1:
            raise ValueError(f"task.args.max_chars: must be a whole number, 1 or more, not {max_chars!r}")
        self.seconds, self.max_chars, self.slow_answers = seconds, max_chars, slow_answers
        count = workers or min(4, cores())
        self._workers = [_Worker(memory_bytes, patience=10 * seconds) for _ in range(count)]
        self._idle: LifoQueue[_Worker] = LifoQueue()  # the one that was used last has read the gold
        for worker in self._workers:
            self._idle.put(worker)
        self._threads = ThreadPoolExecutor(count, "mathcheck")
        self._lock = threading.Lock()
        self._left = slow_answers
        atexit.register(self.close)

    def start_step(self) -> None:
        """Begins the budget of slow answers anew."""
        with self._lock:
            self._left = self.slow_answers

    def check(self, gold: str, answers: Sequence[str]) -> list[Verdict]:
        """A verdict per answer. Equal answers are checked once. Raises RuntimeError if no worker can be started."""
        read = [answer for answer in dict.fromkeys(answers) if len(answer) <= self.max_chars]
        with self._lock:
            words = self._ask(gold, read, min(_FIRST_SECONDS, self.seconds))
            slow = [answer for answer in read if words[answer] == "timeout"][: self._left]
            self._left -= len(slow)  # whatever they take: what an answer costs must not depend on how busy the CPU is
            words |= self._ask(gold, slow, self.seconds)
        return [_VERDICTS.get(words.get(answer, "limit"), Verdict.LIMIT) for answer in answers]

    @property
    def pids(self) -> list[int]:
        """The process groups of the workers that have been started."""
        return [worker.process.pid for worker in self._workers if worker.process is not None]

    def close(self) -> None:
        """Ends the workers; a later check starts others. Calling it twice is harmless."""
        with self._lock:
            for worker in [self._idle.get() for _ in self._workers]:  # after an interrupt, one may still be at work
                worker.close()
                self._idle.put(worker)

    def _ask(self, gold: str, answers: list[str], seconds: float) -> dict[str, str]:
        """Each answer's word. `seconds` of CPU time for each of them."""

        def ask(answer: str) -> str:
            request: dict[str, str | float] = {"gold": gold, "answer": answer, "seconds": seconds}
            worker = self._idle.get()
            try:
                return worker.ask(request) or worker.ask(request) or "limit"
            finally:
                self._idle.put(worker)

        alone = min(len(answers), len(self._workers)) < 2
        words = map(ask, answers) if alone else self._threads.map(ask, answers)
        return dict(zip(answers, words, strict=True))


class _Worker:
    """A process that answers one request at a time. `patience`: how long a reply may take, in seconds on the clock."""

    def __init__(self, memory_bytes: int, patience: float) -> None:
        self.memory_bytes, self.patience = memory_bytes, patience
        self.process: subprocess.Popen[bytes] | None = None

    def ask(self, request: dict[str, str | float]) -> str:
        """The process's word: `correct`, `wrong`, `limit`, `timeout`; empty when it died, or hung and was killed."""
        word = ""
        try:
            if self.process is None:
                self._start()
            self._socket.sendall(json.dumps(request).encode() + b"\n")
            word = self._replies.readline().strip()
        except OSError:  # a timeout is one, too
            pass
        finally:
            if not word:  # also on an interrupt: the late reply must not be taken for the next answer's
                self.close()
        return word

    def close(self) -> None:
        process, self.process = self.process, None
        if process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        self._replies.close()
        self._socket.close()

    def _start(self) -> None:
        # By path and with -P: importing the package would load torch, and the worker must not see this folder as a
        # place to import from. A bare environment holds no keys.
        command = [sys.executable, "-P", str(_WORKER), str(self.memory_bytes)]
        env = {k: v for k, v in os.environ.items() if k in _KEPT_ENVIRONMENT} | {"OMP_NUM_THREADS": "1"}
        self._socket, theirs = socket.socketpair()
        self._replies = self._socket.makefile()
        self._socket.settimeout(_START_SECONDS)
        ready = ""
        with contextlib.suppress(OSError):
            with theirs:
                self.process = subprocess.Popen(
                    command,
                    stdin=theirs.fileno(),
                    stdout=theirs.fileno(),
                    stderr=subprocess.DEVNULL,
                    env=env,
                    process_group=0,
                )
            ready = self._replies.readline()
        if ready != "ready\n":
            raise RuntimeError(f"the maths checker does not start; see what this says: {' '.join(command)}")
        self._socket.settimeout(self.patience)
