"""The hierarchical reward and the prompt filter in TRL's trainer."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from transformers import PreTrainedTokenizerBase
from trl import GRPOTrainer

from gapg.errors import ConfigError
from gapg.integrations.trl import TOKEN_MEANS, FusedLogprobs
from gapg.integrations.trl_reward import HierarchicalReward
from gapg.tasks.base import HELP_PHRASE, Prompt
from gapg.tasks.countdown import Countdown
from tests.integrations.trl_batches import SIZE, Fused, Make, apart, batch, maker, outcome

Ask = Callable[..., list[float | None]]


@pytest.fixture
def hierarchical(countdown: Countdown, tokenizer: PreTrainedTokenizerBase) -> HierarchicalReward:
    return HierarchicalReward(countdown, tokenizer, alpha_a=1.0, alpha_c=0.4, alpha_f=0.05)


def said(prompt: Prompt, how: str) -> str:
    return {"right": f"<answer> {prompt.answer} </answer>", "wrong": "<answer> 1 </answer>", "call": HELP_PHRASE}[how]


def asked(reward: HierarchicalReward, groups: list[tuple[Prompt, Any, list[str]]], **more: Any) -> list[float | None]:
    """The rewards of groups (prompt, the cloud's reply, each response's kind), as TRL asks for them."""
    rows = [(p, reply, said(p, how)) for p, reply, kinds in groups for how in kinds]
    tokenizer = reward.tokenizer
    ids = [[*tokenizer.encode(text, add_special_tokens=False), tokenizer.eos_token_id] for *_, text in rows]
    columns = {"id": [p.id for p, *_ in rows], "cloud_answer": [reply for _, reply, _ in rows]}
    texts = tokenizer.batch_decode(ids, skip_special_tokens=True)
    return reward(prompts=[p.text for p, *_ in rows], completions=texts, completion_ids=ids, **columns, **more)


def test_rewards(hierarchical: HierarchicalReward, countdown: Countdown) -> None:
    one, two, three, four = countdown.prompts("train")[:4]
    metrics: dict[str, float] = {}
    found = asked(
        hierarchical,
        [
            (one, said(one, "right"), ["right", "wrong", "call"]),
            (two, [said(two, "right"), "no idea"], ["call", "wrong"]),
            (three, None, ["right", "wrong"]),
            (four, None, ["call", "right"]),
        ],
        trainer_state=None,
        log_metric=metrics.__setitem__,
    )
    assert found == [1.05, 0.05, pytest.approx(0.45), pytest.approx(0.25), 0.05, 1.05, 0.05, None, None]
    assert metrics == {"call_fraction": pytest.approx(3 / 9), "local_accuracy": pytest.approx(3 / 9)}


def test_bad_columns_and_prices_are_one_line(hierarchical: HierarchicalReward, countdown: Countdown) -> None:
    prompt = countdown.prompts("train")[0]
    with pytest.raises(ConfigError, match="columns 'id' and 'cloud_answer'"):
        hierarchical(prompts=["1"], completions=["2"], completion_ids=[[3]])
    with pytest.raises(ConfigError, match="has no problem '9 9'"):
        hierarchical(completion_ids=[[3]], id=["9 9"], cloud_answer=[None])
    with pytest.raises(ValueError, match="must be below alpha_a"):
        HierarchicalReward(countdown, hierarchical.tokenizer, alpha_c=1.0)
    assert asked(hierarchical, [(prompt, None, ["right"])]) == [1.05]


# --- the filter ------------------------------------------------------------------------------------------------------


@pytest.fixture
def make(
    folder: Callable[..., Path], tokenizer: PreTrainedTokenizerBase, trl_settings: dict[str, Any],
    hierarchical: HierarchicalReward, countdown: Countdown,
) -> Make:  # fmt: skip
    prompts = countdown.prompts("train")[:6]
    replies = [said(p, "wrong" if i == 3 else "right") for i, p in enumerate(prompts)]
    rows = [{"prompt": p.text, "id": p.id, "cloud_answer": r} for p, r in zip(prompts, replies, strict=True)]
    made = maker(folder(), tokenizer, trl_settings)
    given = {"reward_funcs": hierarchical, "train_dataset": Dataset.from_list(rows)}
    return lambda kind=Fused, switches=None, **changed: made(kind, switches, given, **changed)


class Given(GRPOTrainer):
    """Its batches are made already."""

    def _generate_and_score_completions(self, inputs: Any) -> Any:
        return inputs


class Filtered(FusedLogprobs, Given):
    pass


@pytest.mark.parametrize("loss_type", ["grpo", "dr_grpo", "sapo", *TOKEN_MEANS])
def test_the_loss_is_that_of_a_batch_of_d_alone(
    loss_type: str, make: Make, hierarchical: HierarchicalReward, countdown: Countdown
) -> None:
    """Of three groups D has the first, which is right, and of the others, which the cloud solves, one: rho = 1."""
    stock = make(GRPOTrainer, loss_type=loss_type, scale_rewards="none")
    whole = batch(stock)
    prompts = countdown.prompts("train")[:3]
    kinds = [["right"] + ["wrong"] * 3, ["wrong"] * SIZE, ["call"] * SIZE]
    asked(hierarchical, [(p, said(p, "right"), k) for p, k in zip(prompts, kinds, strict=True)])

    trainer = make(Filtered, {"filter_rho": 1, "pack": True}, loss_type=loss_type, scale_rewards="none")
    trainer.model.train()
    filtered = trainer._generate_and_score_completions(whole)
    chosen = filtered["completion_mask"].any(1)
    assert chosen[:SIZE].any() and chosen.view(3, SIZE).any(1).tolist() in ([True, True, False], [True, False, True])
    of_d = chosen.view(3, SIZE).any(1).repeat_interleave(SIZE)
    alone = {name: x[of_d] if x.dim() else x for name, x in whole.items()}
    alone["num_items_in_batch"] = alone["completion_mask"].sum()
    theirs, ours = outcome(stock, alone), outcome(trainer, filtered)
    assert ours.loss == pytest.approx(theirs.loss, rel=1e-5)
    assert apart(ours.gradient, theirs.gradient) < 1e-5

    trainer.model.eval()
    assert trainer._generate_and_score_completions(whole) is whole
    asked(hierarchical, [(p, said(p, "wrong"), ["wrong"] * SIZE) for p in prompts])  # nobody solves any
    trainer.model.train()
    nothing = outcome(trainer, trainer._generate_and_score_completions(whole))
    assert nothing.loss == 0 and not nothing.gradient.any()


def test_what_is_dropped_cannot_spoil_the_loss(
    make: Make, hierarchical: HierarchicalReward, countdown: Countdown
) -> None:
    """Old log-probs far from what a masked completion has, 0."""
    trainer = make(Given, loss_type="dr_grpo")
    whole = batch(trainer)
    whole["old_per_token_logps"][SIZE:] = -200
    for kinds, finite in (("right", False), ("wrong", True)):
        asked(hierarchical, [(p, None, [kinds] * SIZE) for p in countdown.prompts("train")[:3]])
        filtered = make(Filtered, {"filter_rho": 0}, loss_type="dr_grpo")
        filtered.model.train()
        found = outcome(filtered, filtered._generate_and_score_completions(whole))
        assert math.isfinite(found.loss) is finite


def test_it_trains(make: Make, hierarchical: HierarchicalReward) -> None:
    settings = {
        "max_steps": 2,
        "logging_steps": 1,
        "scale_rewards": "none",
        "num_iterations": 2,
        "loss_type": "dr_grpo",
    }
    trainer = make(Fused, {"filter_rho": 0.25, "pack": True, "skip_zero_advantage": True}, **settings)
    trainer.train()
    rows = [row for row in trainer.state.log_history if "loss" in row]
    assert len(rows) == 2 and len(hierarchical.groups) == 3
    assert {"reward", "call_fraction", "local_accuracy", "rewards/HierarchicalReward/mean"} <= rows[0].keys()


@pytest.mark.parametrize(
    ("settings", "fix"),
    [
        ({}, "0 or more"),
        ({"scale_rewards": "batch"}, "scale_rewards"),
        ({"loss_type": "bnpo"}, "bnpo"),
        ({"loss_type": "dr_grpo", "beta": 0.1}, "beta=0"),
    ],
)
def test_what_the_filter_cannot_weigh_is_refused(settings: dict[str, Any], fix: str, make: Make) -> None:
    with pytest.raises(ValueError, match=f"filter_rho: .*{fix}"):
        make(Fused, {"filter_rho": 0.5 if settings else -1}, **settings)
