"""The policy loss against TRL's own GRPO code: advantages, clip, truncated importance sampling, KL, token mean."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from gapg_kernels.policy_loss import PolicyLossOptions, group_advantages, policy_loss, summarize


def test_loss_gradient_and_metrics_are_trls(
    make_model: Callable[..., PreTrainedModel],
    tokenizer: PreTrainedTokenizerBase,
    trl_settings: dict[str, Any],
    tmp_path: Path,
) -> None:
    """TRL's trainer generates and makes its advantages and its loss ("bnpo": the mean over tokens); ours gets the same
    log-probs of the same tokens. Old, reference and rollout log-probs are moved away so that everything binds."""
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    make_model(seed=3).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    given = random.Random(5)
    P, G, clip, beta, cap = 3, 4, (0.1, 0.3), 0.05, 1.1
    scores: list[float] = []

    def reward(completion_ids: list[list[int]], **_: object) -> list[float]:
        scores.extend(given.choice([0.0, 0.3, 1.0]) for _ in completion_ids)
        return scores[-len(completion_ids) :]

    questions = ["1 2 3 = 6 :", "2 5 = 7 :", "8 8 4 = 20 :"]
    trainer = GRPOTrainer(
        model=str(tmp_path / "model"),
        reward_funcs=reward,
        args=GRPOConfig(
            per_device_train_batch_size=P * G,
            num_generations=G,
            beta=beta,
            use_bias_correction_kl=False,  # TRL would weigh the KL by the ratio
            epsilon=clip[0],
            epsilon_high=clip[1],
            loss_type="bnpo",
            **trl_settings,
        ),
        train_dataset=Dataset.from_list([{"prompt": q} for q in questions]),
        processing_class=tokenizer,
    )
    batch = trainer._generate_and_score_completions([{"prompt": q} for q in questions for _ in range(G)])
    rewards = torch.tensor(scores).view(P, G)
    torch.testing.assert_close(group_advantages(rewards, "grpo").flatten(), batch["advantages"], rtol=1e-5, atol=1e-6)

    batch["completion_mask"][::3, 4:] = 0  # responses of different lengths
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
    attended = torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1)
    width = batch["completion_ids"].shape[1]
    logps, _, _ = trainer._get_per_token_logps_and_entropies(trainer.model, ids, attended, width)
    noise = torch.Generator().manual_seed(0)
    old, ref, rollout = (logps.detach() + 0.3 * torch.randn(logps.shape, generator=noise) for _ in range(3))
    batch |= {"old_per_token_logps": old, "ref_per_token_logps": ref}
    batch["importance_sampling_ratio"] = (old - rollout).exp().clamp(max=cap)
    trainer.use_vllm = True  # makes _compute_loss use importance_sampling_ratio
    loss = trainer._compute_loss(trainer.model, batch)
    loss.backward()
    theirs = {name: p.grad.clone() for name, p in trainer.model.named_parameters()}
    trainer.model.zero_grad()

    mask = batch["completion_mask"].bool()
    response = torch.arange(P * G)[:, None].expand(mask.shape)[mask]
    ours, stats = policy_loss(
        logps[mask],
        rewards,
        response // G,
        response % G,
        denominator=int(mask.sum()),
        options=PolicyLossOptions("grpo", clip, cap, "k3", beta),
        old_logprob=old[mask],
        rollout_logprob=rollout[mask],
        reference_logprob=ref[mask],
    )
    ours.backward()
    torch.testing.assert_close(ours.detach(), loss.detach(), rtol=1e-5, atol=1e-7)
    largest = max(float(g.abs().max()) for g in theirs.values())
    for name, p in trainer.model.named_parameters():
        torch.testing.assert_close(p.grad, theirs[name], rtol=1e-4, atol=1e-5 * largest, msg=name)

    metrics, summary = trainer._metrics["train" if trainer.model.training else "eval"], summarize(stats)
    assert all(summary[key] > 0 for key in ("tis_fraction", "clip_low_fraction", "clip_high_fraction"))
    for key, name in [
        ("clip_fraction", "clip_ratio/region_mean"),
        ("clip_low_fraction", "clip_ratio/low_mean"),
        ("clip_high_fraction", "clip_ratio/high_mean"),
        ("kl", "kl"),
    ]:
        assert summary[key] == pytest.approx(metrics[name][-1], rel=1e-4), key
