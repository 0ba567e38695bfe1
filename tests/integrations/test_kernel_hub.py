"""kernels/hub.py: the package as the Hugging Face Kernel Hub wants it, loaded by Hugging Face's own loader."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "kernels" / "gapg_kernels"
BACKENDS = ["cpu", "cuda"]


def lay_out(folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, ROOT / "kernels" / "hub.py", folder], capture_output=True, text=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hub") / "gapg-kernels"
    done = lay_out(folder)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_variant_holds_every_module_and_no_absolute_import(folder: Path, backend: str) -> None:
    """The Hub's rules: inside a kernel imports are relative, outside it there are the standard library and torch."""
    variant = folder / "build" / f"torch-{backend}"
    names = {path.relative_to(variant).as_posix() for path in variant.rglob("*") if path.is_file()}
    assert names == {path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py")} | {"metadata.json"}
    metadata = json.loads((variant / "metadata.json").read_text())
    assert metadata["backend"] == {"type": backend} and metadata["id"].isidentifier()
    allowed, relative, operators = {"torch", "triton", *sys.stdlib_module_names}, 0, 0
    for path in variant.glob("*.py"):
        source = path.read_text()
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Import):
                assert {alias.name.partition(".")[0] for alias in node.names} <= allowed, path
            elif isinstance(node, ast.ImportFrom) and node.level:
                relative += 1
            elif isinstance(node, ast.ImportFrom):
                assert node.module and node.module.partition(".")[0] in allowed, path
        assert "gapg::" not in source and "torch.ops.gapg." not in source
        operators += source.count(f'custom_op("{metadata["id"]}::')
    assert relative > 20 and operators > 3


def test_the_variants_have_ids_of_their_own(folder: Path) -> None:
    """They are module names and operator namespaces."""
    found = [json.loads((folder / f"build/torch-{backend}/metadata.json").read_text())["id"] for backend in BACKENDS]
    assert len(set(found)) == len(BACKENDS)


LOAD = """
import sys
sys.modules["gapg_kernels"] = None  # as if it were not installed

import importlib
from pathlib import Path

import torch
from kernels import Metadata, get_local_kernel
from kernels._rust import Digest

variant = Path(sys.argv[1]) / "build" / "torch-cpu"
metadata = Metadata.read_from_file(variant / "metadata.json")
metadata.digest.validate(Digest.hash_variant(metadata.digest.algorithm, variant))

kernel = get_local_kernel(Path(sys.argv[1]), backend="cpu")
modules = {path.stem: importlib.import_module(f"{kernel.__name__}.{path.stem}") for path in variant.glob("[!_]*.py")}
assert set(kernel.__all__) <= vars(kernel).keys()

torch.manual_seed(0)
hidden, weight, target = torch.randn(12, 16), torch.randn(50, 16), torch.randint(50, (12,))
want = (hidden @ weight.T).log_softmax(-1).gather(1, target[:, None])[:, 0]
got = kernel.linear_logprob(hidden, weight, target)
torch.testing.assert_close(got, want)
torch.testing.assert_close(modules["odds_gemm"].fused_odds(hidden, weight, None, target, 1.0, None).logprob, want)

hidden.requires_grad_()
kernel.linear_loss(hidden, weight, target, lambda logprob: -logprob.sum()).loss.backward()
(by_hand,) = torch.autograd.grad((hidden @ weight.T).log_softmax(-1).gather(1, target[:, None]).sum(), hidden)
torch.testing.assert_close(hidden.grad, -by_hand)
assert not hasattr(torch.ops.gapg, "linear_logprob")

del sys.modules["gapg_kernels"]  # beside an installed one: neither takes the other's operators
import gapg_kernels
assert torch.equal(gapg_kernels.linear_logprob(hidden, weight, target), got)
assert torch.equal(kernel.linear_logprob(hidden, weight, target), got)
assert torch.ops.gapg.linear_logprob is not getattr(torch.ops, kernel.__name__).linear_logprob
"""


def test_the_hubs_loader_loads_it_where_gapg_kernels_is_not_installed(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("kernels.load", reason="the package `kernels` is not installed")
    script = tmp_path / "load.py"
    script.write_text(LOAD)
    env = os.environ | {"TRITON_INTERPRET": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, script, folder], env=env, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_old_files_are_not_uploaded_with_new_ones(folder: Path) -> None:
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    done = lay_out(folder)
    assert done.returncode == 1 and done.stderr.strip().endswith("old files would be uploaded with it")
    assert before == {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
