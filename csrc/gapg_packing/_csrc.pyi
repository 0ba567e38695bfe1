"""The compiled packer (csrc/bindings.cpp). Arrays are contiguous and exactly of these types: nothing is converted."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

_Int64s = NDArray[np.int64]
_Floats = NDArray[np.float32]

def pack(
    lengths: _Int64s, cap: int, ranks: int = 1, linear: float = 1.0, quadratic: float = 0.0
) -> tuple[_Int64s, _Int64s]: ...
def pack_groups(
    lengths: _Int64s, prompts: _Int64s, groups: _Int64s, cap: int, ranks: int, linear: float, quadratic: float
) -> tuple[_Int64s, _Int64s]: ...
def lay_out(
    tokens: _Int64s,
    starts: _Int64s,
    prompts: _Int64s,
    coefficients: _Floats,
    members: _Int64s,
    groups: _Int64s | None = None,
) -> tuple[Any, ...]: ...
