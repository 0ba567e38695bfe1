"""The CPU's oracles, on a card. Every test here is skipped without CUDA.

Run alone (`pytest tests/gpu --confcutdir tests/gpu`), this folder needs torch, triton, transformers and pytest only.
"""

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture
def no_sync() -> Iterator[None]:
    """Whatever makes the host wait for the device raises. Warm up first: compiling a kernel waits."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    yield
    torch.cuda.set_sync_debug_mode("default")
