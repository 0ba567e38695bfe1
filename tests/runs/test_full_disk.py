"""What does not fit is one line that names it; nothing of it is left, and what was saved before stays.

The system really refuses: a limit on the size of files (EFBIG), and /dev/full (ENOSPC).
"""

import json
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from gapg.commands.cli import main
from gapg.config_sections import OptimConfig
from gapg.errors import ConfigError
from gapg.files import DiskFull, write_whole, writing
from gapg.jsonl import read_jsonl
from gapg.optim import clip_and_step, make_optimizer
from gapg.runs import checkpoint
from tests.runs.small import SMALL


@contextmanager
def files_up_to(size: int) -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def everything(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_a_file_that_does_not_fit_leaves_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "summary.json"
    write_whole(path, "old")
    with files_up_to(1000), pytest.raises(DiskFull) as full:
        write_whole(path, "x" * 5000)
    assert str(full.value).startswith(f"{path} does not fit on the disk of {tmp_path}: files may not be so large")
    assert everything(tmp_path) == {"summary.json": b"old"}


def test_a_full_disk_says_how_much_is_free() -> None:
    said = r"^the table does not fit on the disk of /dev: [\d.]+ [MG]iB free; make room"
    with pytest.raises(DiskFull, match=said), writing(Path("/dev/full"), "the table"):
        Path("/dev/full").write_text("x")


def test_other_errors_of_the_system_are_one_line_too(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"file/x cannot be written: Not a directory; mend that, then run it again"):
        write_whole(tmp_path / "file" / "x", "text")
    with pytest.raises(ZeroDivisionError), writing(tmp_path):
        print(1 / 0)


def test_whatever_file_of_a_checkpoint_does_not_fit(
    make_model: Callable[..., PreTrainedModel], tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    model, root = make_model(), tmp_path / "checkpoints"
    optimizer = make_optimizer(model, OptimConfig(lr=1e-3))
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    clip_and_step(optimizer, 1e-3, 1.0)
    checkpoint.save(root, 1, model, tokenizer, optimizer, {"step": 1})
    before = everything(root)
    sizes = sorted({len(content) for content in before.values()})
    assert len(sizes) >= 6
    for size in sizes:
        with files_up_to(size - 1), pytest.raises(DiskFull) as full:
            checkpoint.save(root, 2, model, tokenizer, optimizer, {"step": 1})
        line = str(full.value)
        assert line.startswith("the checkpoint of step 2 (0.3 MiB) does not fit on the disk of ") and "\n" not in line
        assert everything(root) == before, size
    assert checkpoint.save(root, 2, model, tokenizer, optimizer, {"step": 2}) == checkpoint.latest(root)
    with files_up_to(100), pytest.raises(DiskFull, match=r"^a checkpoint does not fit on the disk of "):
        checkpoint.check_saves(root, model, tokenizer)


def test_a_run_ends_in_one_line_and_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = [*SMALL, "--warm-start", "", "--checkpoint-every", "1", "--budget.filter", "false"]
    command += ["--output-dir", str(tmp_path / "run")]
    main([*command, "--steps", "1"])
    root = tmp_path / "run" / "checkpoints"
    before = everything(root)
    weights = len(before["step-1/model/model.safetensors"])
    capsys.readouterr()
    with files_up_to(weights - 1), pytest.raises(SystemExit) as left:
        main([*command, "--resume", "--steps", "3"])
    assert left.value.code == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("gapg: ")]
    assert line.startswith("gapg: the checkpoint of step 2 (") and "raise that limit" in line and "--resume" in line
    assert everything(root) == before
    main([*command, "--resume", "--steps", "3"])
    assert [row["step"] for row in read_jsonl(tmp_path / "run/metrics.jsonl")] == [1, 2, 3]
    assert json.loads((root / "step-3/state.json").read_text())["step"] == 3
