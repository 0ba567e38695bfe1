"""Heads whose logits are scaled, softcapped or both: log-probs and gradients of the model's own logits.

And attention that softcaps its scores or has large heads: it gets padded rows, before anything is sampled.
"""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GraniteConfig,
    LlamaConfig,
    NanoChatConfig,
    PreTrainedConfig,
    PreTrainedModel,
    RecurrentGemmaConfig,
    VaultGemmaConfig,
    xLSTMConfig,
)

from gapg.batches.batching import packed_batches
from gapg.errors import ConfigError
from gapg.model import attention
from gapg.model.policy import logit_map, response_logprobs, response_loss
from gapg.model.route import choose_route
from gapg_kernels import flash
from gapg_kernels.policy_loss import PolicyLossOptions, group_advantages
from tests.model.test_padded import CPU, SIZE, assert_same_gradient, cells, graded, own_logprobs

T = 0.7


def tiny(kind: type[PreTrainedConfig], **settings: object) -> PreTrainedModel:
    attention.register()
    torch.manual_seed(0)
    config = kind(**{**SIZE, "max_position_embeddings": 64, **settings})
    return AutoModelForCausalLM.from_config(config, attn_implementation=attention.implementation(config)).train()


def scaled_and_capped(scale: float) -> PreTrainedModel:
    """``cap * tanh(scale * product / cap)``, the order of the one family that has both (MuseGlimmer)."""
    model = tiny(NanoChatConfig, final_logit_softcapping=1.5)
    model.config.logit_scale = scale
    model.get_output_embeddings().register_forward_hook(lambda head, args, out: out * scale)
    return model


MODELS: dict[str, tuple[Callable[[], PreTrainedModel], tuple[float, float | None], bool]] = {
    "gemma2": (
        lambda: tiny(Gemma2Config, final_logit_softcapping=1.5, attn_logit_softcapping=None), (1.0, 1.5), True
    ),
    "gemma2, scores too": (
        lambda: tiny(Gemma2Config, final_logit_softcapping=1.5, attn_logit_softcapping=1.5), (1.0, 1.5), False
    ),
    "vaultgemma": (lambda: tiny(VaultGemmaConfig, final_logit_softcapping=1.5), (1.0, 1.5), False),
    "gemma3": (lambda: tiny(Gemma3TextConfig, final_logit_softcapping=1.5), (1.0, 1.5), True),
    "nanochat": (lambda: tiny(NanoChatConfig, final_logit_softcapping=1.5), (1.0, 1.5), True),
    "recurrent gemma": (
        lambda: tiny(RecurrentGemmaConfig, logits_soft_cap=1.5, block_types=["recurrent", "attention"]),
        (1.0, 1.5),
        False,
    ),
    "xlstm": (lambda: tiny(xLSTMConfig, output_logit_soft_cap=1.5, num_heads=2), (1.0, 1.5), False),
    "granite": (lambda: tiny(GraniteConfig, logits_scaling=0.25), (4.0, None), True),
    "cohere": (lambda: tiny(CohereConfig, logit_scale=0.5), (0.5, None), True),
    "scaled by 4 and capped": (lambda: scaled_and_capped(4.0), (4.0, 1.5), True),
    "scaled by 0.25 and capped": (lambda: scaled_and_capped(0.25), (0.25, 1.5), True),
}  # fmt: skip
"""How it is made, its scale and softcap, and whether its rows are packed."""


@pytest.mark.parametrize("name", MODELS)
def test_log_probs_and_gradients_are_those_of_the_model_s_own_logits(name: str) -> None:
    make, logits, packs = MODELS[name]
    model = make()
    assert logit_map(model) == logits
    twin = copy.deepcopy(model)
    twin.set_attn_implementation("eager")
    assert choose_route(model, longest=24) is packs
    examples, rewards = graded()
    of = {(e.group, e.sample): e for e in examples}
    advantages = group_advantages(rewards)
    for batch in packed_batches(examples, 60 if not packs else 400, CPU, padded=not packs):
        logprob = response_logprobs(model, batch, T)
        loss = response_loss(model, batch, rewards, 9, PolicyLossOptions(), temperature=T)
        loss.loss.backward()
        for cell in cells(batch).unique(dim=0):
            e, at = of[tuple(cell.tolist())], (cells(batch) == cell).all(-1)
            own = own_logprobs(twin, e, T)
            torch.testing.assert_close(logprob[at], own, atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(loss.logprob[at], own, atol=1e-5, rtol=1e-5)
            (-e.weight * advantages[e.group, e.sample] / 9 * own.sum()).backward()
    assert_same_gradient(model, twin)


@pytest.mark.parametrize("name", ["nanochat", "scaled by 4 and capped"])
def test_the_log_probs_have_that_gradient_too(name: str) -> None:
    model = MODELS[name][0]()
    twin = copy.deepcopy(model)
    examples, _ = graded()
    for batch in packed_batches(examples, 400, CPU):
        (batch.weight * response_logprobs(model, batch, T)).sum().backward()
    for e in examples:
        (e.weight * own_logprobs(twin, e, T).sum()).backward()
    assert_same_gradient(model, twin)


def test_a_softcap_that_the_model_does_not_say_is_refused() -> None:
    model = tiny(NanoChatConfig, final_logit_softcapping=None)
    model.get_output_embeddings().register_forward_hook(lambda head, args, out: 1.5 * torch.tanh(out / 1.5))
    with pytest.raises(ConfigError, match=r"^model nanochat: its logits are not its last hidden states times[^\n]*$"):
        choose_route(model)


def test_softcapped_scores_are_never_left_to_sdpa() -> None:
    """Which drops the softcap: at Gemma 2's own 50 small scores hide it, and large ones would not."""
    model = tiny(Gemma2Config)
    assert model.config.attn_logit_softcapping == 50.0
    assert not choose_route(model)
    assert model.config._attn_implementation == "eager"


@pytest.mark.usefixtures("nothing_said")
def test_heads_that_cuda_s_kernels_lack_get_padded_rows(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Found before the first rollout, though the probes are compared in float32, whose route has them all."""
    settings: dict[str, Any] = {"head_dim": 512, "num_attention_heads": 1, "num_key_value_heads": 1}
    assert choose_route(tiny(LlamaConfig, **settings))
    monkeypatch.setattr(flash, "has_flash", lambda device: True)
    assert not choose_route(tiny(LlamaConfig, **settings))
    said = "".join(capfd.readouterr()).strip()
    assert "pad their sequences" in said and "at most 256, not 512" in said and "\n" not in said


def test_noise_in_training_mode_is_refused_for_what_it_is() -> None:
    """A config that was not read by `load_shape`, or a noise whose setting it does not know."""
    size = {"n_embd": 32, "n_head": 2, "n_layer": 2, "n_positions": 64}
    with pytest.raises(ConfigError, match=r"^model gpt2: in training mode it computes something else[^\n]*$"):
        choose_route(tiny(GPT2Config, **size, resid_pdrop=0.1, attn_pdrop=0.0, embd_pdrop=0.0))
