"""A folder's manifest: the size and SHA-256 of each of its files, written after them, and what else is said of it.

    {"sha256": …, "run": …, "step": 40, …, "files": {"model/config.json": {"size": 733, "sha256": …}, …}}

`sha256` at the top is of the manifest itself, as canonical JSON without that key.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from gapg.files import write_whole

FILE = "manifest.json"


class BadManifest(ValueError):
    """A manifest that is missing or is not what was written: the message says so of "it"."""


def write(folder: Path, about: Mapping[str, Any], files: Iterable[str]) -> None:
    """Writes the manifest of the files, by their names under `folder`. Raises DiskFull and ConfigError."""
    names = sorted(files)
    sizes = [(folder / name).stat().st_size for name in names]
    hashes = sha256s([folder / name for name in names])
    listed = {n: {"size": size, "sha256": h} for n, size, h in zip(names, sizes, hashes, strict=True)}
    content = json.loads(json.dumps({**about, "files": listed}))  # as it will be read: all keys are strings
    write_whole(folder / FILE, json.dumps({"sha256": digest(content), **content}, indent=1))


def read(folder: Path) -> dict[str, Any]:
    """The manifest of a folder, `files` and all. Raises BadManifest."""
    try:
        content = json.loads((folder / FILE).read_bytes())
    except FileNotFoundError:
        raise BadManifest(f"it has no {FILE}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise BadManifest(f"its {FILE} cannot be read ({type(error).__name__})") from None
    if not isinstance(content, dict) or content.pop("sha256", None) != digest(content) or not _lists_files(content):
        raise BadManifest(f"its {FILE} is not as it was written")
    return content


def _lists_files(content: dict[str, Any]) -> bool:
    files = content.get("files")
    entries = files.values() if isinstance(files, dict) else [None]
    return all(isinstance(entry, dict) and {"size", "sha256"} <= entry.keys() for entry in entries)


def fault(folder: Path, manifest: Mapping[str, Any], *, hashes: bool = True) -> str | None:
    """The first of the manifest's files that is not as it was written, and how; None: all are.

    hashes: read every byte; without, only whether the files are there and as long as they were.
    """
    files: dict[str, Any] = manifest["files"]
    try:
        for name, entry in files.items():
            if not (folder / name).is_file():
                return f"{name} is missing"
            if (size := (folder / name).stat().st_size) != entry["size"]:
                return f"{name} has {size} bytes, not {entry['size']}"
        found = sha256s([folder / name for name in files]) if hashes else []
    except OSError as error:
        return f"{error.filename} cannot be read: {error.strerror}"
    return next(
        (f"{n} is damaged" for n, sha256 in zip(files, found, strict=False) if sha256 != files[n]["sha256"]), None
    )


def sha256s(paths: Iterable[Path]) -> list[str]:
    """Of files, in their order. Side by side, for a checkpoint's weights and moments are large. Raises OSError."""
    with ThreadPoolExecutor(4) as pool:
        return list(pool.map(_sha256, paths))


def digest(value: Any) -> str:
    """SHA-256 of a value as canonical JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
