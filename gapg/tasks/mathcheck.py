"""Checks answers with math-verify in a process of its own, under limits on time, memory and length."""

from __future__ import annotations

import atexit
import json
import os
import select
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from gapg.tasks.base import Verdict

_WORKER = Path(__file__).with_name("_mathworker.py")
_START_SECONDS = 120.0
_KEPT_ENVIRONMENT = ("PATH", "PYTHONPATH", "PYTHONHOME", "LD_LIBRARY_PATH", "VIRTUAL_ENV", "LANG")


class MathChecker:
    """One worker process, started at the first check and again whenever it died or had to be killed. Thread-safe.

    seconds: CPU time for one answer; what takes more is LIMIT. The worker interrupts itself at this; where it cannot,
    the kernel ends it at about twice that, and this side after five times that on the clock.
    max_chars: longer answers are LIMIT, unread.
    memory_bytes: the worker's address space.
    A worker that dies is replaced and asked once more: only an answer that kills two workers is LIMIT.
    """

    def __init__(self, seconds: float = 2.0, max_chars: int = 20_000, memory_bytes: int = 2 << 30) -> None:
        self.seconds, self.max_chars, self.memory_bytes = seconds, max_chars, memory_bytes
        self._lock = threading.Lock()
        self._worker: subprocess.Popen[bytes] | None = None
        self._pending = b""
        atexit.register(self.close)

    def check(self, gold: str, answers: Sequence[str]) -> list[Verdict]:
        """A verdict per answer. Equal answers are checked once. Raises RuntimeError if no worker can be started."""
        with self._lock:
            verdicts = {answer: self._check(gold, answer) for answer in dict.fromkeys(answers)}
        return [verdicts[answer] for answer in answers]

    @property
    def pid(self) -> int | None:
        """The worker's process id; None while there is none."""
        return self._worker.pid if self._worker is not None else None

    def close(self) -> None:
        """Ends the worker; a later check starts another. Calling it twice is harmless."""
        worker, self._worker, self._pending = self._worker, None, b""
        if worker is None:
            return
        worker.kill()
        worker.wait()
        for pipe in (worker.stdin, worker.stdout):
            if pipe is not None:
                pipe.close()

    def _check(self, gold: str, answer: str) -> Verdict:
        if len(answer) > self.max_chars:
            return Verdict.LIMIT
        for _ in range(2):
            word = self._ask(gold, answer)
            if word is not None:
                return Verdict(word)
        return Verdict.LIMIT

    def _ask(self, gold: str, answer: str) -> str | None:
        """The worker's word; `limit` if it hung and was killed, None if it died."""
        worker = self._worker or self._start()
        assert worker.stdin is not None
        try:
            worker.stdin.write(json.dumps({"gold": gold, "answer": answer}).encode() + b"\n")
        except OSError:
            self.close()
            return None
        word = self._read_line(5 * self.seconds)
        if word not in ("correct", "wrong", "limit"):
            self.close()
        return "limit" if word == "" else word

    def _start(self) -> subprocess.Popen[bytes]:
        # By path and with -P: importing the package would load torch, and the worker must not see this folder as a
        # place to import from. A bare environment holds no keys.
        command = [sys.executable, "-P", str(_WORKER), str(self.seconds), str(self.memory_bytes)]
        env = {k: v for k, v in os.environ.items() if k in _KEPT_ENVIRONMENT} | {"OMP_NUM_THREADS": "1"}
        self._worker = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, bufsize=0, env=env
        )
        if self._read_line(_START_SECONDS) != "ready":
            self.close()
            raise RuntimeError(f"the maths checker does not start; see what this says: {' '.join(command)}")
        return self._worker

    def _read_line(self, seconds: float) -> str | None:
        """A line of the worker's; empty when none came in time, None when it died."""
        assert self._worker is not None and self._worker.stdout is not None
        pipe, end = self._worker.stdout.fileno(), time.monotonic() + seconds
        while b"\n" not in self._pending:
            if not select.select([pipe], [], [], max(0.0, end - time.monotonic()))[0]:
                return ""
            if not (read := os.read(pipe, 4096)):
                return None
            self._pending += read
        line, _, self._pending = self._pending.partition(b"\n")
        return line.decode()
