"""What is packed, and what a user of the core gets without the trainer's requirements."""

from __future__ import annotations

import sys
import tarfile
from pathlib import Path
from zipfile import ZipFile

import pytest

from tests.packaging.conftest import Built, run

PACKAGES = {"gapg": "gapg", "gapg_kernels": "kernels", "gapg_packing": "csrc", "gapg_rollout": "rollout"}


def sources(tree: Path) -> set[str]:
    """Every file of the import packages, as an installed one is called."""
    found: set[str] = set()
    for package, folder in PACKAGES.items():
        root = tree if package == folder else tree / folder
        found |= {path.relative_to(root).as_posix() for path in (root / package).rglob("*") if path.is_file()}
    return found


def test_the_wheel_holds_every_module_once_and_nothing_else(built: Built) -> None:
    with ZipFile(built.wheel) as archive:
        names = archive.namelist()
    assert len(names) == len(set(names))
    (extension,) = [name for name in names if name.endswith((".so", ".pyd"))]
    assert extension.startswith("gapg_packing/_csrc.")
    assert {name for name in names if ".dist-info/" not in name} - {extension} == sources(built.tree)
    assert {f"{package}/py.typed" for package in PACKAGES} <= set(names)
    assert any(name.startswith("gapg/configs/") and name.endswith(".yaml") for name in names)


def test_the_sdist_holds_what_the_wheel_is_made_of_once_and_neither_tests_nor_benches(built: Built) -> None:
    with tarfile.open(built.sdist) as archive:
        names = [name.partition("/")[2] for name in archive.getnames()]
        links = [member.name for member in archive if member.islnk() or member.issym()]
    assert len(names) == len(set(names)) and not links
    assert {path.relative_to(built.tree).as_posix() for path in (built.tree / "csrc").glob("*.h")} <= set(names)
    assert {"pyproject.toml", "setup.py", "README.md", "LICENSE", "csrc/bindings.cpp"} <= set(names)
    assert {name.partition("/")[0] for name in names if "/" in name} == {*PACKAGES.values(), "gapg.egg-info"}


CORE = """
import sys
import numpy as np
import torch
from gapg_kernels.fused_policy_loss import fused_policy_loss
from gapg_kernels.linear_logprob import linear_logprob
from gapg_packing.pack import pack
from gapg_rollout.records import Sampling

torch.manual_seed(0)
hidden, weight, target = torch.randn(12, 16), torch.randn(50, 16), torch.randint(50, (12,))
logprob = linear_logprob(hidden, weight, target)
assert torch.allclose(logprob, (hidden @ weight.T).log_softmax(-1).gather(1, target[:, None])[:, 0], atol=1e-5)

row = torch.arange(12) // 6
rewards = torch.tensor([[1.0, 0.0]])
hidden.requires_grad_()
loss = fused_policy_loss(hidden, weight, target, rewards, torch.zeros_like(row), row, denominator=2.0).loss
loss.backward()
assert torch.allclose(loss, (logprob[6:].sum() - logprob[:6].sum()) / 2, atol=1e-5) and hidden.grad.any()

packing = pack(np.array([5, 3, 4, 4]), cap=8)
assert sorted(int(n) for members in packing.bins for n in members) == [0, 1, 2, 3] and len(packing.bins) == 2
assert Sampling(max_new_tokens=8).temperature == 1.0
missing = {"transformers", "datasets", "pydantic", "scipy", "rich", "matplotlib", "openai"}
assert not missing & sys.modules.keys()
"""

KERNEL = """
import torch
from gapg_kernels.odds_gemm import fused_odds

torch.manual_seed(0)
hidden, weight, target = torch.randn(8, 16), torch.randn(40, 16), torch.randint(40, (8,))
got = fused_odds(hidden, weight, None, target, 1.0, None).logprob
assert torch.allclose(got, (hidden @ weight.T).log_softmax(-1).gather(1, target[:, None])[:, 0], atol=1e-5)
"""


def test_the_bare_environment_lacks_the_trainers_requirements(bare: Path) -> None:
    """Else the tests below would show nothing."""
    for name in ("transformers", "pydantic", "scipy", "rich"):
        done = run([bare / "python", "-c", f"import {name}"], bare)
        assert done.returncode == 1 and f"No module named '{name}'" in done.stderr


def test_the_core_needs_torch_and_numpy_only(bare: Path) -> None:
    done = run([bare / "python", "-c", CORE], bare)
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="triton is for Linux")
def test_the_triton_kernels_run_there_too(bare: Path) -> None:
    done = run([bare / "python", "-c", KERNEL], bare, TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("command", [["gapg", "train", "quickstart"], ["python", "-m", "gapg", "info"]])
def test_a_command_says_in_one_line_what_to_install(bare: Path, command: list[str]) -> None:
    done = run([bare / command[0], *command[1:]], bare)
    assert done.returncode == 2 and not done.stdout
    (line,) = done.stderr.splitlines()
    assert line.startswith("gapg: ") and "pip install 'gapg[train]'" in line
