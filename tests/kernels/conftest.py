"""Tests here share the float64 oracle beside this file; importlib mode does not put the folder on sys.path."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))
sys.path.append(str(Path(__file__).resolve().parents[2]))  # for `bench`, and last, as in tests/bench


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
