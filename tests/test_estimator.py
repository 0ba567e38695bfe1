"""The estimator on policies small enough to enumerate, what the filter does to it, and TRL's RLOO as an oracle."""

import random
from collections.abc import Callable, Sequence
from fractions import Fraction
from itertools import product
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from gapg.batches.batching import Example, packed_batches
from gapg.filtering import select
from gapg.judge import Group, Outcome, rewards
from gapg.model.policy import response_logprobs
from gapg.tasks.base import Prompt
from gapg_kernels.policy_loss import group_advantages
from gapg_rollout.records import Completion

Floats = np.ndarray


def advantages(rewards: Sequence[float]) -> list[float]:
    """What a step uses, r_i minus the mean of the others, of one group."""
    return group_advantages(torch.tensor([rewards], dtype=torch.float64))[0].tolist()


def loss_weights(rewards: Sequence[float], prompts_in_batch: int) -> list[float]:
    """c_i with loss = sum_i c_i log pi(y_i | x), as the trainer's defaults have it: the mean over |D| G sequences."""
    return [-a / (len(rewards) * prompts_in_batch) for a in advantages(rewards)]


def softmax(theta: Floats) -> Floats:
    e = np.exp(theta - theta.max())
    return e / e.sum()


def true_gradient(theta: Floats, reward: Floats) -> Floats:
    """Of the expected reward of a softmax over whole responses, by autograd in float64."""
    logits = torch.tensor(theta, dtype=torch.float64, requires_grad=True)
    (logits.softmax(0) @ torch.tensor(reward, dtype=torch.float64)).backward()
    assert logits.grad is not None
    return logits.grad.numpy()


def moments(theta: Floats, reward: Floats, G: int) -> tuple[Floats, Floats]:
    """Mean and variance, per coordinate, of the estimator at one prompt, over all K^G groups."""
    p, K = softmax(theta), len(theta)
    score = np.eye(K) - p  # score[k] = grad log p(k)
    mean, square = np.zeros(K), np.zeros(K)
    for group in product(range(K), repeat=G):
        weights = loss_weights([float(reward[k]) for k in group], prompts_in_batch=1)
        estimate = -sum(w * score[k] for w, k in zip(weights, group, strict=True))
        chance = prod(p[k] for k in group)
        mean += chance * estimate
        square += chance * estimate**2
    return mean, square - mean**2


policies = st.integers(3, 4).flatmap(
    lambda K: st.tuples(
        st.lists(st.floats(-3, 3), min_size=K, max_size=K).map(np.array),
        st.lists(st.sampled_from([0.0, 0.1, 0.25, 0.3, 1.0]), min_size=K, max_size=K).map(np.array),
    )
)


@given(policies, st.integers(2, 5))
@settings(max_examples=25, deadline=None)
def test_the_unfiltered_estimator_is_unbiased(policy: tuple[Floats, Floats], G: int) -> None:
    theta, reward = policy
    mean, _ = moments(theta, reward, G)
    np.testing.assert_allclose(mean, true_gradient(theta, reward), atol=1e-10)


@given(policies, st.integers(2, 5))
@settings(max_examples=25, deadline=None)
def test_its_variance_is_that_of_a_u_statistic(policy: tuple[Floats, Floats], G: int) -> None:
    theta, reward = policy
    _, variance = moments(theta, reward, G)
    p = softmax(theta)
    s = np.eye(len(p)) - p
    mu, g = p @ reward, p @ (reward[:, None] * s)
    centred = p @ ((reward[:, None] - mu) ** 2 * s**2)
    zeta_1 = (centred - g**2) / 4
    zeta_2 = (centred + p @ (reward - mu) ** 2 * (p @ s**2)) / 2
    np.testing.assert_allclose(variance, (4 * (G - 2) * zeta_1 + 2 * zeta_2) / (G * (G - 1)), atol=1e-10)


def test_a_wrong_denominator_would_be_seen() -> None:
    """1/G instead of 1/(G-1), the commonest slip, misses the true gradient by a factor (G-1)/G."""
    theta, reward, G = np.array([0.3, -0.4, 0.1]), np.array([1.0, 0.25, 0.0]), 3
    mean, _ = moments(theta, reward, G)
    assert np.abs(mean * (G - 1) / G - true_gradient(theta, reward)).max() > 0.01


@given(st.floats(allow_nan=False, allow_infinity=False, width=64), st.integers(2, 16))
def test_equal_rewards_have_exactly_zero_advantages(reward: float, G: int) -> None:
    assert advantages([reward] * G) == [0.0] * G
    assert loss_weights([reward] * G, 7) == [0.0] * G


def test_a_float_mean_would_not_be_exact() -> None:
    """Why equality decides and not a difference: a mean of eight equal floats often misses them."""
    drawn = random.Random(0)
    values = [drawn.uniform(0.02, 0.98) for _ in range(200)]
    assert any(v - sum([v] * 7) / 7 != 0 for v in values)
    assert all(advantages([v] * 7) == [0.0] * 7 for v in values)


# --- the filter ------------------------------------------------------------------------------------------------------

RIGHT, CALL, WRONG = 0, 1, 2
ALPHA_C = 0.3


def group_of(name: str, drawn: Sequence[int], cloud_knows: bool) -> Group:
    called = Outcome.CLOUD_CORRECT if cloud_knows else Outcome.CLOUD_WRONG
    outcomes = {RIGHT: Outcome.LOCAL_CORRECT, CALL: called, WRONG: Outcome.LOCAL_WRONG}
    return Group(
        Prompt(name, name, "", "toy"),
        tuple(Completion((k,), (0.0,), "", "stop") for k in drawn),
        tuple(outcomes[k] for k in drawn),
        (True,) * len(drawn),
        oracle_score=float(cloud_knows),
    )


PROMPTS = (  # one policy, three problems: the logits are theta plus the problem's own
    ("easy", np.array([1.0, 0.0, 0.0]), True),
    ("hard", np.array([-1.0, 0.0, 0.5]), True),
    ("hopeless", np.array([-2.0, 0.0, 1.0]), False),
)


def expected_update(theta: Floats, G: int, rho: Fraction | None) -> Floats:
    """Mean over every possible batch of the gradient estimate that a step would use (0 where nothing is kept)."""
    score, chances, draws = [], [], list(product(range(3), repeat=G))
    for _, offset, _ in PROMPTS:
        p = softmax(theta + offset)
        score.append(np.eye(3) - p)
        chances.append([prod(p[k] for k in drawn) for drawn in draws])
    groups = [[group_of(name, drawn, knows) for drawn in draws] for name, _, knows in PROMPTS]
    index = {name: i for i, (name, _, _) in enumerate(PROMPTS)}
    total = np.zeros(3)
    for batch in product(range(len(draws)), repeat=len(PROMPTS)):
        kept = select([groups[i][d] for i, d in enumerate(batch)], rho, random.Random(0)).kept
        estimate = np.zeros(3)
        for group in kept:
            weights = loss_weights(rewards(group, 1.0, ALPHA_C), len(kept))
            s = score[index[group.prompt.id]]
            estimate -= sum(w * s[c.token_ids[0]] for w, c in zip(weights, group.completions, strict=True))
        total += prod(chances[i][d] for i, d in enumerate(batch)) * estimate
    return total


def objective_gradient(theta: Floats) -> Floats:
    """Of the mean over the prompts of the expected reward."""
    return np.mean(
        [
            true_gradient(theta + offset, np.array([1.0, ALPHA_C * knows, 0.0]))  # d/dtheta = d/dlogits
            for _, offset, knows in PROMPTS
        ],
        axis=0,
    )


def test_without_the_filter_a_batch_is_unbiased() -> None:
    theta = np.array([0.2, -0.3, 0.1])
    np.testing.assert_allclose(expected_update(theta, 2, None), objective_gradient(theta), atol=1e-10)


def test_the_filter_is_biased_towards_local_answers(record_property: Callable[[str, object], None]) -> None:
    """On purpose: it drops prompts that nobody solves and most that only the cloud does.

    With rho = 1/2 and three prompts no draw is left to chance (D2 is kept whole at |D1| = 2, else dropped), so the
    enumeration is exact. Here the expected step is 1.79 times as long as the gradient (the problem that nobody solves
    no longer counts in 1/|D|), turned by 7 degrees, and lowers calls twice as much for the same gain in right answers.
    """
    theta = np.array([0.2, -0.3, 0.1])
    truth, filtered = objective_gradient(theta), expected_update(theta, 3, Fraction(1, 2))
    length = float(np.linalg.norm(filtered) / np.linalg.norm(truth))
    angle = float(np.degrees(np.arccos(filtered @ truth / np.linalg.norm(filtered) / np.linalg.norm(truth))))
    record_property("filter bias (right, call, wrong)", (filtered - truth).round(4).tolist())
    assert length == pytest.approx(1.791, abs=1e-3)
    assert angle == pytest.approx(7.1, abs=0.1)
    assert filtered[CALL] / filtered[RIGHT] == pytest.approx(2 * truth[CALL] / truth[RIGHT], rel=0.03)


def test_a_zero_rho_keeps_only_what_was_solved_locally() -> None:
    """The bias grows as rho falls: with rho = 0 a problem that only the cloud solves teaches nothing about calling."""
    theta = np.array([0.2, -0.3, 0.1])
    truth = objective_gradient(theta)
    to_calls = [(expected_update(theta, 2, rho) - truth)[CALL] for rho in (None, Fraction(1), Fraction(0))]
    assert abs(to_calls[0]) < 1e-10
    assert to_calls[2] < 2 * to_calls[1] < 0


# --- TRL's RLOO ------------------------------------------------------------------------------------------------------


def test_gradient_and_loss_agree_with_trls_rloo(
    make_model: Callable[..., PreTrainedModel],
    tokenizer: PreTrainedTokenizerBase,
    trl_settings: dict[str, Any],
    tmp_path: Path,
) -> None:
    """TRL's own trainer generates, takes leave-one-out baselines and makes its loss; ours gets the same samples.

    TRL: mean over P G samples of -(r_i - mean of the others) exp(log pi - log pi_old). A leave-one-out advantage is
    G/(G-1) (r_i - mean), so at log pi = log pi_old its weight of log pi_i is -(r_i - mean)/((G-1) P): c_i exactly, with
    no factor between them. The values of the two losses differ by a constant: their changes agree to first order.
    """
    from datasets import Dataset
    from trl import RLOOConfig, RLOOTrainer

    make_model(seed=3).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    given = random.Random(5)
    P, G = 3, 4
    seen: list[tuple[str, tuple[int, ...], float]] = []

    def reward(prompts: list[str], completion_ids: list[list[int]], **_: object) -> list[float]:
        values = [given.choice([0.0, 0.3, 1.0]) for _ in completion_ids]
        seen.extend(zip(prompts, map(tuple, completion_ids), values, strict=True))
        return values

    questions = ["1 2 3 = 6 :", "2 5 = 7 :", "8 8 4 = 20 :"]
    trainer = RLOOTrainer(
        model=str(tmp_path / "model"),
        reward_funcs=reward,
        args=RLOOConfig(
            per_device_train_batch_size=P * G,
            num_generations=G,
            num_iterations=1,
            beta=0.0,
            normalize_advantages=False,
            **trl_settings,
        ),
        train_dataset=Dataset.from_list([{"prompt": q} for q in questions]),
        processing_class=tokenizer,
    )
    rows = [{"prompt": q} for q in questions for _ in range(G)]
    batch = trainer._generate_and_score_completions(rows)
    loss = trainer._compute_loss(trainer.model, batch)
    loss.backward()
    theirs = {name: p.grad.clone() for name, p in trainer.model.named_parameters()}

    ours = make_model(seed=3)
    examples = []
    for start in range(0, P * G, G):
        group = seen[start : start + G]
        assert len({prompt for prompt, _, _ in group}) == 1
        weights = loss_weights([r for _, _, r in group], P)
        examples += [
            Example(tokenizer(prompt)["input_ids"], ids, w) for (prompt, ids, _), w in zip(group, weights, strict=True)
        ]
    assert len({e.weight for e in examples}) > 3
    their_weights = -batch["advantages"] / (P * G)
    torch.testing.assert_close(their_weights, torch.tensor([e.weight for e in examples]), atol=1e-7, rtol=1e-5)

    def our_loss() -> torch.Tensor:
        parts = packed_batches(examples, 64, torch.device("cpu"))
        assert len(parts) > 1
        return sum((b.weight * response_logprobs(ours, b)).sum() for b in parts)  # type: ignore[return-value]

    before = our_loss()
    before.backward()
    largest = max(float(g.abs().max()) for g in theirs.values())
    assert largest > 1e-3
    for name, p in ours.named_parameters():
        torch.testing.assert_close(p.grad, theirs[name], atol=1e-5 * largest, rtol=1e-4, msg=name)

    with torch.no_grad():
        for mine, his in zip(ours.parameters(), trainer.model.parameters(), strict=True):
            mine -= 2e-4 * mine.grad
            his -= 2e-4 * his.grad
    change, their_change = (our_loss() - before).item(), (trainer._compute_loss(trainer.model, batch) - loss).item()
    assert change < 0
    assert change == pytest.approx(their_change, rel=0.02)
