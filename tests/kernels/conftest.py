from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor


@pytest.fixture
def current(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The tensors whose devices PyTorch was told to make current and not yet to leave, where there is no device."""
    entered: list[Tensor] = []

    @contextmanager
    def device_of(x: Tensor) -> Iterator[None]:
        entered.append(x)
        yield
        entered.pop()

    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    return entered
