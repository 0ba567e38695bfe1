"""The wheels that a GPU machine without a network lacks: fetched here, carried there in parts, installed there.

    make gpu-wheels                                                     # here, into .wheels/, which git ignores
    python bench/gpu_wheels.py install peers /tmp/gpu/site-packages     # there; then PYTHONPATH=/tmp/gpu/site-packages

`update` is what a whole update and its peers need (`bench/gpu.sh B`), `peers` what the heads' peers need, those of
`update` among them (C). A set is one tar, cut so that a transfer can carry a folder of it (`update`, `peers-1`,
`peers-2`); manifest.json goes along each time. Carry the folders in any order: `install` checks every byte and says
which one is still missing. Where a transfer replaces the folder it goes to, gather them there first:
`cp -r .wheels/. /tmp/wheels`, and `--wheels /tmp/wheels`.

Both commands need pip and no package beside it, but for the check of `fetch` that nothing else is missing (packaging).
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import io
import json
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterable
from fnmatch import fnmatchcase
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / ".wheels"
PYTHON = "3.12"
PLATFORMS = [f"manylinux_2_{minor}_x86_64" for minor in range(39, 16, -1)] + ["manylinux2014_x86_64"]
"""pip matches the number exactly"""

TRANSFER = 56_000_000
"""Bytes of a folder. A transfer carries 67,108,864: the repository takes 5 million of them, and leaves room to grow."""

SETS = {
    "update": (
        "pydantic", "pydantic-core", "annotated-types", "typing-inspection", "typing-extensions",
        "trl", "datasets", "dill", "multiprocess", "liger-kernel",
    ),
    "peers": (
        "quack-kernels", "torch-c-dlpack-ext", "apache-tvm-ffi", "nvidia-cutlass-dsl", "nvidia-cutlass-dsl-libs-core",
        "nvidia-cutlass-dsl-libs-base", "nvidia-cutlass-dsl-libs-cu13", "cut-cross-entropy", "verl",
    ),
}  # fmt: skip
NEEDS = {"update": ("update",), "peers": ("update", "peers")}
"""What is installed for each set."""

VERSIONS = {
    "quack-kernels": "0.6.5",
    "torch-c-dlpack-ext": "0.1.5",
    "nvidia-cutlass-dsl": "4.8.1",
    "nvidia-cutlass-dsl-libs-core": "4.8.1",
    "nvidia-cutlass-dsl-libs-base": "4.8.1",
    "nvidia-cutlass-dsl-libs-cu13": "4.8.1",
    "verl": "0.9.1",
}
"""Of what constraints.txt, which has the others, does not install."""

IMAGE = {
    "torch": "2.11.0", "triton": "3.6.0", "transformers": "5.17.0", "accelerate": "1.15.0", "numpy": "2.5.2",
    "huggingface-hub": "1.33.0", "cuda-bindings": None, "einops": None, "filelock": None, "fsspec": None,
    "jinja2": None, "packaging": None, "pandas": None, "protobuf": None, "psutil": None, "pyarrow": None,
    "pyyaml": None, "tqdm": None, "xxhash": None,
}  # fmt: skip
"""What the GPU image has, of what the wheels require; its version where it is known."""

UNUSED = {"nvidia-cutlass-dsl": "nvidia-cutlass-dsl-libs-cu12", "verl": "*"}
"""Wheel: what it requires and we do without. The libraries for CUDA 13 do for those for 12; of verl two files are
loaded, which need torch and triton (`peers.losses`)."""

SITECUSTOMIZE = """\
import os
import site

site.addsitedir(os.path.dirname(__file__))  # its .pth files: Python reads none in a folder of PYTHONPATH
"""


class Refused(Exception):
    """Why a command stops, in one line."""


# --- here ------------------------------------------------------------------------------------------------------------


def fetch(folder: Path) -> None:
    """Every wheel of SETS into ``folder``/whole, those already there apart, and from there into the transfers."""
    whole = folder / "whole"
    whole.mkdir(parents=True, exist_ok=True)
    lacking = [wheel for wheels in SETS.values() for wheel in wheels if path_of(wheel, whole) is None]
    for done, wheel in enumerate(lacking, 1):
        print(f"fetching {done} of {len(lacking)}: {wheel} {version(wheel)}", flush=True)
        target = ["--python-version", PYTHON, "--implementation", "cp", "--only-binary=:all:", "--no-deps"]
        target += [word for platform in PLATFORMS for word in ("--platform", platform)]
        pip("download", *target, "--dest", str(whole), f"{wheel}=={version(wheel)}")
    wheels = {name: [path for wheel in SETS[name] if (path := path_of(wheel, whole))] for name in SETS}
    lay_out(wheels, folder)
    for name, needs in NEEDS.items():
        sizes = [path.stat().st_size for need in needs for path in wheels[need]]
        print(f"{sum(sizes):>12,}  {name}: {len(sizes)} wheels")
    missing = unmet([path for paths in wheels.values() for path in paths])
    if missing:
        raise Refused("neither fetched nor on the GPU machine, add it to SETS: " + "; ".join(missing))


def version(wheel: str) -> str:
    """The one to fetch: ours in VERSIONS, else constraints.txt's."""
    if wheel in VERSIONS:
        return VERSIONS[wheel]
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        name, _, pinned = line.partition("==")
        if canonical(name) == wheel:
            return pinned
    raise Refused(f"no version of {wheel}: give one in VERSIONS of bench/gpu_wheels.py")


def canonical(name: str) -> str:
    """As package indexes compare names."""
    return re.sub(r"[-_.]+", "-", name).lower()


def path_of(wheel: str, folder: Path) -> Path | None:
    """Where a wheel of the wanted version lies."""
    return next(folder.glob(f"{wheel.replace('-', '_')}-{version(wheel)}-*.whl"), None)


def pip(*arguments: str) -> None:
    """Runs this Python's pip, silently."""
    done = subprocess.run([sys.executable, "-m", "pip", arguments[0], "-q", *arguments[1:]], stderr=subprocess.PIPE)
    if done.returncode:
        errors = [line for line in done.stderr.decode(errors="replace").splitlines() if line.strip()]
        said = next((line for line in reversed(errors) if line.startswith("ERROR")), (errors or ["no message"])[-1])
        raise Refused(f"pip {arguments[0]} failed: {said}")


def unmet(paths: Iterable[Path], image: dict[str, str | None] = IMAGE) -> list[str]:
    """What the wheels require on the GPU machine, extras apart, that neither is among them nor in ``image``.

    One line each, "trl 1.16.0 needs datasets>=4.7.0"; a known version that does not fit is said as well.
    """
    from packaging.requirements import Requirement

    wheels = [
        importlib.metadata.PathDistribution(inside)
        for path in paths
        for inside in zipfile.Path(path).iterdir()
        if inside.name.endswith(".dist-info")
    ]
    there = image | {canonical(wheel.name): wheel.version for wheel in wheels}
    machine = {"python_version": PYTHON, "python_full_version": f"{PYTHON}.0", "sys_platform": "linux", "extra": "",
               "platform_system": "Linux", "platform_machine": "x86_64", "implementation_name": "cpython"}  # fmt: skip
    found = []
    for wheel in wheels:
        by = canonical(wheel.name)
        for needed in map(Requirement, wheel.requires or []):
            name = canonical(needed.name)
            unused = needed.marker is not None and not needed.marker.evaluate(machine)
            if unused or fnmatchcase(name, UNUSED.get(by, "")):
                continue
            has = there.get(name)
            if name not in there or (has is not None and not needed.specifier.contains(has, prereleases=True)):
                but = f", there is {has}" if has else ""
                found.append(f"{by} {wheel.version} needs {name}{needed.specifier}{but}")
    return found


def lay_out(wheels: dict[str, list[Path]], folder: Path, limit: int = TRANSFER) -> None:
    """Each set as a tar, cut into pieces of at most ``limit`` bytes, a folder each, and the manifest of the pieces.

    A set of one piece has a folder of its own name, else they are numbered.
    """
    manifest: dict[str, list[dict[str, str]]] = {}
    for name, paths in wheels.items():
        for old in (path for path in folder.glob(f"{name}*") if path.is_dir()):
            shutil.rmtree(old)
        archive = io.BytesIO()
        with tarfile.open(fileobj=archive, mode="w") as tar:
            for path in sorted(paths):
                tar.add(path, path.name)
        data = archive.getvalue()
        manifest[name] = []
        for number, start in enumerate(range(0, len(data), limit), 1):
            piece = data[start : start + limit]
            place = folder / (f"{name}-{number}" if len(data) > limit else name) / f"{name}.tar.{number:02}"
            place.parent.mkdir()
            place.write_bytes(piece)
            manifest[name].append({"file": place.relative_to(folder).as_posix(), "sha256": sha256(piece)})
            print(f"{len(piece):>12,}  {place}")
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


# --- there -----------------------------------------------------------------------------------------------------------


def install(name: str, site: Path, folder: Path) -> None:
    """Joins, checks and installs the wheels of a set into ``site``, which then does on PYTHONPATH alone."""
    if site.name != "site-packages":  # quack asks that of a path before it takes what lies there for a library
        raise Refused(f"quack works in a folder called site-packages only: give {site / 'site-packages'}")
    if not (folder / "manifest.json").exists():
        raise Refused(f"{folder} has no manifest.json: run `make gpu-wheels`, and carry it along with each folder")
    manifest = json.loads((folder / "manifest.json").read_text())
    files = [piece["file"] for need in NEEDS[name] for piece in manifest[need]]
    missing = sorted({file.partition("/")[0] for file in files if not (folder / file).exists()})
    if missing:
        raise Refused(f"{folder} lacks {', '.join(missing)}: carry that here too")
    with tempfile.TemporaryDirectory() as scratch:
        for need in NEEDS[name]:
            data = b"".join(checked(folder / piece["file"], piece["sha256"]) for piece in manifest[need])
            with tarfile.open(fileobj=io.BytesIO(data)) as tar:
                tar.extractall(scratch, filter="data")
        wheels = sorted(map(str, Path(scratch).glob("*.whl")))
        pip("install", "--no-index", "--no-deps", "--no-compile", "--no-cache-dir", "--upgrade",
            "--target", str(site), *wheels)  # fmt: skip
    (site / "sitecustomize.py").write_text(SITECUSTOMIZE)
    print(f"{len(wheels)} wheels in {site}: put it on PYTHONPATH")


def checked(path: Path, wanted: str) -> bytes:
    """A piece's bytes."""
    data = path.read_bytes()
    if sha256(data) != wanted:
        raise Refused(f"{path} is damaged: carry it here again")
    return data


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    here = commands.add_parser("fetch", help="on a machine with a network")
    there = commands.add_parser("install", help="on the GPU machine")
    there.add_argument("set", choices=SETS)
    there.add_argument("site", type=Path, help="a folder called site-packages")
    for command in (here, there):
        command.add_argument("--wheels", type=Path, default=FOLDER, help="where they lie; .wheels by default")
    given = parser.parse_args()
    try:
        if given.command == "fetch":
            fetch(given.wheels)
        else:
            install(given.set, given.site, given.wheels)
    except Refused as why:
        sys.exit(f"bench/gpu_wheels.py: {why}")


if __name__ == "__main__":
    main()
