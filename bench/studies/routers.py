"""Who is called first by a router after the answer: scores of predictions, higher where the cloud is needed more."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from gapg.judge import parse
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


def self_consistency(rows: Answers) -> tuple[FloatArray, FloatArray]:
    """(score [n], local [n]) of n problems with k sampled responses each, in the order in which the ids first come.

    score: 1 - the share of the k responses that give the most common answer (the text in the answer block, blanks
    aside); 1 where none has an answer. local: 1 where that answer is right; of equally common ones the first sampled.
    Answers are told apart by their text: two ways to write one value are two answers. Raises ValueError where problems
    have unequally many responses.
    """
    samples: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        samples.setdefault(row["id"], []).append(row)
    if len({len(of_problem) for of_problem in samples.values()}) > 1:
        raise ValueError("self-consistency needs equally many responses for each problem")
    votes = [_vote(of_problem) for of_problem in samples.values()]
    return np.array([score for score, _ in votes]), np.array([float(right) for _, right in votes])


def _vote(of_problem: Answers) -> tuple[float, bool]:
    answers = [parse(row["response"], row.get("thinking", False)).answer for row in of_problem]
    texts = [None if answer is None else " ".join(answer.split()) for answer in answers]
    counts = Counter(text for text in texts if text is not None)
    if not counts:
        return 1.0, False
    # most_common keeps the order of first appearance among equals
    winner, count = counts.most_common(1)[0]
    return 1 - count / len(texts), of_problem[texts.index(winner)]["outcome"] == "local_correct"
