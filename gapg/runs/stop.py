"""Signals that end a run between two steps: Ctrl-C, and what SLURM and Kubernetes send before they kill."""

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
def listening(*, once: bool = True) -> Iterator[None]:
    """Handles the signals until it is left.

    The first ends the run: after the step that it falls into (`between_steps`), which is saved, at once elsewhere. A
    second one ends the process at once, with nothing done; with `once=False`, for a process whose parent decides, it
    does nothing. One that came while signals were held back counts as coming now.
    """
    global _requested
    _requested, ending = None, False

    def handle(signum: int, _: FrameType | None) -> None:
        nonlocal ending
        global _requested
        if ending:
            return
        ending, name = True, signal.Signals(signum).name
        if once:
            time.sleep(ECHO_S)
        for each in SIGNALS:
            signal.signal(each, signal.SIG_DFL if once else signal.SIG_IGN)
        _requested = name
        if not _in_steps:
            look()
        again = "; a second signal ends it at once" if once else ""
        _write(f"gapg: {name}: this step ends and is saved, then the run{again}\n")

    before = {each: signal.signal(each, handle) for each in SIGNALS}
    try:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        yield
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)
        _requested = None


@contextmanager
def held_back() -> Iterator[None]:
    """Signals wait until it is left; a process that is started inside begins so, and waits until it is `listening`."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


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
    """Raises Stopped if a signal came: a library may have lost the one that was raised into its callback."""
    if _requested is not None:
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
