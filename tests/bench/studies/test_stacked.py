"""A logistic regression of failures: against Newton's method, and that it finds what is there."""

from typing import Any

import numpy as np
import pytest

from studies.prompt_router import auc
from studies.stacked import RIDGE, features, fit_logistic, stacked_score


def newton(x: np.ndarray, failed: np.ndarray) -> np.ndarray:
    """The minimum of the same loss by its gradient and Hessian, written out."""
    columns = np.column_stack([x, np.ones(len(x))])
    w = np.zeros(columns.shape[1])
    for _ in range(50):
        p = 1 / (1 + np.exp(-columns @ w))
        gradient = columns.T @ (p - failed) + RIDGE * w
        hessian = columns.T @ (columns * (p * (1 - p))[:, None]) + RIDGE * np.eye(len(w))
        w = w - np.linalg.solve(hessian, gradient)
    return w


def test_the_fit_is_newtons() -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(300, 3))
    failed = (rng.random(300) < 1 / (1 + np.exp(-(x @ [2.0, -1.0, 0.0] - 0.5)))).astype(float)
    w = fit_logistic(x, failed)
    assert w == pytest.approx(newton(x, failed), abs=1e-4)
    assert w == pytest.approx([2.0, -1.0, 0.0, -0.5], abs=0.45)
    told_apart = (x[:, 0] > 0).astype(float)
    assert fit_logistic(x, told_apart) == pytest.approx(newton(x, told_apart), abs=1e-3), "finite without one mistake"


def test_a_stacked_score_uses_what_helps() -> None:
    """Two features that each know half, in units of their own; a third that is the same everywhere."""
    rng = np.random.default_rng(1)
    truth = rng.normal(size=(2, 2000, 2))
    failed = (truth.sum(2) > 0).astype(float)
    x = [np.column_stack([t[:, 0] * 1e-4 + 7, -t[:, 1] * 300, np.ones(2000)]) for t in truth]
    fit, other = stacked_score(x[0], failed[0], x)
    assert auc(fit, failed[0].tolist()) > 0.99 and auc(other, failed[1].tolist()) > 0.99
    assert auc(truth[1][:, 0], failed[1].tolist()) < 0.9
    assert (other > 0).mean() == pytest.approx(failed[1].mean(), abs=0.03), "log-odds of failure"


def test_features_are_finite_and_in_order() -> None:
    rows: list[dict[str, Any]] = [
        {"response": "8 * 3 <answer> 24 </answer>", "help_margin": m, "answer_logprob_mean": -0.5 * i,
         "answer_logprob_min": -2.0 * i} for i, m in enumerate((-3.0, None, 1.5))
    ]  # fmt: skip
    made = features(rows, [np.array([5.0, 6.0, 7.0])])
    assert made.tolist() == [[-3.0, 0.0, 0.0, 6.0, 5.0], [-4.0, -0.5, -2.0, 6.0, 6.0], [1.5, -1.0, -4.0, 6.0, 7.0]]
    never = features([row | {"help_margin": None} for row in rows])
    assert never[:, 0].tolist() == [0, 0, 0]
