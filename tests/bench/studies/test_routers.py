"""Scores of predictions: what each reads, which way it points, and votes on tables counted by hand."""

import json
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gapg.config_sections import RewardConfig
from gapg.evaluation.evaluate import prediction
from gapg.judge import Judge
from gapg.tasks.base import HELP_PHRASE
from gapg.tasks.countdown import Countdown
from gapg_rollout.oracle.solver import SolverOracle
from gapg_rollout.records import Completion
from studies.routers import doubt, reading, self_consistency
from studies.statistics import help_margins

TEXT = reading("maths")


def row(countdown: Countdown, text: str, logprobs: tuple[float, ...], margin: float | None = None) -> dict[str, Any]:
    """What a run keeps of one response to the first held-out problem, through JSON."""
    never = (-1000.0,) * len(logprobs)  # the help phrase's log-odds: the answer's log-probs are the recorded ones
    completion = Completion(tuple(range(len(logprobs))), logprobs, text, "stop", margin, never)
    judge = Judge(countdown, SolverOracle(countdown.solve, accuracy=1.0, wrong="0"), ask_always=True)
    group = judge.submit(countdown.prompts("heldout")[0], [completion]).result()
    line: dict[str, Any] = json.loads(json.dumps(prediction(group, RewardConfig())))
    return line


def test_scores_are_higher_where_the_model_is_less_sure(countdown: Countdown) -> None:
    sure = row(countdown, "<answer> 1 </answer>", (-0.1, -0.2, -0.3), margin=-4.0)
    one_doubt = row(countdown, "<answer> 1 </answer>", (0.0, -1.5, 0.0), margin=2.0)
    no_phrase = row(countdown, "1 + 1", (-0.75,), margin=-math.inf)
    rows = [sure, one_doubt, no_phrase]
    assert doubt(rows, "logprob_mean") == pytest.approx([0.2, 0.5, 0.75])
    assert doubt(rows, "answer_logprob_mean") == pytest.approx([0.2, 0.5, 0.75])
    assert doubt(rows, "answer_logprob_min") == pytest.approx([0.3, 1.5, 0.75])
    assert help_margins(rows).tolist() == [-4.0, 2.0, -math.inf]


def test_predictions_without_the_log_prob_are_refused() -> None:
    rows = [{"logprob_mean": -3.0, "answer_logprob_mean": -0.5, "answer_logprob_min": -0.75}]
    assert doubt(rows, "answer_logprob_mean").tolist() == [0.5]
    with pytest.raises(ValueError, match="no answer_logprob_mean: an older gapg made them; delete"):
        doubt([*rows, {"logprob_mean": -1.0}], "answer_logprob_mean")
    with pytest.raises(ValueError, match="answer_logprob_min is unknown"):
        doubt([*rows, {"answer_logprob_min": None}], "answer_logprob_min")


def sampled(*problems: tuple[str, list[tuple[str, bool]]]) -> list[dict[str, Any]]:
    return [
        {"id": name, "response": text, "outcome": "local_correct" if right else "local_wrong"}
        for name, responses in problems
        for text, right in responses
    ]


def answer(text: str) -> str:
    return f"8 * 3 = 24 <answer> {text} </answer>"


def test_votes_by_hand() -> None:
    one, two, five, six = (answer(text) for text in ("1", "2 + 3", "5", "6"))
    wide, narrow = answer("2  +  3"), "<answer>2 + 3</answer>"
    both = f"{answer('8')} {HELP_PHRASE}"
    rows = sampled(
        # three of five agree, and are right, however they are spaced
        ("a", [(one, False), (two, True), (wide, True), (six, False), (narrow, True)]),
        # all agree and are wrong
        ("b", [(six, False)] * 5),
        # two and two: the first sampled wins
        ("c", [("no answer", False), (five, True), (six, False), (six, False), (five, True)]),
        # an answer counts however few there are; one that calls as well is none
        ("d", [(one, True), ("1 + 1", False), (both, False), ("", False), ("", False)]),
        ("e", [("1 + 1", False)] * 5),
    )
    score, local = self_consistency(rows, TEXT)
    assert score == pytest.approx([0.4, 0.0, 0.6, 0.8, 1.0])
    assert local.tolist() == [1, 0, 1, 1, 0]
    # rows of one problem need not lie together
    score, local = self_consistency([*rows[:2], *rows[5:], *rows[2:5]], TEXT)
    assert score == pytest.approx([0.4, 0.0, 0.6, 0.8, 1.0])
    with pytest.raises(ValueError, match="equally many"):
        self_consistency(rows[:-1], TEXT)


def test_countdown_votes_count_what_answers_compute() -> None:
    """Three spellings of 39 from 3, 8, 15 are one answer; 39 from other numbers, and what is no expression, are not."""
    texts = ["9 * 4 + 3", "( 8 * 3 ) + 15", "8 * 3 +", "15 + 3 * 8", "15+(8*3) = 39"]
    rows = sampled(("a", [(answer(text), i in (1, 3, 4)) for i, text in enumerate(texts)]))
    assert [x.tolist() for x in self_consistency(rows, reading("countdown"))] == [[pytest.approx(0.4)], [1.0]]
    assert [x.tolist() for x in self_consistency(rows, TEXT)] == [[pytest.approx(0.8)], [0.0]]
    (score,), (local,) = self_consistency(sampled(("a", [(answer("8 * +"), False)] * 5)), reading("countdown"))
    assert (score, local) == (1.0, 0.0), "nothing that can be read is no answer"


@given(st.lists(st.lists(st.integers(0, 3), min_size=5, max_size=5), min_size=1, max_size=8), st.integers(0, 3))
def test_a_vote_is_right_with_its_answer(problems: list[list[int]], right: int) -> None:
    """0 stands for no answer; where all samples agree there is nothing to doubt."""
    texts = ["", answer("1"), answer("2"), answer("3")]
    rows = sampled(*((str(i), [(texts[k], k == right > 0) for k in ks]) for i, ks in enumerate(problems)))
    score, local = self_consistency(rows, TEXT)
    for ks, s, was_right in zip(problems, score, local, strict=True):
        most = max(ks.count(k) for k in (1, 2, 3))
        assert s == pytest.approx(1 - most / 5)
        if was_right:
            assert ks.count(right) == most > 0
        elif ks.count(right) == most and right and most:
            assert any(ks.count(k) == most for k in (1, 2, 3) if k != right)
    assert np.isin(local, [0, 1]).all()
