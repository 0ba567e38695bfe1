"""The project's sdist and wheel, built once from a copy of the tree, and a venv with the core's requirements only."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Sequence
from importlib.metadata import distribution
from pathlib import Path
from typing import NamedTuple

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]


class Built(NamedTuple):
    tree: Path
    """the copy: what git tracks or would track"""
    sdist: Path
    wheel: Path
    """made from the unpacked sdist, so that the sdist must hold all that a compiler needs"""


def run(command: Sequence[str | Path], folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """The command, in a folder that is not the tree and without its PYTHONPATH."""
    outside = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "TRITON"))}
    return subprocess.run(command, cwd=folder, env=outside | environment, capture_output=True, text=True)


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    folder = tmp_path_factory.mktemp("built")
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
        cwd=ROOT, check=True, capture_output=True, text=True,
    )  # fmt: skip
    for name in filter(None, listed.stdout.split("\0")):
        if (ROOT / name).is_file():
            (folder / "tree" / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / "tree" / name)
    sdist = build("sdist", folder / "tree", folder)
    with tarfile.open(sdist) as archive:
        archive.extractall(folder / "unpacked", filter="data")
    (unpacked,) = (folder / "unpacked").iterdir()
    return Built(folder / "tree", sdist, build("wheel", unpacked, folder))


def build(kind: str, tree: Path, folder: Path) -> Path:
    """By the backend that pyproject.toml names, without an environment of its own: no network."""
    script = f"from setuptools import build_meta; print(build_meta.build_{kind}({str(folder)!r}))"
    done = run([sys.executable, "-c", script], tree)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / done.stdout.splitlines()[-1]


@pytest.fixture(scope="session")
def bare(built: Built, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bin folder of a venv with the wheel, torch, triton, numpy, what those need, and nothing else."""
    folder = tmp_path_factory.mktemp("bare")
    done = run([sys.executable, "-m", "venv", "--without-pip", folder / "venv"], folder)
    assert done.returncode == 0, done.stderr
    python = folder / "venv" / "bin" / "python"
    (site,) = (folder / "venv" / "lib").glob("python*/site-packages")
    for name in needed(["torch", "numpy", *(["triton"] if sys.platform == "linux" else [])]):
        for top in {path.parts[0] for path in distribution(name).files or () if path.parts[0] not in ("..", "/")}:
            source = Path(str(distribution(name).locate_file(top)))
            if source.exists() and not (site / top).exists():
                (site / top).symlink_to(source)
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps", "--no-index"]
    done = run([*pip, built.wheel], folder)
    assert done.returncode == 0, done.stderr
    return python.parent


def needed(names: Sequence[str]) -> set[str]:
    """These distributions and all that they require, by name."""
    found: set[str] = set()
    queue = list(names)
    while queue:
        name = queue.pop()
        if name in found:
            continue
        found.add(name)
        for requirement in map(Requirement, distribution(name).requires or ()):
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                queue.append(requirement.name)
    return found
