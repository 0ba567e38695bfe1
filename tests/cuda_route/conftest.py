"""The tests of CUDA's route share the shapes and the recorder beside this file; importlib mode leaves it out."""

from contextlib import nullcontext

import pytest
import torch

from gapg.model import attention
from gapg_kernels import flash

attention.register()


@pytest.fixture
def flash_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every device has PyTorch's FlashAttention, and none has to be made current, as fake ones cannot be."""
    monkeypatch.setattr(torch.cuda, "device_of", lambda x: nullcontext())
    monkeypatch.setattr(flash, "has_flash", lambda device: True)
