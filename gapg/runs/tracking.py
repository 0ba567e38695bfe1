"""What a run records of itself: seconds per phase, metrics.jsonl, TensorBoard, W&B."""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

from gapg.console import warn
from gapg.files import write_whole, writing
from gapg.jsonl import append_jsonl, read_jsonl, to_json


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
        self._tensorboard: Any = None
        self._wandb: Any = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._tensorboard = SummaryWriter(str(folder / "tensorboard"), purge_step=resumed_step + 1)
        if wandb:
            import wandb as wandb_module

            self._wandb = wandb_module.init(project="gapg", dir=str(folder), id=_run_id(folder), resume="allow")

    def log(self, row: Mapping[str, Any]) -> None:
        append_jsonl(self.path, row)
        scalars = {k: v for k, v in row.items() if isinstance(v, int | float) and k != "step"}
        with self._writing():
            for key, value in scalars.items() if self._tensorboard else ():
                self._tensorboard.add_scalar(key, value, row["step"])
        if self._wandb:
            self._wandb.log(scalars, step=row["step"])

    def text(self, name: str, text: str, step: int) -> None:
        if self._tensorboard:
            with self._writing():
                self._tensorboard.add_text(name, text, step)

    def close(self) -> None:
        if self._tensorboard:
            with self._writing():
                self._tensorboard.close()
        if self._wandb:
            self._wandb.finish()

    def _writing(self) -> AbstractContextManager[None]:
        return writing(self.path.parent / "tensorboard", "a row for TensorBoard")


def _run_id(folder: Path) -> str:
    """W&B's id of this run, kept in its folder so that a resumed run goes on with the same one."""
    path = folder / ".wandb-id"
    if not path.exists():
        write_whole(path, secrets.token_hex(4))
    return path.read_text()
