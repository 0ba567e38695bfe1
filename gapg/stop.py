"""Signals that end a run between two steps: Ctrl-C, and what SLURM and Kubernetes send before they kill."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)

_in_steps = False
_requested: str | None = None


class Stopped(BaseException):
    """A signal ended the run: one line. No Exception, because what handles errors of a part must not handle it."""


@contextmanager
def listening(*, once: bool = True) -> Iterator[None]:
    """Handles the signals until it is left.

    The first ends the run: after the step that it falls into (`between_steps`), which is saved, at once elsewhere. A
    second one ends the process at once, with nothing done; with `once=False`, for a process whose parent decides, it
    does nothing.
    """
    global _requested
    _requested = None

    def handle(signum: int, _: FrameType | None) -> None:
        global _requested
        name = signal.Signals(signum).name
        for each in SIGNALS:
            signal.signal(each, signal.SIG_DFL if once else signal.SIG_IGN)
        if not _in_steps:
            raise Stopped(f"{name}: stopped; what was saved stays")
        _requested = name
        # not through the console, in the middle of whose output the signal may have come
        again = "; a second signal ends it at once" if once else ""
        os.write(2, f"gapg: {name}: this step ends and is saved, then the run{again}\n".encode())

    before = {each: signal.signal(each, handle) for each in SIGNALS}
    try:
        yield
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)
        _requested = None


@contextmanager
def between_steps() -> Iterator[None]:
    """Inside, a signal waits until the step asks for it with `requested`. Raises Stopped for one that nobody saw."""
    global _in_steps
    _in_steps = True
    try:
        yield
    finally:
        _in_steps = False
    if _requested is not None:
        raise Stopped(f"{_requested}: stopped after the last step, which is saved")


def requested() -> str | None:
    """The name of the signal that asked the run to end; None if none did."""
    return _requested
