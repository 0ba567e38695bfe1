"""The wheels for a GPU machine: cut, carried folder by folder, joined, installed by pip; and what they need."""

from __future__ import annotations

import io
import os
import random
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Sequence
from pathlib import Path
from zipfile import ZipFile

import pytest

import gpu_wheels
import record
from gpu_wheels import Refused

SCRIPT = record.ROOT / "bench" / "gpu_wheels.py"


def wheel(
    folder: Path, name: str, version: str = "1.0", needs: Sequence[str] = (), files: dict[str, bytes] | None = None
) -> Path:
    """A wheel that pip installs: stored, so that its size is its files'."""
    stem, info = name.replace("-", "_"), f"{name.replace('-', '_')}-{version}.dist-info"
    head = [f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}", *(f"Requires-Dist: {need}" for need in needs)]
    inside = {
        **(files or {f"{stem}.py": b"there = True\n"}),
        f"{info}/METADATA": "\n".join(head).encode() + b"\n",
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    path = folder / f"{stem}-{version}-py3-none-any.whl"
    with ZipFile(path, "w") as archive:
        for inner, data in inside.items():
            archive.writestr(inner, data)
        archive.writestr(f"{info}/RECORD", "".join(f"{inner},,\n" for inner in (*inside, f"{info}/RECORD")))
    return path


def laid_out(folder: Path) -> Path:
    """A small set that fits one folder, and one that is cut between two: 30,000 bytes a folder."""
    made = folder / "made"
    made.mkdir()
    noise = random.Random(0).randbytes(30_000)
    library = {"alibrary/noise.bin": noise, "alibrary/packages/hidden.py": b"found = True\n"}
    library["alibrary.pth"] = (
        b"import os, sys, alibrary; sys.path.append(os.path.join(alibrary.__path__[0], 'packages'))"
    )
    wheels = {
        "update": [wheel(made, "a-trainer")],
        "peers": [wheel(made, "library", files=library), wheel(made, "a-peer", needs=["library"])],
    }
    depot = folder / "depot"
    depot.mkdir()
    gpu_wheels.lay_out(wheels, depot, limit=30_000)
    return depot


def test_no_folder_is_too_large_and_the_pieces_are_the_wheels(tmp_path: Path) -> None:
    depot = laid_out(tmp_path)
    folders = sorted(path for path in depot.iterdir() if path.is_dir())
    assert [path.name for path in folders] == ["peers-1", "peers-2", "update"]
    sizes = [sum(file.stat().st_size for file in path.iterdir()) for path in folders]
    assert sizes[0] == 30_000 and 0 < sizes[1] < 30_000
    data = b"".join(path.read_bytes() for path in sorted(depot.glob("peers-*/peers.tar.*")))
    with tarfile.open(fileobj=io.BytesIO(data)) as whole:
        assert whole.getnames() == ["a_peer-1.0-py3-none-any.whl", "library-1.0-py3-none-any.whl"]


def test_laid_out_again_it_leaves_nothing_of_before(tmp_path: Path) -> None:
    depot = laid_out(tmp_path)
    gpu_wheels.lay_out({"peers": [tmp_path / "made" / "a_peer-1.0-py3-none-any.whl"]}, depot)
    assert sorted(path.name for path in depot.iterdir()) == ["manifest.json", "peers", "update"]


def test_what_arrives_folder_by_folder_is_installed_with_its_paths(tmp_path: Path) -> None:
    depot, there, site = laid_out(tmp_path), tmp_path / "there", tmp_path / "site-packages"
    there.mkdir()
    with pytest.raises(Refused, match=r"no manifest\.json: run `make gpu-wheels`"):
        gpu_wheels.install("peers", site, there)
    shutil.copy(depot / "manifest.json", there)
    for folder, lacking in (("peers-2", "peers-1, update"), ("update", "peers-1"), ("peers-1", None)):
        shutil.copytree(depot / folder, there / folder)
        if lacking:
            with pytest.raises(Refused, match=f"lacks {lacking}: carry that here too"):
                gpu_wheels.install("peers", site, there)
    gpu_wheels.install("peers", site, there)
    code = "import a_trainer, a_peer, hidden; assert a_trainer.there and a_peer.there; print(hidden.__file__)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(site)}
    )
    assert done.stdout.strip() == str(site / "alibrary" / "packages" / "hidden.py"), done.stderr


def test_the_smaller_set_does_not_wait_for_the_larger(tmp_path: Path) -> None:
    depot, site = laid_out(tmp_path), tmp_path / "site-packages"
    for folder in depot.glob("peers-*"):
        shutil.rmtree(folder)
    gpu_wheels.install("update", site, depot)
    assert (site / "a_trainer.py").exists() and not (site / "alibrary").exists()


@pytest.mark.parametrize("change", [b"", b"more"])
def test_a_damaged_part_is_named(tmp_path: Path, change: bytes) -> None:
    depot = laid_out(tmp_path)
    (part,) = (depot / "peers-1").iterdir()
    part.write_bytes(part.read_bytes()[:-4] + change)
    with pytest.raises(Refused, match=f"{part.name} is damaged: carry it here again"):
        gpu_wheels.install("peers", tmp_path / "site-packages", depot)
    assert not (tmp_path / "site-packages").exists()


def test_what_pip_refuses_is_one_line(tmp_path: Path) -> None:
    depot, made = tmp_path / "depot", tmp_path / "made"
    depot.mkdir()
    made.mkdir()
    gpu_wheels.lay_out({"update": [wheel(made, "other").rename(made / "other-1.0-cp27-none-any.whl")]}, depot)
    with pytest.raises(Refused, match=r"^pip install failed: ERROR: other-1\.0-cp27.* is not a supported wheel[^\n]*$"):
        gpu_wheels.install("update", tmp_path / "site-packages", depot)


def test_it_needs_the_standard_library_alone_and_says_where_quack_works(tmp_path: Path) -> None:
    command = [sys.executable, "-I", "-S", str(SCRIPT), "install", "peers", "--wheels", str(tmp_path)]
    for site, why in ((tmp_path / "site", "quack works in a folder"), (tmp_path / "site-packages", "no manifest.json")):
        done = subprocess.run([*command, str(site)], capture_output=True, text=True)
        assert done.returncode == 1 and why in done.stderr and done.stderr.count("\n") == 1


# --- what is fetched -------------------------------------------------------------------------------------------------


def test_every_wheel_has_one_version() -> None:
    wheels = [name for names in gpu_wheels.SETS.values() for name in names]
    assert len(set(wheels)) == len(wheels)
    pinned = {gpu_wheels.canonical(line.partition("==")[0]): line.partition("==")[2]
              for line in (record.ROOT / "constraints.txt").read_text().splitlines()}  # fmt: skip
    assert not pinned.keys() & gpu_wheels.VERSIONS.keys() and gpu_wheels.VERSIONS.keys() <= set(wheels)
    assert {name: gpu_wheels.version(name) for name in ("trl", "pydantic-core", "quack-kernels")} == {
        "trl": pinned["trl"], "pydantic-core": pinned["pydantic-core"], "quack-kernels": "0.6.5",
    }  # fmt: skip
    with pytest.raises(Refused, match="no version of nothing: give one in VERSIONS"):
        gpu_wheels.version("nothing")


def test_what_is_there_is_not_fetched_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without an index, so that pip would fail: and it does, in one line, once a wheel is gone."""
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    whole = tmp_path / "whole"
    whole.mkdir()
    for names in gpu_wheels.SETS.values():
        for name in names:
            wheel(whole, name, gpu_wheels.version(name))
    gpu_wheels.fetch(tmp_path)
    last = capsys.readouterr().out.splitlines()[-2:]
    counts = [len(gpu_wheels.SETS["update"]), sum(map(len, gpu_wheels.SETS.values()))]
    assert [line.split()[1:] for line in last] == [
        [f"{name}:", str(count), "wheels"] for name, count in zip(("update", "peers"), counts, strict=True)
    ]
    trl = gpu_wheels.path_of("trl", whole)
    assert trl is not None
    trl.unlink()
    with pytest.raises(Refused, match=r"^pip download failed: ERROR: No matching distribution found for trl==[^\n]*$"):
        gpu_wheels.fetch(tmp_path)
    assert capsys.readouterr().out == f"fetching 1 of 1: trl {gpu_wheels.version('trl')}\n"


def test_what_neither_the_wheels_nor_the_image_have_is_said(tmp_path: Path) -> None:
    image = {"torch": "2.11.0", "tqdm": None}
    needs = [
        "torch>=2.2", "tqdm>=1", "A.Peer", "fine; python_version < '3.11'", "fine; extra == 'dev'",
        "transformers[torch]>=5.20; sys_platform == 'linux'", "torch!=2.11.0; platform_machine == 'x86_64'",
    ]  # fmt: skip
    wheels = [wheel(tmp_path, "trainer", "2.0", needs), wheel(tmp_path, "a-peer")]
    assert gpu_wheels.unmet(wheels, image) == [
        "trainer 2.0 needs transformers>=5.20", "trainer 2.0 needs torch!=2.11.0, there is 2.11.0",
    ]  # fmt: skip
    assert gpu_wheels.unmet(wheels[:1], image)[0] == "trainer 2.0 needs a-peer"


def test_what_we_do_without_is_not_missed(tmp_path: Path) -> None:
    wheels = [
        wheel(tmp_path, "verl", needs=["ray[default]>=2", "transformers<5.11"]),
        wheel(tmp_path, "nvidia-cutlass-dsl", needs=["nvidia-cutlass-dsl-libs-cu12==4", "nvidia-cutlass-dsl-libs-new"]),
    ]
    assert gpu_wheels.unmet(wheels) == ["nvidia-cutlass-dsl 1.0 needs nvidia-cutlass-dsl-libs-new"]
