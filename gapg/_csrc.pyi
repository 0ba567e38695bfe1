"""The compiled packer (csrc/bindings.cpp). Arrays are contiguous and exactly of these types: nothing is converted."""

import numpy as np
from numpy.typing import NDArray

_Int64s = NDArray[np.int64]
_Int32s = NDArray[np.int32]
_Floats = NDArray[np.float32]

def pack(
    lengths: _Int64s, cap: int, ranks: int = 1, linear: float = 1.0, quadratic: float = 0.0
) -> tuple[_Int64s, _Int64s]: ...
def pack_groups(
    lengths: _Int64s, prompts: _Int64s, groups: _Int64s, cap: int, ranks: int, linear: float, quadratic: float
) -> tuple[_Int64s, _Int64s]: ...
def measure(
    tokens: _Int64s, starts: _Int64s, prompts: _Int64s, coefficients: _Floats, members: _Int64s
) -> tuple[int, int]: ...
def lay_out(
    tokens: _Int64s,
    starts: _Int64s,
    prompts: _Int64s,
    coefficients: _Floats,
    members: _Int64s,
    input_ids: _Int64s,
    position_ids: _Int64s,
    cu_seqlens: _Int32s,
    response_index: _Int64s,
    targets: _Int64s,
    sequence_ids: _Int64s,
    response_coefficients: _Floats,
) -> None: ...
def measure_shared(
    tokens: _Int64s, starts: _Int64s, prompts: _Int64s, coefficients: _Floats, groups: _Int64s, members: _Int64s
) -> tuple[int, int, int]: ...
def lay_out_shared(
    tokens: _Int64s,
    starts: _Int64s,
    prompts: _Int64s,
    coefficients: _Floats,
    groups: _Int64s,
    members: _Int64s,
    input_ids: _Int64s,
    position_ids: _Int64s,
    cu_segments: _Int32s,
    cu_responses: _Int32s,
    response_index: _Int64s,
    targets: _Int64s,
    sequence_ids: _Int64s,
    response_coefficients: _Floats,
) -> None: ...
