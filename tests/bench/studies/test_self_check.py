"""P(true): the odds that are asked for, and a copy that learns to say what its answer tells."""

import copy
from collections.abc import Callable

import torch

from gapg.help_phrase import help_control
from gapg.runs.run import Run
from studies import self_check
from studies.answers import Answers, own_answers
from studies.predictions import heldout
from studies.prompt_router import auc
from studies.self_check import Recipe, trained, untrained


def telling(answers: Answers) -> Answers:
    """The same, wrong exactly where the answer's last number is odd: its tokens tell."""
    texts = [e.response_ids for e in answers.examples]
    return Answers(answers.ids, answers.examples, torch.tensor([float(t[len(t) // 2] % 2) for t in texts]))


def test_the_odds_are_those_after_the_answer(start: Callable[..., Run]) -> None:
    run = start()
    answers = own_answers(run).validation
    found = untrained(run).scores(answers)
    (token,) = {s.token_id for s in help_control(run.tokenizer).spellings}
    double = copy.deepcopy(run.model).double().requires_grad_(False)
    for e, score in zip(answers.examples, found.tolist(), strict=True):
        logits = double(input_ids=torch.tensor([[*e.prompt_ids, *e.response_ids]])).logits[0, -1]
        others = torch.cat([logits[:token], logits[token + 1 :]])
        assert abs(score - float(logits[token] - others.logsumexp(0))) < 1e-4


def test_a_copy_learns_what_its_answers_tell(start: Callable[..., Run]) -> None:
    run = start(task__args="{max_number: 6, max_target: 20}")
    before = {name: value.clone() for name, value in run.model.state_dict().items()}
    answers = own_answers(run)
    training, validation, unseen = (telling(part) for part in answers)
    check = trained(run, training, validation, Recipe(3e-3, 8, 16))
    wrong = (unseen.wrong > 0).tolist()
    assert auc(untrained(run).scores(unseen).double().numpy(), wrong) < 0.7
    assert auc(check.scores(unseen).double().numpy(), wrong) > 0.9
    assert all(torch.equal(value, before[name]) for name, value in run.model.state_dict().items())
    first, again = (trained(run, training, validation, Recipe(3e-3, 1, 16)) for _ in range(2))
    assert torch.equal(again.scores(unseen), first.scores(unseen))


def test_the_best_epoch_is_kept(start: Callable[..., Run]) -> None:
    """Validation problems that say the opposite: every epoch is worse on them than none."""
    run = start()
    training, validation, unseen = own_answers(run)
    training, validation = telling(training), telling(validation)
    opposite = Answers(validation.ids, validation.examples, torch.zeros_like(validation.wrong))
    always = Answers(training.ids, training.examples, torch.ones_like(training.wrong))
    check = trained(run, always, opposite, Recipe(3e-3, 2, 16))
    assert torch.equal(check.scores(unseen), untrained(run).scores(unseen))


def test_rows_of_a_run(start: Callable[..., Run]) -> None:
    run = start()
    ids = [p.id for p in (*run.validation, *heldout(run))]
    for predictions in (self_check.UNTRAINED, self_check.TRAINED):
        rows = predictions.make(run)
        assert [row["id"] for row in rows] == ids
        assert {row["local"] for row in rows} == {0, 1}
