"""Whole small models on a card: which route their updates take, and a step that is not finite."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Lfm2Config,
    LlamaConfig,
    NanoChatConfig,
    PreTrainedModel,
    Qwen3_5TextConfig,
)

from gapg.model import attention

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")]
# the trainer's requirements are more than a card's machine may have
batching, config, marginal_loss, optim, policy, route = (
    pytest.importorskip(f"gapg.{name}")
    for name in ("batches.batching", "config", "marginal_loss", "optim", "model.policy", "model.route")
)

SIZE: dict[str, Any] = dict(
    vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=2, head_dim=32, initializer_range=0.2, pad_token_id=0, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
LINEAR = dict(linear_key_head_dim=16, linear_value_head_dim=16, linear_num_key_heads=2, linear_num_value_heads=4)
MODELS = {
    "llama": (LlamaConfig, {}, True),
    "llama, heads of 512": (LlamaConfig, {"head_dim": 512}, False),
    "nanochat": (NanoChatConfig, {"final_logit_softcapping": 1.5}, True),
    "gemma2": (Gemma2Config, {"final_logit_softcapping": 1.5}, False),
    "lfm2": (Lfm2Config, {"layer_types": ["conv", "full_attention"]}, False),
    "qwen3.5": (Qwen3_5TextConfig, {"layer_types": ["linear_attention", "full_attention"], **LINEAR}, False),
}
"""Config, settings, and whether its sequences can be packed."""


def make(name: str) -> PreTrainedModel:
    attention.register()
    torch.manual_seed(0)
    kind, settings, _ = MODELS[name]
    model = AutoModelForCausalLM.from_config(kind(**{**SIZE, **settings}), attn_implementation=attention.NAME)
    return model.cuda().train()


@pytest.mark.parametrize("name", MODELS)
def test_the_route_of_a_model(name: str) -> None:
    """As on the CPU, where the table of architectures comes from; then 16-bit log-probs are near the float32 ones."""
    model, packs = make(name), MODELS[name][2]
    assert route.choose_route(model, longest=64) is packs
    draw = torch.Generator().manual_seed(1)
    examples = [
        batching.Example(*torch.randint(3, 64, (2, n), generator=draw).tolist(), group=n) for n in (2, 5, 9, 17, 30)
    ]  # fmt: skip
    for batch in batching.packed_batches(examples, 4096, model.device, padded=not packs):
        exact = policy.response_logprobs(model, batch)
        half = policy.response_logprobs(model, batch, compute=torch.bfloat16)
        assert exact.isfinite().all() and (half - exact).abs().mean() < 0.2
        exact.sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_a_step_that_is_not_finite_is_skipped_on_the_card() -> None:
    layer = torch.nn.Linear(8, 8, device="cuda")
    optimizer = optim.make_optimizer(layer, config.OptimConfig(lr=0.1))
    for x in (1.0, float("nan")):  # the first step makes the optimizer's state
        layer(torch.full((2, 8), x, device="cuda")).sum().backward()
        before = layer.weight.detach().clone()
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error" if x != x else "default")
        try:
            norm = optim.clip_and_step(optimizer, 0.1, 1.0)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert not norm.isfinite() and torch.equal(layer.weight, before)


@pytest.mark.parametrize("dtype, worst", [("float32", 1e-4), ("bfloat16", 3e-2)])
def test_the_marginal_estimator_on_the_card_is_that_of_the_cpu(dtype: str, worst: float) -> None:
    """Tokens 7 and 8 begin the phrase after a 5, and 9 begins it anywhere in every second response."""
    draw = torch.Generator().manual_seed(2)
    ids = [torch.randint(3, 7, (n,), generator=draw).tolist() for n in (5, 9, 2, 30, 17, 8, 3, 12)]
    examples = [
        batching.Example(
            [1, 4 + i // 4], y, group=i // 4, sample=i % 4,
            deciding=[(9,) if i % 2 else (7, 8) if t and y[t - 1] == 5 else () for t in range(len(y))],
        )
        for i, y in enumerate(ids)
    ]  # fmt: skip
    right = torch.randint(2, (2, 4), generator=draw).float()
    found = []
    for device, compute in (("cpu", "float32"), ("cuda", dtype)):
        model = make("llama").to(device)
        run = config.RunConfig(task="countdown", method="marginal", model={"dtype": compute})
        masked = marginal_loss.Masked(torch.ones(2, device=device), torch.full((2, 4), torch.nan, device=device))
        loss = marginal_loss.MarginalLoss(model, run, right.to(device), masked)
        for batch in batching.packed_batches(examples, 4096, model.device, whole_groups=True):
            loss(batch, 8.0).loss.backward()
        found.append(torch.cat([p.grad.flatten().cpu() for p in model.parameters()]))
    exact, got = found
    assert (got - exact).norm() < worst * exact.norm()
