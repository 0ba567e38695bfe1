"""Equal responses to a prompt are put through the model once, with the gradient of all of them."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from transformers import PreTrainedModel

from gapg.batches.batching import Example, packed_batches
from gapg.config import load_config
from gapg.examples import equal_once
from gapg.marginal_loss import MarginalLoss, Masked
from gapg.optim import make_optimizer
from gapg.update import policy_update

CPU, HELP = torch.device("cpu"), 9
RIGHT = torch.tensor([[1.0, 0.0, 1.0, 0.0], [0.0, 0.0, 0.0, 1.0]])
RESPONSES = ([[3, 4, 5], [6, 7], [3, 4, 5], [6, 7]], [[3, 4, 5], [3, 4, 5], [3, 4, 5], [3, 4, 5]])
"""In the second group all are equal and one was judged otherwise, as a verifier that ran into its limits may."""


def examples() -> list[Example]:
    return [
        Example([11, 12, 13 + g], ids, 1.0, [-1.0] * len(ids), g, i, [(HELP,)] * len(ids))
        for g, group in enumerate(RESPONSES)
        for i, ids in enumerate(group)
    ]


def test_they_are_counted_and_the_first_stands_for_them() -> None:
    once, masked = equal_once(examples(), RIGHT, Masked(torch.ones(2), torch.zeros(2, 4)))
    assert [(e.group, e.sample, e.weight) for e in once] == [(0, 0, 2), (0, 1, 2), (1, 0, 3), (1, 3, 1)]
    assert masked.first_PG is not None and masked.first_PG.tolist() == [[0, 1, 0, 1], [0, 0, 0, 3]]


@pytest.mark.parametrize("score", ["log", "brier", "price"])
@pytest.mark.parametrize("cap", [512, 16])
def test_the_gradient_is_that_of_all(make_model: Callable[..., PreTrainedModel], score: str, cap: int) -> None:
    config = load_config("quickstart", {"method": "marginal", "marginal.score": score})
    known, grads, figures = Masked(torch.ones(2), torch.zeros(2, 4)), [], []
    for given, masked in ((examples(), known), equal_once(examples(), RIGHT, known)):
        model = make_model(seed=3)
        batches = packed_batches(given, cap, CPU, whole_groups=True)
        loss = MarginalLoss(model, config, RIGHT, masked)
        loss.look_ahead(batches)
        for batch in batches:
            loss(batch, 8.0).loss.backward()
        grads.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
        figures.append(loss.metrics())
    assert grads[0].norm() > 1e-2
    torch.testing.assert_close(grads[1], grads[0], atol=1e-6 * float(grads[0].abs().max()), rtol=1e-4)
    assert figures[1] == pytest.approx(figures[0], rel=1e-5)


def test_an_update_computes_them_once(make_model: Callable[..., PreTrainedModel]) -> None:
    config = load_config("quickstart", {"method": "marginal", "update.share_prompts": "never"})
    model = copy.deepcopy(make_model(seed=3))
    known = Masked(torch.ones(2), torch.full((2, 4), torch.nan))
    row = policy_update(model, make_optimizer(model, config.optim), config, 0, examples(), RIGHT, masked=known)
    assert row["tokens/given"] == 46 and row["tokens/computed"] == 23 == 46 - row["tokens/saved_equal_responses"]
