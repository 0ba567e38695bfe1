"""The group-level advantage, and the weight it gives a response in the loss."""

from __future__ import annotations

from collections.abc import Sequence


def advantages(rewards: Sequence[float]) -> list[float]:
    """r_i - mean(r) over the G responses of one prompt; exactly 0 for all when all rewards are equal.

    (A float mean of equal rewards need not equal them: alpha_c moves, and 40% of all-equal groups of 8 would miss.)
    """
    if all(r == rewards[0] for r in rewards):
        return [0.0] * len(rewards)
    mean = sum(rewards) / len(rewards)
    return [r - mean for r in rewards]


def loss_weights(rewards: Sequence[float], prompts_in_batch: int) -> list[float]:
    """c_i with loss = sum_i c_i log pi(y_i | x): the estimator of arXiv 2509.24050,

        grad J = 1/|D| sum_x 1/(G-1) sum_i (r_i - mean(r)) grad log pi(y_i | x),

    as a loss to minimise, c_i = -(r_i - mean(r)) / ((G-1) |D|). Equal to RLOO's leave-one-out baseline.
    """
    return [-a / ((len(rewards) - 1) * prompts_in_batch) for a in advantages(rewards)]
