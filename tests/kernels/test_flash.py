"""The choice among FlashAttentions, and that each is called as its source says: no GPU runs here.

The packages' functions below have the parameters of flash-attention's sources (2.8.4, and hopper/ and flash_attn/cute/
of August 2026) and compute what those document, on the CPU; so a wrong keyword, a swapped argument or a dropped result
shows, and a wrong reading of the source does not.
"""

import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from gapg_kernels import flash
from gapg_kernels.flash import Lengths, Varlen
from tests.kernels.flash_on_cpu import FLASH_ON_CPU


def fa2_forward(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale, causal,
    window_size_left=-1, window_size_right=-1, softcap=0.0, alibi_slopes=None, return_softmax=False, block_table=None,
    leftpad_k=None, seqused_k=None, zero_tensors=False, num_splits=0,
) -> Any:  # fmt: skip
    assert (dropout_p, window_size_left, window_size_right, softcap, return_softmax) == (0.0, -1, -1, 0.0, False)
    lengths = Lengths(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, causal)
    return *FLASH_ON_CPU.forward(q, k, v, lengths, softmax_scale), None, None


def fa2_backward(
    dout, q, k, v, out, softmax_lse, dq, dk, dv, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p,
    softmax_scale, causal, window_size_left, window_size_right, softcap, alibi_slopes, deterministic, rng_state=None,
    zero_tensors=False,
) -> Any:  # fmt: skip
    assert (dropout_p, window_size_left, window_size_right, softcap, alibi_slopes) == (0.0, -1, -1, 0.0, None)
    lengths = Lengths(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, causal)
    fill((dq, dk, dv), FLASH_ON_CPU.backward(dout, q, k, v, out, softmax_lse, lengths, softmax_scale))
    return torch.empty(0)


def fa3_forward(
    q, k, v, k_new=None, v_new=None, qv=None, out_=None, cu_seqlens_q=None, cu_seqlens_k=None, cu_seqlens_k_new=None,
    seqused_q=None, seqused_k=None, max_seqlen_q=None, max_seqlen_k=None, page_table=None, kv_batch_idx=None,
    leftpad_k=None, rotary_cos=None, rotary_sin=None, seqlens_rotary=None, q_descale=None, k_descale=None,
    v_descale=None, softmax_scale=None, causal=False, window_size_left=-1, window_size_right=-1, attention_chunk=0,
    softcap=0.0, rotary_interleaved=True, scheduler_metadata=None, num_splits=1, pack_gqa=None, sm_margin=0,
) -> Any:  # fmt: skip
    lengths = Lengths(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, causal)
    return *FLASH_ON_CPU.forward(q, k, v, lengths, softmax_scale), torch.tensor([]), torch.tensor([])


def fa3_backward(
    dout, q, k, v, out, softmax_lse, cu_seqlens_q=None, cu_seqlens_k=None, sequed_q=None, sequed_k=None,
    max_seqlen_q=None, max_seqlen_k=None, dq=None, dk=None, dv=None, softmax_scale=None, is_causal=False,
    window_size_left=-1, window_size_right=-1, softcap=0.0, deterministic=False, sm_margin=0,
) -> Any:  # fmt: skip
    lengths = Lengths(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, is_causal)
    fill((dq, dk, dv), FLASH_ON_CPU.backward(dout, q, k, v, out, softmax_lse, lengths, softmax_scale))
    return torch.empty(0)


def fa4_forward(
    q, k, v, qv=None, cu_seqlens_q=None, cu_seqlens_k=None, seqused_q=None, seqused_k=None, max_seqlen_q=None,
    max_seqlen_k=None, min_seqlen_k=None, page_table=None, softmax_scale=None, causal=False, softcap=None,
    window_size_left=None, window_size_right=None, learnable_sink=None, num_splits=1, pack_gqa=None, return_lse=False,
    out=None, lse=None,
) -> Any:  # fmt: skip
    lengths = Lengths(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, causal)
    found, found_lse = FLASH_ON_CPU.forward(q, k, v, lengths, softmax_scale)
    return found, found_lse if return_lse else None, None, None


def fa4_backward(
    q, k, v, out, dout, lse, softmax_scale=None, causal=False, softcap=0.0, window_size_left=None,
    window_size_right=None, m_block_size=64, n_block_size=128, num_threads=256, pack_gqa=False, cu_seqlens_q=None,
    cu_seqlens_k=None, seqused_q=None, seqused_k=None, max_seqlen_q=None, max_seqlen_k=None, deterministic=False,
    dq=None, dk=None, dv=None,
) -> Any:  # fmt: skip
    lengths = Lengths(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, causal)
    return FLASH_ON_CPU.backward(dout, q, k, v, out, lse, lengths, softmax_scale)


def fill(buffers: tuple[Tensor, ...], values: tuple[Tensor, ...]) -> None:
    for buffer, value in zip(buffers, values, strict=True):
        buffer.copy_(value)


MODULES: dict[str, dict[str, dict[str, Any]]] = {
    "flash-attn 4": {
        "flash_attn": {},
        "flash_attn.cute": {"__version__": "4.0.0"},
        "flash_attn.cute.interface": {"_flash_attn_fwd": fa4_forward, "_flash_attn_bwd": fa4_backward},
    },
    "flash-attn 3": {
        "flash_attn_interface": {"_flash_attn_forward": fa3_forward, "_flash_attn_backward": fa3_backward}
    },
    "flash-attn 2.8.4": {
        "flash_attn": {"__version__": "2.8.4"},
        "flash_attn.flash_attn_interface": {
            "_flash_attn_varlen_forward": fa2_forward,
            "_flash_attn_varlen_backward": fa2_backward,
        },
    },
}


def install(monkeypatch: pytest.MonkeyPatch, *packages: str) -> None:
    for name in (n for modules in MODULES.values() for n in modules):
        monkeypatch.setitem(sys.modules, name, None)
    for package in packages:
        for name, contents in MODULES[package].items():
            module = sys.modules.get(name) or ModuleType(name)
            vars(module).update(contents)
            monkeypatch.setitem(sys.modules, name, module)


@pytest.fixture(autouse=True)
def forget() -> Iterator[None]:
    flash.installed.cache_clear()
    yield
    flash.installed.cache_clear()


@pytest.mark.parametrize("package", MODULES)
@pytest.mark.parametrize("causal", [True, False])
def test_each_package_is_called_as_its_source_says(package: str, causal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, package)
    (backend,) = [b for b in flash.installed() if isinstance(b, Varlen)]
    assert backend.name.startswith(package)
    cu = torch.tensor([0, 3, 4, 9], dtype=torch.int32)
    lengths = Lengths(cu, cu if causal else torch.tensor([0, 2, 8, 9], dtype=torch.int32), 5, 6, causal)
    q, grad = (torch.randn(9, 4, 8).bfloat16() for _ in range(2))
    k, v = (torch.randn(9, 2, 8).bfloat16() for _ in range(2))

    def outcome(varlen: Varlen) -> tuple[Tensor, ...]:
        out, lse = varlen.forward(q, k, v, lengths, 0.3)
        return out, lse, *varlen.backward(grad, q, k, v, out, lse, lengths, 0.3)

    for got, expected in zip(outcome(backend), outcome(FLASH_ON_CPU), strict=True):
        assert torch.equal(got, expected)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    monkeypatch.setattr(flash, "best", lambda device, head_dim: backend)
    out = flash.packed(*leaves, lengths, 0.3)
    grads = torch.autograd.grad(out, leaves, grad)
    assert all(torch.equal(a, b) for a, b in zip(grads, outcome(FLASH_ON_CPU)[2:], strict=True))


def test_flash_attn_4_is_called_on_the_device_of_its_tensors(
    current: list[Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It asks for the current device's architecture."""
    seen: list[Tensor] = []

    def noted(function: Any) -> Any:
        return lambda *args, **keywords: seen.append(current[-1]) or function(*args, **keywords)

    install(monkeypatch, FA4)
    for name in ("_flash_attn_fwd", "_flash_attn_bwd"):
        module = sys.modules["flash_attn.cute.interface"]
        monkeypatch.setattr(module, name, noted(getattr(module, name)))
    backend, q, cu = flash.installed()[0], torch.randn(4, 2, 8).bfloat16(), torch.tensor([0, 4], dtype=torch.int32)
    assert isinstance(backend, Varlen)
    out, lse = backend.forward(q, q, q, Lengths(cu, cu, 4, 4, True), 0.3)
    backend.backward(out, q, q, q, out, lse, Lengths(cu, cu, 4, 4, True), 0.3)
    assert len(seen) == 2 and all(x is q for x in seen) and not current


FA4, FA3, FA2 = MODULES
NOT_4, NOT_3, NOT_2 = "flash-attn 4: ", "flash-attn 3: ", "flash-attn: "
UNFIT_4, UNFIT_3 = "cute 4.0.0) does not fit this GPU", "flash-attn 3 does not fit this GPU"


@pytest.mark.parametrize(
    ("packages", "capability", "head_dim", "chosen", "reasons"),
    [
        ([FA4, FA3, FA2], (9, 0), 128, FA4, []),
        ([FA4, FA3, FA2], (9, 0), 256, FA4, []),
        ([FA4], (10, 0), 128, FA4, []),
        ([FA4, FA3, FA2], (10, 0), 256, FA2, [UNFIT_4, UNFIT_3]),
        ([FA4, FA2], (8, 0), 64, FA2, [UNFIT_4, NOT_3]),
        ([FA3, FA2], (9, 0), 64, FA3, [NOT_4]),
        ([FA4, FA3], (8, 9), 64, "PyTorch FlashAttention", [UNFIT_4, UNFIT_3, NOT_2]),
        ([], (9, 0), 64, "PyTorch FlashAttention", [NOT_4, NOT_3, NOT_2]),
    ],
)
def test_the_first_that_is_installed_and_fits(
    packages: list[str],
    capability: tuple[int, int],
    head_dim: int,
    chosen: str,
    reasons: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    install(monkeypatch, *packages)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    device = torch.device("cuda")
    assert flash.best(device, head_dim).name.startswith(chosen)
    line = flash.describe(device, head_dim)
    assert line.startswith(chosen) and "\n" not in line
    assert [r for r in (NOT_4, UNFIT_4, NOT_3, UNFIT_3, NOT_2) if r in line] == reasons


def test_an_old_flash_attn_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, "flash-attn 2.8.4")
    monkeypatch.setattr(sys.modules["flash_attn"], "__version__", "2.7.4.post1")
    assert flash.installed()[-1] == "flash-attn: version 2.7.4.post1 is older than 2.8"


def test_elsewhere_pytorchs_own() -> None:
    assert flash.best(torch.device("meta"), 64) is flash.ATEN
    for head_dim in (264, 20):
        with pytest.raises(ValueError, match=f"at most 256, not {head_dim}: compute in float32"):
            flash.best(torch.device("meta"), head_dim)
