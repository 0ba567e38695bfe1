"""TRL's GRPOTrainer with the fused head against itself without: on one batch the same loss, gradient and metrics."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import trl.trainer.utils as trl_utils
from transformers import (
    CohereConfig,
    Gemma2Config,
    GraniteConfig,
    Lfm2Config,
    LlamaConfig,
    MambaConfig,
    ModernBertDecoderConfig,
    PreTrainedTokenizerBase,
    Qwen3MoeConfig,
)
from trl import GRPOTrainer

from gapg.integrations.trl import FusedLogprobs, fuse
from tests.integrations.trl_batches import Fused, Make, apart, batch, maker, outcome

Folder = Callable[..., Path]
LOSSES: dict[str, dict[str, Any]] = {
    "grpo": {"loss_type": "grpo", "delta": 1.5},
    "bnpo": {"loss_type": "bnpo", "off_policy_mask_threshold": 0.1},
    "dr_grpo": {"loss_type": "dr_grpo", "temperature": 0.7},
    "dapo": {"loss_type": "dapo", "epsilon_high": 0.3},
    "cispo": {"loss_type": "cispo", "epsilon_high": 2.0},
    "sapo": {"loss_type": "sapo"},
    "vespo": {"loss_type": "vespo"},
    "gspo": {"loss_type": "grpo", "importance_sampling_level": "sequence"},
    "luspo": {"loss_type": "luspo", "importance_sampling_level": "sequence"},
}
OTHERS: dict[str, dict[str, Any]] = {
    "kl": {"beta": 0.1},
    "plain kl": {"beta": 0.1, "use_bias_correction_kl": False, "loss_type": "grpo"},
    "entropy bonus": {"entropy_coef": 0.1},
    "top entropy": {"top_entropy_quantile": 0.4},
}
PACK, SKIP = {"pack": True}, {"skip_zero_advantage": True}


@pytest.fixture
def make(folder: Folder, tokenizer: PreTrainedTokenizerBase, trl_settings: dict[str, Any]) -> Make:
    return maker(folder(), tokenizer, trl_settings)


@pytest.mark.parametrize("name", [*LOSSES, *OTHERS])
def test_a_batch_has_trls_loss_gradient_and_metrics(name: str, make: Make) -> None:
    """The old log-probs are of a second iteration, the sampling ratios vLLM's."""
    settings = (LOSSES | OTHERS)[name]
    stock = make(GRPOTrainer, **settings)
    fused = [make(Fused, switches, **settings) for switches in ({}, PACK, *[PACK | SKIP] * (name in LOSSES))]
    for trainer in (stock, *fused):
        trainer.use_vllm = True  # makes TRL weigh by importance_sampling_ratio
    for old in (True, False):
        inputs = batch(stock, old=old)
        theirs = outcome(stock, inputs)
        assert theirs.gradient.norm() > 1e-3
        for trainer in fused:
            found = outcome(trainer, inputs)
            assert found.loss == pytest.approx(theirs.loss, rel=2e-5, abs=1e-7)
            assert apart(found.gradient, theirs.gradient) < 1e-5
            others = {"entropy", "vespo/phi_seq_mean"} if trainer.skip_zero_advantage else set()
            assert "entropy" in theirs.metrics
            for key in theirs.metrics.keys() - others:
                assert found.metrics[key] == pytest.approx(theirs.metrics[key], rel=1e-4, abs=1e-6), key


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        (Gemma2Config, {"final_logit_softcapping": 0.7, "num_key_value_heads": 2}),
        (CohereConfig, {"logit_scale": 0.25, "layer_norm_eps": 1e-5}),
        (GraniteConfig, {"logits_scaling": 4.0}),
        (Qwen3MoeConfig, {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}),
    ],
    ids=lambda x: x.__name__ if isinstance(x, type) else "",
)
def test_softcaps_scales_and_experts_are_the_models_own(
    kind: Any,
    settings: dict[str, Any],
    folder: Folder,
    tokenizer: PreTrainedTokenizerBase,
    trl_settings: dict[str, Any],
) -> None:
    make = maker(folder(kind, **settings), tokenizer, trl_settings)
    stock = make(GRPOTrainer)
    inputs = batch(stock)
    theirs = outcome(stock, inputs)
    for switches in ({}, *[PACK] * (kind is not Gemma2Config)):
        found = outcome(make(Fused, switches), inputs)
        assert apart(found.gradient, theirs.gradient) < 1e-5
        for name in ["entropy", *["aux_loss"] * (kind is Qwen3MoeConfig)]:
            assert found.metrics[name] == pytest.approx(theirs.metrics[name], rel=1e-5)


@pytest.mark.parametrize(
    "settings",
    [
        {"bf16": True},
        {"bf16": True, "cast_lm_head_to_fp32": True},
        {"model_init_kwargs": {"dtype": torch.bfloat16}, "cast_lm_head_to_fp32": True},
    ],
    ids=["autocast", "autocast, the head in float32", "all but the head in bfloat16"],
)
def test_in_bfloat16_it_is_no_further_from_float32_than_trl(settings: dict[str, Any], make: Make) -> None:
    trainers = [make(GRPOTrainer), make(GRPOTrainer, **settings), make(Fused, **settings)]
    for trainer in trainers:
        trainer.model.lm_head.weight.data *= 1.001  # a float32 head is trained, and has more digits than bfloat16
    inputs = batch(trainers[0])
    exact, theirs, ours = (outcome(trainer, inputs) for trainer in trainers)
    assert 1e-4 < apart(ours.gradient, exact.gradient) < 1.1 * apart(theirs.gradient, exact.gradient) < 0.1
    if "cast_lm_head_to_fp32" in settings:  # of the same hidden states
        assert ours.metrics["entropy"] == pytest.approx(theirs.metrics["entropy"], rel=1e-6)


def test_improbable_completions_can_be_skipped(make: Make) -> None:
    """Their old log-probs are such that the ratio of anything else to them would overflow."""
    stock, skipping = make(GRPOTrainer, temperature=0.005), make(Fused, SKIP, temperature=0.005)
    inputs = batch(stock)
    assert inputs["old_per_token_logps"][inputs["advantages"] == 0].min() < -100
    theirs, ours = outcome(stock, inputs), outcome(skipping, inputs)
    assert ours.loss == pytest.approx(theirs.loss, rel=1e-4)


def test_adapters_train_against_their_base(make: Make) -> None:
    from peft import LoraConfig

    given = {"peft_config": LoraConfig(r=4, target_modules=["q_proj", "down_proj"])}
    stock = make(GRPOTrainer, given=given, beta=0.1)
    inputs = batch(stock)
    theirs, ours = outcome(stock, inputs), outcome(make(Fused, PACK, given=given, beta=0.1), inputs)
    assert apart(ours.gradient, theirs.gradient) < 1e-5 and 0 < len(theirs.gradient) < 2000


def test_what_goes_through_the_model(make: Make) -> None:
    """Every present token once when packed; with both switches those alone of completions with an advantage."""
    seen: list[int] = []
    stock = make(GRPOTrainer)
    inputs = batch(stock)
    present = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1).sum(1)
    answered = inputs["completion_mask"].any(1)
    live = answered & (inputs["advantages"] != 0)
    for switches, tokens in (
        ({}, 13 * int(answered.sum())),
        (PACK, int(present[answered].sum())),
        (SKIP, 13 * int(live.sum())),
        (PACK | SKIP, int(present[live].sum())),
    ):
        trainer = make(Fused, switches)
        trainer.model.get_input_embeddings().register_forward_hook(lambda _, ids, __: seen.append(ids[0].numel()))
        found = outcome(trainer, inputs)
        assert seen.pop() == tokens and not seen
        counted = live if trainer.skip_zero_advantage else answered
        alone = outcome(stock, {k: x[counted] if x.dim() else x for k, x in inputs.items()})
        assert found.metrics["entropy"] == pytest.approx(alone.metrics["entropy"], rel=1e-5)
        # without anything to learn one row goes through, so that no other process waits for this one
        nothing = outcome(trainer, inputs | {"advantages": torch.zeros_like(inputs["advantages"])})
        assert nothing.loss == 0 and not nothing.gradient.any() and seen.pop() > 0


def test_training_is_trls(make: Make) -> None:
    """Three updates, two for each generation, whose rewards and samples depend on the updates before."""
    settings = {"max_steps": 3, "num_iterations": 2, "learning_rate": 1e-2, "logging_steps": 1}

    def trained(trainer: GRPOTrainer) -> list[dict[str, float]]:
        trainer.train()
        return [row for row in trainer.state.log_history if "loss" in row]

    stock = trained(make(GRPOTrainer, **settings))
    assert len(stock) == 3 and all(row["grad_norm"] > 0 for row in stock)
    assert stock[1]["clip_ratio/region_mean"] > 0
    for switches in ({}, PACK, SKIP, PACK | SKIP):
        for ours, theirs in zip(trained(make(Fused, switches, **settings)), stock, strict=True):
            assert ours.keys() == theirs.keys()
            wanted = {"loss", "grad_norm", "reward", "clip_ratio/region_mean", "completions/mean_length"}
            for key in wanted & theirs.keys():
                assert ours[key] == pytest.approx(theirs[key], rel=1e-4, abs=1e-6), (switches, key)


@pytest.mark.parametrize(
    ("switches", "settings", "said"),
    [
        (SKIP, {"beta": 0.1}, "beta=0"),
        (SKIP, {"entropy_coef": 0.1}, "entropy_coef=0"),
        (SKIP, {"use_adaptive_entropy": True}, "use_adaptive_entropy=False"),
        (SKIP, {"top_entropy_quantile": 0.5}, "top_entropy_quantile=1"),
        ({"filter_rho": 0.5}, {}, "HierarchicalReward"),
        (PACK, {"use_transformers_continuous_batching": True}, "use_transformers_continuous_batching=False"),
        ({}, {"fp16": True}, "bf16=True"),
        (PACK, {"model_init_kwargs": {"dtype": torch.float16}}, "dtype of bfloat16"),
    ],
)
def test_options_that_do_not_go_with_it_are_refused(
    switches: dict[str, Any], settings: dict[str, Any], said: str, make: Make
) -> None:
    with pytest.raises(ValueError, match=said):
        make(Fused, switches, **settings)


def test_another_trl_is_refused_in_one_line(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(GRPOTrainer, "_compute_loss")
    monkeypatch.delattr(trl_utils, "FusedCausalLMOutput")
    with pytest.raises(
        ImportError, match=r"without FusedCausalLMOutput, GRPOTrainer._compute_loss.*pip install"
    ) as said:
        make()
    assert "\n" not in str(said.value)


@pytest.mark.parametrize(
    ("kind", "settings", "pack", "said"),
    [
        (Lfm2Config, {"layer_types": ["conv", "full_attention"]}, True, "pack"),
        (MambaConfig, {}, True, "set pack=False"),
        (LlamaConfig, {"attention_dropout": 0.1}, True, "attention_dropout=0.0"),
        (ModernBertDecoderConfig, {"bos_token_id": 1}, False, "its LM head"),
        (LlamaConfig, {}, False, None),
    ],
    ids=["a convolution", "a state", "dropout", "a layer before the head", "Llama"],
)
def test_a_model_with_other_logprobs_is_refused(
    kind: Any, settings: dict[str, Any], pack: bool, said: str | None, folder: Folder
) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder(kind, **settings))
    if said is None:
        return fuse(model, 1.0, float32_head=False, pack=pack)
    with pytest.raises(ValueError, match=said) as refused:
        fuse(model, 1.0, float32_head=False, pack=pack)
    assert "\n" not in str(refused.value)


def test_the_forward_keeps_its_signature_and_answers_other_calls(make: Make) -> None:
    """generate() checks its arguments against the signature, and evaluation wants logits."""
    stock, trainer = make(GRPOTrainer), make(Fused, PACK)
    assert inspect.signature(trainer.model.forward) == inspect.signature(stock.model.forward)
    ids = torch.arange(3, 9)[None]
    torch.testing.assert_close(trainer.model(ids).logits, stock.model(ids).logits)


def test_it_is_a_trainer_by_itself_and_before_a_class_of_ones_own() -> None:
    class Own(GRPOTrainer):
        pass

    class Both(FusedLogprobs, Own):
        pass

    assert Both.__mro__.index(FusedLogprobs) < Both.__mro__.index(Own) < Both.__mro__.index(GRPOTrainer)
