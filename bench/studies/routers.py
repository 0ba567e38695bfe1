"""Who is called first by a router after the answer: scores of predictions, higher where the cloud is needed more."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import numpy as np

from gapg.judge import parse
from gapg.tasks.countdown import computed
from studies.statistics import FloatArray

Answers = Sequence[Mapping[str, Any]]
"""Predictions decoded with help masked."""


def doubt(rows: Answers, key: str) -> FloatArray:
    """[n] a log-prob of the response, negated.

    key: `answer_logprob_mean` or `answer_logprob_min`, the mean or the least token log-prob given that the response
    does not call. `logprob_mean` of a model that can call also holds log(1 - p), with p the chance of the help phrase.
    Raises ValueError where a row has none.
    """
    if any(key not in row for row in rows):
        raise ValueError(
            f"predictions have no {key}: an older gapg made them; delete the products/*.jsonl that lack it and run the"
            " same command again"
        )
    if any(row[key] is None for row in rows):
        raise ValueError(f"{key} is unknown: the help phrase was not steered")
    return -np.array([row[key] for row in rows], dtype=np.float64)


Reading = Callable[[str], Hashable | None]
"""What the text of an answer block says; None: nothing that could be right. Equal ones are one answer."""


def reading(task: str) -> Reading:
    """How votes tell the answers of a task apart.

    countdown: by what they compute (`gapg.tasks.countdown.computed`): `8 * 3 + 15` and `15 + (3 * 8)` are one answer.
    Any other task: by the text, blanks aside.
    """
    return computed if task == "countdown" else lambda answer: " ".join(answer.split())


def self_consistency(rows: Answers, read: Reading) -> tuple[FloatArray, FloatArray]:
    """(score [n], local [n]) of n problems with k sampled responses each, in the order in which the ids first come.

    score: 1 - the share of the k responses that give the most common answer; 1 where none has an answer. local: 1 where
    that answer is right; of equally common ones the first sampled. Raises ValueError where problems have unequally many
    responses.
    """
    samples: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        samples.setdefault(row["id"], []).append(row)
    if len({len(of_problem) for of_problem in samples.values()}) > 1:
        raise ValueError("self-consistency needs equally many responses for each problem")
    votes = [_vote(of_problem, read) for of_problem in samples.values()]
    return np.array([score for score, _ in votes]), np.array([float(right) for _, right in votes])


def _vote(of_problem: Answers, read: Reading) -> tuple[float, bool]:
    texts = [parse(row["response"], row.get("thinking", False)).answer for row in of_problem]
    answers = [None if text is None else read(text) for text in texts]
    counts = Counter(answer for answer in answers if answer is not None)
    if not counts:
        return 1.0, False
    # most_common keeps the order of first appearance among equals
    winner, count = counts.most_common(1)[0]
    return 1 - count / len(answers), of_problem[answers.index(winner)]["outcome"] == "local_correct"
