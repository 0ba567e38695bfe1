"""Which forward of the fused head given tensors or a device get, and why."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from gapg_kernels import head, reference
from gapg_kernels.reference import RowOdds
from gapg_kernels.tiles import TILES, Capability

Route = Callable[[Tensor, Tensor, Tensor | None, Tensor, float, Tensor | None, bool, float | None], RowOdds]
"""(hidden, weight, bias, target, temperature, store, entropy, softcap), as in `reference.plain_odds`."""


def uses_kernel(hidden: Tensor) -> bool:
    """Whether the fused GEMM runs: bfloat16 on a CUDA card of `tiles.TILES`, H a multiple of 16."""
    return _obstacle(hidden.device, hidden.dtype, hidden.shape[-1]) is None


def route(hidden: Tensor) -> Route:
    """The forward for these hidden states. Triton is imported only where it runs."""
    if not len(hidden):  # TMA has no descriptor of no rows
        return reference.plain_odds
    if uses_kernel(hidden):
        from gapg_kernels.odds_gemm import fused_odds

        return fused_odds
    if hidden.is_cuda and hidden.dtype != torch.float64:
        from gapg_kernels.cublas_odds import cublas_odds

        return cublas_odds
    return reference.plain_odds


def describe(where: torch.device | str | Tensor, weight: Tensor | None = None) -> str:
    """Which forward the fused heads take, and why, in one line: for hidden [T, H], with its weight [V, H] if given,
    under the autocast that is on; or on a device for bfloat16."""
    if isinstance(where, Tensor):
        dtype = head.follow_autocast(where.new_empty(0)).dtype
        device, width = where.device, where.shape[-1]
    else:
        device, dtype, width = torch.device(where), torch.bfloat16, 16
    other = dtype if weight is None else weight.dtype
    if torch.float16 in (dtype, other):
        return "refused: float16 is too narrow for the odds form; pass bfloat16 or float32"
    if dtype != other and (dtype, other) != (torch.bfloat16, torch.float32):
        return f"refused: hidden is {_name(dtype)} and weight {_name(other)}; pass hidden.to(weight.dtype)"
    obstacle = _obstacle(device, dtype, width)
    if obstacle is None:
        card = _sm(torch.cuda.get_device_capability(device))
        line = f"Triton GEMM with odds epilogue (bfloat16 on {card}: compiled for it, not timed on a card yet)"
    elif device.type == "cuda" and dtype != torch.float64:
        line = f"cuBLAS and one Triton pass in odds form ({obstacle})"
    else:
        line = f"plain PyTorch in odds form ({obstacle})"
    return line if dtype == other else f"{line}; the float32 weight is rounded to bfloat16 for it"


def _obstacle(device: torch.device, dtype: torch.dtype, width: int) -> str | None:
    """Why the fused GEMM does not take hidden states of this kind and width H; None: it does."""
    if device.type != "cuda":
        return f"the Triton kernels need CUDA; this is {device.type}"
    if torch.version.hip is not None:  # PyTorch calls AMD's cards cuda too, and a gfx90a has the capability 9.0
        return "the fused GEMM is for NVIDIA's cards; this is AMD's"
    if dtype != torch.bfloat16:
        return f"the fused GEMM is for bfloat16; this is {_name(dtype)}"
    if width % 16:
        return f"the fused GEMM needs an H that is a multiple of 16; this is {width}"
    capability = torch.cuda.get_device_capability(device)
    if capability not in TILES:
        return f"the fused GEMM is for {', '.join(map(_sm, TILES))}; this is {_sm(capability)}"
    return None


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _sm(capability: Capability) -> str:
    return f"sm_{capability[0]}{capability[1]}"
