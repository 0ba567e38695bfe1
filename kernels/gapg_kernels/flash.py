"""FlashAttention on packed sequences, whichever there is, as a forward and a backward that share the log-sum-exp.

Merging two pieces of an attention by their log-sum-exp (`gapg_kernels.shared_prompt_attention`) needs both halves of a
kernel by themselves: the forward's lse, and a backward that is called with the *merged* out and lse. `best` chooses, of
what is installed and fits the GPU, the first of

| backend           | GPU, head size                          | entry points                                          |
|-------------------|-----------------------------------------|-------------------------------------------------------|
| flash-attn 4      | sm_90: to 256; sm_100, sm_110: to 128   | flash_attn.cute.interface: _flash_attn_fwd, _bwd      |
| flash-attn 3      | sm_90: to 256                           | flash_attn_interface: _flash_attn_forward, _backward  |
| flash-attn >= 2.8 | sm_80 or newer: to 256                  | flash_attn.flash_attn_interface: _flash_attn_varlen_* |
| PyTorch's own     | sm_80 or newer: to 256; and meta        | aten._flash_attention_forward, _backward              |

All four take int32 cu_seqlens and 16-bit q, k, v whose last dimension is contiguous, and keep the log-sum-exp as
[Hq, Tq] float32, contiguous. PyTorch's runs in the tests on the meta device; the first three are written from their
sources (flash-attention 2.8.4 and its hopper/ and flash_attn/cute/ folders of August 2026) and ran nowhere yet.
"""

# mypy: disable-error-code="no-untyped-call"
from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import cache
from itertools import takewhile
from typing import Any, NamedTuple

import torch
from torch import Tensor

HALVES = (torch.bfloat16, torch.float16)

_aten = torch.ops.aten


class Lengths(NamedTuple):
    """Which keys each query sees: those of the same entry b, tokens cu_q[b]:cu_q[b + 1] and cu_k[b]:cu_k[b + 1]."""

    cu_q: Tensor
    """[B + 1] int32, contiguous"""
    cu_k: Tensor
    """[B + 1] int32, contiguous"""
    max_q: int
    """no entry has more queries; an upper bound, which sizes the launch"""
    max_k: int
    causal: bool
    """query i sees keys 0..i of its entry, which then has as many queries as keys; else all of them"""


class Varlen(NamedTuple):
    """One FlashAttention. Its functions are not differentiable by themselves."""

    name: str
    fits: Callable[[tuple[int, int], int], bool]
    """(compute capability, head size) -> can it run, both ways?"""
    forward: Callable[[Tensor, Tensor, Tensor, Lengths, float], tuple[Tensor, Tensor]]
    """(q [Tq, Hq, D], k [Tk, Hkv, D], v, lengths, scale) -> (out [Tq, Hq, D] in q's type, lse [Hq, Tq] float32)"""
    backward: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Lengths, float], tuple[Tensor, Tensor, Tensor]]
    """(d(out), q, k, v, out, lse, lengths, scale) -> d(q), d(k), d(v) in q's type; out and lse may be merged ones"""


@cache
def has_flash(device: torch.device) -> bool:
    """Whether a FlashAttention runs on this device at all."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)


def best(device: torch.device, head_dim: int) -> Varlen:
    """The first backend of the table above that is installed and fits; on anything but CUDA, PyTorch's own.

    Raises ValueError for a head size that no FlashAttention has.
    """
    check_head_dim(head_dim)
    if device.type != "cuda":
        return ATEN
    capability = torch.cuda.get_device_capability(device)
    return next((b for b in installed() if isinstance(b, Varlen) and b.fits(capability, head_dim)), ATEN)


def check_head_dim(head_dim: int) -> None:
    """Raises ValueError for a head size that no FlashAttention has."""
    if head_dim > 256 or head_dim % 8 != 0:
        raise ValueError(
            f"FlashAttention needs a head size that is a multiple of 8 and at most 256, not {head_dim}: "
            "compute in float32, which does not use it"
        )


def one_type(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What autocast does to the inputs of scaled_dot_product_attention, and not to the kernels called here.

    Raises ValueError when they are of different types even so.
    """
    kind = q.device.type
    if kind != "meta" and torch.is_autocast_enabled(kind):  # the meta device knows no autocast
        low = torch.get_autocast_dtype(kind)
        q, k, v = (x if x.dtype == torch.float64 else x.to(low) for x in (q, k, v))
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(
            f"queries are {q.dtype}, keys {k.dtype} and values {v.dtype}: run the model under torch.autocast, "
            "or load it in one type"
        )
    return q, k, v


@cache
def installed() -> tuple[Varlen | str, ...]:
    """flash-attn 4, 3 and 2, best first: each, or why it cannot be imported."""
    found: list[Varlen | str] = []
    for name, load in (("flash-attn 4", _flash_attn_4), ("flash-attn 3", _flash_attn_3), ("flash-attn", _flash_attn_2)):
        try:
            found.append(load())
        except (ImportError, AttributeError) as error:
            found.append(f"{name}: {error}")
    return tuple(found)


def describe(device: torch.device, head_dim: int = 128) -> str:
    """Which backend `best` chooses on a CUDA device, and why not a better one."""
    chosen = best(device, head_dim)
    better = takewhile(lambda b: b is not chosen, installed())
    why = "; ".join(b if isinstance(b, str) else f"{b.name} does not fit this GPU" for b in better)
    return f"{chosen.name} ({why})" if why else chosen.name


class _Packed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, lengths: Lengths, scale: float, backend: Varlen) -> Tensor:
        out, lse = backend.forward(q, k, v, lengths, scale)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.rest = lengths, scale, backend
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        lengths, scale, backend = ctx.rest
        return *backend.backward(grad, *ctx.saved_tensors, lengths, scale), None, None, None


def packed(q: Tensor, k: Tensor, v: Tensor, lengths: Lengths, scale: float) -> Tensor:
    """Attention by the best backend of q's device; differentiable. Arguments as in `Varlen.forward`."""
    backend = best(q.device, q.shape[-1])
    if backend is ATEN:  # PyTorch knows this operator's backward
        return _aten._flash_attention_forward(q, k, v, *_aten_lengths(lengths), scale=scale)[0]
    return _Packed.apply(q, k, v, lengths, scale, backend)


# --- PyTorch's own ---------------------------------------------------------------------------------------------------


def _aten_lengths(lengths: Lengths) -> tuple[Tensor, Tensor, int, int, float, bool, bool]:
    return lengths.cu_q, lengths.cu_k, lengths.max_q, lengths.max_k, 0.0, lengths.causal, False


def _aten_forward(q: Tensor, k: Tensor, v: Tensor, lengths: Lengths, scale: float) -> tuple[Tensor, Tensor]:
    out, lse, *_ = _aten._flash_attention_forward(q, k, v, *_aten_lengths(lengths), scale=scale)
    return out, lse


def _aten_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, lengths: Lengths, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    *between, _ = _aten_lengths(lengths)
    no_dropout = q.new_empty(2, dtype=torch.uint64), q.new_empty((), dtype=torch.uint64)  # their seed, never read
    grads: tuple[Tensor, Tensor, Tensor] = _aten._flash_attention_backward(
        grad, q, k, v, out, lse, *between, *no_dropout, scale=scale
    )
    return grads


ATEN = Varlen(
    "PyTorch FlashAttention", lambda capability, head_dim: capability >= (8, 0), _aten_forward, _aten_backward
)


# --- flash-attn 4, 3, 2 ----------------------------------------------------------------------------------------------


def _flash_attn_4() -> Varlen:
    module = importlib.import_module("flash_attn.cute.interface")
    fwd, bwd = module._flash_attn_fwd, module._flash_attn_bwd

    def fits(capability: tuple[int, int], head_dim: int) -> bool:
        return capability[0] == 9 or (capability[0] in (10, 11) and head_dim <= 128)

    def forward(q: Tensor, k: Tensor, v: Tensor, lengths: Lengths, scale: float) -> tuple[Tensor, Tensor]:
        with torch.cuda.device_of(q):  # it asks what the current device is; the others go by q's
            out, lse, *_ = fwd(q, k, v, softmax_scale=scale, return_lse=True, **_keywords(lengths))
        return out, lse

    def backward(
        grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, lengths: Lengths, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        with torch.cuda.device_of(q):
            dq, dk, dv, *_ = bwd(
                q, k, v, out, grad, lse, softmax_scale=scale, deterministic=_deterministic(), **_keywords(lengths)
            )
        return dq, dk, dv

    version = importlib.import_module("flash_attn.cute").__version__
    return Varlen(f"flash-attn 4 (flash_attn.cute {version})", fits, forward, backward)


def _flash_attn_3() -> Varlen:
    module = importlib.import_module("flash_attn_interface")
    fwd, bwd = module._flash_attn_forward, module._flash_attn_backward

    def forward(q: Tensor, k: Tensor, v: Tensor, lengths: Lengths, scale: float) -> tuple[Tensor, Tensor]:
        out, lse, *_ = fwd(q, k, v, softmax_scale=scale, **_keywords(lengths))
        return out, lse

    def backward(
        grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, lengths: Lengths, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        keywords = _keywords(lengths)
        keywords["is_causal"] = keywords.pop("causal")
        deterministic = _deterministic()
        bwd(grad, q, k, v, out, lse, dq=dq, dk=dk, dv=dv, softmax_scale=scale, deterministic=deterministic, **keywords)
        return dq, dk, dv

    return Varlen("flash-attn 3", lambda capability, head_dim: capability[0] == 9, forward, backward)


def _flash_attn_2() -> Varlen:
    package, module = (importlib.import_module(n) for n in ("flash_attn", "flash_attn.flash_attn_interface"))
    version = package.__version__  # not there when only flash-attn 4 is
    if tuple(map(int, version.split(".")[:2])) < (2, 8):
        raise ImportError(f"version {version} is older than 2.8")
    fwd, bwd = module._flash_attn_varlen_forward, module._flash_attn_varlen_backward
    plain: dict[str, Any] = {
        "dropout_p": 0.0, "window_size_left": -1, "window_size_right": -1, "softcap": 0.0, "alibi_slopes": None,
    }  # fmt: skip

    def forward(q: Tensor, k: Tensor, v: Tensor, lengths: Lengths, scale: float) -> tuple[Tensor, Tensor]:
        out, lse, *_ = fwd(q, k, v, softmax_scale=scale, return_softmax=False, **_keywords(lengths), **plain)
        return out, lse

    def backward(
        grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, lengths: Lengths, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        keywords = {**_keywords(lengths), **plain, "softmax_scale": scale, "deterministic": _deterministic()}
        bwd(grad, q, k, v, out, lse, dq, dk, dv, **keywords)
        return dq, dk, dv

    return Varlen(f"flash-attn {version}", lambda capability, head_dim: capability >= (8, 0), forward, backward)


def _keywords(lengths: Lengths) -> dict[str, Any]:
    """What the three call alike."""
    return {
        "cu_seqlens_q": lengths.cu_q,
        "cu_seqlens_k": lengths.cu_k,
        "max_seqlen_q": lengths.max_q,
        "max_seqlen_k": lengths.max_k,
        "causal": lengths.causal,
    }


def _deterministic() -> bool:
    return torch.are_deterministic_algorithms_enabled()
