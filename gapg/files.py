"""Files that appear whole or not at all, outlive a power cut, and say in one line why they could not be written."""

from __future__ import annotations

import errno
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from gapg.errors import ConfigError

PARTIAL = re.compile(r"\..+\.\d+-[0-9a-f]{8}\.partial")
_CODE = re.compile(r"\(os error (\d+)\)")
"""What safetensors and tokenizers, which are written in Rust, put in their errors."""


class DiskFull(RuntimeError):
    """Something does not fit where it was to be written: one line that names it, and the fix. Nothing of it is left."""


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A place for a file's new content, which replaces it in one go when this is left: a reader, a kill or a power cut
    finds the old file or the new one, whole.

    Raises DiskFull, and ConfigError where the folder does not let the file be written; nothing is left of it then.
    """
    partial = partial_name(path)
    with writing(path):
        try:
            yield partial
            sync(partial)
            os.replace(partial, path)
            sync(path.parent)
        finally:
            partial.unlink(missing_ok=True)


def write_whole(path: Path, text: str) -> None:
    """Replaces a file of text, UTF-8, in one go. Raises as `replacing` does."""
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8")


def partial_name(path: Path) -> Path:
    """A hidden name beside `path`, of this one writer."""
    return path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.partial")


def remove_partials(folder: Path) -> None:
    """Deletes what killed writers left in a folder. Only for who has it alone: others' may still be written."""
    for leftover in folder.iterdir():
        if PARTIAL.fullmatch(leftover.name):
            shutil.rmtree(leftover, ignore_errors=True) if leftover.is_dir() else leftover.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Waits until a file, or the names in a folder, are on the disk."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


@contextmanager
def writing(path: Path, what: str | None = None) -> Iterator[None]:
    """Makes one line of an error of the system inside: DiskFull where something does not fit, else ConfigError.

    what: what is written to `path`, for the message; empty: `path`.
    """
    try:
        yield
    except Exception as error:
        if (code := _system_error(error)) is None:
            raise
        if code not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            where = f"{what} cannot be written to {path}" if what else f"{path} cannot be written"
            raise ConfigError(
                f"{where}: {os.strerror(code)}; mend that, then run it again (a run: with --resume)"
            ) from None
        disk = _existing(path)
        why = {
            errno.ENOSPC: f"{size_text(shutil.disk_usage(disk).free)} free; make room",
            errno.EDQUOT: "the quota is used up; make room",
            errno.EFBIG: "files may not be so large; raise that limit (ulimit -f)",
        }
        raise DiskFull(
            f"{what or path} does not fit on the disk of {disk}: {why[code]}, then run it again (a run: with --resume)"
        ) from None


def size_text(size: float) -> str:
    """Bytes as people write them."""
    return f"{size / 2**30:.1f} GiB" if size >= 2**29 else f"{size / 2**20:.1f} MiB"


def _system_error(error: Exception) -> int | None:
    """The error number of a failed system call, however the library that made it tells of it."""
    if isinstance(error, OSError):
        return error.errno
    found = _CODE.search(str(error))
    return int(found[1]) if found else None


def _existing(path: Path) -> Path:
    """The innermost folder above `path` that is there."""
    return next(folder for folder in path.absolute().parents if folder.is_dir())
