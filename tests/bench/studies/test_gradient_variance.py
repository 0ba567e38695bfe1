"""The variance formula against enumeration and real groups; the scores against plain autograd."""

from collections.abc import Callable
from itertools import product

import numpy as np
import pytest
import torch

from gapg.batches.batching import Example
from gapg.runs.run import Run
from studies import gradient_variance as gv
from studies.gradient_variance import agreements, formula, measured, variance_rows, variance_table

P = np.array([0.1, 0.3, 0.3, 0.2, 0.1])
R = np.array([1.0, 0.0, 0.4, 1.0, 0.0])
S = np.array([[1.5, 1.0], [-0.5, 1.0], [-2.0, 0.0], [0.4, -2.0], [3.0, 0.5]])
S = S - P @ S  # the score's mean is zero


def enumerated(group_size: int) -> np.ndarray:
    """[2] the exact variance of the estimator over all groups of five responses with these probabilities."""
    mean, square = np.zeros(2), np.zeros(2)
    for chosen in product(range(5), repeat=group_size):
        r = R[list(chosen)]
        estimate = ((r - r.mean()) / (group_size - 1)) @ S[list(chosen)]
        p = P[list(chosen)].prod()
        mean, square = mean + p * estimate, square + p * estimate**2
    return square - mean**2


def sampled(n: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(rewards [n], scores [n, 2])."""
    chosen = np.random.default_rng(seed).choice(5, n, p=P)
    return R[chosen], S[chosen]


@pytest.mark.parametrize("group_size", [2, 3, 4])
def test_formula_is_the_variance_over_all_groups(group_size: int) -> None:
    assert formula(*sampled(200_000, 1), group_size) == pytest.approx(enumerated(group_size), rel=0.03)


def test_formula_and_measurement_hit_the_truth_on_average_also_with_few_responses() -> None:
    rng = np.random.default_rng(3)
    few = [sampled(32, seed) for seed in range(1500)]
    exact = enumerated(4)
    for found in ([formula(*x, 4) for x in few], [measured(*x, 4, rng, partitions=2) for x in few]):
        error = np.std(found, axis=0) / len(few) ** 0.5
        assert (abs(np.mean(found, axis=0) - exact) < 4 * error).all()
        assert (error < 0.03 * exact).all(), "precise enough to see a bias of parts in n"


def test_agreement_has_the_truth_inside_and_a_wrong_formula_outside() -> None:
    rows = variance_rows(*sampled(8192, 4), np.random.default_rng(5))
    for found in agreements(rows):
        assert found["low"] - 0.02 < 1 < found["high"] + 0.02
        assert found["high"] - found["low"] < 0.2
    cells = variance_table(rows).cells
    assert [row[0] for row in cells] == ["2", "4", "8", "16"]
    assert cells[0][2] == "1.000"
    # half the truth is told from it
    wrong = [row | {"formula_blocks": [x / 2 for x in row["formula_blocks"]]} for row in rows]
    assert all(found["low"] > 1.5 for found in agreements(wrong))


def test_a_score_is_the_gradient_of_the_responses_log_prob(start: Callable[..., Run]) -> None:
    run = start("run")
    prompt = run.task.render(run.validation[0], run.tokenizer)
    response = run.tokenizer.encode("1 + 2 = 3 <answer> 1 + 2 </answer>", add_special_tokens=False)
    score = gv.score(run.model, list(run.model.parameters()), Example(prompt, response), 1.0)
    plain = run.engine.model  # type: ignore[attr-defined]  # the same weights, another attention
    plain.requires_grad_(True)
    logits = plain(input_ids=torch.tensor([[*prompt, *response]])).logits[0, len(prompt) - 1 : -1]
    logprob = torch.log_softmax(logits, -1).gather(1, torch.tensor(response)[:, None]).sum()
    expected = torch.cat([g.reshape(-1) for g in torch.autograd.grad(logprob, list(plain.parameters()))])
    assert torch.allclose(score, expected, atol=1e-4, rtol=1e-3)
    assert score.norm() > 0.1


def test_it_measures_a_real_policy(start: Callable[..., Run], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gv, "PROMPTS", 1)
    rows = gv.gradient_variance(start("run"))
    assert len({row["prompt"] for row in rows}) == 1
    assert len(rows) == 4
    assert all(len(row["measured"]) == gv.DIRECTIONS and len(row["formula_blocks"]) == gv.BLOCKS for row in rows)
    assert all(row["reward_std"] > 0 for row in rows), "the prompts are those whose rewards differ"
    for found in agreements(rows):
        assert 0.5 < found["ratio"] < 2
