"""Lays out `gapg_kernels` as a kernel repository for the Hugging Face Hub: python kernels/hub.py FOLDER

    FOLDER/README.md, LICENSE
    FOLDER/build/torch-cpu/      metadata.json, __init__.py, linear_logprob.py, ... every module of gapg_kernels
    FOLDER/build/torch-cuda/     the same for CUDA

There is nothing to build: the package is Python, and Triton compiles where it runs. Two things are rewritten, because
the `kernels` package loads a kernel under a name of its own, the ``id`` in its metadata, and several versions in one
process: imports inside the package become relative, and the custom operators move from the namespace ``gapg`` to the
id's. The id holds a hash of the source. The format is that of "Kernel requirements" in the documentation of kernels
0.17 (huggingface.co/docs/kernels), but for one rule: it asks for Python 3.9, and this package needs 3.11.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shutil
import sys
from pathlib import Path

SOURCE = Path(__file__).resolve().parent / "gapg_kernels"
LICENSE = SOURCE.parents[1] / "LICENSE"
BACKENDS = ("cpu", "cuda")
VERSION = 0
"""The Hub's major version. It keeps 0 for kernels whose interface may still change."""

CARD = """---
library_name: kernels
license: apache-2.0
---

# gapg-kernels

Log-probabilities and policy losses from hidden states and an LM head, without [T, V] logits. Triton kernels on CUDA,
plain PyTorch on a CPU. Needs Python 3.11, torch 2.11 and, on CUDA, triton 3.6.

```python
from kernels import get_kernel

gapg_kernels = get_kernel("<owner>/gapg-kernels", version=0, trust_remote_code=True)
logprob = gapg_kernels.linear_logprob(hidden, lm_head.weight, target)  # [T, H], [V, H], [T] -> [T]
```
"""


def relative_imports(source: str) -> str:
    """``from gapg_kernels.x import y`` as ``from .x import y``; likewise ``from gapg_kernels import x``."""
    return re.sub(
        r"^(\s*from )gapg_kernels(\.\w+)? import", lambda m: f"{m[1]}{m[2] or '.'} import", source, flags=re.MULTILINE
    )


def write_variant(folder: Path, backend: str) -> None:
    """One build variant: the modules and their metadata."""
    modules = {path.name: relative_imports(path.read_text()) for path in sorted(SOURCE.glob("*.py"))}
    state = hashlib.sha256(json.dumps(modules).encode()).hexdigest()[:12]
    identity = f"_gapg_kernels_{backend}_{state}"
    digests = {}
    folder.mkdir(parents=True)
    for name, source in modules.items():
        content = (
            source.replace("gapg::", f"{identity}::").replace("torch.ops.gapg.", f"torch.ops.{identity}.").encode()
        )
        (folder / name).write_bytes(content)
        digests[name] = base64.b64encode(hashlib.sha256(content).digest()).decode()
    metadata = {
        "name": "gapg-kernels",
        "id": identity,
        "version": VERSION,
        "license": "Apache-2.0",
        "python-depends": [],
        "backend": {"type": backend},
        "digest": {"algorithm": "sha256", "files": digests},
    }
    (folder / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n")


def main() -> None:
    if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
        raise SystemExit("usage: python kernels/hub.py FOLDER")
    folder = Path(sys.argv[1])
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
        raise SystemExit(f"hub.py: {folder} is not empty; name a new folder, for old files would be uploaded with it")
    for backend in BACKENDS:
        write_variant(folder / "build" / f"torch-{backend}", backend)
    (folder / "README.md").write_text(CARD)
    shutil.copy(LICENSE, folder)
    print(
        f"{folder}: upload it with `hf upload <owner>/gapg-kernels {folder} --repo-type kernel --revision v{VERSION}`"
    )


if __name__ == "__main__":
    main()
