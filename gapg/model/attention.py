"""`gapg_varlen`: packed causal attention for any transformers causal LM, without forking its model code.

    attention.register()
    model = AutoModelForCausalLM.from_pretrained(path, attn_implementation=attention.NAME)
    model(input_ids, position_ids=position_ids, use_cache=False, **attention.packed_arguments(cu_seqlens, max_length))
    model(input_ids, position_ids=position_ids, use_cache=False, **attention.shared_arguments(layout))

Given cu_seq_lens_q, each sequence of the one packed row attends causally to itself. Given shared_prompts, the row holds
each prompt once, before all responses, and a response attends to its prompt and causally to itself
(`gapg_kernels.shared_prompt_attention`). With neither (generation, serving) the model behaves exactly as with
transformers' own "sdpa", padding masks included. The backends for packed rows:

| device, dtype                    | backend                                                                         |
|----------------------------------|---------------------------------------------------------------------------------|
| CUDA sm_80+, bfloat16 or float16 | PyTorch's FlashAttention: 4 or 3 where `activate` found one that works, else 2   |
| meta, bfloat16 or float16        | PyTorch's FlashAttention: shapes and counted work of the real route             |
| CPU; CUDA in float32 or older    | scaled_dot_product_attention, sequences of equal length batched                 |

The last is right everywhere, but on CUDA it waits for the device and is slow where lengths differ: use bfloat16.
A layer's sliding window is kept, packed and shared, and costs nothing where no sequence outgrows it.
The type that counts is autocast's where that is on, for packed rows as for scaled_dot_product_attention itself:
under autocast a float32 model's rotary embedding makes float32 queries and keys, but its projection 16-bit values.
"""

from functools import cached_property
from typing import Any

import torch
from torch.nn.attention import current_flash_attention_impl
from torch.nn.functional import scaled_dot_product_attention
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AttentionInterface, AttentionMaskInterface, PreTrainedConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from gapg.console import say_once
from gapg_kernels import equal_lengths, flash
from gapg_kernels.shared_layout import SharedPrompts
from gapg_kernels.shared_prompt_attention import shared_prompt_attention

NAME = "gapg_varlen"


def register() -> None:
    """Make `attn_implementation="gapg_varlen"` known to transformers. Calling it again changes nothing."""
    AttentionInterface.register(NAME, attention_forward)
    AttentionMaskInterface.register(NAME, _mask)


def implementation(config: PreTrainedConfig) -> str:
    """The `attn_implementation` for models of this config: NAME, or "eager" where attention cannot be exchanged.

    Older model code (Bloom's, MPT's) computes its attention itself and takes any name without a word.
    """
    kind: Any = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    return NAME if kind is None or kind._can_set_attn_implementation() else "eager"


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


def shared_arguments(layout: SharedPrompts) -> dict[str, Any]:
    """The same for a row in which responses share their prompts; the layout is on the model's device.

    Without cu_seq_lens_q: a model that does not hand unknown keywords on to its attention is then refused, and not
    computed as if its responses had no prompts.
    """
    mask = layout.cu_segments.new_empty((1, 1, 0, 0), dtype=torch.bool)
    return {"attention_mask": mask, "shared_prompts": layout}


def activate(model: torch.nn.Module, device: torch.device) -> None:
    """Gives PyTorch, for this process, the newest FlashAttention that works with the model's head sizes on the device.

    Says so, once, where that is not the one that PyTorch brings.
    """
    names = ("head_dim", "head_size")  # the second is GPT-NeoX's
    sizes = {size for m in model.modules() for name in names if isinstance(size := getattr(m, name, None), int)}
    if sizes and flash.has_flash(device) and all(size <= 256 and size % 8 == 0 for size in sizes):
        chosen = flash.activate(device, sizes)
        if current_flash_attention_impl():
            say_once(f"attention: {chosen}")


def describe(device: torch.device | str) -> str:
    """Which backend packed rows get on this device, and why, in one line; on CUDA it is then active."""
    device = torch.device(device)
    if device.type == "cpu":
        return "PyTorch's FlashAttention for CPUs, sequences of equal length batched (FlashAttention 2 to 4 need CUDA)"
    if device.type == "meta":
        return "PyTorch's FlashAttention, shapes only (meta device)"
    fallback = "scaled_dot_product_attention, sequences of equal length batched"
    if device.type != "cuda":
        return f"{fallback} (there is no varlen kernel for {device.type})"
    if not flash.has_flash(device):
        return f"{fallback} (FlashAttention needs sm_80 or newer)"
    return f"{flash.activate(device, [128])}; in float32 {fallback}"


@torch.compiler.disable  # type: ignore[untyped-decorator]  # a compiled layer is two: up to here, and from here on
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
    shared_prompts: SharedPrompts | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """The function transformers calls in every layer; see the module's docstring.

    Args:
        query: [B, Hq, T, D]; B is 1 when packed.
        key, value: [B, Hkv, T, D], Hq a multiple of Hkv (T may be longer when not packed: a cache).
        attention_mask: ignored when packed.
        cu_seq_lens_q: [sequences + 1] int32; given, the row is packed. cu_seq_lens_k must be the same, or None.
        max_length_q: the longest sequence; the CUDA kernels need it, the CPU does not.
        shared_prompts: given, the row is packed as it says, and cu_seq_lens_q must not be given.
        kwargs: of them sliding_window: a token sees no more than so many, itself and those before it.

    Returns:
        ([B, T, Hq, D], None).

    Raises:
        ValueError: the model asks for something the kernels cannot do (dropout, softcapping, sinks, position biases,
            head sizes), or the row is not packed as promised; the fix is named.
    """
    _refuse_variants(kwargs)
    if cu_seq_lens_q is None and shared_prompts is None:
        mask = attention_mask.tensor if isinstance(attention_mask, _DeferredMask) else attention_mask
        if mask is not None and mask.numel() == 0:
            raise ValueError(
                "an empty attention mask without cu_seq_lens_q or shared_prompts: pass all of packed_arguments(...) or "
                "shared_arguments(...), to a model that hands them on to its attention"
            )
        return sdpa_attention_forward(module, query, key, value, mask, dropout=dropout, scaling=scaling, **kwargs)
    _check_row(module, query, key, value)
    if dropout > 0:
        raise ValueError(f"packed attention has no dropout, but got {dropout}: set attention_dropout=0.0 in the config")
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    window = kwargs.get("sliding_window")
    if shared_prompts is not None:
        if cu_seq_lens_q is not None:
            raise ValueError("a row has either cu_seq_lens_q or shared_prompts: pass shared_arguments(...) alone")
        return shared_prompt_attention(q, k, v, shared_prompts, scaling, window)[None], None
    assert cu_seq_lens_q is not None
    if cu_seq_lens_k is not None and cu_seq_lens_k.shape != cu_seq_lens_q.shape:
        raise ValueError("cu_seq_lens_k must equal cu_seq_lens_q: packed attention is self-attention")
    return packed_attention(q, k, v, cu_seq_lens_q, max_length_q, scaling, window)[None], None


def packed_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens: torch.Tensor,
    max_length: int | None = None,
    scale: float | None = None,
    window: int | None = None,
) -> torch.Tensor:
    """Causal attention of each packed sequence, tokens cu_seqlens[b] to cu_seqlens[b + 1], to itself; differentiable.

    Args:
        q: [T, Hq, D].
        k, v: [T, Hkv, D]; query head h reads key head h // (Hq // Hkv).
        cu_seqlens: [B + 1] int32 on q's device, from 0 to T.
        max_length: the longest sequence; needed on CUDA and meta.
        scale: of the scores; D ** -0.5 by default.
        window: each token sees no more than so many, itself and those before it; 1 or more, all by default.

    Returns:
        [T, Hq, D] in the type of q, k and v; autocast's where that is on for the device.

    Raises:
        ValueError: q, k and v of different types; head sizes or types the CUDA kernels lack, max_length missing there;
            cu_seqlens of another type or total; a window below 1.
    """
    q, k, v = flash.one_type(q, k, v)
    flash.check_window(window)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if window is not None and max_length is not None and max_length <= window:
        window = None
    if cu_seqlens.dtype != torch.int32:
        raise ValueError(f"cu_seqlens must be int32, not {cu_seqlens.dtype}: pass cu_seqlens.int()")
    if q.device.type == "meta" or flash.takes(q):
        if q.dtype not in flash.HALVES:  # only on meta, which must not accept what CUDA would send the other way
            raise ValueError(f"FlashAttention needs bfloat16 or float16, not {q.dtype}: compute in bfloat16")
        if max_length is None:
            raise ValueError("packed attention on CUDA needs max_length_q: pass packed_arguments(...)")
        lengths = flash.Lengths(cu_seqlens, cu_seqlens, max_length, max_length, causal=True, window=window)
        return flash.packed(q, k, v, lengths, scale)
    if window is not None:
        return equal_lengths.banded(q, k, v, cu := cu_seqlens.tolist(), cu, window, scale)
    return _grouped(q, k, v, equal_lengths.plan(tuple(cu_seqlens.tolist()), q.shape[0], q.device), scale)


def _grouped(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, plan: equal_lengths.Plan, scale: float | None
) -> torch.Tensor:
    """Sorts the sequences by length and attends once per distinct length, without padding or masks.

    On the CPU this reaches PyTorch's FlashAttention. On 256 sequences of 18-31 tokens it was faster than a call per
    sequence and than one call on padded sequences, and an autograd.Function around it all gained nothing more. Where
    lengths rarely repeat, this becomes a call per sequence, whose overhead long sequences do not feel.
    """
    gqa = q.shape[1] != k.shape[1]
    outs = [
        scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale, enable_gqa=gqa)
        for query, key, value in zip(plan.split(q), plan.split(k), plan.split(v), strict=True)
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
            raise ValueError(f"{NAME} cannot do the model's {name}: use transformers' eager attention, and do not pack")


def _check_row(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
) -> None:
    if query.shape[0] != 1:
        raise ValueError(f"a packed batch is one row, not {query.shape[0]}: concatenate the sequences")
    if key.shape[2] != query.shape[2]:
        raise ValueError("a packed row cannot continue a cache: pass use_cache=False and no past_key_values")
    if value.shape[3] != query.shape[3]:
        raise ValueError("keys and values of different sizes cannot be packed: choose a model whose heads agree")
    if not getattr(module, "is_causal", True):
        raise ValueError("packed attention is causal, and this module is not: choose a causal language model")
