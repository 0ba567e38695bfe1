"""`gapg_varlen`: packed causal attention for any transformers causal LM, without forking its model code.

    attention.register()
    model = AutoModelForCausalLM.from_pretrained(path, attn_implementation=attention.NAME)
    model(input_ids, position_ids=position_ids, use_cache=False, **attention.packed_arguments(cu_seqlens, max_length))

Given cu_seq_lens_q, each sequence of the one packed row attends causally to itself; without it (generation, serving)
the model behaves exactly as with transformers' own "sdpa", padding masks included. The backends for packed rows:

| device, dtype                    | backend                                                             |
|----------------------------------|---------------------------------------------------------------------|
| CUDA sm_80+, bfloat16 or float16 | flash-attn when installed, else PyTorch's own FlashAttention        |
| meta, bfloat16 or float16        | the latter: shapes and counted work of the real route               |
| CPU; CUDA in float32 or older    | scaled_dot_product_attention, sequences of equal length batched     |

The last is right everywhere, but on CUDA it waits for the device and is slow where lengths differ: use bfloat16.
The type that counts is autocast's where that is on, for packed rows as for scaled_dot_product_attention itself:
under autocast a float32 model's rotary embedding makes float32 queries and keys, but its projection 16-bit values.
"""

from collections.abc import Callable
from functools import cache, cached_property, lru_cache
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "gapg_varlen"

_aten = torch.ops.aten
_HALVES = (torch.bfloat16, torch.float16)


def register() -> None:
    """Make `attn_implementation="gapg_varlen"` known to transformers. Calling it again changes nothing."""
    AttentionInterface.register(NAME, attention_forward)
    AttentionMaskInterface.register(NAME, _mask)


def packed_arguments(cu_seqlens: torch.Tensor, max_length: int) -> dict[str, Any]:
    """The keyword arguments that make a model's forward treat its one row as packed sequences.

    `attention_mask` is an empty 4D tensor: transformers passes those on untouched. Without it, transformers looks for
    sequence starts in position_ids, which waits for the GPU in every forward and is impossible on the meta device.

    Args:
        cu_seqlens: [B + 1] int32 on the model's device, where each sequence starts, and the number of tokens.
        max_length: the longest sequence.
    """
    return {
        "attention_mask": cu_seqlens.new_empty((1, 1, 0, 0), dtype=torch.bool),
        "cu_seq_lens_q": cu_seqlens,
        "cu_seq_lens_k": cu_seqlens,
        "max_length_q": max_length,
        "max_length_k": max_length,
    }


def describe(device: torch.device | str) -> str:
    """Which backend packed rows get on this device, and why, in one line."""
    device = torch.device(device)
    if device.type == "cpu":
        return "PyTorch's FlashAttention for CPUs, sequences of equal length batched (flash-attn needs CUDA)"
    if device.type == "meta":
        return "PyTorch's FlashAttention, shapes only (meta device)"
    fallback = "scaled_dot_product_attention, sequences of equal length batched"
    if device.type != "cuda":
        return f"{fallback} (there is no varlen kernel for {device.type})"
    if not _has_flash(device):
        return f"{fallback} (FlashAttention needs sm_80 or newer)"
    function, why = _flash_attn()
    return f"{'flash-attn' if function else 'PyTorch FlashAttention'} ({why}); in float32 {fallback}"


def attention_forward(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: "torch.Tensor | _DeferredMask | None",
    scaling: float | None = None,
    dropout: float = 0.0,
    cu_seq_lens_q: torch.Tensor | None = None,
    cu_seq_lens_k: torch.Tensor | None = None,
    max_length_q: int | None = None,
    max_length_k: int | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """The function transformers calls in every layer; see the module's docstring.

    Args:
        query: [B, Hq, T, D]; B is 1 when packed.
        key, value: [B, Hkv, T, D], Hq a multiple of Hkv (T may be longer when not packed: a cache).
        attention_mask: ignored when packed.
        cu_seq_lens_q: [sequences + 1] int32; given, the row is packed. cu_seq_lens_k must be the same, or None.
        max_length_q: the longest sequence; the CUDA kernels need it, the CPU does not.

    Returns:
        ([B, T, Hq, D], None).

    Raises:
        ValueError: the model asks for something the kernels cannot do (dropout, a sliding window shorter than a
            sequence, softcapping, sinks, position biases, head sizes), or the row is not packed as promised; the fix
            is named.
    """
    _refuse_variants(kwargs)
    if cu_seq_lens_q is None:
        mask = attention_mask.tensor if isinstance(attention_mask, _DeferredMask) else attention_mask
        if mask is not None and mask.numel() == 0:
            raise ValueError("an empty attention mask without cu_seq_lens_q: pass all of packed_arguments(...)")
        return sdpa_attention_forward(module, query, key, value, mask, dropout=dropout, scaling=scaling, **kwargs)
    _check_row(module, query, key, value, cu_seq_lens_q, cu_seq_lens_k)
    if dropout > 0:
        raise ValueError(f"packed attention has no dropout, but got {dropout}: set attention_dropout=0.0 in the config")
    window = kwargs.get("sliding_window")
    if window is not None and (max_length_q is None or max_length_q > window):
        raise ValueError(
            f"sequences of up to {max_length_q} tokens do not fit the model's sliding window of {window}, which packed "
            'attention cannot do: shorten the sequences, or set config.layer_types to all "full_attention"'
        )
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    return packed_attention(q, k, v, cu_seq_lens_q, max_length_q, scaling)[None], None


def packed_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens: torch.Tensor,
    max_length: int | None = None,
    scale: float | None = None,
) -> torch.Tensor:
    """Causal attention of each packed sequence, tokens cu_seqlens[b] to cu_seqlens[b + 1], to itself; differentiable.

    Args:
        q: [T, Hq, D].
        k, v: [T, Hkv, D]; query head h reads key head h // (Hq // Hkv).
        cu_seqlens: [B + 1] int32 on q's device, from 0 to T.
        max_length: the longest sequence; needed on CUDA and meta.
        scale: of the scores; D ** -0.5 by default.

    Returns:
        [T, Hq, D] in the type of q, k and v; autocast's where that is on for the device.

    Raises:
        ValueError: q, k and v of different types; head sizes or types the CUDA kernels lack, max_length missing there;
            cu_seqlens of another type or total.
    """
    q, k, v = _one_type(q, k, v)
    if cu_seqlens.dtype != torch.int32:
        raise ValueError(f"cu_seqlens must be int32, not {cu_seqlens.dtype}: pass cu_seqlens.int()")
    if q.device.type == "meta" or (q.dtype in _HALVES and _has_flash(q.device)):
        return _flash(q, k, v, cu_seqlens, max_length, scale)
    plan = _plan(tuple(cu_seqlens.tolist()), q.shape[0], q.device)
    return _grouped(q, k, v, plan, scale)


def _one_type(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What autocast does to the inputs of scaled_dot_product_attention, and not to the kernels called here."""
    kind = q.device.type
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        low = torch.get_autocast_dtype(kind)
        q, k, v = (x if x.dtype == torch.float64 else x.to(low) for x in (q, k, v))
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(
            f"queries are {q.dtype}, keys {k.dtype} and values {v.dtype}: run the model under torch.autocast, "
            "or load it in one type"
        )
    return q, k, v


# --- CUDA ------------------------------------------------------------------------------------------------------------


def _flash(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu: torch.Tensor, longest: int | None, scale: float | None
) -> torch.Tensor:
    if q.dtype not in _HALVES:  # only on meta, which must not accept what CUDA would send the other way
        raise ValueError(f"FlashAttention needs bfloat16 or float16, not {q.dtype}: compute in bfloat16")
    head_dim = q.shape[-1]
    if head_dim > 256 or head_dim % 8 != 0:
        raise ValueError(
            f"FlashAttention needs a head size that is a multiple of 8 and at most 256, not {head_dim}: "
            "compute in float32, which does not use it"
        )
    if longest is None:
        raise ValueError("packed attention on CUDA needs max_length_q: pass packed_arguments(...)")
    flash_attn, _ = _flash_attn()
    if flash_attn is not None and q.is_cuda:
        return flash_attn(q, k, v, cu, cu, longest, longest, softmax_scale=scale, causal=True)
    # No autograd.Function: PyTorch knows this op's backward, which takes the saved log-sum-exp.
    out, *_ = _aten._flash_attention_forward(q, k, v, cu, cu, longest, longest, 0.0, True, False, scale=scale)
    return out


@cache
def _flash_attn() -> tuple[Callable[..., torch.Tensor] | None, str]:
    """flash-attn's varlen function, or None; and why."""
    try:
        import flash_attn
        from flash_attn import flash_attn_varlen_func
    except ImportError as error:
        return None, f"flash-attn: {error}"
    return flash_attn_varlen_func, f"flash-attn {flash_attn.__version__} is installed"


@cache
def _has_flash(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)


# --- sequences of equal length, batched ------------------------------------------------------------------------------


class _Plan(NamedTuple):
    """Packed tokens sorted by their sequence's length, so that equal lengths lie together as one batch."""

    order: torch.Tensor
    """[T] where the sorted tokens come from"""
    inverse: torch.Tensor
    """[T] where the packed tokens went"""
    groups: tuple[tuple[int, int], ...]
    """(sequences, their length), in sorted order"""

    def split(self, x: torch.Tensor) -> list[torch.Tensor]:
        """[T, H, D], sorted, as one [sequences, H, length, D] view per group."""
        pieces = x.split([count * length for count, length in self.groups])
        return [
            piece.view(count, length, *x.shape[1:]).transpose(1, 2)
            for piece, (count, length) in zip(pieces, self.groups, strict=True)
        ]

    def join(self, pieces: list[torch.Tensor]) -> torch.Tensor:
        """Undoes split, and the sorting."""
        flat = [piece.transpose(1, 2).reshape(-1, piece.shape[1], piece.shape[3]) for piece in pieces]
        return torch.cat(flat).index_select(0, self.inverse)


@lru_cache(maxsize=64)  # keyed by the values, so every layer of a micro-batch finds it, and nothing can go stale
def _plan(cu_seqlens: tuple[int, ...], tokens: int, device: torch.device) -> _Plan:
    if cu_seqlens[0] != 0 or cu_seqlens[-1] != tokens or any(b < a for a, b in pairwise(cu_seqlens)):
        raise ValueError(f"cu_seqlens must rise from 0 to the number of tokens, {tokens}: got {list(cu_seqlens)[:8]}…")
    lengths = torch.tensor(cu_seqlens).diff()
    by_length = torch.argsort(lengths, stable=True)
    sorted_lengths = lengths[by_length]
    shift = torch.tensor(cu_seqlens)[by_length] - (sorted_lengths.cumsum(0) - sorted_lengths)
    order = torch.arange(tokens) + shift.repeat_interleave(sorted_lengths)
    values, counts = sorted_lengths[sorted_lengths > 0].unique_consecutive(return_counts=True)
    groups = tuple(zip(counts.tolist(), values.tolist(), strict=True)) or ((0, 1),)
    return _Plan(order.to(device), torch.argsort(order).to(device), groups)


def _grouped(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, plan: _Plan, scale: float | None) -> torch.Tensor:
    """Sorts the sequences by length and attends once per distinct length, without padding or masks.

    On the CPU this reaches PyTorch's FlashAttention. On 256 sequences of 18-31 tokens it was faster than a call per
    sequence and than one call on padded sequences, and an autograd.Function around it all gained nothing more. Split,
    never slice: autograd's backward of a slice fills a whole tensor, once per slice. Where lengths rarely repeat, this
    becomes a call per sequence, whose overhead long sequences do not feel.
    """
    inputs = [plan.split(x.index_select(0, plan.order)) for x in (q, k, v)]
    gqa = q.shape[1] != k.shape[1]
    outs = [
        scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale, enable_gqa=gqa)
        for query, key, value in zip(*inputs, strict=True)
    ]
    return plan.join(outs)


# --- masks and refusals ----------------------------------------------------------------------------------------------


class _DeferredMask:
    """A mask built when somebody looks at it: a packed row never does, and would else pay for a [T, T] tensor."""

    def __init__(self, arguments: dict[str, Any]) -> None:
        self._arguments = arguments

    @cached_property
    def tensor(self) -> torch.Tensor | None:
        return sdpa_mask(**self._arguments)


def _mask(**arguments: Any) -> torch.Tensor | _DeferredMask | None:
    """transformers' sdpa mask; deferred where it noticed position_ids that restart in a single row without padding."""
    one_row = arguments["batch_size"] == 1 and arguments["q_length"] == arguments["kv_length"] > 1
    plain = arguments.get("attention_mask") is None and not arguments.get("use_vmap", False)
    if one_row and plain and not arguments.get("allow_is_causal_skip", True):
        return _DeferredMask(arguments)
    return sdpa_mask(**arguments)


def _refuse_variants(kwargs: dict[str, Any]) -> None:
    for name in ("softcap", "s_aux", "position_bias"):
        if kwargs.get(name) is not None:
            raise ValueError(
                f"{NAME} cannot do the model's {name}: choose a model without it, or load it with another "
                "attn_implementation and do not pack"
            )


def _check_row(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seqlens: torch.Tensor,
    cu_seqlens_k: torch.Tensor | None,
) -> None:
    if query.shape[0] != 1:
        raise ValueError(f"a packed batch is one row, not {query.shape[0]}: concatenate the sequences")
    if key.shape[2] != query.shape[2]:
        raise ValueError("a packed row cannot continue a cache: pass use_cache=False and no past_key_values")
    if value.shape[3] != query.shape[3]:
        raise ValueError("keys and values of different sizes cannot be packed: choose a model whose heads agree")
    if cu_seqlens_k is not None and cu_seqlens_k.shape != cu_seqlens.shape:
        raise ValueError("cu_seq_lens_k must equal cu_seq_lens_q: packed attention is self-attention")
    if not getattr(module, "is_causal", True):
        raise ValueError("packed attention is causal, and this module is not: choose a causal language model")
