"""Models of many kinds decode in batches as they compute without a cache, or are refused before the first step."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from gapg_rollout.engines.transformers import TransformersEngine
from tests.rollout.engine_checks import generate

SIZE: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "head_dim": 16,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "initializer_range": 0.2, "bos_token_id": None,
}  # fmt: skip
LINEAR = {"linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_num_key_heads": 2, "linear_num_value_heads": 4}
MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_chunk_size": 4}
MIXED = {"layer_types": ["linear_attention", "full_attention"]}
EQUAL_LENGTHS: dict[str, dict[str, Any]] = {
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "qwen3_5_text": {**LINEAR, **MIXED},
    "granitemoehybrid": {
        **MAMBA, "layer_types": ["mamba", "attention"], "num_local_experts": 4, "shared_intermediate_size": 32
    },
    "falcon_h1": {**MAMBA, "mamba_d_ssm": 64},
    "mamba": {"state_size": 8},
    "zamba2": {
        "num_hidden_layers": 3, "layers_block_type": ["mamba", "hybrid", "mamba"], "mamba_d_state": 8, "chunk_size": 4,
        "adapter_rank": 4,
    },
    "minimax": {"num_local_experts": 4, "block_size": 4, **MIXED},
}  # fmt: skip
PADDED: dict[str, dict[str, Any]] = {
    "mistral": {"sliding_window": 6},
    "gemma2": {"sliding_window": 6, "attn_logit_softcapping": 0.5, "pad_token_id": 0},
    "bloom": {},
}


def build(kind: str, tokenizer: PreTrainedTokenizerBase, settings: dict[str, Any], attention: str) -> PreTrainedModel:
    torch.manual_seed(0)
    ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    config = AutoConfig.for_model(kind, **{**SIZE, "vocab_size": len(tokenizer), **ends, **settings})
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    with torch.no_grad():  # biases and gates start at zero, where a fault would hide
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model.eval()


@pytest.mark.parametrize("kind", [*EQUAL_LENGTHS, *PADDED])
def test_logprobs_are_those_without_a_cache(
    kind: str, tokenizer: PreTrainedTokenizerBase, prompts: list[list[int]]
) -> None:
    """Prompts of unlike lengths, several responses each, rows that end early; bloom has no sdpa, gemma2 caps scores."""
    attention = "eager" if kind in ("bloom", "gemma2", "mamba") else "sdpa"
    model = build(kind, tokenizer, {**EQUAL_LENGTHS, **PADDED}[kind], attention)
    engine = TransformersEngine(model, tokenizer)
    assert engine.model.config._attn_implementation == attention
    assert engine._pads == (kind in PADDED)
    found = generate(engine, prompts[:6], 3, max_new_tokens=12, stop=("7", "+", "1"))
    assert len({len(c.token_ids) for cs in found for c in cs}) > 2
    for prompt, completions in zip(prompts, found, strict=False):
        for c in completions:
            with torch.no_grad():
                ids = torch.tensor([[*prompt, *c.token_ids]])
                logits = model(input_ids=ids, use_cache=False).logits[0, -len(c.token_ids) - 1 : -1]
            wanted = torch.log_softmax(logits.float(), -1).gather(1, ids[0, len(prompt) :, None]).squeeze(1)
            torch.testing.assert_close(torch.tensor(c.logprobs), wanted, rtol=0, atol=2e-5)


def test_prompts_of_one_length_share_a_wave(tokenizer: PreTrainedTokenizerBase) -> None:
    engine = TransformersEngine(build("lfm2", tokenizer, EQUAL_LENGTHS["lfm2"], "sdpa"), tokenizer)
    assert list(engine._waves([3, 1, 3, 2, 3, 1], 2)) == [[1, 5], [3], [0, 2], [4]]


@pytest.mark.parametrize("kind", ["rwkv", "recurrent_gemma", "openai-gpt"])
def test_a_model_without_a_usable_cache_is_refused(kind: str, tokenizer: PreTrainedTokenizerBase) -> None:
    settings = {"block_types": ["recurrent", "attention"]} if kind == "recurrent_gemma" else {}
    model = build(kind, tokenizer, settings, "eager")
    with pytest.raises(ValueError, match=f"'{kind}' model cannot be decoded .* rollout.engine=vllm") as error:
        TransformersEngine(model, tokenizer)
    assert "\n" not in str(error.value)


class Forgetful(LlamaForCausalLM):
    """Looks at nothing but the last token."""

    def forward(self, input_ids: torch.Tensor, past_key_values: Any = None, **kwargs: Any) -> Any:
        return super().forward(input_ids, use_cache=kwargs.get("use_cache"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_wrong_cache_is_seen(dtype: torch.dtype, tokenizer: PreTrainedTokenizerBase) -> None:
    """In the trainer's type: bfloat16 hides nothing."""
    config = AutoConfig.for_model("llama", **SIZE, vocab_size=len(tokenizer), eos_token_id=None)
    TransformersEngine(LlamaForCausalLM(config), tokenizer, dtype=dtype)
    with pytest.raises(ValueError, match="off by"):
        TransformersEngine(Forgetful(config), tokenizer, dtype=dtype)


@pytest.mark.parametrize("what", ["a weight", "all"])
def test_ruined_weights_are_refused(
    what: str, tokenizer: PreTrainedTokenizerBase, make_model: Callable[..., PreTrainedModel]
) -> None:
    model = make_model(seed=1)
    with torch.no_grad():
        for parameter in [model.lm_head.weight[3:4]] if what == "a weight" else model.parameters():
            parameter.fill_(torch.nan)
    with pytest.raises(ValueError, match="weights are ruined"):
        TransformersEngine(model, tokenizer)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_later_ruin_shows_in_the_logprobs(
    temperature: float,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[list[int]],
    make_model: Callable[..., PreTrainedModel],
) -> None:
    model = make_model(seed=1)
    engine = TransformersEngine(model, tokenizer)
    engine.sync({name: torch.full_like(tensor, torch.nan) for name, tensor in model.state_dict().items()})
    for (completion,) in generate(engine, prompts[:3], temperature=temperature):
        assert all(x != x for x in completion.logprobs)
