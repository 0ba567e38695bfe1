"""Signals that end a run: Ctrl-C, and what SLURM and Kubernetes send before they kill.

The handler only notes a signal, because an exception raised into whatever runs at that moment, a callback of C++ code
say, may be lost or abort the process. Steps and the parts before and after them look for it.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)

ECHO_S = 0.1
"""Seconds after a signal in which another is no second one: launchers pass on what their children were sent too."""

_in_steps = False
_requested: str | None = None


class Stopped(BaseException):
    """A signal ended the run: one line. No Exception, because what handles errors of a part must not handle it."""


@contextmanager
def listening() -> Iterator[None]:
    """Handles the signals until it is left.

    The first ends the run: in steps (`between_steps`) after the step that it falls into, which is saved; elsewhere at
    the next `look`. A second one ends the process at once, with nothing done.
    """
    global _requested
    _requested = None

    def handle(signum: int, _: FrameType | None) -> None:
        global _requested
        if _requested is not None:
            return
        _requested = signal.Signals(signum).name
        time.sleep(ECHO_S)
        for each in SIGNALS:
            signal.signal(each, signal.SIG_DFL)
        ends = "this step ends and is saved, then the run" if _in_steps else "the run ends after what it does just now"
        _write(f"gapg: {_requested}: {ends}; a second signal ends it at once\n")

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
    look()
    _in_steps = True
    try:
        yield
    finally:
        _in_steps = False
    if _requested is not None:
        raise Stopped(f"{_requested}: stopped after the last step, which is saved")


def look() -> None:
    """Raises Stopped if a signal came, unless in steps."""
    if _requested is not None and not _in_steps:
        raise Stopped(f"{_requested}: stopped; what was saved stays")


def requested() -> str | None:
    """The name of the signal that asked the run to end; None if none did."""
    return _requested


def _write(line: str) -> None:
    """To stderr, but not through the console, in the middle of whose output the signal may have come.

    Where nobody reads stderr any more (Ctrl-C ends the `tee` of a pipe at once), that must not end the step.
    """
    try:
        os.write(2, line.encode())
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
