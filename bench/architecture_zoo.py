"""A tiny random causal language model of every architecture that `bench/architectures.py` tries.

The sizes are small; what decides whether sequences may share a row is kept: at least one layer of each kind, windows,
multipliers of the logits, softcaps, sinks, biases and the head sizes of latent attention. Chunks of recurrent layers
and the number of keys that sparse attention keeps are shorter than the sequences.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from gapg.model import attention
from gapg.model.folder import set_plain

Settings = dict[str, Any]

SIZE: Settings = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LEAVE_OUT = object()
SLIDING = ["sliding_attention", "full_attention"]
INDEXED: Settings = {"index_topk": 16, "index_head_dim": 16, "index_n_heads": 2}
EXPERTS: Settings = {"num_experts_per_tok": 2, "moe_intermediate_size": 16}
ROUTED: Settings = {**EXPERTS, "n_routed_experts": 4, "n_group": 1, "topk_group": 1}
LATENT: Settings = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8}
LATENT |= {"v_head_dim": 16, "head_dim": 8}
LINEAR: Settings = {"linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_num_key_heads": 2}
LINEAR |= {"linear_num_value_heads": 4, "layer_types": ["linear_attention", "full_attention"]}
MAMBA: Settings = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_chunk_size": 8}
CHUNKED: Settings = {"intermediate_size_mlp": 32, "num_local_experts": 4, "intermediate_size": 16}
CHUNKED |= {"layer_types": ["chunked_attention", "full_attention"]}
SHARED_KEYS: Settings = {"num_hidden_layers": 4, "num_kv_shared_layers": 2, "layer_types": SLIDING * 2}
SHARED_KEYS |= {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 64}
VISION: Settings = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
VISION |= {"image_size": 8, "patch_size": 4}

PLAIN = (
    "apertus", "arcee", "biogpt", "bitnet", "bloom", "cohere", "diffllama", "ernie4_5", "gemma", "gemma2", "glm",
    "glm4", "gpt2", "gpt_bigcode", "gpt_neox", "gpt_neox_japanese", "helium", "hrm_text", "hunyuan_v1_dense",
    "jais2", "llama", "ministral3", "mistral", "modernbert-decoder", "mpt", "nanochat", "nemotron", "olmo", "olmo2",
    "openai-gpt", "persimmon", "phi", "phi3", "qwen2", "qwen3", "rwkv", "seed_oss", "smollm3", "stablelm",
    "starcoder2", "vaultgemma",
)  # fmt: skip
"""They need no settings but `SIZE`."""

ZOO: dict[str, Settings] = {
    **{name: {} for name in PLAIN},
    "afmoe": {**EXPERTS, "num_experts": 4, "layer_types": SLIDING},
    "aria_text": {"moe_num_experts": 4, "intermediate_size": 16},
    "axk1": {**ROUTED, **LATENT},
    "axk2": {**ROUTED, **LATENT, **INDEXED},
    "bamba": {**MAMBA, "attn_layer_indices": [1]},
    "codegen": {"num_attention_heads": 4, "head_dim": 8, "rotary_dim": 8},
    "cohere2": {"layer_types": SLIDING},
    "cohere2_moe": {"layer_types": SLIDING, "num_experts": 4, "intermediate_size": 16},
    "cpmant": {"dim_head": 16, "dim_ff": 64, "prompt_length": 4},
    "ctrl": {"dff": 64},
    "cwm": {"layer_types": ["full_attention", "sliding_attention"]},
    "dbrx": {"d_model": 32, "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0}, "ffn_config":
        {"ffn_hidden_size": 16, "moe_num_experts": 4, "moe_top_k": 2}},
    "deepseek_v2": {**ROUTED, **LATENT, "first_k_dense_replace": 1},
    "deepseek_v3": {**ROUTED, **LATENT, "first_k_dense_replace": 1},
    "deepseek_v32": {**ROUTED, **LATENT, **INDEXED},
    "deepseek_v4": {**ROUTED, **INDEXED, "q_lora_rank": 16, "o_lora_rank": 8, "o_groups": 2},
    "doge": {"num_experts": 4, "num_experts_per_tok": 2},
    "dots1": {**ROUTED, "n_shared_experts": 1, "first_k_dense_replace": 1},
    "ernie4_5_moe": {"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 16},
    "exaone4": {"layer_types": SLIDING},
    "exaone_moe": {**EXPERTS, "num_experts": 4, "layer_types": SLIDING},
    "falcon": {"head_dim": LEAVE_OUT},
    "falcon (alibi)": {"model_type": "falcon", "head_dim": LEAVE_OUT, "alibi": True},
    "falcon_h1": {**MAMBA, "mamba_d_ssm": 64, "lm_head_multiplier": 0.5, "key_multiplier": 0.5},
    "falcon_mamba": {"state_size": 8},
    "flex_olmo": {"num_experts": 4, "num_experts_per_tok": 2},
    "gemma2 (softcaps of 2)": {"model_type": "gemma2", "attn_logit_softcapping": 2.0, "final_logit_softcapping": 2.0},
    "gemma3": {"text_config": {**SIZE, "layer_types": SLIDING}, "vision_config": VISION, "mm_tokens_per_image": 4},
    "gemma3_text": {"layer_types": SLIDING},
    "gemma3n_text": {**SHARED_KEYS, "laurel_rank": 4},
    "gemma4": {"text_config": {**SIZE, **SHARED_KEYS, "global_head_dim": 16, "final_logit_softcapping": 2.0}},
    "gemma4_text": {**SHARED_KEYS, "global_head_dim": 16},
    "gemma4_unified": {"text_config": {**SIZE, "global_head_dim": 16, "final_logit_softcapping": 2.0}},
    "gemma4_unified_text": {"global_head_dim": 16},
    "glm4_moe": {**ROUTED},
    "glm4_moe_lite": {**ROUTED, **LATENT},
    "glm_moe_dsa": {**ROUTED, **LATENT, **INDEXED, "first_k_dense_replace": 1},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": 64},
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 16},
    "gptj": {"rotary_dim": 8},
    "granite": {"logits_scaling": 8.0},
    "granite_swa": {"logits_scaling": 8.0},
    "granitemoe": {"logits_scaling": 6.0, "num_local_experts": 4},
    "granitemoe_swa": {"logits_scaling": 6.0, "num_local_experts": 4},
    "granitemoehybrid": {**MAMBA, "layer_types": ["mamba", "attention"], "logits_scaling": 8.0, "num_local_experts": 4,
        "shared_intermediate_size": 32},
    "granitemoeshared": {"logits_scaling": 6.0, "num_local_experts": 4, "shared_intermediate_size": 32},
    "hunyuan_v1_moe": {"num_experts": 4, "moe_topk": 2},
    "hy_v3": {**EXPERTS, "num_experts": 4},
    "hy_v4": {**ROUTED, **LATENT, **INDEXED},
    "hyperclovax": {"logits_scaling": 0.5},
    "inkling_text": {**ROUTED, "swa_num_attention_heads": 2, "swa_num_key_value_heads": 2, "swa_head_dim": 16},
    "jamba": {"num_experts": 4, "attn_layer_period": 2, "attn_layer_offset": 1, "mamba_d_state": 8},
    "jetmoe": {"kv_channels": 16, "num_local_experts": 4},
    "kimi_linear": {**EXPERTS, **LATENT, "q_lora_rank": None, "num_local_experts": 4, "linear_head_dim": 8,
        "linear_num_heads": 2, "layer_types": ["linear_attention", "full_attention"]},
    "laguna": {**EXPERTS, "num_experts": 4, "shared_expert_intermediate_size": 16, "layer_types": SLIDING},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {**EXPERTS, "num_experts": 4, "num_dense_layers": 1, "layer_types": ["conv", "full_attention"]},
    "llama (dynamic rope over 16)": {"model_type": "llama", "max_position_embeddings": 16, "rope_parameters":
        {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}},
    "llama4": {"text_config": {**SIZE, **CHUNKED}, "vision_config": VISION},
    "llama4_text": CHUNKED,
    "llama4_text (chunk of 16)": {**CHUNKED, "model_type": "llama4_text", "attention_chunk_size": 16},
    "longcat_flash": {**LATENT, "num_layers": 1, "num_hidden_layers": 2, "ffn_hidden_size": 32,
        "expert_ffn_hidden_size": 16, "n_routed_experts": 4, "zero_expert_num": 2, "moe_topk": 2},
    "mamba": {"state_size": 8},
    "mamba2": {"num_heads": 4, "state_size": 8, "n_groups": 2, "chunk_size": 8},
    "mellum": {**EXPERTS, "num_experts": 4, "layer_types": SLIDING},
    "mimo_v2_flash": {**ROUTED, "num_key_value_heads": 1, "v_head_dim": 8},
    "minicpm3": {**LATENT},
    "minimax": {"num_local_experts": 4, "block_size": 8, "layer_types": ["linear_attention", "full_attention"]},
    "minimax_m2": {"num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 16},
    "minimax_m3_vl_text": {"num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 16,
        "dense_intermediate_size": 32, "shared_intermediate_size": 16, "rotary_dim": 8, "layer_types":
        ["full_attention", "minimax_m3_sparse"], "index_n_heads": 2, "index_head_dim": 16, "index_block_size": 4,
        "index_topk_blocks": 4},
    "ministral": {"layer_types": SLIDING},
    "mistral (window of 16)": {"model_type": "mistral", "sliding_window": 16},
    "mixtral": {"num_local_experts": 4},
    "modernbert-decoder (window of 16)": {"model_type": "modernbert-decoder", "local_attention": 32},
    "nemotron_h": {"num_hidden_layers": 4, "layers_block_type": ["mamba", "moe", "attention", "mlp"], "ssm_state_size":
        8, "mamba_num_heads": 4, "mamba_head_dim": 16, "n_groups": 2, "chunk_size": 8, "n_routed_experts": 4,
        "moe_intermediate_size": 16, "moe_shared_expert_intermediate_size": 16},
    "olmo3": {"layer_types": SLIDING},
    "olmo_hybrid": {"layer_types": ["linear_attention", "full_attention"]},
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
    "opt": {"ffn_dim": 64},
    "phi3 (longrope over 16)": {"model_type": "phi3", "original_max_position_embeddings": 16, "rope_parameters":
        {"rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0] * 8, "long_factor": [4.0] * 8,
        "original_max_position_embeddings": 16}},
    "phimoe": {"num_local_experts": 4},
    "qwen2 (window of 16)": {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 16,
        "max_window_layers": 1},
    "qwen2_moe": {**EXPERTS, "num_experts": 4, "shared_expert_intermediate_size": 16},
    "qwen3_5": {"text_config": {**SIZE, **LINEAR}},
    "qwen3_5_text": LINEAR,
    "qwen3_5_moe": {"text_config": {**SIZE, **LINEAR, **EXPERTS, "num_experts": 4, "shared_expert_intermediate_size":
        16}},
    "qwen3_5_moe_text": {**LINEAR, **EXPERTS, "num_experts": 4, "shared_expert_intermediate_size": 16},
    "qwen3_moe": {**EXPERTS, "num_experts": 4},
    "qwen3_next": {**LINEAR, **EXPERTS, "num_experts": 4, "shared_expert_intermediate_size": 16},
    "qwen4_exp_text": {**LINEAR, **EXPERTS, "num_experts": 4, "shared_expert_intermediate_size": 16, "hc_lowrank": 8,
        "indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 16, "indexer_budget": 8,
        "indexer_compress_ratio": 2},
    "recurrent_gemma": {"block_types": ["recurrent", "attention"]},
    "solar_open": {**ROUTED},
    "xglm": {"ffn_dim": 64},
    "xlstm": {"num_heads": 2},
    "youtu": {**LATENT},
    "zamba": {"num_hidden_layers": 4, "layers_block_type": ["mamba", "hybrid"] * 2, "mamba_d_state": 8},
    "zamba2": {"num_hidden_layers": 3, "layers_block_type": ["mamba", "hybrid", "mamba"], "mamba_d_state": 8,
        "chunk_size": 8, "adapter_rank": 4},
    "zaya": {"moe_intermediate_size": 16, "num_experts": 4, "router_hidden_size": 8},
}  # fmt: skip


def settings(name: str) -> PreTrainedConfig:
    """The config of `ZOO[name]` as a checkpoint would have it, noise included."""
    sizes = {key: value for key, value in {**SIZE, **ZOO[name]}.items() if value is not LEAVE_OUT}
    return AutoConfig.for_model(sizes.pop("model_type", name), **sizes)


def build(name: str, implementation: str | None = None, seed: int = 0) -> PreTrainedModel:
    """The model of `ZOO[name]` as the trainer loads it. Raises ConfigError where it does not.

    The attention is what the trainer loads a model with, or as named.
    """
    config = settings(name)
    set_plain(config)
    return random_model(config, implementation or attention.implementation(config), seed)


def random_model(config: PreTrainedConfig, implementation: str, seed: int = 0) -> PreTrainedModel:
    """In float32, every parameter moved by noise of 0.2.

    The noise makes weights large enough for the context to matter, and leaves no bias or gate at the zero that it
    starts from, behind which a fault could hide.
    """
    attention.register()
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=implementation).float()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    return model
