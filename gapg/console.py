"""What a command says, on stderr: lines, warnings, and a progress display. No text that is said steers the terminal."""

from __future__ import annotations

import logging
import os
import re
import sys
import time

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


class _Console(Console):
    def on_broken_pipe(self) -> None:
        """Nobody reads any more (the `tee` of a pipe has ended): that ends no run."""
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)


console = _Console(stderr=True, highlight=False, soft_wrap=True, emoji=False)
tables = Console(highlight=False, markup=False, emoji=False, width=100)
"""On standard output; what goes into them must be `printable`."""

_STEERING = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f"  # C0 and C1 but newline and tab: escape sequences, carriage returns, bells
    "\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069"  # turn the direction of what follows
    "\u00ad\u180e\u200b\u2028\u2029\u2060-\u2065\u206a-\u206f\ufeff\ufff9-\ufffb\U000e0000-\U000e007f"  # unseen
    "\ud800-\udfff]"  # halves of a character, which no stream can encode
)


def printable(text: str) -> str:
    """The text with whatever steers a terminal or hides in it written out, as `\\x1b` and `\\u202e`.

    For what models, servers, data and file names may hold. Newlines and tabs stay, and so do the joiners that scripts
    and emoji need.
    """
    return _STEERING.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


class Display:
    """A progress bar with the figures that matter; on anything but a terminal, a line every `every` seconds instead."""

    def __init__(self, title: str, total: int, done: int = 0, *, every: float = 20.0, quiet: bool = False) -> None:
        self.title, self.total, self.done, self.every = printable(title), total, done, every
        self._last = 0.0
        self._live = sys.stderr.isatty() and not quiet
        self._quiet = quiet
        self._progress = Progress(
            TextColumn("{task.description}", style="bold", markup=False),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[figures]}", markup=False),
            console=console,
            disable=not self._live,
        )
        self._task = self._progress.add_task(self.title, total=total, completed=done, figures="")

    def __enter__(self) -> Display:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def advance(self, figures: str = "") -> None:
        self.done += 1
        self._progress.update(self._task, completed=self.done, figures=printable(figures))
        now = time.monotonic()
        if not self._live and not self._quiet and (now - self._last > self.every or self.done >= self.total):
            self._last = now
            say(f"{self.title} {self.done}/{self.total}  {figures}")


def say(message: str) -> None:
    # a model's text may look like markup
    console.print(printable(message), markup=False)


_SAID = set[str]()


def say_once(message: str, about: str | None = None) -> None:
    """What a process says once, however often it loads a model; `about`: what makes two messages the same."""
    if (about or message) not in _SAID:
        _SAID.add(about or message)
        say(message)


def warn(message: str) -> None:
    """Something the user must not miss."""
    console.print(f"warning: {printable(message)}", markup=False, style="bold red")


class _Warnings(logging.Handler):
    """What modules that know nothing of the console warn of."""

    def emit(self, record: logging.LogRecord) -> None:
        warn(record.getMessage())


for _package in ("gapg", "gapg_rollout", "gapg_kernels", "gapg_packing"):
    logging.getLogger(_package).addHandler(_Warnings(logging.WARNING))
