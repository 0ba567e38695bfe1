"""The decision beside a frozen policy: its hazards by definition, its loss, and what learns and what does not."""

import copy
import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from gapg.batches.batching import one_batch
from gapg.help_phrase import deciding_tokens, help_control
from gapg.runs.run import Run
from studies import frozen_decision
from studies.answers import own_answers
from studies.arms import MASKED
from studies.frozen_decision import HelpRows, learn, log_hazards, log_loss, scores
from studies.predictions import heldout

OWN = {key.replace(".", "__"): value for key, value in MASKED.items()}


def test_hazards_are_those_of_the_changed_head(start: Callable[..., Run]) -> None:
    run = start(**OWN)
    help, model = help_control(run.tokenizer), run.model
    examples = [
        replace(e, deciding=deciding_tokens(help, e.prompt_ids, e.response_ids))
        for e in own_answers(run).validation.examples[:4]
    ]
    rows = HelpRows(help, 48)
    torch.nn.init.normal_(rows.change.weight, std=0.3)
    torch.nn.init.constant_(rows.change.bias, 0.7)
    batch = one_batch(examples, model.device)
    found = log_hazards(model, batch, run.config, 1.0, rows)
    (token,) = rows.tokens
    double = copy.deepcopy(model).double()
    for e, log_x in zip(examples, found.tolist(), strict=True):
        ids = torch.tensor([[*e.prompt_ids, *e.response_ids]])
        hidden = double.model(input_ids=ids).last_hidden_state[0, len(e.prompt_ids) - 1 : -1]
        logits = double.lm_head(hidden)
        logits[:, token] += hidden @ rows.change.weight[0].double() + 0.7
        by_hand = -torch.log1p(-logits.softmax(-1)[:, token]).sum()
        assert log_x == pytest.approx(by_hand.log().item(), abs=1e-4)


def test_the_loss_is_the_log_score() -> None:
    x = torch.tensor([1e-6, 0.1, 1.0, 5.0], dtype=torch.float64)
    torch.testing.assert_close(log_loss(x.log(), torch.ones(4)), x)
    torch.testing.assert_close(log_loss(x.log(), torch.zeros(4)), -(-torch.expm1(-x)).log())
    # certain and wrong, either way: the loss is as large as it should be, and the gradient a number
    log_x = torch.tensor([-60.0, math.log(60.0)], requires_grad=True)
    loss = log_loss(log_x, torch.tensor([0.0, 1.0]))
    assert loss.tolist() == pytest.approx([60.0, 60.0])
    loss.sum().backward()
    assert log_x.grad is not None and log_x.grad.tolist() == pytest.approx([-1.0, 60.0])


def test_the_decision_is_learned_and_the_policy_stays(start: Callable[..., Run]) -> None:
    run = start(**OWN, steps="15", optim__lr="5e-3", optim__warmup_steps="1")
    before = {name: value.clone() for name, value in run.model.state_dict().items()}
    rows, copied = learn(run)
    assert all(torch.equal(value, before[name]) for name, value in run.model.state_dict().items())
    answers = own_answers(run).training
    right = 1 - answers.wrong

    def loss(*by: object) -> float:
        return float(log_loss(scores(run, *by[:1], answers, *by[1:]), right).mean())  # type: ignore[arg-type]

    untouched = loss(run.model)
    assert loss(run.model, rows) < untouched - 0.02
    assert loss(copied) < untouched - 0.02
    again, copied_again = learn(run)
    assert torch.equal(again.change.weight, rows.change.weight)
    assert torch.equal(copied_again.lm_head.weight, copied.lm_head.weight)


def test_rows_of_a_run(start: Callable[..., Run]) -> None:
    run = start(**OWN)
    run_ids = [p.id for p in (*run.validation, *heldout(run))]
    of_rows = frozen_decision.ROWS.make(run)
    of_copy = frozen_decision.COPY.make(run)
    assert [row["id"] for row in of_rows] == [row["id"] for row in of_copy] == run_ids
    assert [row["local"] for row in of_rows] == [row["local"] for row in of_copy]
    assert [row["score"] for row in of_rows] == [row["of_rows"] for row in of_copy] != [r["score"] for r in of_copy]
    assert run.oracle.usage.requests == 0
