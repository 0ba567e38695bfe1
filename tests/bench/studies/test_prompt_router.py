"""The router that reads the prompt alone: it learns what can be learned, keeps pairs aside, and repeats itself."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import DebertaV2Config, DebertaV2ForSequenceClassification, PreTrainedTokenizerBase

from gapg.batches.batching import Example
from gapg.errors import ConfigError
from gapg.runs.run import Run
from gapg.tasks.base import Prompt
from gapg.tasks.countdown import Countdown
from studies import predictions
from studies.answers import Answers, OwnAnswers
from studies.prompt_router import (
    DEVICE,
    SCRATCH,
    Recipe,
    Score,
    _in_folds,
    auc,
    cross_fitted_router,
    train_prompt_router,
)

QUICK = Recipe(lr=3e-3, epochs=4, batch_size=32, weight_decay=0.01, dropout=0.0)
Pairs = tuple[list[Prompt], list[bool]]


def hard(prompts: Sequence[Prompt]) -> list[bool]:
    """A failure that the prompt tells: a target over 15."""
    return [int(p.id.split(" = ")[1]) > 15 for p in prompts]


@pytest.fixture(scope="module")
def pairs(countdown: Countdown) -> Pairs:
    prompts = list(countdown.prompts("train")[:300])
    return prompts, hard(prompts)


def test_it_learns_what_the_prompt_tells(
    countdown: Countdown, tokenizer: PreTrainedTokenizerBase, pairs: Pairs
) -> None:
    router = train_prompt_router(*pairs, countdown, tokenizer, seed=0, recipe=QUICK)
    assert router.auc > 0.9
    heldout = countdown.prompts("heldout")[:150]
    assert auc(router.scores(heldout), hard(heldout)) > 0.9
    # prompts of three and four numbers score the same padded beside each other and alone
    longer = Countdown(numbers=4, max_number=8, max_target=30, problems=20)
    mixed = [*heldout[:5], *longer.prompts("train")[:5]]
    assert router.scores(mixed) == pytest.approx([float(router.scores([p])[0]) for p in mixed], abs=1e-4)


def test_failures_that_the_prompt_does_not_tell_are_not_learned(
    countdown: Countdown, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Judged on pairs it did not learn from: remembering them would give an AUC of 1."""
    prompts = countdown.prompts("train")[:400]
    chance = np.random.default_rng(0).random(400) < 0.4
    router = train_prompt_router(prompts, chance.tolist(), countdown, tokenizer, seed=0, recipe=QUICK)
    assert 0.3 < router.auc < 0.7
    kept = [prompts[i] for i in router.kept]
    assert router.auc == pytest.approx(auc(router.scores(kept), chance[list(router.kept)].tolist()))
    # a fifth of both kinds
    assert len(set(router.kept)) == round(0.2 * chance.sum()) + round(0.2 * (400 - chance.sum()))
    assert chance[list(router.kept)].sum() == round(0.2 * chance.sum())


def test_a_seed_repeats_and_leaves_the_generator_alone(
    countdown: Countdown, tokenizer: PreTrainedTokenizerBase, pairs: Pairs
) -> None:
    prompts, failed = pairs[0][:60], pairs[1][:60]
    recipe = Recipe(lr=1e-3, epochs=2, batch_size=16, weight_decay=0.01)
    torch.manual_seed(5)
    first = train_prompt_router(prompts, failed, countdown, tokenizer, seed=1, recipe=recipe)
    after = torch.rand(1)
    again, other = (train_prompt_router(prompts, failed, countdown, tokenizer, seed, recipe=recipe) for seed in (1, 2))
    assert first.kept == again.kept != other.kept
    assert first.scores(prompts).tolist() == again.scores(prompts).tolist() != other.scores(prompts).tolist()
    torch.manual_seed(5)
    assert torch.rand(1) == after


def test_an_encoder_from_a_folder(
    countdown: Countdown, tokenizer: PreTrainedTokenizerBase, pairs: Pairs, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    config = DebertaV2Config(
        vocab_size=len(tokenizer), hidden_size=48, num_hidden_layers=1, num_attention_heads=2, intermediate_size=96,
        pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    DebertaV2ForSequenceClassification(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    recipe = Recipe(5e-3, 6, 32, 0.01)
    router = train_prompt_router(*pairs, countdown, tokenizer, seed=0, model=str(tmp_path), recipe=recipe)
    assert type(router.model) is DebertaV2ForSequenceClassification
    assert router.auc > 0.8


def test_what_cannot_be_a_router_is_refused(countdown: Countdown, tokenizer: PreTrainedTokenizerBase) -> None:
    prompts = countdown.prompts("train")
    with pytest.raises(ConfigError, match="no-such-folder"):
        train_prompt_router(prompts[:4], [True] * 4, countdown, tokenizer, seed=0, model="./no-such-folder")
    with pytest.raises(ValueError, match="pairs"):
        train_prompt_router(prompts[:1], [True], countdown, tokenizer, seed=0)
    with pytest.raises(ValueError, match="pairs"):
        train_prompt_router(prompts[:4], [True], countdown, tokenizer, seed=0)


@pytest.mark.parametrize("failed", [[True, False], [True] * 6, [False] * 6])
def test_next_to_nothing_to_learn_from_is_no_crash(
    countdown: Countdown, tokenizer: PreTrainedTokenizerBase, failed: list[bool]
) -> None:
    prompts = countdown.prompts("train")[: len(failed)]
    router = train_prompt_router(prompts, failed, countdown, tokenizer, seed=0, recipe=QUICK)
    assert router.auc == 0.5
    assert np.isfinite(router.scores(prompts)).all()


def test_a_problem_is_scored_by_routers_that_did_not_see_it() -> None:
    """A router that remembers: 1 where it learned the problem, else 0."""
    empty = Answers([], [], torch.zeros(0))
    ids = [f"p{i}" for i in range(23)]
    validation = Answers(ids, [Example([1], [], group=i) for i in range(23)], torch.zeros(23))
    seen: list[str] = []

    def learn(pairs: Answers, label: str) -> Score:
        seen.extend(pairs.ids)
        return lambda others: np.array([float(i in pairs.ids or i == "h0") for i in others.ids])

    heldout = Answers(["h0", "h1"], [Example([1], [])] * 2, torch.zeros(2))
    mine, others = _in_folds(OwnAnswers(empty, validation, heldout), learn, seed=0)
    assert mine.tolist() == [0.0] * 23
    assert sorted(seen) == sorted(ids * 4), "each is learned from in four folds of five"
    assert others == pytest.approx([1.0, 0.0])


@pytest.mark.parametrize("encoder", [SCRATCH, DEVICE])
def test_rows_of_a_run(start: Callable[..., Run], encoder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("studies.prompt_router.SMALL", QUICK)
    run = start()
    before = {name: value.clone() for name, value in run.model.state_dict().items()}
    rows = cross_fitted_router(encoder).make(run)
    others = [p.id for p in predictions.heldout(run)]
    assert [row["id"] for row in rows] == [*(p.id for p in run.validation), *others]
    assert {row["local"] for row in rows} == {0, 1}
    assert len({row["score"] for row in rows}) > 10
    assert all(torch.equal(value, before[name]) for name, value in run.model.state_dict().items())


def test_an_encoder_names_its_predictions(start: Callable[..., Run]) -> None:
    assert cross_fitted_router("some/encoder").name == "prompt-only-some-encoder"
    with pytest.raises(ConfigError, match="no-such-folder"):
        cross_fitted_router("./no-such-folder").make(start())


def test_the_area_by_hand() -> None:
    """Failures at 3 and 1, successes at 2 and 1: of four pairs 3>2, 3>1 are won, 1<2 is lost, 1=1 is half."""
    assert auc(np.array([3.0, 1.0, 2.0, 1.0]), [True, True, False, False]) == pytest.approx(2.5 / 4)
    assert auc(np.array([1.0, 2.0]), [True, True]) == 0.5
    assert auc(np.array([-math.inf, 2.0]), [False, True]) == 1.0


@given(st.lists(st.tuples(st.integers(0, 3), st.booleans()), min_size=2, max_size=25))
def test_the_area_counts_pairs(rows: list[tuple[int, bool]]) -> None:
    score, failed = np.array([float(s) for s, _ in rows]), [f for _, f in rows]
    ups, downs = [s for s, f in rows if f], [s for s, f in rows if not f]
    won = sum((u > d) + (u == d) / 2 for u in ups for d in downs)
    assert auc(score, failed) == pytest.approx(won / (len(ups) * len(downs)) if ups and downs else 0.5)
