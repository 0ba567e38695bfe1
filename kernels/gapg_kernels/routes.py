"""Which forward of the fused head a device gets, and why."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from gapg_kernels import reference
from gapg_kernels.reference import RowOdds

KERNEL_CAPABILITY = (9, 0)
"""The CUDA architecture the Triton kernels are compiled and checked for."""

Route = Callable[[Tensor, Tensor, Tensor | None, Tensor, float, Tensor | None, bool, float | None], RowOdds]
"""(hidden, weight, bias, target, temperature, store, entropy, softcap), as in `reference.plain_odds`."""


def uses_kernel(hidden: Tensor) -> bool:
    """Whether the Triton forward runs: bfloat16 on a CUDA device of compute capability 9.0, H a multiple of 16."""
    return (
        hidden.is_cuda
        and hidden.dtype == torch.bfloat16
        and hidden.shape[1] % 16 == 0
        and torch.cuda.get_device_capability(hidden.device) == KERNEL_CAPABILITY
    )


def route(hidden: Tensor) -> Route:
    """The forward for these hidden states. Triton is imported only where it runs."""
    if uses_kernel(hidden):
        from gapg_kernels.odds_gemm import fused_odds

        return fused_odds
    if hidden.is_cuda and hidden.dtype != torch.float64:
        from gapg_kernels.cublas_odds import cublas_odds

        return cublas_odds
    return reference.plain_odds


def describe(device: torch.device | str) -> str:
    """Which forward the fused heads take on this device, and why, in one line."""
    device = torch.device(device)
    if device.type != "cuda":
        return f"plain PyTorch in odds form (the Triton kernels need CUDA; this is {device.type})"
    major, minor = torch.cuda.get_device_capability(device)
    if (major, minor) != KERNEL_CAPABILITY:
        return f"cuBLAS and one Triton pass in odds form (the fused GEMM is for sm_90; this is sm_{major}{minor})"
    return "Triton GEMM with odds epilogue (sm_90) for bfloat16; cuBLAS and one Triton pass for float32"
