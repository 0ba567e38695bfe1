"""Probes: what they read, that they learn what the hidden states hold and nothing else, and their rows of a run."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from gapg.batches.batching import Example
from gapg.jsonl import read_jsonl
from gapg.runs.run import Run
from studies import probe
from studies.answers import SAMPLED, Answers, OwnAnswers, own_answers, with_samples
from studies.arms import predictions_path
from studies.predictions import heldout
from studies.probe import ATTENTION, POOLED, Kind, probe_scores, states
from studies.prompt_router import auc

TELLING = 7
"""The token that makes an answer wrong in `made`."""


def made(n: int, seed: int, *, chance: bool = False) -> Answers:
    """Random answers of 3 to 8 tokens; wrong are those with `TELLING` in them, or half of them by chance."""
    rng = np.random.default_rng(seed)
    examples = [
        Example(rng.integers(8, 40, 3).tolist(), rng.integers(8, 40, rng.integers(3, 9)).tolist(), group=i)
        for i in range(n)
    ]
    told = rng.random(n) < 0.5
    if not chance:
        examples = [
            replace(e, response_ids=[TELLING, *e.response_ids[1:]] if t else e.response_ids)
            for e, t in zip(examples, told, strict=True)
        ]
    return Answers([f"p{seed}-{i}" for i in range(n)], examples, torch.from_numpy(told).float())


@pytest.fixture(scope="module")
def model(make_model: Callable[..., PreTrainedModel]) -> PreTrainedModel:
    return make_model(0)


def test_the_states_of_an_answer_are_those_it_has_alone(model: PreTrainedModel) -> None:
    answers = made(5, 0)
    several = states(model, answers.examples)
    for i, e in enumerate(answers.examples):
        out = model.model(input_ids=torch.tensor([[*e.prompt_ids, *e.response_ids]]), output_hidden_states=True)
        alone = torch.cat(out.hidden_states, -1)[0].double()
        torch.testing.assert_close(several.x[i, : len(e)].double(), alone, atol=1e-5, rtol=1e-4)
        assert several.here[i].sum() == len(e)
        of_response = alone[len(e.prompt_ids) - 1 :]
        by_hand = torch.cat([of_response.mean(0), of_response.max(0).values, of_response[-1]])
        torch.testing.assert_close(several.pooled()[0][i].double(), by_hand, atol=1e-5, rtol=1e-4)
    assert model.training, "as it was"


@pytest.mark.parametrize("kind", [POOLED, ATTENTION])
def test_a_probe_learns_what_an_answer_tells_and_repeats_itself(model: PreTrainedModel, kind: Kind) -> None:
    answers = OwnAnswers(made(400, 1), made(100, 2), made(200, 3))
    scores = probe_scores(kind, model, answers, seed=0, nets=1, epochs=30)[1]
    assert auc(scores.double().numpy(), (answers.heldout.wrong > 0).tolist()) > 0.95
    torch.manual_seed(5)
    first = probe_scores(kind, model, answers, seed=0, nets=2, epochs=1)
    after = torch.rand(1)
    again, other = (probe_scores(kind, model, answers, seed=s, nets=2, epochs=1) for s in (0, 1))
    assert torch.equal(first[1], again[1]) and not torch.equal(first[1], other[1])
    torch.manual_seed(5)
    assert torch.rand(1) == after


def test_failures_that_answers_do_not_tell_are_not_learned(model: PreTrainedModel) -> None:
    answers = OwnAnswers(*(made(n, seed, chance=True) for n, seed in ((300, 1), (100, 2), (400, 3))))
    scores = probe_scores(ATTENTION, model, answers, seed=0, nets=1, epochs=10)[1]
    assert 0.4 < auc(scores.double().numpy(), (answers.heldout.wrong > 0).tolist()) < 0.6


def test_rows_of_a_run(start: Callable[..., Run]) -> None:
    run = start()
    rows = probe.PROBE.make(run)
    answers = own_answers(run)
    for split, prompts, of_split in (
        ("validation", run.validation, answers.validation), ("heldout", heldout(run), answers.heldout),
    ):  # fmt: skip
        mine = [row for row in rows if row["split"] == split]
        assert [row["id"] for row in mine] == [p.id for p in prompts] == of_split.ids
        assert [row["local"] for row in mine] == [1 - w for w in of_split.wrong.tolist()]
        assert np.isfinite([row["score"] for row in mine]).all()
    assert {p.id for p in run.queue.prompts} == set(answers.training.ids)
    assert not set(answers.training.ids) & {*answers.validation.ids, *answers.heldout.ids}
    more = with_samples(run, answers)
    n = len(answers.training.ids)
    assert more.training.ids == answers.training.ids * (1 + SAMPLED), "the greedy answers and then the sampled ones"
    assert [e.group for e in more.training.examples] == list(range(n * (1 + SAMPLED)))
    assert more.training.wrong[:n].tolist() == answers.training.wrong.tolist()
    assert more.training.wrong[n : 2 * n].tolist() != more.training.wrong[2 * n :].tolist()
    assert more[1:] == answers[1:]
    texts = {row["id"]: row["response"] for row in read_jsonl(predictions_path(run.folder, "heldout-masked"))}
    written = [run.tokenizer.decode(list(e.response_ids)) for e in answers.heldout.examples]
    assert written == [texts[i] for i in answers.heldout.ids], "the answers are judged token by token"
