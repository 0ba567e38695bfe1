"""The tests of CUDA's route share the shapes and the recorder beside this file; importlib mode leaves it out."""

import pytest

from gapg.model import attention
from gapg_kernels import flash

attention.register()


@pytest.fixture
def flash_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every device has PyTorch's FlashAttention, and flash-attn is not installed."""
    monkeypatch.setattr(flash, "has_flash", lambda device: True)
    monkeypatch.setattr(flash, "best", lambda device, head_dim: flash.ATEN)
