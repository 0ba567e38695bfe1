"""A score from several: a logistic regression of failures, fitted on problems that the model was not trained on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy import optimize, special

from studies.routers import Answers, doubt
from studies.statistics import FloatArray, help_margins

RIDGE = 1.0
"""The penalty RIDGE / 2 |w|^2 beside the sum of the losses, of features with mean 0 and deviation 1: it keeps w finite
where the failures can be told apart without one mistake."""


OF_ANSWER = ("response", "help_margin", "answer_logprob_mean", "answer_logprob_min")
"""What `features` reads of an answer."""


def features(answers: Answers, more: Sequence[FloatArray] = ()) -> FloatArray:
    """[n, 4 + len(more)] what is known of greedy answers decoded with help masked, all finite: the margin of the help
    phrase, the mean and the least token log-prob, the length in words; and further scores."""
    words = np.array([float(len(row["response"].split())) for row in answers])
    log_probs = [-doubt(answers, key) for key in ("answer_logprob_mean", "answer_logprob_min")]
    return np.stack([_finite(x) for x in (help_margins(answers), *log_probs, words, *more)], axis=1)


def _finite(values: FloatArray) -> FloatArray:
    """-inf, where the phrase could never begin, as a little below all others."""
    known = values[np.isfinite(values)]
    return np.where(np.isfinite(values), values, known.min() - 1.0 if known.size else 0.0)


def fit_logistic(x: FloatArray, failed: FloatArray) -> FloatArray:
    """[k + 1] the weights of the k columns of x [n, k], and the constant, by maximum likelihood with the ridge.

    failed: [n] in {0, 1}.
    """
    columns = np.column_stack([x, np.ones(len(x))])
    signs = 2 * failed - 1

    def loss(w: FloatArray) -> tuple[float, FloatArray]:
        margins = signs * (columns @ w)
        slopes = -signs * special.expit(-margins)
        return float(np.logaddexp(0, -margins).sum() + RIDGE / 2 * w @ w), columns.T @ slopes + RIDGE * w

    found: Any = optimize.minimize(loss, np.zeros(columns.shape[1]), jac=True, method="L-BFGS-B", tol=1e-12)
    return np.asarray(found.x, dtype=np.float64)


def stacked_score(fit: FloatArray, failed: FloatArray, scored: Sequence[FloatArray]) -> list[FloatArray]:
    """Log-odds of failure of each set of features in `scored`, from a regression fitted to `fit` and its failures."""
    mean, deviation = fit.mean(0), fit.std(0)
    deviation = np.where(deviation > 0, deviation, 1.0)
    w = fit_logistic((fit - mean) / deviation, failed)
    return [(x - mean) / deviation @ w[:-1] + w[-1] for x in scored]
