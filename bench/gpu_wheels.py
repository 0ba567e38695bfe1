"""The wheels that a GPU machine without a network lacks: fetched here, carried there in parts, installed there.

    make gpu-wheels                                                     # here, into .wheels/, which git ignores
    python bench/gpu_wheels.py install peers /tmp/gpu/site-packages     # there; then PYTHONPATH=/tmp/gpu/site-packages

`update` is what a whole update and its peers need (`bench/gpu.sh B`), `peers` what the heads' peers need, those of
`update` among them (C). `.wheels/` has a folder for each transfer (`update`, `peers-1`, `peers-2`), none larger than
TRANSFER, and manifest.json, which goes along each time. A wheel that is too large is cut, and joined by `install`,
which checks every byte. Carry the folders in any order; `install` says which one is still missing. Where a transfer
replaces the folder it goes to, gather them there first: `cp -r .wheels/. /tmp/wheels`, and `--wheels /tmp/wheels`.

Both commands need pip and no package beside it, but for the check of `fetch` that nothing else is missing (packaging).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from email.parser import HeaderParser
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any
from zipfile import ZipFile

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
loaded, which need torch and triton (`peers.heads`)."""

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
    wheels = {name: {wheel: path_of(wheel, whole) for wheel in SETS[name]} for name in SETS}
    lacking = [wheel for found in wheels.values() for wheel, path in found.items() if path is None]
    for done, wheel in enumerate(lacking, 1):
        print(f"fetching {done} of {len(lacking)}: {wheel} {version(wheel)}", flush=True)
        download(wheel, whole)
    found = {name: [path for wheel in SETS[name] if (path := path_of(wheel, whole))] for name in SETS}
    manifest = lay_out(found, folder)
    report(manifest, folder)
    missing = unmet([path for paths in found.values() for path in paths])
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


def download(wheel: str, folder: Path) -> None:
    """One wheel for the GPU machine, without what it requires."""
    target = ["--python-version", PYTHON, "--implementation", "cp", "--only-binary=:all:", "--no-deps"]
    target += [word for platform in PLATFORMS for word in ("--platform", platform)]
    pip("download", *target, "--dest", str(folder), f"{wheel}=={version(wheel)}")


def pip(*arguments: str) -> None:
    """Runs this Python's pip, silently."""
    done = subprocess.run([sys.executable, "-m", "pip", arguments[0], "-q", *arguments[1:]], stderr=subprocess.PIPE)
    if done.returncode:
        errors = [line for line in done.stderr.decode(errors="replace").splitlines() if line.strip()]
        said = next((line for line in reversed(errors) if line.startswith("ERROR")), (errors or ["no message"])[-1])
        raise Refused(f"pip {arguments[0]} failed: {said}")


def unmet(wheels: Iterable[Path], image: dict[str, str | None] = IMAGE) -> list[str]:
    """What the wheels require on the GPU machine, extras apart, that neither is among them nor in ``image``.

    One line each, "trl 1.16.0 needs datasets>=4.7.0"; a known version that does not fit is said as well.
    """
    from packaging.requirements import Requirement

    headers = [metadata(path) for path in wheels]
    there = image | {canonical(header["Name"]): header["Version"] for header in headers}
    machine = {"python_version": PYTHON, "python_full_version": f"{PYTHON}.0", "sys_platform": "linux", "extra": "",
               "platform_system": "Linux", "platform_machine": "x86_64", "implementation_name": "cpython"}  # fmt: skip
    found = []
    for header in headers:
        for text in header.get_all("Requires-Dist", []):
            needed = Requirement(text)
            name = canonical(needed.name)
            if needed.marker is not None and not needed.marker.evaluate(machine):
                continue
            if fnmatchcase(name, UNUSED.get(canonical(header["Name"]), "")):
                continue
            has = there.get(name)
            if name not in there or (has is not None and not needed.specifier.contains(has, prereleases=True)):
                but = f", there is {has}" if has else ""
                found.append(f"{canonical(header['Name'])} {header['Version']} needs {name}{needed.specifier}{but}")
    return found


def metadata(path: Path) -> Any:
    """A wheel's headers."""
    with ZipFile(path) as archive:
        name = next(name for name in archive.namelist() if re.fullmatch(r"[^/]+\.dist-info/METADATA", name))
        return HeaderParser().parsestr(archive.read(name).decode())


def lay_out(wheels: dict[str, list[Path]], folder: Path, limit: int = TRANSFER) -> dict[str, Any]:
    """Fills folders of at most ``limit`` bytes, set by set, small wheels first, and writes the manifest.

    A set that fits one folder has one of its own name, else they are numbered. What does not fit what is left of a
    folder is cut there, so that all but the last are full: its parts sort in their order.
    """
    manifest: dict[str, Any] = {}
    for name, paths in wheels.items():
        for old in (path for path in folder.glob(f"{name}*") if path.is_dir()):
            shutil.rmtree(old)
        numbered = sum(path.stat().st_size for path in paths) > limit
        number, room = 1, limit
        for path in sorted(paths, key=lambda path: path.stat().st_size):
            size, parts = path.stat().st_size, []
            with path.open("rb") as source:
                while source.tell() < size:
                    if not room:
                        number, room = number + 1, limit
                    data = source.read(min(room, size - source.tell()))
                    room -= len(data)
                    part = path.name if len(data) == size else f"{path.name}.part{len(parts):02}"
                    place = folder / (f"{name}-{number}" if numbered else name) / part
                    place.parent.mkdir(exist_ok=True)
                    place.write_bytes(data)
                    parts.append({"file": place.relative_to(folder).as_posix(), **checks(data)})
            manifest[path.name] = {"set": name, **checks(path.read_bytes()), "parts": parts}
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")
    return manifest


def checks(data: bytes) -> dict[str, Any]:
    """What tells whether it arrived."""
    return {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def report(manifest: dict[str, Any], folder: Path) -> None:
    """Every wheel with its size, every folder, every set."""
    sizes: dict[str, int] = {}
    for name, wheel in sorted(manifest.items(), key=lambda item: item[1]["bytes"]):
        parts = f", in {len(wheel['parts'])} parts" if len(wheel["parts"]) > 1 else ""
        print(f"{wheel['bytes']:>12,}  {name}{parts}")
        for part in wheel["parts"]:
            place = part["file"].partition("/")[0]
            sizes[place] = sizes.get(place, 0) + part["bytes"]
    for place, size in sorted(sizes.items()):
        print(f"{size:>12,}  {folder / place}")
    for name, needs in NEEDS.items():
        chosen = [wheel["bytes"] for wheel in manifest.values() if wheel["set"] in needs]
        print(f"{sum(chosen):>12,}  {name}: {len(chosen)} wheels")


# --- there -----------------------------------------------------------------------------------------------------------


def install(name: str, site: Path, folder: Path) -> None:
    """Joins, checks and installs the wheels of a set into ``site``, which then does on PYTHONPATH alone."""
    if site.name != "site-packages":  # quack asks that of a path before it takes what lies there for a library
        raise Refused(f"quack works in a folder called site-packages only: give {site / 'site-packages'}")
    if not (folder / "manifest.json").exists():
        raise Refused(f"{folder} has no manifest.json: run `make gpu-wheels`, and carry it along with each folder")
    manifest = json.loads((folder / "manifest.json").read_text())
    chosen = {wheel: entry for wheel, entry in manifest.items() if entry["set"] in NEEDS[name]}
    files = [part["file"] for entry in chosen.values() for part in entry["parts"]]
    missing = sorted({file.partition("/")[0] for file in files if not (folder / file).exists()})
    if missing:
        raise Refused(f"{folder} lacks {', '.join(missing)}: carry that here too")
    with tempfile.TemporaryDirectory() as scratch:
        wheels = [join(folder, wheel, entry, Path(scratch)) for wheel, entry in chosen.items()]
        pip("install", "--no-index", "--no-deps", "--no-compile", "--no-cache-dir", "--upgrade",
            "--target", str(site), *map(str, wheels))  # fmt: skip
    (site / "sitecustomize.py").write_text(SITECUSTOMIZE)
    print(f"{len(wheels)} wheels in {site}: put it on PYTHONPATH")


def join(folder: Path, wheel: str, entry: dict[str, Any], scratch: Path) -> Path:
    """A wheel from its parts, each checked, then the whole."""
    data = b"".join(checked(folder, part) for part in entry["parts"])
    if checks(data) != {"bytes": entry["bytes"], "sha256": entry["sha256"]}:
        raise Refused(f"the parts of {wheel} do not make it: run `make gpu-wheels` and carry all of them again")
    (scratch / wheel).write_bytes(data)
    return scratch / wheel


def checked(folder: Path, part: dict[str, Any]) -> bytes:
    """A part's bytes."""
    data = (folder / part["file"]).read_bytes()
    if checks(data) != {"bytes": part["bytes"], "sha256": part["sha256"]}:
        raise Refused(f"{folder / part['file']} is damaged: carry it here again")
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
