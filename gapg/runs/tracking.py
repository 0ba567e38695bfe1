"""What a run writes about itself: metrics.jsonl, TensorBoard, the live display, and the warnings that must be seen."""

from __future__ import annotations

import logging
import os
import re
import secrets
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from gapg.files import write_whole, writing
from gapg.jsonl import append_jsonl, read_jsonl, to_json


class _Console(Console):
    def on_broken_pipe(self) -> None:
        """Nobody reads any more (the `tee` of a pipe has ended): that ends no run."""
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)


console = _Console(stderr=True, highlight=False, soft_wrap=True, emoji=False)

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


class Phases:
    """Seconds spent per phase since the last `take`."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start

    def take(self) -> dict[str, float]:
        taken, self.seconds = self.seconds, {}
        return taken


class Tracker:
    """One object a step to `metrics.jsonl` (key `step`), and the same scalars to TensorBoard and, if asked, W&B."""

    def __init__(self, folder: Path, resumed_step: int, *, tensorboard: bool, wandb: bool) -> None:
        self.path = folder / "metrics.jsonl"
        # steps after the checkpoint are run again: their first rows would be there twice
        rows = read_jsonl(self.path)
        stepped = [row for row in rows if isinstance(row.get("step"), int)]
        if strays := len(rows) - len(stepped):
            warn(f"{self.path}: left out, for want of a step: {strays} of its lines")
        kept = [row for row in stepped if row["step"] <= resumed_step]
        write_whole(self.path, "".join(to_json(row) + "\n" for row in kept))
        self._writers: list[Any] = []
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._writers.append(SummaryWriter(str(folder / "tensorboard"), purge_step=resumed_step + 1))
        self._wandb: Any = None
        if wandb:
            import wandb as wandb_module

            self._wandb = wandb_module.init(project="gapg", dir=str(folder), id=_run_id(folder), resume="allow")

    def log(self, row: Mapping[str, Any]) -> None:
        append_jsonl(self.path, row)
        scalars = {k: v for k, v in row.items() if isinstance(v, int | float) and k != "step"}
        with self._writing():
            for writer in self._writers:
                for key, value in scalars.items():
                    writer.add_scalar(key, value, row["step"])
        if self._wandb is not None:
            self._wandb.log(scalars, step=row["step"])

    def text(self, name: str, text: str, step: int) -> None:
        with self._writing():
            for writer in self._writers:
                writer.add_text(name, text, step)

    def close(self) -> None:
        with self._writing():
            for writer in self._writers:
                writer.close()
        if self._wandb is not None:
            self._wandb.finish()

    def _writing(self) -> AbstractContextManager[None]:
        return writing(self.path.parent / "tensorboard", "a row for TensorBoard")


def _run_id(folder: Path) -> str:
    """W&B's id of this run, kept in its folder so that a resumed run goes on with the same one."""
    path = folder / ".wandb-id"
    if not path.exists():
        write_whole(path, secrets.token_hex(4))
    return path.read_text()


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

    def advance(self, figures: str = "", by: int = 1) -> None:
        self.done += by
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


logging.getLogger("gapg").addHandler(_Warnings(logging.WARNING))
